"""What happens when a recipe is run: a list of builds, then the loop. Read from top to bottom."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console

from bigtrain.checkpoint.format import verify_checkpoint
from bigtrain.checkpoint.reader import load_checkpoint
from bigtrain.checkpoint.state import TrainState
from bigtrain.checkpoint.writer import CheckpointWriter
from bigtrain.config.loader import LoadedRecipe, to_yaml
from bigtrain.config.recipe import DistillConfig, Recipe
from bigtrain.data.datasets import prepare
from bigtrain.data.examples import PreparedData
from bigtrain.data.loader import train_batches
from bigtrain.engine.base import Engine
from bigtrain.engine.batch_norm import RunningStatistics
from bigtrain.engine.deepspeed_config import render_deepspeed_config
from bigtrain.engine.launcher import read_launcher, refuse_contradictions
from bigtrain.engine.plan import Launcher, Plan, make_plan
from bigtrain.engine.runtime import (
    Device,
    explain_out_of_memory,
    find_device,
    world_from_environment,
)
from bigtrain.engine.start import start_engine
from bigtrain.engine.stopwatch import StepClock
from bigtrain.errors import RequestError, StoppedEarly, TrainingFailed
from bigtrain.models.build import build_model
from bigtrain.models.export import export_model
from bigtrain.models.model_inputs import write_model_inputs
from bigtrain.runs.directory import RunDir, run_directory, write_atomic
from bigtrain.runs.events import Event
from bigtrain.runs.lock import release_ownership, take_ownership
from bigtrain.runs.metrics_file import MetricsFile
from bigtrain.supervision.peer_loss import lost_a_peer
from bigtrain.supervision.signals import StopFlag
from bigtrain.supervision.verdict import write_verdict
from bigtrain.supervision.watchdog import Watchdog
from bigtrain.tasks.base import Task
from bigtrain.tasks.registry import TASKS
from bigtrain.tracking.accelerate import AccelerateTracker, start_accelerate_tracker
from bigtrain.tracking.base import TrackerGroup
from bigtrain.tracking.library_logs import keep_warnings
from bigtrain.tracking.terminal import Terminal
from bigtrain.tracking.wandb import WandB
from bigtrain.training.context import TrainContext
from bigtrain.training.evaluation import evaluate
from bigtrain.training.loop import train
from bigtrain.training.optimizers import make_optimizer
from bigtrain.training.preflight import (
    check_host_memory,
    refuse_different_ranks,
    refuse_unusable_trackers,
    take_teacher,
    try_forward,
    use_output_loss,
)
from bigtrain.training.resume import (
    ResumePoint,
    load_resume_point,
    outside_weights,
    recipe_changes,
    refuse_fruitless_restarts,
)
from bigtrain.training.settings import (
    Settings,
    announce,
    batch_norm_layers,
    group_settings,
    loss_setting,
    model_facts,
    provenance,
    settings_in_force,
    with_origin,
)


class _PlannedEngine(NamedTuple):
    """How this run uses the ranks that the launcher has started."""

    plan: Plan
    origins: dict[str, str]  # of the plan's settings
    ds_config: dict[str, Any]  # DeepSpeed's; empty for DDP


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Looking for garbage until training begins would cost a tenth of the start."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_garbage_collection()
def run_recipe(
    loaded: LoadedRecipe, screen: Console, fresh: bool = False, allow_change: Sequence[str] = ()
) -> dict[str, Any]:
    """Train what the recipe says, from the run's newest checkpoint on; returns the run's summary.

    `fresh`: begin NAME-2 instead of resuming. `allow_change`: keys of the recipe that may differ
    from the run's. Raises RequestError before anything is written, TrainingFailed, StoppedEarly.
    """
    recipe = loaded.recipe
    changes = recipe_changes(recipe, fresh, allow_change)
    refuse_unusable_trackers(recipe.track)
    device = find_device(recipe.engine.device)
    launcher = read_launcher(os.environ)
    refuse_contradictions(launcher, recipe.engine, loaded.origins, os.environ)
    prepared = prepare(recipe)
    planned = _plan_engine(recipe, prepared, device, launcher)
    task = TASKS[recipe.task](recipe.task, prepared, recipe.train.label_smoothing)

    with ExitStack() as cleanup:
        engine = start_engine(planned.plan, device, planned.ds_config, recipe.optim.clip_norm)
        watchdog = Watchdog(engine, recipe.train.hang_timeout)
        cleanup.callback(watchdog.close)
        cleanup.push(partial(_leave_group, engine))
        model = build_model(recipe, prepared, engine.shard)
        make = partial(make_optimizer, optim=recipe.optim, whole_shape=engine.whole_shape)
        engine.prepare(model, make)
        refuse_different_ranks(engine, task)
        prepared.notes.extend(check_host_memory(engine, recipe.optim))
        flops = try_forward(engine, task)
        settings = settings_in_force(loaded, *planned, launcher.source)
        settings |= model_facts(model, flops, engine, device)
        settings |= group_settings(engine, recipe.optim)
        settings |= _settle_loss(engine, task, recipe.train.distill)

        run = _open_run(recipe.name, engine, fresh, cleanup)
        stop = StopFlag(run, engine.main)
        resume = load_resume_point(engine, run, len(prepared.train))
        refuse_fruitless_restarts(engine, run, resume.state.step)
        keep_warnings(run, engine.rank)
        if engine.main:
            settings |= outside_weights(recipe) | with_origin("where it runs", provenance())
        tracker = _start_tracking(recipe, engine, task, run, settings, resume, screen)
        _report_start(tracker, engine, task, settings, resume, changes)
        flops_per_target = settings["flops_per_unit"]["value"]
        ctx = build_training(
            recipe=recipe,
            engine=engine,
            task=task,
            run=run,
            state=resume.state,
            tracker=tracker,
            stop=stop,
            watchdog=watchdog,
            peak_seconds_per_target=flops_per_target / settings["peak_flops"]["value"],
        )
        summary = {"name": run.name, "parameters": settings["parameters"]["value"]}
        summary = _train_and_export(ctx, run, summary)
        # Wait for all: a launcher may end the job soon after the first rank has left.
        engine.gather(None)
    return summary


def _settle_loss(engine: Engine, task: Task, distill: DistillConfig | None) -> Settings:
    """Decide how training computes its loss; what effective.json says of it. A collective."""
    if distill is None:
        return loss_setting(without_logits=use_output_loss(engine, task))
    take_teacher(engine, task, distill)
    return {}


def _leave_group(engine: Engine, kind: type[BaseException] | None, *_: object) -> None:
    """Only the ordinary end, and a stop on request, are ends that all ranks have agreed on."""
    engine.close(all_ranks_end=kind is None or issubclass(kind, StoppedEarly))


def build_training(
    *,
    recipe: Recipe,
    engine: Engine,
    task: Task,
    run: RunDir,
    state: TrainState,
    tracker: TrackerGroup,
    stop: StopFlag,
    watchdog: Watchdog,
    peak_seconds_per_target: float = 0.0,
) -> TrainContext:
    """What the loop works on, from `state` on: the batches that come next, and the checkpoints.

    `engine` is prepared, and holds the weights of `state`.
    """
    prepared = task.data
    batches = train_batches(
        prepared.train, task.collate, recipe, engine.plan, engine.data_rank, state.samples
    )
    state.bad = sorted({*state.bad, *prepared.unreadable})
    watchdog.report_to(tracker, state.step, run.logs)
    return TrainContext(
        recipe=recipe,
        engine=engine,
        task=task,
        batches=batches,
        tracker=tracker,
        state=state,
        stop=stop,
        checkpoints=CheckpointWriter(engine, run, recipe, state),
        watchdog=watchdog,
        clock=StepClock(engine.device),
        running_statistics=RunningStatistics(engine.module),
        peak_seconds_per_target=peak_seconds_per_target,
    )


def build_trackers(
    recipe: Recipe,
    run: RunDir,
    task: Task,
    settings: Settings,
    screen: Console,
    state: TrainState,
) -> TrackerGroup:
    """All trackers that the recipe asks for; notes W&B's id of the run in `state`."""
    # First, because they may fail: what is opened after them runs in threads.
    extra = []
    for name in recipe.track.extra:
        started = start_accelerate_tracker(
            name, recipe.track.project, run.name, run.path, state.step
        )
        extra.append(AccelerateTracker(started))
    steps = settings["train.steps"]["value"]
    group = TrackerGroup(MetricsFile(run), *extra, Terminal(steps, task.unit, screen))
    if recipe.track.wandb != "off":
        config = {key: setting["value"] for key, setting in settings.items()}
        wandb = WandB(recipe.track, run, recipe.name, config, state.wandb_id, state.step)
        state.wandb_id = wandb.id
        group.trackers.append(wandb)
    return group


