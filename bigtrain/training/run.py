"""What happens when a recipe is run: read from top to bottom."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bigtrain.checkpoint.format import committed_checkpoints, verify_checkpoint
from bigtrain.checkpoint.reader import load_checkpoint, newest_checkpoint
from bigtrain.checkpoint.state import TrainState
from bigtrain.checkpoint.writer import CheckpointWriter
from bigtrain.config.loader import LoadedRecipe, load_recipe, to_yaml
from bigtrain.config.resume_policy import diff_recipes
from bigtrain.data.datasets import prepare
from bigtrain.data.loader import train_batches
from bigtrain.engine.base import Engine
from bigtrain.engine.deepspeed_config import render_deepspeed_config
from bigtrain.engine.launcher import read_launcher, refuse_contradictions
from bigtrain.engine.plan import make_plan
from bigtrain.engine.runtime import find_device, world_from_environment
from bigtrain.engine.start import start_engine
from bigtrain.errors import RequestError, StoppedEarly, TrainingFailed
from bigtrain.models.build import build_model
from bigtrain.models.export import export_model
from bigtrain.runs.directory import RunDir, run_directory, write_atomic
from bigtrain.runs.lock import release_ownership, take_ownership
from bigtrain.runs.metrics_file import MetricsFile, read_metrics
from bigtrain.tasks.base import Task
from bigtrain.tasks.registry import TASKS
from bigtrain.tracking.accelerate import AccelerateTracker, start_accelerate_tracker
from bigtrain.tracking.base import TrackerGroup
from bigtrain.tracking.library_logs import keep_warnings
from bigtrain.tracking.terminal import Terminal
from bigtrain.tracking.wandb import WandB
from bigtrain.tracking.wandb_sync import logged_in
from bigtrain.training.context import TrainContext
from bigtrain.training.endings import lost_a_peer
from bigtrain.training.evaluation import evaluate
from bigtrain.training.loop import train
from bigtrain.training.optimizers import make_optimizer
from bigtrain.training.preflight import refuse_other_ranks, try_forward
from bigtrain.training.settings import (
    Settings,
    announce,
    facts_of,
    provenance,
    set_by,
    settings_in_force,
)
from bigtrain.training.signals import StopFlag
from bigtrain.training.watchdog import Watchdog


def run_recipe(
    loaded: LoadedRecipe, screen: Console, fresh: bool = False, allow_change: Sequence[str] = ()
) -> dict[str, Any]:
    """Train what the recipe says, going on from the run's newest checkpoint; returns the run's summary."""
    recipe = loaded.recipe
    begun = run_directory(recipe.name)
    goes_on = not fresh and begun.recipe.is_file() and committed_checkpoints(begun)
    changed = (
        diff_recipes(load_recipe(str(begun.recipe)).recipe, recipe, list(allow_change))
        if goes_on
        else {}
    )
    if recipe.track.wandb == "online" and not logged_in():
        raise RequestError(
            "track.wandb is online, but W&B has no key",
            "a login",
            "wandb login, or track.wandb=offline",
        )
    if missing := [kind for kind in recipe.track.extra if importlib.util.find_spec(kind) is None]:
        raise RequestError(
            f"track.extra has {missing[0]}, which is not installed",
            "its extra",
            f"pip install {missing[0]}",
        )
    device = find_device(recipe.engine.device)
    launcher = read_launcher(os.environ)
    refuse_contradictions(launcher, recipe.engine, loaded.origins, os.environ)
    prepared = prepare(recipe)
    world_size = world_from_environment()[1]
    plan, planned = make_plan(
        recipe.engine,
        world_size,
        len(prepared.train),
        prepared.tokens_per_sample,
        device.bf16_is_fast,
        launcher,
    )
    ds_config = (
        {}
        if plan.kind == "ddp"
        else render_deepspeed_config(plan, recipe.optim.clip_norm, launcher)
    )
    task = TASKS[recipe.task](recipe.task, prepared, recipe.train.label_smoothing)
    ranks = start_engine(plan, device, ds_config, recipe.optim.clip_norm)
    watch = Watchdog(ranks, recipe.train.hang_timeout)
    try:
        model = build_model(recipe, prepared, ranks.shard)
        ranks.prepare(model, lambda module: make_optimizer(module, recipe.optim))
        refuse_other_ranks(ranks, task)
        flops = try_forward(ranks, task)
        settings = settings_in_force(loaded, plan, planned, ds_config, launcher.source) | facts_of(
            model, flops, ranks, device
        )
        run = _open_run(loaded.recipe.name, ranks, fresh)
        try:
            return _train(loaded, run, ranks, watch, task, settings, changed, screen)
        finally:
            if ranks.main:
                release_ownership(run)
    finally:
        watch.close()
        ranks.close()


def _train(
    loaded: LoadedRecipe,
    run: RunDir,
    ranks: Engine,
    watch: Watchdog,
    task: Task,
    settings: Settings,
    changed: dict[str, str],
    screen: Console,
) -> dict[str, Any]:
    recipe, prepared, stop = loaded.recipe, task.data, StopFlag(run, ranks.main)
    path, lines = newest_checkpoint(ranks, run)
    state, moved = (
        load_checkpoint(ranks, path) if path else (TrainState(data_size=len(prepared.train)), "")
    )
    if state.data_size != len(prepared.train):
        raise RequestError(
            f"there are {len(prepared.train):,} training samples, and there were {state.data_size:,} when this run began",
            "the same data, or its order is another",
            "the data as it was, or --fresh",
        )
    if ranks.gather(ranks.main and _gains_nothing(run, state.step))[0]:
        raise TrainingFailed(
            f"Slurm has started {run.path} {_FRUITLESS} times at step {state.step}, and no checkpoint came of it",
            "at least one checkpoint between two restarts",
            "the job's output says why it ends; or a smaller train.checkpoint_every",
        )
    tracker = TrackerGroup()
    keep_warnings(run, ranks.rank)
    if ranks.main:  # only now: a start that was refused must leave the run as it was
        settings |= set_by("where it runs", provenance())
        write_atomic(run.recipe, to_yaml(recipe))
        run.write_json(run.effective, settings)
        announce(screen, run, settings, task, path)
        tracker = _tracker(loaded, run, task, settings, screen, state)
    if ranks.main and (
        verdict := os.environ.get("BIGTRAIN_VERDICT")
    ):  # slurm/train.sbatch counts lives that do not get here
        Path(verdict).write_text("started")
    tracker.event(state.step, "started", ranks=ranks.world_size, job=os.environ.get("SLURM_JOB_ID"))
    for event, details in _news(settings, lines, prepared.unreadable, path, changed, moved):
        tracker.event(state.step, event, **details)
    batches = train_batches(
        prepared.train, task.collate, recipe, ranks.plan, ranks.rank, state.samples
    )
    state.bad = sorted({*state.bad, *prepared.unreadable})
    checkpoints = CheckpointWriter(ranks, run, recipe, state)
    watch.report = lambda event, **found: tracker.event(state.step, event, **found)
    work = settings["flops_per_unit"]["value"] / settings["peak_flops"]["value"]
    training = TrainContext(
        recipe, ranks, task, batches, tracker, state, stop, checkpoints, watch, work
    )
    summary = _carry_out(
        training, run, {"name": run.name, "parameters": settings["parameters"]["value"]}
    )
    ranks.gather(
        None
    )  # waits for all: a launcher may end the job when the first rank has left for a while
    return summary


def _carry_out(t: TrainContext, run: RunDir, summary: dict[str, Any]) -> dict[str, Any]:
    """Train, export, and close what was opened, however it ends; `summary` and what came of it."""
    try:
        results = train(t)
        t.watch.at("end")
        if t.recipe.train.keep_best:
            results = _take_the_best(t, run) or results
        counts = {key: value for key, value in asdict(t.state).items() if isinstance(value, int)}
        done = summary | {
            "status": "finished",
            **counts,
            **results,
            "baselines": t.task.data.baselines,
        }
        t.engine.sync_buffers()
        weights = t.engine.whole_weights()
        if t.engine.main:
            export_model(weights, t.recipe, t.task.data, run.export, done)
            run.write_json(run.summary, done)
        summary |= done
    except BaseException as problem:
        if not isinstance(problem, StoppedEarly):  # which is an event already
            event = "lost_peer" if lost_a_peer(problem) else "failed"
            t.tracker.event(
                t.state.step, event, reason=str(problem).split("\n")[0] or type(problem).__name__
            )
        raise
    finally:
        t.checkpoints.close()
        t.tracker.close(
            {key: value for key, value in summary.items() if isinstance(value, int | float)}
        )
    return summary


def _news(
    settings: Settings,
    lines: list[str],
    bad: list[str],
    path: Path | None,
    changed: dict[str, str],
    moved: str,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What there is to say of a start: (event, details)."""
    if "normalisation" in settings:
        yield "normalisation", settings["normalisation"]
    for line in lines:
        yield "checkpoint_rejected", {"reason": line}
    if bad:
        yield "samples_unreadable", {"samples": bad}
    if path and changed:
        yield "recipe_changed", dict(changed)
    if path:
        yield "resumed", {"path": str(path)} | ({"moved": moved} if moved else {})


