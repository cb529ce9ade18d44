"""What bigtrain's loop and loader add to a step: `python benchmarks/loop_overhead.py`.

One process. A raw loop (forward, backward, step on the same kind of engine) and bigtrain's train
step take turns, step by step, each on a model of its own with the same weights and batches; so do
steps with the loader and steps whose batches are in memory. Prints a line of JSON.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from workloads import write_recipe

from bigtrain.checkpoint.state import TrainState
from bigtrain.config.loader import load_recipe
from bigtrain.data.datasets import prepare
from bigtrain.data.loader import MicroBatch
from bigtrain.engine.plan import make_plan
from bigtrain.engine.runtime import find_device
from bigtrain.engine.start import start_engine
from bigtrain.models.build import build_model
from bigtrain.runs.directory import RunDir
from bigtrain.supervision.signals import StopFlag
from bigtrain.supervision.watchdog import Watchdog
from bigtrain.tasks.registry import TASKS
from bigtrain.tracking.terminal import console
from bigtrain.training.context import TrainContext
from bigtrain.training.loop import train_step
from bigtrain.training.optimizers import make_optimizer
from bigtrain.training.run import build_trackers, build_training
from bigtrain.training.settings import with_origin

SAME_STEPS = 20  # after which weights are compared
NEVER = 10**9
Steps = list[list[MicroBatch]]


def build(recipe_file: str, folder: Path, *overrides: str) -> TrainContext:
    """A run that is ready to step, as training/run.py puts it together."""
    far_off = [f"train.steps={NEVER}", f"train.eval_every={NEVER}"]
    far_off += [f"train.checkpoint_every={NEVER}", "track.wandb=off", *overrides]
    recipe = load_recipe(recipe_file, far_off).recipe
    prepared = prepare(recipe)
    device = find_device("cpu")
    plan, _ = make_plan(
        recipe.engine,
        world_size=1,
        samples=len(prepared.train),
        tokens_per_sample=prepared.tokens_per_sample,
        bf16_is_fast=device.bf16_is_fast,
        train=recipe.train,
    )
    engine = start_engine(plan, device, {}, recipe.optim.clip_norm)
    make = partial(make_optimizer, optim=recipe.optim, whole_shape=engine.whole_shape)
    engine.prepare(build_model(recipe, prepared, engine.shard), make)
    run = RunDir(folder / f"run-{time.time_ns()}")
    run.checkpoints.mkdir(parents=True)
    state = TrainState()
    task = TASKS[recipe.task](recipe.task, prepared)
    steps = with_origin("plan", {"train.steps": plan.steps})
    return build_training(
        recipe=recipe,
        engine=engine,
        task=task,
        run=run,
        state=state,
        tracker=build_trackers(recipe, run, task, steps, console(), state),
        stop=StopFlag(run),
        watchdog=Watchdog(engine, recipe.train.hang_timeout),
    )


def close(ctx: TrainContext) -> None:
    """Close what `build` opened; the run that was built last comes first (signals)."""
    ctx.watchdog.close()
    ctx.checkpoints.close()
    ctx.tracker.close({})


def raw_step(ctx: TrainContext, micro_batches: list[MicroBatch]) -> None:
    """What any loop on this engine has to do. (One rank: every micro-batch adds its gradients.)"""
    engine, task = ctx.engine, ctx.task
    targets = sum(task.num_targets(micro_batch.batch) for micro_batch in micro_batches)
    divisor = torch.tensor(float(targets), dtype=torch.float64)
    for micro_batch in micro_batches:
        with engine.autocast():
            loss = task.loss_sum(engine.model, engine.to_device(micro_batch.batch))
        engine.backward(loss, divisor)
    engine.step(ctx.recipe.optim.lr)


def in_turns(
    number: int, one: Callable[[], object], other: Callable[[], object]
) -> tuple[list[float], list[float]]:
    """Seconds of `number` calls of each; which goes first changes every time."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(number):
        for which in (0, 1) if turn % 2 else (1, 0):
            act = (one, other)[which]
            began = time.perf_counter()
            act()
            times[which].append(time.perf_counter() - began)
    return times


def compare_loops(recipe: str, folder: Path, number: int, *overrides: str) -> dict[str, Any]:
    """bigtrain's step against a raw one on the same batches, which are in memory for both."""
    raw = build(recipe, folder, "optim.schedule=constant", "optim.warmup_steps=0", *overrides)
    ours = build(recipe, folder, "optim.schedule=constant", "optim.warmup_steps=0", *overrides)
    raw.engine.model.train()
    steps: Steps = [next(raw.batches) for _ in range(number + SAME_STEPS)]
    ours.batches = iter(steps)
    for_raw = iter(steps)
    in_turns(SAME_STEPS, lambda: raw_step(raw, next(for_raw)), lambda: train_step(ours))
    raw_weights, own_weights = raw.engine.whole_weights(), ours.engine.whole_weights()
    same = all(torch.equal(raw_weights[name], own_weights[name]) for name in raw_weights)
    raw_times, own_times = in_turns(
        number, lambda: raw_step(raw, next(for_raw)), lambda: train_step(ours)
    )
    close(ours)
    close(raw)
    return difference(raw_times, own_times) | {"same": same}


def compare_loader(recipe: str, folder: Path, number: int, *overrides: str) -> dict[str, Any]:
    """bigtrain's step with its loader against one with batches in memory."""
    loading = build(recipe, folder, *overrides)
    ready = build(recipe, folder, *overrides)
    steps: Steps = [next(ready.batches) for _ in range(number + SAME_STEPS)]
    ready.batches = iter(steps)
    in_turns(SAME_STEPS, lambda: train_step(ready), lambda: train_step(loading))
    ready_times, loading_times = in_turns(
        number, lambda: train_step(ready), lambda: train_step(loading)
    )
    close(ready)
    close(loading)
    return difference(ready_times, loading_times)


def difference(before: list[float], after: list[float]) -> dict[str, Any]:
    """The median step, and the median of what the other of each pair took longer."""
    pairs = zip(before, after, strict=True)
    longer = statistics.median(other - one for one, other in pairs)
    return {"step": statistics.median(before), "longer": longer}


def main() -> None:
    """All comparisons."""
    lines: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for workload, title, number in (("transformer", "Transformer", 60), ("cnn", "CNN", 90)):
            recipe = str(write_recipe(workload, folder))
            loop = compare_loops(recipe, folder, number)
            lines[f"loop against a raw loop, {title} ({1e3 * loop['step']:.0f} ms)"] = {
                "goal": "≤ 1%; weights equal to the bit",
                "measured": f"{loop['longer'] / loop['step']:+.2%}; {words(loop['same'])}",
            }
            augment = ("data.augment.crop=4", "data.augment.flip=true")
            overrides = augment if workload == "cnn" else ()
            loader = compare_loader(recipe, folder, number, *overrides)
            augmented = ", with augmentation" if overrides else ""
            lines[f"loader against batches in memory, {title}{augmented}"] = {
                "goal": "≤ 1.01 ×",
                "measured": f"{1 + loader['longer'] / loader['step']:.3f} ×",
            }
        for every in (1, 50):
            loop = compare_loops("breast-cancer", folder, 2000, f"train.log_every={every}")
            lines[f"loop against a raw loop, toy model, a line per {every} steps"] = {
                "goal": "≤ 150 µs; weights equal to the bit",
                "measured": f"{1e6 * loop['longer']:.0f} µs; {words(loop['same'])}",
            }
    print("\n" + json.dumps(lines, ensure_ascii=False))


def words(same: bool) -> str:
    return "equal" if same else "NOT EQUAL"


if __name__ == "__main__":
    main()
