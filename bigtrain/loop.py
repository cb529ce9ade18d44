"""The one loop: every task, every engine."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from bigtrain import checkpoint
from bigtrain.checkpoint import Checkpoints, State
from bigtrain.data import eval_batches
from bigtrain.data.order import key, mix
from bigtrain.data.stream import Piece
from bigtrain.engine import Engine
from bigtrain.errors import StoppedEarly, TrainingFailed
from bigtrain.fault import strike
from bigtrain.optim import learning_rate
from bigtrain.recipe import LOWER_IS_BETTER, Recipe, Train
from bigtrain.stop import StopFlag
from bigtrain.tasks import Task
from bigtrain.track import Everyone
from bigtrain.watch import Watchdog

_WINDOW = 32  # losses that a spike is measured against


@dataclass
class Lap:
    """The steps since the last line of metrics: seconds that the loop spent in them, their number, and what they weighed."""

    seconds: float = 0.0
    began: float = 0.0  # when the one under way did
    steps: int = 0
    weight: float = 0.0


class Pending(NamedTuple):
    """A step that the device may not have finished yet."""

    rate: float
    pieces: list[Piece]
    spiked: bool
    logged: bool
    numbers: Callable[[], list[float]]  # waits: loss, applied, gradient norm, weight, digest, wishes


@dataclass
class Training:
    """All that the loop moves; built by run.py."""

    recipe: Recipe
    engine: Engine
    task: Task
    batches: Iterator[list[Piece]]
    tracker: Everyone
    state: State
    stop: StopFlag
    checkpoints: Checkpoints
    watch: Watchdog
    work: float = 0.0  # seconds that one unit of weight would take if all devices ran at their peak
    failed: str = ""  # why the last checkpoint could not be written
    pending: Pending | None = None  # the step that was begun last, until it is settled
    lap: Lap = field(default_factory=Lap)


class Wishes(NamedTuple):
    """What any rank was asked to do, and what each has done: numbers that ranks add up once per step."""

    stop: float = 0.0
    save: float = 0.0
    bad: float = 0.0  # samples that could not be read
    written: float = 0.0  # ranks whose part of the checkpoint under way is on disk


def train(t: Training) -> dict[str, float]:
    """Steps from where the state stands to the end; returns the last evaluation.

    Raises StoppedEarly after a signal, once a checkpoint is committed.
    """
    settings, state = t.recipe.train, t.state
    stopping = _evaluate_if_due(t)  # a run may have been stopped before its last evaluation
    while state.step < settings.steps and not stopping:
        wishes = _step(t)
        stopping = wishes.stop > 0
        # Who is told to stop has seconds, not minutes: evaluation comes after the restart.
        stopping = stopping or _evaluate_if_due(t)
        # While steps are skipped, the checkpoint before them is the one to keep.
        regular = _is_due(state.step, settings, settings.checkpoint_every) and not state.skips
        last = stopping or state.step == settings.steps
        t.watch.at("checkpoint")
        if last or wishes.save or regular or state.best_step == state.step:
            _report(t, t.checkpoints.begin(state))
            if last or wishes.save or not settings.async_save:
                _report(t, t.checkpoints.finish())
            t.stop.granted(False, wishes.save > 0)
        elif wishes.written == t.engine.world_size:
            _report(t, t.checkpoints.finish())
    if stopping and state.evaluated < settings.steps:
        t.stop.granted(True, False)
        if t.failed:
            raise TrainingFailed(f"stopped at step {state.step}, but its checkpoint was not written: {t.failed}", _kept(t))
        t.tracker.event(state.step, "stopped", reason=t.stop.received or "asked for on another rank")
        raise StoppedEarly(f"stopped at step {state.step} of {settings.steps}; the same command goes on from there")
    return state.results


def _refuse_to_go_on_in_vain(t: Training) -> None:
    """Raises TrainingFailed after too many steps in a row that came to nothing."""
    state, most = t.state, t.recipe.train.max_skips
    if max(state.skips, state.rewinds) < most:
        return
    t.watch.at("checkpoint")
    _report(t, t.checkpoints.finish())
    raise TrainingFailed(
        f"{most} steps in a row had a loss or gradient that is not finite, or far too high (step {state.step})"
        if state.skips >= most
        else f"the loss rose {most} times since the last checkpoint (step {state.step})",
        "finite numbers",
        f"a lower optim.lr, or other data; {_kept(t)}",
    )


def _kept(t: Training) -> str:
    good = [path.name for path in checkpoint.committed(t.checkpoints.run)][-1:] or ["none"]
    return f"the last good checkpoint is {good[0]}"


def _report(t: Training, all_saved: list[checkpoint.Saved]) -> None:
    """A checkpoint that could not be written is reported, and training goes on: the one before is still there."""
    for saved in all_saved:
        t.failed = saved.problem
        if saved.problem:
            t.tracker.event(saved.step, "checkpoint FAILED", reason=saved.problem)
            continue
        times = {"seconds": saved.seconds, "blocked": saved.blocked, "writing": saved.writing}
        t.tracker.event(saved.step, "checkpoint", path=str(saved.path), **times)
        if (needed := saved.blocked + saved.writing) > t.stop.grace:
            t.tracker.event(
                saved.step,
                "checkpoint slower than the grace period",
                seconds=needed,
                reason=f"a signal leaves {t.stop.grace:.0f} s: ask for more (sbatch --signal=USR1@SECONDS)",
            )


def _step(t: Training) -> Wishes:
    """One optimizer step; returns what all ranks together wish, as far as it is known.

    A step that nothing depends on at once (a line of metrics, an evaluation, a checkpoint) is left to the device, and
    settled within the next, once that one keeps the device busy: so the host never waits for an idle device.
    """
    began = t.lap.began = time.perf_counter()
    engine, task, state, settings = t.engine, t.task, t.state, t.recipe.train
    strike(engine.rank, state.step + 1)
    t.watch.at("data")
    pieces = next(t.batches)
    fetched = time.perf_counter() - began
    t.watch.at("meeting")
    local = sum(task.weight(piece.batch) for piece in pieces if piece.counts)
    mine = Wishes(*t.stop.wanted(), sum(len(piece.bad) for piece in pieces), t.checkpoints.written())
    sums = engine.sum(local, _digest(pieces), *mine)
    loss, spiked, forward = _gradients(t, pieces, sums[0].clamp(min=1))
    t.watch.at("update")
    before = _settle(t)
    rate = learning_rate(state.applied, settings.steps, t.recipe.optim)
    result = engine.step(rate)
    state.step += 1
    state.samples += engine.plan.global_batch
    logged = spiked or _is_due(state.step, settings, settings.log_every)
    total = engine.sum(loss)[0] if logged else math.nan
    t.pending = Pending(rate, pieces, spiked, logged, engine.read(torch.cat([engine.put(total, *result), sums])))
    at_once = logged or any(_is_due(state.step, settings, every) for every in (settings.eval_every, settings.checkpoint_every))
    after = _settle(t) if at_once or before.stop or before.save else Wishes()
    seconds = time.perf_counter() - began
    t.lap.seconds += 0.0 if logged else seconds
    t.watch.stepped(state.step, seconds, fetched + forward)
    return Wishes(*map(max, before, after))


def _is_due(step: int, settings: Train, every: int) -> bool:
    return step % every == 0 or step == settings.steps


def _settle(t: Training) -> Wishes:
    """Wait for the step that was begun last, if it is not settled yet: what became of it, and what the ranks wished."""
    step, t.pending = t.pending, None
    if step is None:
        return Wishes()
    state, lap = t.state, t.lap
    loss, applied, grad_norm, weight, digest, *others = step.numbers()
    state.applied += int(applied)
    state.skips = 0 if applied else state.skips + 1
    state.weight += int(weight)
    lap.steps, lap.weight = lap.steps + 1, lap.weight + weight
    if step.logged:
        found = {"loss": loss / max(weight, 1), "lr": step.rate, "grad_norm": grad_norm, "applied": bool(applied)}
        _log(t, {"samples_digest": int(digest), "weight": state.weight, **found})
        _watch(t, found["loss"], step.spiked)
    elif not applied:
        t.tracker.event(state.step, "step skipped", grad_norm=grad_norm)
    while t.watch.news:
        event, details = t.watch.news.pop(0)
        t.tracker.event(state.step, event, **details)
    if Wishes(*others).bad:
        _count_bad(t, step.pieces)
    _refuse_to_go_on_in_vain(t)
    return Wishes(*others)


def _log(t: Training, found: dict[str, float]) -> None:
    """A line of metrics; its seconds and rates are means over the steps since the last one."""
    lap, t.lap = t.lap, Lap()
    seconds = lap.seconds + time.perf_counter() - lap.began
    rates = {
        f"{t.task.unit}_per_s": lap.weight / seconds,
        "mfu": t.work * lap.weight / seconds,
        "seconds": seconds / lap.steps,
        "peak_memory_bytes": t.engine.peak_memory(),
    }
    t.tracker.log({"kind": "train", "step": t.state.step, "samples": t.state.samples, **found, **rates})


def _gradients(t: Training, pieces: list[Piece], weight: torch.Tensor) -> tuple[torch.Tensor, bool, float]:
    """Forward and backward over this rank's micro-batches.

    Returns its part of the summed loss, whether the step is spoilt, and this host's seconds in forward passes.
    """
    engine, task, spiked, forward = t.engine, t.task, False, 0.0
    engine.model.train()
    loss = torch.zeros((), device=engine.device)
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        _seed_draws(t.recipe.seed, piece.first)
        with engine.micro_batch(last):
            t.watch.at("forward")
            began = time.perf_counter()
            with engine.autocast():
                loss_sum = task.loss_sum(engine.model, engine.to_device(piece.batch))
            forward += time.perf_counter() - began
            loss_sum = loss_sum if piece.counts else loss_sum * 0.0
            loss += loss_sum.detach()
            if last and t.recipe.train.on_spike != "warn":
                spiked = is_spike(t.state.recent, float(engine.sum(loss)[0] / weight))
                # Every engine leaves a step out when its gradient is not finite; so no engine needs another way.
                loss_sum = loss_sum * math.nan if spiked else loss_sum
            t.watch.at("backward")
            # An infinite loss may have a finite gradient; times NaN it has none, and all ranks leave the step out.
            engine.backward(loss_sum * (1.0 + 0.0 * loss_sum.detach()), weight)
    return loss, spiked, forward


def _seed_draws(seed: int, position: int) -> None:
    """Dropout's draws are a function of (seed, the micro-batch's position in the stream of samples).

    A resumed run draws what the undisturbed one would, and so does another number of ranks that cuts the global
    batch into the same micro-batches.
    """
    drawn = int(key(seed, position)) >> 1
    torch.manual_seed(drawn)
    random.seed(drawn)
    np.random.seed(drawn & 0xFFFFFFFF)


def _digest(pieces: list[Piece]) -> float:
    """A number made of which samples the pieces hold; those of all ranks add up to the same on any number of ranks."""
    samples = [sample for piece in pieces if piece.counts for sample in piece.samples]
    return float((mix(np.asarray(samples, np.uint64)) >> np.uint64(40)).sum())


def _count_bad(t: Training, pieces: list[Piece]) -> None:
    """Name the samples that no rank could read. Raises TrainingFailed beyond `data.max_bad`."""
    met = {text for texts in t.engine.gather([text for piece in pieces for text in piece.bad]) for text in texts}
    if new := sorted(met.difference(t.state.bad)):
        t.state.bad = sorted({*t.state.bad, *new})
        t.tracker.event(t.state.step, "bad samples left out", samples=new)
    if len(t.state.bad) > t.recipe.data.max_bad:
        t.watch.at("checkpoint")
        _report(t, t.checkpoints.finish())
        raise TrainingFailed(t.state.bad[-1], f"at most data.max_bad={t.recipe.data.max_bad} samples that cannot be read")


def is_spike(recent: list[float], loss: float) -> bool:
    """Whether a loss lies above the median of the last ones by more than six times what the 90th percentile does.

    Both are robust, so a spike does not hide the next; heavy tails, as of small batches, widen the scale by themselves.
    """
    if len(recent) < _WINDOW or not math.isfinite(loss):
        return False
    middle, high = statistics.median(recent), statistics.quantiles(recent, n=10)[-1]
    return loss > middle + 6 * max(high - middle, 0.02 * abs(middle))


def _watch(t: Training, loss: float, spiked: bool) -> None:
    """Say that the loss has spiked and do what the recipe wants; else remember the loss."""
    state, policy = t.state, t.recipe.train.on_spike
    high, usual = spiked or is_spike(state.recent, loss), statistics.median(state.recent or [loss])
    if math.isfinite(loss) and not spiked:  # one that is only warned about counts: it may be the new level
        state.recent = [*state.recent, loss][-_WINDOW:]
    if not high:
        return
    t.tracker.event(state.step, "loss spike", loss=loss, usual=usual, policy=policy)
    if policy == "rewind":
        t.watch.at("checkpoint")
        _report(t, t.checkpoints.finish())
        path, _ = checkpoint.newest(t.engine, t.checkpoints.run)
        if path is not None:
            before = checkpoint.load(t.engine, path).state
            # The data goes on: what led to the spike, and the spike itself, do not come again.
            kept = {"samples": state.samples, "bad": state.bad, "rewinds": state.rewinds + 1}
            vars(state).update(vars(before) | kept)
            t.tracker.event(state.step, "rewound", path=str(path))


def _evaluate_if_due(t: Training) -> bool:
    """Evaluate at the steps that are for it, once; returns whether ranks were asked to stop before it was done."""
    state, settings = t.state, t.recipe.train
    if state.evaluated == state.step or not _is_due(state.step, settings, settings.eval_every):  # at step 0 it counts as done
        return False
    results = evaluate(t.engine, t.task, t)
    if results is None:
        return True
    state.evaluated, state.results = state.step, results
    t.tracker.log({"kind": "eval", "step": state.step, **results})
    if settings.keep_best:
        value = results[settings.keep_best] * (1 if settings.keep_best in LOWER_IS_BETTER else -1)
        fresh = state.best is None or state.best_metric != settings.keep_best
        if math.isfinite(value) and (fresh or value < (state.best or 0.0)):
            state.best, state.best_step, state.best_metric = value, state.step, settings.keep_best
    return False


@torch.no_grad()
def evaluate(engine: Engine, task: Task, training: Training | None = None) -> dict[str, float] | None:
    """The task's metrics over the held-out set, each example counted once. A collective.

    None if a stop came first, of the `training` that this belongs to.
    """
    engine.sync_buffers()
    engine.model.eval()
    evaluator = task.evaluator(engine.device)
    first: dict[str, torch.Tensor] = {}
    for number, piece in enumerate(eval_batches(task, engine.plan, engine.rank)):
        if training is not None:
            training.watch.at("evaluation")
            if number % 8 == 0 and engine.sum(training.stop.wanted()[0]) > 0:
                return None
        batch = engine.to_device(piece.batch)
        first = first or batch
        with engine.autocast():
            if piece.counts:
                evaluator.update(engine.model, batch)
            else:
                task.loss_sum(engine.model, batch)  # sharded engines gather weights together, so all ranks run along
    if training is not None and training.recipe.track.wandb != "off":
        with engine.autocast():
            training.tracker.samples(training.state.step, evaluator.samples(engine.model, first))
    return evaluator.compute()
