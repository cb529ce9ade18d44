"""The one loop: every task, every engine."""

import contextlib
import itertools
import math
import random
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigtrain.data.loader import MicroBatch
from bigtrain.data.order import key, mix
from bigtrain.errors import StoppedEarly, TrainingFailed
from bigtrain.runs.step_shares import STEP_PARTS, column_of
from bigtrain.supervision.fault_injection import maybe_inject_fault
from bigtrain.training.checkpointing import finish_checkpoint, last_good_checkpoint, save_if_due
from bigtrain.training.context import (
    InFlightStep,
    LogInterval,
    RankRequests,
    StepNumbers,
    TrainContext,
)
from bigtrain.training.evaluation import evaluate_if_due
from bigtrain.training.loss_spikes import handle_loss_spike, is_spike
from bigtrain.training.profiling import begin_profile_if_asked, end_profile_if_done
from bigtrain.training.schedules import learning_rate


class GradientPass(NamedTuple):
    """What forward and backward passes over a rank's micro-batches came to."""

    loss_sum: Tensor  # this rank's part of the summed loss, a scalar on the device
    spiked: bool  # the loss is a spike, and the gradients are NaN so that the step is left out


def train(ctx: TrainContext) -> dict[str, float]:
    """Train from the state's step to the last one; returns the last evaluation.

    Raises StoppedEarly after a signal, once a checkpoint is committed, and TrainingFailed where
    another try would end the same way.
    """
    ctx.engine.reset_peak_memory()
    # A run may have been stopped before its last evaluation.
    stopping = evaluate_if_due(ctx)
    try:
        while not ctx.is_last_step and not stopping:
            begin_profile_if_asked(ctx)
            requests = train_step(ctx)
            end_profile_if_done(ctx, requests)
            # A rank that was asked to stop has seconds, not minutes: evaluation waits for the
            # restart.
            stopping = requests.stop > 0 or evaluate_if_due(ctx)
            save_if_due(ctx, requests, stopping)
    except Exception:
        _settle_alone(ctx)
        raise
    finished = ctx.is_last_step and ctx.state.evaluated == ctx.state.step
    if stopping and not finished:
        _end_early(ctx)
    return ctx.state.results


def _settle_alone(ctx: TrainContext) -> None:
    """After a failure: write the line of the step before, if it is not written, and ask nobody."""
    with contextlib.suppress(Exception):
        if ctx.in_flight is not None:
            _settle(ctx, ctx.in_flight)
        if ctx.profile is not None:
            ctx.profile.profiler.stop()


def _end_early(ctx: TrainContext) -> None:
    """Raises StoppedEarly, or TrainingFailed if there is no checkpoint to resume from."""
    step = ctx.state.step
    ctx.stop.acknowledge()
    if ctx.checkpoint_problem:
        raise TrainingFailed(
            f"stopped at step {step}, but its checkpoint was not written: {ctx.checkpoint_problem}",
            last_good_checkpoint(ctx),
        )
    ctx.tracker.event(step, "stopped", reason=ctx.stop.received or "requested on another rank")
    raise StoppedEarly(
        f"stopped at step {step} of {ctx.engine.plan.steps}; the same command resumes from there"
    )


def train_step(ctx: TrainContext) -> RankRequests:
    """One optimizer step; returns the requests of all ranks.

    A step that nothing depends on at once (an evaluation, a checkpoint, what is done about a spike)
    is left to the device. Its numbers are read, and its line of metrics written, within the next
    step, once that one keeps the device busy: so the host never waits for an idle device.
    """
    began = time.perf_counter()
    engine = ctx.engine
    maybe_inject_fault(engine.rank, ctx.state.step + 1)
    ctx.enter("data")
    micro_batches = next(ctx.batches)
    ctx.enter("numbers")
    # The end of StepNumbers, from the number of targets on.
    own = [
        _num_targets(ctx, micro_batches),
        _samples_digest(micro_batches),
        *_own_requests(ctx, micro_batches),
    ]
    ctx.enter("meeting")
    sums = engine.sum(*own)
    read_sums = engine.read(sums)
    gradients = _compute_gradients(ctx, micro_batches, sums[0].clamp(min=1))

    # The host may wait here: the device has these passes to work on.
    _finish_previous_step(ctx)
    step_sums = read_sums()
    requests = RankRequests(*step_sums[-len(RankRequests._fields) :])
    ctx.enter("update")
    state = ctx.state
    rate = learning_rate(
        state.applied, engine.plan.steps, ctx.recipe.optim, engine.plan.progress, state.rate_decays
    )
    result = engine.step(rate)
    state.step += 1
    state.samples += engine.plan.at(state.samples).global_batch
    logged = gradients.spiked or ctx.is_due(ctx.recipe.train.log_every)
    loss_sum: Tensor | float = math.nan
    peak_memory: Tensor | float = 0.0
    if logged:
        ctx.enter("meeting")
        loss_and_peaks = engine.sum(gradients.loss_sum, *engine.peak_of_each_rank())
        loss_sum, peak_memory = loss_and_peaks[0], loss_and_peaks[1:].max()
    ctx.enter("numbers")
    outcome = engine.put(loss_sum, *result, peak_memory)
    lap = ctx.clock.lap()  # before the outcome is sent: once that is here, the device has passed it
    ctx.in_flight = InFlightStep(
        learning_rate=rate,
        micro_batches=micro_batches,
        spiked=gradients.spiked,
        logged=logged,
        lap=lap,
        sums=step_sums,
        read_outcome=engine.read(outcome),
    )
    if requests.stop or requests.save or _is_waited_for(ctx, logged):
        _finish_previous_step(ctx)
    ctx.watchdog.step_done(ctx.state.step, time.perf_counter() - began)
    return requests