def _plan_engine(
    recipe: Recipe, prepared: PreparedData, device: Device, launcher: Launcher
) -> _PlannedEngine:
    plan, origins = make_plan(
        recipe.engine,
        world_from_environment()[1],
        len(prepared.train),
        prepared.cost_on(device.kind),
        device.bf16_is_fast,
        launcher,
        recipe.train,
    )
    ds_config: dict[str, Any] = {}
    if plan.kind != "ddp":
        ds_config = render_deepspeed_config(plan, recipe.optim.clip_norm, launcher)
    return _PlannedEngine(plan, origins, ds_config)


def _open_run(name: str, engine: Engine, fresh: bool, cleanup: ExitStack) -> RunDir:
    """The run's directory, the first thing that is written. Rank 0 owns it until `cleanup`.

    Raises RequestError, on all ranks, if another process owns it. A collective.
    """
    run = run_directory(name, fresh)
    problem: RequestError | None = None
    if engine.main:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            take_ownership(run)
        except RequestError as refused:
            problem = refused
    # With --fresh, ranks may see different directories: rank 0's counts.
    run, problem = engine.gather((run, problem))[0]
    if problem is not None:
        raise problem
    if engine.main:
        cleanup.callback(release_ownership, run)
    return run


def _start_tracking(
    recipe: Recipe,
    engine: Engine,
    task: Task,
    run: RunDir,
    settings: Settings,
    resume: ResumePoint,
    screen: Console,
) -> TrackerGroup:
    """Write the recipe and its settings, announce the run, open its trackers; on rank 0 alone.

    Only once nothing refuses the start any more: a start that is refused must leave the run as it
    was.
    """
    if not engine.main:
        return TrackerGroup()
    settings |= with_origin("data", {**task.data.columns})
    write_atomic(run.recipe, to_yaml(recipe))
    run.write_json(run.effective, settings)
    write_model_inputs(recipe, task.data, run)
    announce(screen, run, settings, task, resume.checkpoint)
    tracker = build_trackers(recipe, run, task, settings, screen, resume.state)
    write_verdict("started")
    return tracker


