"""The task's metrics over the held-out set."""

import math

import torch
from torch import Tensor

from bigtrain.config.task_specs import lower_is_better
from bigtrain.data.loader import eval_batches
from bigtrain.engine.base import Engine
from bigtrain.tasks.base import Evaluator, Task
from bigtrain.training.context import TrainContext
from bigtrain.training.preflight import without_compiling

_STOP_EVERY = 8  # micro-batches between two looks at whether a rank was asked to stop


@torch.no_grad()
def evaluate(engine: Engine, task: Task) -> dict[str, float]:
    """The task's metrics over the held-out set, each example counted once. A collective."""
    evaluator = _start(engine, task)
    for micro_batch in eval_batches(task.data.eval, task.collate, engine.plan, engine.data_rank):
        batch = engine.to_device(micro_batch.batch)
        _update(engine, evaluator, batch, micro_batch.has_samples)
    return evaluator.compute()


@torch.no_grad()
def evaluate_in_training(ctx: TrainContext) -> dict[str, float] | None:
    """As `evaluate`, within a run: its trackers get a table of samples, and a stop ends it early.

    To write targets takes far longer than to judge them: that is done at the end of the run, or if
    the best checkpoint is found by it. Returns None, on all ranks, if one of them was asked to
    stop. A collective.
    """
    engine, task = ctx.engine, ctx.task
    ctx.enter("evaluation")
    evaluator = _start(engine, task)
    first_batch: dict[str, Tensor] = {}
    settings = ctx.recipe.train
    losing = settings.patience == ctx.state.evaluations_since_best + 1  # this may be the last
    writes = ctx.is_last_step or losing or settings.keep_best == "bleu"
    micro_batches = eval_batches(task.data.eval, task.collate, engine.plan, engine.data_rank)
    for number, micro_batch in enumerate(micro_batches):
        ctx.enter("evaluation")
        if number % _STOP_EVERY == 0 and engine.sum(ctx.stop.requested()) > 0:
            return None
        batch = engine.to_device(micro_batch.batch)
        if number == 0:
            first_batch = batch
        _update(engine, evaluator, batch, micro_batch.has_samples, writes)
    if ctx.recipe.track.wandb != "off":
        with engine.autocast():
            rows = evaluator.samples(engine.model, first_batch)
        ctx.tracker.samples(ctx.state.step, rows)
    return evaluator.compute()


def evaluate_if_due(ctx: TrainContext) -> bool:
    """Evaluate once at each step that is due for it; True if a stop came before it was done.

    Step 0 counts as evaluated.
    """
    state = ctx.state
    if not ctx.is_due(ctx.recipe.train.eval_every) or state.evaluated == state.step:
        return False
    results = evaluate_in_training(ctx)
    if results is None:
        return True
    state.evaluated = state.step
    state.results = results
    ctx.tracker.log({"kind": "eval", "step": state.step, **results})
    _compare_with_best(ctx)
    return False


def _start(engine: Engine, task: Task) -> Evaluator:
    engine.sync_buffers()
    engine.model.eval()
    return task.evaluator(engine.device)


def _update(
    engine: Engine,
    evaluator: Evaluator,
    batch: dict[str, Tensor],
    has_samples: bool,
    writes: bool = True,
) -> None:
    with engine.autocast():
        if has_samples:
            evaluator.update(engine.model, batch)
        else:
            # Sharded engines gather weights together, so every rank makes each forward pass.
            evaluator.task.loss_sum(engine.model, batch)
        if writes:
            with without_compiling(engine):
                ranks_together = engine.plan.kind == "zero3"
                evaluator.write(engine.module, batch, has_samples, ranks_together)


def _compare_with_best(ctx: TrainContext) -> None:
    """Note the step whose `train.keep_best` (or loss) is the best, and for how long it has been."""
    state, settings, optim = ctx.state, ctx.recipe.train, ctx.recipe.optim
    plateau = optim.schedule == "plateau"
    if not (settings.keep_best or settings.patience or plateau):
        return
    metric = settings.keep_best or "loss"
    value = state.results[metric]
    if not lower_is_better(metric):
        value = -value
    is_first = state.best is None or state.best_metric != metric
    if math.isfinite(value) and (is_first or value < (state.best or 0.0)):
        state.best = value
        state.best_step = state.step
        state.best_metric = metric
        state.evaluations_since_best = 0
        state.evaluations_since_decay = 0
        return
    state.evaluations_since_best += 1
    state.evaluations_since_decay += 1
    if plateau and state.evaluations_since_decay >= optim.decay_patience:
        state.evaluations_since_decay = 0
        state.rate_decays += 1
        factor = optim.decay_factor**state.rate_decays
        ctx.tracker.event(state.step, "rate_decayed", metric=metric, factor=factor)
    if state.evaluations_since_best == settings.patience:
        ctx.tracker.event(state.step, "out_of_patience", metric=metric, best_step=state.best_step)
