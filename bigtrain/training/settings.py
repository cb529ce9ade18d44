"""Every setting in force, with its value and origin."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.console import Console

from bigtrain.config.loader import LoadedRecipe, flatten
from bigtrain.config.recipe import OptimConfig
from bigtrain.config.versions import installed_versions
from bigtrain.engine.base import Engine
from bigtrain.engine.plan import CORES_PER_GPU, Plan
from bigtrain.engine.runtime import Device, cores_per_rank
from bigtrain.models.flops import peak_flops
from bigtrain.runs.directory import RunDir
from bigtrain.tasks.base import Task
from bigtrain.training.parameter_groups import groups_in_force


class Setting(TypedDict):
    """A value and who decided it, as effective.json has them."""

    value: Any
    origin: str


Settings = dict[str, Setting]


def with_origin(origin: str, values: dict[str, Any]) -> Settings:
    """Settings that all have one origin."""
    return {key: {"value": value, "origin": origin} for key, value in values.items()}


def settings_in_force(
    loaded: LoadedRecipe,
    plan: Plan,
    plan_origins: dict[str, str],
    ds_config: dict[str, Any],
    ds_source: str,
) -> Settings:
    """The recipe's settings, and what was decided beyond it.

    What the plan decided replaces the recipe's `auto`. `ds_source`: where the launcher has its
    DeepSpeed settings from.
    """
    settings: Settings = {}
    for key, value in flatten(loaded.recipe.model_dump(mode="json")).items():
        settings[key] = {"value": value, "origin": loaded.origins.get(key, "default")}
    planned = asdict(plan)
    del planned["ramp"]  # the recipe's engine.global_batch, by step
    for name, value in planned.items():
        key = "train.steps" if name == "steps" else f"engine.{name}"
        known = key in settings and settings[key]["value"] == value
        if key in plan_origins or not known:
            default_origin = "launcher" if name == "world_size" else "plan"
            origin = plan_origins.get(key, default_origin)
            settings[key] = {"value": value, "origin": origin}
    settings |= with_origin("plan", {"engine.accumulation": plan.accumulation})
    if ds_config:
        from_file = ds_source.endswith(".json")
        origin = ds_source if from_file else f"ds_configs for {plan.kind}"
        settings |= with_origin(origin, flatten(ds_config, "deepspeed"))
    settings |= with_origin("installed", flatten(installed_versions(), "versions"))
    threads = {"threads": torch.get_num_threads()}
    return settings | with_origin("OMP_NUM_THREADS or the machine", threads)


def model_facts(model: torch.nn.Module, flops: float, engine: Engine, device: Device) -> Settings:
    """The model's size, and what model FLOPs utilisation (MFU) is computed from. A collective.

    `flops`: of a forward pass, per target. A backward pass counts as two forward passes; what is
    computed again for activation checkpointing does not count (PaLM, arXiv 2204.02311, appendix B).
    """
    parameters = sum(engine.num_elements(p) for p in model.parameters())
    facts = with_origin("model", {"parameters": parameters})
    batch_norms = batch_norm_layers(model)
    if batch_norms:
        # The loss then depends on how the global batch is cut.
        origin = f"model ({batch_norms})"
        facts |= with_origin(origin, {"normalisation": "depends on the micro-batch"})
    peaks = engine.gather(peak_flops(engine.device, device.bf16_is_fast))
    facts |= with_origin("model (counted)", {"flops_per_unit": 3 * flops})
    return facts | with_origin("this machine (data sheet or measured)", {"peak_flops": sum(peaks)})


def loss_setting(without_logits: bool) -> Settings:
    """How the loss is computed, where it is not from logits."""
    if not without_logits:
        return {}
    origin = "model (the same as from logits)"
    return with_origin(origin, {"loss": "in the output layer, without logits"})


def group_settings(engine: Engine, optim: OptimConfig) -> Settings:
    """The groups of parameters, read back from the engine, if the recipe asks for any.

    Raises TrainingFailed where the engine has others.
    """
    groups = groups_in_force(engine, optim)
    if not optim.groups:
        return {}
    return with_origin("engine (read back)", {"optim.groups_in_force": groups})


def batch_norm_layers(model: torch.nn.Module) -> str:
    """The names of the model's classes of batch normalisation; empty: it has none."""
    class_names = {type(module).__name__ for module in model.modules()}
    return ", ".join(sorted(name for name in class_names if "BatchNorm" in name))


def provenance() -> dict[str, Any]:
    """Slurm's job, and the git commit of the folder that the run was started in."""
    facts: dict[str, Any] = {}
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        facts["slurm.job"] = job
    # No git, or no repository, or a slow disk.
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = _git("rev-parse", "HEAD").strip()
        changes = _git("status", "--porcelain", "-uno")
        facts["git.commit"] = commit
        facts["git.dirty"] = bool(changes)
    return facts


def _git(*arguments: str) -> str:
    """What git prints. Raises OSError or subprocess.SubprocessError if it fails."""
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, timeout=5
    )
    return done.stdout


def announce(
    screen: Console, run: RunDir, settings: Settings, task: Task, checkpoint: Path | None
) -> None:
    """Print the settings in force, grouped by their origin; then what is about to happen."""
    groups: dict[str, list[str]] = {}
    for key, setting in settings.items():
        value = setting["value"]
        shown = f"{value:.2e}" if key == "peak_flops" else value
        # An opening bracket begins markup.
        text = f"{key}={shown}".replace("[", r"\[")
        groups.setdefault(_group(setting["origin"]), []).append(text)
    for group, texts in groups.items():
        screen.print(f"[bold]{group}[/]: " + "  ".join(texts), highlight=False)
    global_batch = settings["engine.global_batch"]["value"]
    ranks = settings["engine.world_size"]["value"]
    for note in (*task.data.notes, *_unused(global_batch, ranks)):
        screen.print(f"note: {note}", highlight=False)
    begin = f"resuming from {checkpoint.name}" if checkpoint else "starting"
    screen.print(
        f"{begin}: {run.path}  {settings['parameters']['value']:,} parameters, "
        f"{len(task.data.train):,} training and {len(task.data.eval):,} held-out samples",
        highlight=False,
    )


def _group(origin: str) -> str:
    """An origin without its place or reason: `recipe FILE:LINE` is of `recipe`."""
    if origin.startswith(("recipe ", "override ")):
        return origin.split(" ", maxsplit=1)[0]
    return origin.split(" (", maxsplit=1)[0]


def _unused(global_batch: int, ranks: int) -> Iterator[str]:
    """Notes about time of ranks and GPUs that this run does not use, and about too few cores."""
    idle = -global_batch % ranks
    if idle:
        lost = idle / (global_batch + idle)
        yield (
            f"{global_batch} samples over {ranks} ranks are uneven: exact, but {lost:.1%} of the"
            " ranks' time is idle"
        )
    gpus = torch.cuda.device_count()
    cores = cores_per_rank()
    if gpus and cores < CORES_PER_GPU:
        yield f"a GPU waits for its host where a rank has {cores} cores: slurm.cpus_per_gpu=8"
    if ranks == 1 and gpus > 1:
        command = f"torchrun --nproc_per_node {gpus} -m bigtrain train …"
        yield f"this is one process, and {gpus} GPUs are visible: {command} uses them all"
