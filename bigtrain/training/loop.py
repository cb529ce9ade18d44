"""The one loop: every task, every engine."""

import math
import random
import time

import numpy as np
import torch

from bigtrain.data.loader import MicroBatch
from bigtrain.data.order import key, mix
from bigtrain.errors import StoppedEarly, TrainingFailed
from bigtrain.training.context import (
    InFlightStep,
    LogInterval,
    RankRequests,
    TrainContext,
    is_due,
    last_good_checkpoint,
    report_checkpoints,
)
from bigtrain.training.evaluation import evaluate_if_due
from bigtrain.training.fault_injection import maybe_inject_fault
from bigtrain.training.loss_spikes import handle_loss_spike, is_spike
from bigtrain.training.schedules import learning_rate


def train(t: TrainContext) -> dict[str, float]:
    """Steps from where the state stands to the end; returns the last evaluation.

    Raises StoppedEarly after a signal, once a checkpoint is committed.
    """
    settings, state = t.recipe.train, t.state
    stopping = evaluate_if_due(t)  # a run may have been stopped before its last evaluation
    while state.step < settings.steps and not stopping:
        wishes = _step(t)
        stopping = wishes.stop > 0
        # Who is told to stop has seconds, not minutes: evaluation comes after the restart.
        stopping = stopping or evaluate_if_due(t)
        # While steps are skipped, the checkpoint before them is the one to keep.
        regular = is_due(state.step, settings, settings.checkpoint_every) and not state.skips
        last = stopping or state.step == settings.steps
        t.watch.at("checkpoint")
        if last or wishes.save or regular or state.best_step == state.step:
            if not t.checkpoints.has(state.step):
                state.rewinds = 0  # they are counted since the last checkpoint
            report_checkpoints(t, t.checkpoints.begin(state))
            if last or wishes.save or not settings.async_save:
                report_checkpoints(t, t.checkpoints.finish())
            t.stop.granted(False, wishes.save > 0)
        elif wishes.written == t.engine.world_size:
            report_checkpoints(t, t.checkpoints.finish())
    if stopping and state.evaluated < settings.steps:
        t.stop.granted(True, False)
        if t.failed:
            raise TrainingFailed(
                f"stopped at step {state.step}, but its checkpoint was not written: {t.failed}",
                last_good_checkpoint(t),
            )
        t.tracker.event(
            state.step, "stopped", reason=t.stop.received or "asked for on another rank"
        )
        raise StoppedEarly(
            f"stopped at step {state.step} of {settings.steps}; the same command goes on from there"
        )
    return state.results


def _refuse_to_go_on_in_vain(t: TrainContext) -> None:
    """Raises TrainingFailed after too many steps in a row that came to nothing."""
    state, most = t.state, t.recipe.train.max_skipped_steps
    if max(state.skips, state.rewinds) < most:
        return
    t.watch.at("checkpoint")
    report_checkpoints(t, t.checkpoints.finish())
    raise TrainingFailed(
        f"{most} steps in a row had a loss or gradient that is not finite, or far too high (step {state.step})"
        if state.skips >= most
        else f"the loss rose {most} times since the last checkpoint (step {state.step})",
        "finite numbers",
        f"a lower optim.lr, or other data; {last_good_checkpoint(t)}",
    )


def _step(t: TrainContext) -> RankRequests:
    """One optimizer step; returns what all ranks together wish, as far as it is known.

    A step that nothing depends on at once (a line of metrics, an evaluation, a checkpoint) is left to the device, and
    settled within the next, once that one keeps the device busy: so the host never waits for an idle device.
    """
    began = t.lap.began = time.perf_counter()
    engine, task, state, settings = t.engine, t.task, t.state, t.recipe.train
    maybe_inject_fault(engine.rank, state.step + 1)
    t.watch.at("data")
    micro_batches = next(t.batches)
    fetched = time.perf_counter() - began
    t.watch.at("meeting")
    local = sum(
        task.num_targets(micro_batch.batch)
        for micro_batch in micro_batches
        if micro_batch.has_samples
    )
    mine = RankRequests(
        *t.stop.wanted(),
        sum(len(micro_batch.unreadable) for micro_batch in micro_batches),
        t.checkpoints.written(),
    )
    sums = engine.sum(local, _digest(micro_batches), *mine)
    loss, spiked, forward = _gradients(t, micro_batches, sums[0].clamp(min=1))
    t.watch.at("update")
    before = _finish_previous_step(t)
    rate = learning_rate(state.applied, settings.steps, t.recipe.optim)
    result = engine.step(rate)
    state.step += 1
    state.samples += engine.plan.global_batch
    logged = spiked or is_due(state.step, settings, settings.log_every)
    total = engine.sum(loss)[0] if logged else math.nan
    t.pending = InFlightStep(
        rate,
        micro_batches,
        spiked,
        logged,
        engine.read(torch.cat([engine.put(total, *result), sums])),
    )
    at_once = logged or any(
        is_due(state.step, settings, every)
        for every in (settings.eval_every, settings.checkpoint_every)
    )
    after = _finish_previous_step(t) if at_once or before.stop or before.save else RankRequests()
    seconds = time.perf_counter() - began
    t.lap.seconds += 0.0 if logged else seconds
    t.watch.stepped(state.step, seconds, fetched + forward)
    return RankRequests(*map(max, before, after))


