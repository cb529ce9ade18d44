"""What `accelerate launch` asked for, read from the environment variables that it sets."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bigtrain.config.recipe import EngineConfig
from bigtrain.engine.plan import Kind, Launcher, Offload
from bigtrain.errors import RequestError

_KIND_OF_STAGE: dict[int, Kind] = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}
_Bf16 = Literal["bf16"] | None


def read_launcher(environ: Mapping[str, str]) -> Launcher:
    """The launcher's settings, all None without one.

    Raises RequestError for engines that bigtrain does not have, and for a DeepSpeed configuration
    file that cannot be used.
    """
    if _is_true(environ, "ACCELERATE_USE_FSDP"):
        raise RequestError(
            "accelerate launch asks for FSDP",
            "DeepSpeed or plain data parallel",
            "leave --use_fsdp out",
        )
    mixed_precision = environ.get("ACCELERATE_MIXED_PRECISION")
    if mixed_precision in ("fp16", "fp8"):
        raise RequestError(
            f"accelerate launch asks for {mixed_precision}",
            "bf16 or no mixed precision",
            "--mixed_precision bf16",
        )
    precision: _Bf16 = "bf16" if mixed_precision == "bf16" else None
    if not _is_true(environ, "ACCELERATE_USE_DEEPSPEED"):
        source = "accelerate launch --mixed_precision" if precision else ""
        return Launcher(precision=precision, source=source)
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if path in ("", "none"):
        return _from_options(environ, precision)
    return _from_deepspeed_file(Path(path), precision)


def is_first_on_machine(environ: Mapping[str, str]) -> bool:
    """Whether this rank speaks for its machine: by the launcher's count, which an engine may hide
    from libraries that take it for a device's number.
    """
    launched_as = environ.get("BIGTRAIN_LOCAL_RANK") or environ.get("LOCAL_RANK", "0")
    return launched_as == "0"


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("true", "1")


def _from_options(environ: Mapping[str, str], precision: _Bf16) -> Launcher:
    """DeepSpeed as `accelerate launch` configures it by options, without a file."""
    stage = int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    source = f"accelerate launch (ZeRO stage {stage})"
    offload = _offload(
        params=environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none"),
        optimizer=environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none"),
        source=source,
    )
    return Launcher(_KIND_OF_STAGE.get(stage), offload, precision, None, source)


def _from_deepspeed_file(path: Path, precision: _Bf16) -> Launcher:
    """DeepSpeed as a configuration file has it."""
    source = str(path)
    config = _read_deepspeed_file(path)
    zero = config["zero_optimization"]
    offload = _offload(
        params=zero.get("offload_param", {}).get("device", "none"),
        optimizer=zero.get("offload_optimizer", {}).get("device", "none"),
        source=source,
    )
    if config.get("fp16", {}).get("enabled") is True:
        raise RequestError(f"{source}: asks for fp16", "bf16 or fp32", '"bf16": {"enabled": true}')
    if config.get("bf16", {}).get("enabled") is True:
        precision = "bf16"
    return Launcher(_KIND_OF_STAGE[zero.get("stage", 0)], offload, precision, config, source)


def _read_deepspeed_file(path: Path) -> dict[str, Any]:
    """The file's content, with a section zero_optimization whose stage is a known one."""
    try:
        config = json.loads(path.read_text())
        zero = config.setdefault("zero_optimization", {})
        _KIND_OF_STAGE[zero.get("stage", 0)]
    except (OSError, ValueError, KeyError, AttributeError) as problem:
        raise RequestError(
            f"{path}: not a usable DeepSpeed configuration ({problem})",
            "JSON with zero_optimization.stage 1, 2 or 3",
        ) from None
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise RequestError(
                f"{path}: has a section {section}",
                "none: the recipe's optim decides",
                f"remove {section}",
            )
    return dict(config)


def _offload(params: str, optimizer: str, source: str) -> Offload:
    """engine.offload for the devices that parameters and optimizer state are offloaded to."""
    if "nvme" in (params, optimizer):
        raise RequestError(
            f"{source}: asks for NVMe offload",
            "offload to cpu",
            '--offload_optimizer_device cpu, or "device": "cpu"',
        )
    if params == "cpu":
        return "params"
    if optimizer == "cpu":
        return "optimizer"
    return "none"


def refuse_contradictions(
    launcher: Launcher, engine: EngineConfig, origins: Mapping[str, str], environ: Mapping[str, str]
) -> None:
    """Raises RequestError, naming both sides, when recipe and launcher ask for different things."""
    # Offload has no `auto`: the recipe asks for it only where somebody has set it.
    offload_is_default = origins.get("engine.offload") == "default"
    pairs = [
        ("kind", engine.kind, launcher.kind),
        ("offload", "auto" if offload_is_default else engine.offload, launcher.offload),
        ("precision", engine.precision, launcher.precision),
    ]
    for key, in_recipe, from_launcher in pairs:
        if from_launcher is not None and in_recipe not in ("auto", from_launcher):
            origin = origins.get(f"engine.{key}", "recipe")
            raise RequestError(
                f"engine.{key} is {in_recipe} ({origin}), "
                f"but {launcher.source} says {from_launcher}",
                "one of the two, or both the same",
                f"engine.{key}={from_launcher}, or another launcher configuration",
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
