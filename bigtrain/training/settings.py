"""Every setting in force, with its value and origin."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from bigtrain.config.loader import LoadedRecipe, flatten
from bigtrain.config.versions import installed_versions
from bigtrain.engine.base import Engine
from bigtrain.engine.flops import peak_flops
from bigtrain.engine.plan import Plan
from bigtrain.engine.runtime import Device
from bigtrain.runs.directory import RunDir
from bigtrain.tasks.base import Task

Settings = dict[str, dict[str, Any]]


def set_by(origin: str, values: dict[str, Any]) -> Settings:
    return {key: {"value": value, "origin": origin} for key, value in values.items()}


def facts_of(model: torch.nn.Module, flops: float, ranks: Engine, device: Device) -> Settings:
    """Its size; whether its loss depends on how the global batch is cut, as with BatchNorm; and what model FLOPs
    utilisation is made of: operations per unit of weight, and what all ranks' devices could do.

    A backward pass counts two forward passes; what is computed again for activation checkpointing does not count
    (PaLM, arXiv 2204.02311, appendix B).
    """
    facts = set_by(
        "model", {"parameters": sum(ranks.num_elements(p) for p in model.parameters())}
    )
    if found := sorted(
        {type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__}
    ):
        facts |= set_by(
            f"model ({', '.join(found)})", {"normalisation": "depends on the micro-batch"}
        )
    peaks = ranks.gather(peak_flops(ranks.device, device.bf16_is_fast))
    facts |= set_by("model (counted)", {"flops_per_unit": 3 * flops})
    return facts | set_by("this machine (data sheet or measured)", {"peak_flops": sum(peaks)})


def settings_in_force(
    loaded: LoadedRecipe,
    plan: Plan,
    planned: dict[str, str],
    ds_config: dict[str, Any],
    source: str,
) -> Settings:
    """Every setting in force with its value and origin; what the plan decided replaces the recipe's `auto`."""
    values = flatten(loaded.recipe.model_dump(mode="json"))
    settings = {
        key: {"value": value, "origin": loaded.origins.get(key, "default")}
        for key, value in values.items()
    }
    for name, value in asdict(plan).items():
        key = f"engine.{name}"
        if key in planned or key not in settings or settings[key]["value"] != value:
            settings[key] = {
                "value": value,
                "origin": planned.get(key, "launcher" if name == "world_size" else "plan"),
            }
    settings |= set_by("plan", {"engine.accumulation": plan.accumulation})
    origin = source if source.endswith(".json") else f"ds_configs for {plan.kind}"
    settings |= set_by(origin, flatten(ds_config, "deepspeed") if ds_config else {})
    settings |= set_by(
        "installed", {f"versions.{name}": version for name, version in installed_versions().items()}
    )
    return settings | set_by("OMP_NUM_THREADS or the machine", {"threads": torch.get_num_threads()})


def provenance() -> dict[str, Any]:
    """The commit of the folder that the run was started in, whether it was changed since; Slurm's job."""
    found: dict[str, Any] = {"slurm.job": job} if (job := os.environ.get("SLURM_JOB_ID")) else {}
    with contextlib.suppress(
        OSError, subprocess.SubprocessError
    ):  # no git, or no repository, or a slow disk
        ask = lambda *words: (
            subprocess.run(
                ["git", *words], capture_output=True, text=True, check=True, timeout=5
            ).stdout
        )  # noqa: E731
        found |= {
            "git.commit": ask("rev-parse", "HEAD").strip(),
            "git.dirty": bool(ask("status", "--porcelain", "-uno")),
        }
    return found


def announce(screen: Console, run: RunDir, settings: Settings, task: Task, path: Any) -> None:
    """The settings in force, grouped by who set them; then what is about to happen."""
    groups: dict[str, list[str]] = {}
    for key, setting in settings.items():
        groups.setdefault(setting["origin"].split(":")[0].split(" ")[0], []).append(
            f"{key}={setting['value']}"
        )
    for origin, texts in groups.items():
        screen.print(
            f"[bold]{origin}[/]: " + "  ".join(text.replace("[", r"\[") for text in texts),
            highlight=False,
        )
    ranks = settings["engine.world_size"]["value"]
    for note in (*task.data.notes, *_idle(settings["engine.global_batch"]["value"], ranks)):
        screen.print(f"note: {note}", highlight=False)
    begin = f"going on from {path.name}" if path else "starting"
    screen.print(
        f"{begin}: {run.path}  {settings['parameters']['value']:,} parameters, "
        f"{len(task.data.train):,} training and {len(task.data.eval):,} held-out samples",
        highlight=False,
    )


def _idle(global_batch: int, ranks: int) -> Iterator[str]:
    """What is left unused: time of the ranks with one sample less than others; GPUs, where one process was started bare."""
    if idle := -global_batch % ranks:
        lost = idle / (global_batch + idle)
        yield f"{global_batch} samples over {ranks} ranks are uneven: exact, but {lost:.1%} of the ranks' time is idle"
    if ranks == 1 < (count := torch.cuda.device_count()):
        every = f"torchrun --nproc_per_node {count} -m bigtrain train … uses them all"
        yield f"this is one process, and {count} GPUs are visible: {every}"