def _finish_previous_step(t: TrainContext) -> RankRequests:
    """Wait for the step that was begun last, if it is not settled yet: what became of it, and what the ranks wished."""
    step, t.pending = t.pending, None
    if step is None:
        return RankRequests()
    state, lap = t.state, t.lap
    loss, applied, grad_norm, weight, digest, *others = step.numbers()
    state.applied += int(applied)
    state.skips = 0 if applied else state.skips + 1
    state.weight += int(weight)
    lap.steps, lap.weight = lap.steps + 1, lap.weight + weight
    if step.logged:
        found = {
            "loss": loss / max(weight, 1),
            "lr": step.rate,
            "grad_norm": grad_norm,
            "applied": bool(applied),
        }
        _log(t, {"samples_digest": int(digest), "weight": state.weight, **found})
        handle_loss_spike(t, found["loss"], step.spiked)
    elif not applied:
        t.tracker.event(state.step, "step_skipped", grad_norm=grad_norm)
    while t.watch.news:
        event, details = t.watch.news.pop(0)
        t.tracker.event(state.step, event, **details)
    if RankRequests(*others).bad:
        _count_bad(t, step.micro_batches)
    _refuse_to_go_on_in_vain(t)
    return RankRequests(*others)


def _log(t: TrainContext, found: dict[str, float]) -> None:
    """A line of metrics; its seconds and rates are means over the steps since the last one."""
    lap, t.lap = t.lap, LogInterval()
    seconds = lap.seconds + time.perf_counter() - lap.began
    rates = {
        f"{t.task.unit}_per_s": lap.weight / seconds,
        "mfu": t.work * lap.weight / seconds,
        "seconds": seconds / lap.steps,
        "peak_memory_bytes": t.engine.peak_memory(),
    }
    t.tracker.log(
        {"kind": "train", "step": t.state.step, "samples": t.state.samples, **found, **rates}
    )


def _gradients(
    t: TrainContext, micro_batches: list[MicroBatch], weight: torch.Tensor
) -> tuple[torch.Tensor, bool, float]:
    """Forward and backward over this rank's micro-batches.

    Returns its part of the summed loss, whether the step is spoilt, and this host's seconds in forward passes.
    """
    engine, task, spiked, forward = t.engine, t.task, False, 0.0
    engine.model.train()
    loss = torch.zeros((), device=engine.device)
    for number, micro_batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        _seed_draws(t.recipe.seed, micro_batch.first)
        with engine.micro_batch(last):
            t.watch.at("forward")
            began = time.perf_counter()
            with engine.autocast():
                loss_sum = task.loss_sum(engine.model, engine.to_device(micro_batch.batch))
            forward += time.perf_counter() - began
            loss_sum = loss_sum if micro_batch.has_samples else loss_sum * 0.0
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


def _digest(micro_batches: list[MicroBatch]) -> float:
    """A number made of which samples the micro_batches hold; those of all ranks add up to the same on any number of ranks."""
    samples = [
        sample
        for micro_batch in micro_batches
        if micro_batch.has_samples
        for sample in micro_batch.samples
    ]
    return float((mix(np.asarray(samples, np.uint64)) >> np.uint64(40)).sum())


def _count_bad(t: TrainContext, micro_batches: list[MicroBatch]) -> None:
    """Name the samples that no rank could read. Raises TrainingFailed beyond `data.max_unreadable`."""
    met = {
        text
        for texts in t.engine.gather(
            [text for micro_batch in micro_batches for text in micro_batch.unreadable]
        )
        for text in texts
    }
    if new := sorted(met.difference(t.state.bad)):
        t.state.bad = sorted({*t.state.bad, *new})
        t.tracker.event(t.state.step, "samples_unreadable", samples=new)
    if len(t.state.bad) > t.recipe.data.max_unreadable:
        t.watch.at("checkpoint")
        report_checkpoints(t, t.checkpoints.finish())
        raise TrainingFailed(
            t.state.bad[-1],
            f"at most data.max_unreadable={t.recipe.data.max_unreadable} samples that cannot be read",
        )