def _num_targets(ctx: TrainContext, micro_batches: list[MicroBatch]) -> int:
    """Target tokens (or images, or rows) that this rank's micro-batches count."""
    counted = [micro_batch for micro_batch in micro_batches if micro_batch.has_samples]
    return sum(ctx.task.num_targets(micro_batch.batch) for micro_batch in counted)


def _samples_digest(micro_batches: list[MicroBatch]) -> float:
    """A number made of the micro-batches' samples.

    Those of all ranks add up to the same on any number of ranks.
    """
    samples: list[int] = []
    for micro_batch in micro_batches:
        if micro_batch.has_samples:
            samples += micro_batch.samples
    hashes = mix(np.asarray(samples, np.uint64))
    return float((hashes >> np.uint64(40)).sum())


def _own_requests(ctx: TrainContext, micro_batches: list[MicroBatch]) -> RankRequests:
    """What this rank wants of the others."""
    return RankRequests(
        stop=ctx.stop.requested(),
        save=ctx.stop.save_requested(),
        unreadable=sum(len(micro_batch.unreadable) for micro_batch in micro_batches),
        written=ctx.checkpoints.written(),
    )


def _is_waited_for(ctx: TrainContext, logged: bool) -> bool:
    """Whether the numbers of the step must be known before the next one begins.

    For its evaluation or checkpoint, or because its loss may change what the next step does.
    """
    settings = ctx.recipe.train
    decides_about_spikes = logged and settings.on_spike != "warn"
    every = (settings.eval_every, settings.checkpoint_every)
    return decides_about_spikes or any(ctx.is_due(steps) for steps in every)


def _compute_gradients(
    ctx: TrainContext, micro_batches: list[MicroBatch], global_targets: Tensor
) -> GradientPass:
    """Forward and backward passes over this rank's micro-batches.

    `global_targets`: a scalar on the device, the targets of the whole global batch.
    """
    engine, task = ctx.engine, ctx.task
    policy = ctx.recipe.train.on_spike
    if not engine.module.training:  # what DeepSpeed wraps it in leaves its own flag alone
        engine.model.train()  # it walks over all modules
    loss_sum = torch.zeros((), device=engine.device)
    spiked = False
    with_samples = sum(micro_batch.has_samples for micro_batch in micro_batches)
    passes = 0  # over micro-batches with samples
    for number, micro_batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        ctx.enter("forward")
        _seed_random_draws(ctx.recipe.seed, micro_batch.first)
        if micro_batch.has_samples:
            ctx.running_statistics.enter(passes, with_samples)
            passes += 1
        else:
            ctx.running_statistics.enter(with_samples, with_samples)
        with engine.micro_batch(last):
            with engine.autocast():
                loss = task.loss_sum(engine.model, engine.to_device(micro_batch.batch))
            if not micro_batch.has_samples:
                loss = loss * 0.0
            loss_sum += loss.detach()
            if last and policy in ("skip", "rewind"):
                ctx.enter("meeting")
                mean_loss = float(engine.sum(loss_sum)[0] / global_targets)
                spiked = is_spike(ctx.state.recent, mean_loss)
                if spiked:
                    # Every engine leaves a step out if its gradient is not finite.
                    loss = loss * math.nan
            ctx.enter("backward")
            # An infinite loss may have a finite gradient. Times NaN it has none, and all ranks
            # leave the step out.
            engine.backward(loss * (1.0 + 0.0 * loss.detach()), global_targets)
    return GradientPass(loss_sum, spiked)


