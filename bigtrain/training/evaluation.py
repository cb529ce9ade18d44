"""The task's metrics over the held-out set."""

import math

import torch

from bigtrain.config.task_specs import lower_is_better
from bigtrain.data.loader import eval_batches
from bigtrain.engine.base import Engine
from bigtrain.tasks.base import Task
from bigtrain.training.context import TrainContext, is_due


def evaluate_if_due(t: TrainContext) -> bool:
    """Evaluate at the steps that are for it, once; returns whether ranks were asked to stop before it was done."""
    state, settings = t.state, t.recipe.train
    if state.evaluated == state.step or not is_due(
        state.step, settings, settings.eval_every
    ):  # at step 0 it counts as done
        return False
    results = evaluate(t.engine, t.task, t)
    if results is None:
        return True
    state.evaluated, state.results = state.step, results
    t.tracker.log({"kind": "eval", "step": state.step, **results})
    if settings.keep_best:
        value = results[settings.keep_best] * (1 if lower_is_better(settings.keep_best) else -1)
        fresh = state.best is None or state.best_metric != settings.keep_best
        if math.isfinite(value) and (fresh or value < (state.best or 0.0)):
            state.best, state.best_step, state.best_metric = value, state.step, settings.keep_best
    return False


@torch.no_grad()
def evaluate(
    engine: Engine, task: Task, training: TrainContext | None = None
) -> dict[str, float] | None:
    """The task's metrics over the held-out set, each example counted once. A collective.

    None if a stop came first, of the `training` that this belongs to.
    """
    engine.sync_buffers()
    engine.model.eval()
    evaluator = task.evaluator(engine.device)
    first: dict[str, torch.Tensor] = {}
    for number, micro_batch in enumerate(
        eval_batches(task.data.eval, task.collate, engine.plan, engine.rank)
    ):
        if training is not None:
            training.watch.at("evaluation")
            if number % 8 == 0 and engine.sum(training.stop.wanted()[0]) > 0:
                return None
        batch = engine.to_device(micro_batch.batch)
        first = first or batch
        with engine.autocast():
            if micro_batch.has_samples:
                evaluator.update(engine.model, batch)
            else:
                task.loss_sum(
                    engine.model, batch
                )  # sharded engines gather weights together, so all ranks run along
    if training is not None and training.recipe.track.wandb != "off":
        with engine.autocast():
            training.tracker.samples(training.state.step, evaluator.samples(engine.model, first))
    return evaluator.compute()