_FRUITLESS = 3


def _gains_nothing(run: RunDir, step: int) -> bool:
    """Whether Slurm has restarted this job again and again from the same step: it would go on so for ever."""
    starts = [
        line["step"] for line in read_metrics(run.metrics, "event") if line["event"] == "started"
    ]
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return restarts >= _FRUITLESS and starts[-_FRUITLESS:] == [step] * _FRUITLESS


def _take_the_best(t: TrainContext, run: RunDir) -> dict[str, float] | None:
    """Put the weights of the best checkpoint in place, to be exported; its results, or None if the last is the best."""
    best = run.checkpoints / f"step-{t.state.best_step:08d}"
    if t.state.best_step in (0, t.state.step):
        return None
    if broken := t.engine.gather(verify_checkpoint(best) if t.engine.main else [])[0]:
        t.tracker.event(
            t.state.step,
            "best_not_exported",
            path=str(best),
            reason=broken[0],
        )
        return None
    load_checkpoint(t.engine, best)
    t.tracker.event(t.state.step, "best_exported", path=str(best), metric=t.recipe.train.keep_best)
    return evaluate(t.engine, t.task)


def _open_run(name: str, ranks: Engine, fresh: bool) -> RunDir:
    """The run directory, which is ours alone from now on: the first thing that is written."""
    run, refused = run_directory(name, fresh), None
    if ranks.main:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            take_ownership(run)
        except RequestError as problem:
            refused = problem
    run, refused = ranks.gather((run, refused))[0]
    if refused is not None:
        raise refused
    return run


def _tracker(
    loaded: LoadedRecipe,
    run: RunDir,
    task: Task,
    settings: Settings,
    screen: Console,
    state: TrainState,
) -> TrackerGroup:
    recipe = loaded.recipe
    # First, because they may fail: what is opened after them runs in threads.
    also = [
        AccelerateTracker(
            start_accelerate_tracker(kind, recipe.track.project, run.name, run.path, state.step)
        )
        for kind in recipe.track.extra
    ]
    everyone = TrackerGroup(
        MetricsFile(run), *also, Terminal(recipe.train.steps, task.unit, screen)
    )
    if recipe.track.wandb != "off":
        config = {key: setting["value"] for key, setting in settings.items()}
        wandb = WandB(recipe.track, run, recipe.name, config, state.wandb_id, state.step)
        state.wandb_id = wandb.id
        everyone.trackers.append(wandb)
    return everyone