def _seed_random_draws(seed: int, position: int) -> None:
    """Make dropout's draws a function of the seed and the micro-batch's position in the stream.

    A resumed run draws what the undisturbed one would, and so does another number of ranks that
    cuts the global batch into the same micro-batches.
    """
    micro_batch_seed = int(key(seed, position)) >> 1
    # torch.manual_seed looks for back-ends to seed, for a quarter of a millisecond.
    torch.default_generator.manual_seed(micro_batch_seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(micro_batch_seed)
    random.seed(micro_batch_seed)
    np.random.seed(micro_batch_seed & 0xFFFFFFFF)


def _finish_previous_step(ctx: TrainContext) -> None:
    """Wait for the numbers of the step in flight, if there is one, and act on them."""
    step = ctx.in_flight
    if step is None:
        return
    ctx.enter("logging")
    numbers = _settle(ctx, step)
    if step.logged:
        handle_loss_spike(ctx, numbers.mean_loss, step.spiked)
    elif not numbers.applied:
        ctx.tracker.event(ctx.state.step, "step_skipped", grad_norm=numbers.grad_norm)
    while ctx.watchdog.pending_events:
        event = ctx.watchdog.pending_events.popleft()
        ctx.tracker.event(ctx.state.step, event.name, **event.details)
    if numbers.requests.unreadable:
        _report_unreadable_samples(ctx, step.micro_batches)
    _refuse_to_repeat_failures(ctx)


def _settle(ctx: TrainContext, step: InFlightStep) -> StepNumbers:
    """Wait for the numbers of the step in flight, count them, and write its line of metrics."""
    ctx.in_flight = None
    numbers = StepNumbers.from_vector([*step.read_outcome(), *step.sums])
    seconds = step.lap.seconds()
    ctx.watchdog.was_busy(seconds["data"] + seconds["forward"])
    state = ctx.state
    state.applied += int(numbers.applied)
    state.skips = 0 if numbers.applied else state.skips + 1
    state.weight += int(numbers.num_targets)
    ctx.interval.add(numbers.num_targets, seconds)
    if step.logged:
        _log(ctx, numbers, step.learning_rate)
    return numbers


def _log(ctx: TrainContext, numbers: StepNumbers, rate: float) -> None:
    """A line of metrics; its seconds and rates are means over the steps since the last one."""
    interval = ctx.interval
    ctx.interval = LogInterval()
    by_part = {column_of(part): interval.mean_seconds(part) for part in STEP_PARTS}
    seconds = sum(by_part.values())
    targets_per_s = interval.num_targets / interval.steps / seconds
    ctx.tracker.log(
        {
            "kind": "train",
            "step": ctx.state.step,
            "samples": ctx.state.samples,
            "samples_digest": int(numbers.samples_digest),
            "weight": ctx.state.weight,
            "loss": numbers.mean_loss,
            "lr": rate,
            "grad_norm": numbers.grad_norm,
            "applied": numbers.applied,
            f"{ctx.task.unit}_per_s": targets_per_s,
            "mfu": ctx.peak_seconds_per_target * targets_per_s,
            "seconds": seconds,
            **by_part,
            column_of("checkpoint"): interval.mean_seconds("checkpoint"),
            "peak_memory_bytes": int(numbers.peak_memory),
        }
    )


def _report_unreadable_samples(ctx: TrainContext, micro_batches: list[MicroBatch]) -> None:
    """Name the samples that could not be read, on any rank. A collective.

    Raises TrainingFailed beyond `data.max_unreadable`.
    """
    state, allowed = ctx.state, ctx.recipe.data.max_unreadable
    mine = [name for micro_batch in micro_batches for name in micro_batch.unreadable]
    unreadable = set(itertools.chain.from_iterable(ctx.engine.gather(mine)))
    new = sorted(unreadable.difference(state.bad))
    if new:
        state.bad = sorted({*state.bad, *new})
        ctx.tracker.event(state.step, "samples_unreadable", samples=new)
    if len(state.bad) > allowed:
        finish_checkpoint(ctx)
        raise TrainingFailed(
            state.bad[-1], f"at most data.max_unreadable={allowed} samples that cannot be read"
        )


def _refuse_to_repeat_failures(ctx: TrainContext) -> None:
    """Raises TrainingFailed after too many skipped steps, or rewinds, in a row."""
    state, allowed = ctx.state, ctx.recipe.train.max_skipped_steps
    if max(state.skips, state.rewinds) < allowed:
        return
    finish_checkpoint(ctx)
    if state.skips >= allowed:
        problem = (
            f"{allowed} steps in a row had a loss or gradient that is not finite, or far too high"
        )
    else:
        problem = f"the loss rose {allowed} times since the last checkpoint"
    raise TrainingFailed(
        f"{problem} (step {state.step})",
        "finite numbers",
        f"a lower optim.lr, or other data; {last_good_checkpoint(ctx)}",
    )
