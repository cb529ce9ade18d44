"""A profile of three steps, on request: a file PROFILE in the run directory, or the recipe's."""

import gzip
import os
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from bigtrain.training.context import RankRequests, RunningProfile, TrainContext

_STEPS = 3  # fewer where an evaluation or the end comes first
_DEAREST = 3  # operations that the event names
_ROWS = 40  # of the text's table


def begin_profile_if_asked(ctx: TrainContext) -> None:
    """Profile the steps that come now, on rank 0 alone, where somebody asks for it."""
    ctx.enter("numbers")  # on every rank, as all phases
    if not ctx.engine.main or ctx.profile is not None:
        return
    first = ctx.state.step + 1
    is_requested = ctx.stop.profile_requested()
    if first not in ctx.recipe.train.profile_steps and not is_requested:
        return
    # torch's library prints a line at every start.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    profile = RunningProfile(first, torch.profiler.profile(), is_requested)
    try:
        profile.profiler.start()
        ctx.profile = profile
    except Exception as problem:  # whatever it is, training continues
        _report_failure(ctx, profile, problem)


def end_profile_if_done(ctx: TrainContext, requests: RankRequests) -> None:
    """After a step: write the profile under way if it has its three steps, or no more follow."""
    profile = ctx.profile
    if profile is None:
        return
    ctx.enter("profile")
    profile.steps += 1
    evaluates = ctx.is_due(ctx.recipe.train.eval_every)
    if profile.steps < _STEPS and not evaluates and not requests.stop:
        return
    ctx.profile = None
    try:
        profile.profiler.stop()
        _write(ctx, profile)
    except Exception as problem:  # a full disk, above all
        _report_failure(ctx, profile, problem)
        return
    if profile.is_requested:
        ctx.stop.acknowledge_profile()


def _report_failure(ctx: TrainContext, profile: RunningProfile, problem: Exception) -> None:
    # First, because the disk may be full, and the event has to be written.
    for path in ctx.checkpoints.run.logs.glob(f"profile-step-{profile.first:08d}.*"):
        path.unlink(missing_ok=True)
    if profile.is_requested:
        ctx.stop.acknowledge_profile()
    reason = str(problem) or type(problem).__name__
    ctx.tracker.event(ctx.state.step, "profile_failed", reason=reason)


def _write(ctx: TrainContext, profile: RunningProfile) -> None:
    """The trace, a text beside it, and an event. Raises OSError, or what torch raises."""
    logs = ctx.checkpoints.run.logs
    logs.mkdir(exist_ok=True)
    trace = logs / f"profile-step-{profile.first:08d}.json.gz"
    _export(profile.profiler, trace)
    averages = profile.profiler.key_averages()
    clock = "cuda" if ctx.engine.device.type == "cuda" else "cpu"
    key = "self_device_time_total" if clock == "cuda" else "self_cpu_time_total"
    dearest = _dearest(averages, key)
    table = averages.table(sort_by=key, row_limit=_ROWS)
    text = f"{profile.steps} steps from step {profile.first} on, rank 0, time on the {clock}\n"
    text += f"dearest: {dearest}\n\n{table}\n"
    trace.with_name(trace.name.replace(".json.gz", ".txt")).write_text(text)
    ctx.tracker.event(ctx.state.step, "profile", path=str(trace), dearest=dearest)


def _export(profiler: torch.profiler.profile, trace: Path) -> None:
    """The trace as a whole, or an OSError: torch only prints that it could not write."""
    building = trace.with_name(f".{trace.name}")
    try:
        profiler.export_chrome_trace(str(building))
        with gzip.open(building) as file:
            if not file.read().rstrip().endswith(b"}"):
                raise OSError("the trace was cut short: no space left for temporary files")
        building.replace(trace)
    finally:
        building.unlink(missing_ok=True)


def _dearest(averages: Any, key: str) -> str:
    """The operations that take most of the time themselves, each with its share."""
    seconds = {op.key: getattr(op, key) for op in averages if op.device_type == DeviceType.CPU}
    total = max(sum(seconds.values()), 1e-9)
    names = sorted(seconds, key=lambda name: -seconds[name])[:_DEAREST]
    return ", ".join(f"{name} {seconds[name] / total:.0%}" for name in names)
