"""What a launcher (accelerate launch) has asked for, read from the environment it sets."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bigtrain.config.recipe import EngineConfig
from bigtrain.engine.plan import Kind, Launcher, Offload
from bigtrain.errors import RequestError

_STAGE: dict[int, Kind] = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}


def read_launcher(environ: Mapping[str, str]) -> Launcher:
    """Raises RequestError for engines bigtrain does not have and for a DeepSpeed file that cannot be used."""
    if environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        raise RequestError(
            "accelerate launch asks for FSDP",
            "DeepSpeed or plain data parallel",
            "leave --use_fsdp out",
        )
    if environ.get("ACCELERATE_MIXED_PRECISION") in ("fp16", "fp8"):
        found = environ["ACCELERATE_MIXED_PRECISION"]
        raise RequestError(
            f"accelerate launch asks for {found}",
            "bf16 or no mixed precision",
            "--mixed_precision bf16",
        )
    precision: Literal["bf16"] | None = (
        "bf16" if environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" else None
    )
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return Launcher(
            precision=precision, source="accelerate launch --mixed_precision" if precision else ""
        )
    path, parts = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""), ("param", "optimizer")
    if path and path != "none":
        config, source = _read_deepspeed_file(Path(path)), path
        zero = config["zero_optimization"]
        stage, devices = (
            zero.get("stage", 0),
            [zero.get(f"offload_{part}", {}).get("device", "none") for part in parts],
        )
    else:
        config, stage = None, int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        source = f"accelerate launch (ZeRO stage {stage})"
        devices = [
            environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
            for part in parts
        ]
    said = config or {}
    if "nvme" in devices:
        raise RequestError(
            f"{source}: asks for NVMe offload",
            "offload to cpu",
            '--offload_optimizer_device cpu, or "device": "cpu"',
        )
    if said.get("fp16", {}).get("enabled") is True:
        raise RequestError(f"{source}: asks for fp16", "bf16 or fp32", '"bf16": {"enabled": true}')
    offload: Offload = (
        "params" if devices[0] == "cpu" else "optimizer" if devices[1] == "cpu" else "none"
    )
    if said.get("bf16", {}).get("enabled") is True:
        precision = "bf16"
    return Launcher(_STAGE.get(stage), offload, precision, config, source)


def _read_deepspeed_file(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        _STAGE[config.setdefault("zero_optimization", {}).get("stage", 0)]
    except (OSError, ValueError, KeyError, AttributeError) as problem:
        raise RequestError(
            f"{path}: not a usable DeepSpeed configuration ({problem})",
            "JSON with zero_optimization.stage 1, 2 or 3",
        ) from None
    if extra := [key for key in ("optimizer", "scheduler") if key in config]:
        raise RequestError(
            f"{path}: has a section {extra[0]}",
            "none: the recipe's optim decides",
            f"remove {extra[0]}",
        )
    return dict(config)


def refuse_contradictions(
    launcher: Launcher, engine: EngineConfig, origins: Mapping[str, str], environ: Mapping[str, str]
) -> None:
    """Raises RequestError naming both sides when recipe and launcher ask for different things."""
    pairs = [
        ("kind", engine.kind, launcher.kind),
        (
            "offload",
            None if origins.get("engine.offload") == "default" else engine.offload,
            launcher.offload,
        ),
        ("precision", engine.precision, launcher.precision),
    ]
    for key, asked, launched in pairs:
        if launched is not None and asked not in (None, "auto", launched):
            raise RequestError(
                f"engine.{key} is {asked} ({origins.get('engine.' + key, 'recipe')}), but {launcher.source} says {launched}",
                "one of the two, or both the same",
                f"engine.{key}={launched}, or another launcher configuration",
            )
    accumulation = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise RequestError(
            f"accelerate launch asks for {accumulation} accumulation steps",
            "engine.global_batch and engine.micro_batch in the recipe",
            "leave --gradient_accumulation_steps out",
        )
    if launcher.kind == "ddp" and launcher.config is not None:
        raise RequestError(
            f"{launcher.source}: ZeRO stage 0",
            "stage 1, 2 or 3 (plain data parallel needs no DeepSpeed)",
        )