def _report_start(
    tracker: TrackerGroup,
    engine: Engine,
    task: Task,
    settings: Settings,
    resume: ResumePoint,
    changes: dict[str, str],
) -> None:
    """Events about how the run starts. `changes`: of the recipe, since it began."""
    step = resume.state.step
    tracker.event(step, "started", ranks=engine.world_size, job=os.environ.get("SLURM_JOB_ID"))
    if "normalisation" in settings:
        layers = batch_norm_layers(engine.module)
        effect = settings["normalisation"]["value"]
        tracker.event(step, "normalisation", layers=layers, effect=effect)
    for line in resume.rejected:
        tracker.event(step, "checkpoint_rejected", reason=line)
    if task.data.unreadable:
        tracker.event(step, "samples_unreadable", samples=task.data.unreadable)
    if resume.restored is None:
        return
    if changes:
        tracker.event(step, "recipe_changed", **changes)
    details: dict[str, Any] = {"path": str(resume.checkpoint)}
    if resume.restored.moved:
        details["moved"] = resume.restored.moved
    details["load_seconds"] = resume.restored.load_seconds
    details["check_seconds"] = resume.restored.check_seconds
    tracker.event(step, "resumed", **details)


def _train_and_export(ctx: TrainContext, run: RunDir, summary: dict[str, Any]) -> dict[str, Any]:
    """Train, export, and close what was opened however it ends; `summary` with the results."""
    gc.enable()  # a reference cycle may hold a device's memory
    try:
        results = train(ctx)
        ctx.watchdog.enter("end")
        exported_step = ctx.state.step
        best_results = _load_best(ctx, run) if ctx.recipe.train.keep_best else None
        if best_results is not None:
            results = best_results
            exported_step = ctx.state.best_step
        state = asdict(ctx.state)
        finished = {
            **summary,
            "status": "finished",
            **{key: value for key, value in state.items() if isinstance(value, int)},
            "exported_step": exported_step,
            **results,
            "baselines": ctx.task.data.baselines,
        }
        ctx.engine.sync_buffers()
        weights = ctx.engine.whole_weights()
        if ctx.engine.main:
            export_model(weights, ctx.recipe, ctx.task.data, run.export, finished, run)
            run.write_json(run.summary, finished)
        ctx.tracker.event(ctx.state.step, "finished")
        summary = finished
    except StoppedEarly:
        raise  # the loop has reported it
    except BaseException as problem:
        event: Event = "lost_peer" if lost_a_peer(problem, ctx.engine.world_size) else "failed"
        reason = str(problem).split("\n")[0] or type(problem).__name__
        ctx.tracker.event(ctx.state.step, event, reason=reason)
        if isinstance(problem, torch.OutOfMemoryError):
            explanation = explain_out_of_memory(problem, ctx.engine.plan, ctx.engine.module)
            raise TrainingFailed(*explanation) from None
        raise
    finally:
        ctx.checkpoints.close()
        numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        ctx.tracker.close(numbers)
    return summary


def _load_best(ctx: TrainContext, run: RunDir) -> dict[str, float] | None:
    """Load the weights of the best checkpoint, to be exported; returns their evaluation.

    None if the last one is the best, or the best does not verify. A collective.
    """
    step, best_step = ctx.state.step, ctx.state.best_step
    if best_step in (0, step):
        return None
    best = run.checkpoints / f"step-{best_step:08d}"
    problems = ctx.engine.gather(verify_checkpoint(best) if ctx.engine.main else [])[0]
    if problems:
        ctx.tracker.event(step, "best_not_exported", path=str(best), reason=problems[0])
        return None
    load_checkpoint(ctx.engine, best)
    metric = ctx.recipe.train.keep_best
    ctx.tracker.event(step, "best_exported", path=str(best), metric=metric)
    return evaluate(ctx.engine, ctx.task)
