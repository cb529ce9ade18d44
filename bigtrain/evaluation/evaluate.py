"""Evaluate a finished run's model again."""

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from bigtrain.cluster.rendezvous import become_rank_of_slurm_step
from bigtrain.config.loader import load_recipe
from bigtrain.config.recipe import Recipe
from bigtrain.data.datasets import prepare
from bigtrain.engine.base import Engine
from bigtrain.engine.plan import make_plan
from bigtrain.engine.runtime import find_device, world_from_environment
from bigtrain.engine.start import start_engine
from bigtrain.errors import RequestError
from bigtrain.evaluation.predictions import Predictions, predict_held_out
from bigtrain.evaluation.report_metrics import values_of
from bigtrain.models.build import build_model
from bigtrain.runs.directory import RunDir
from bigtrain.tasks.base import Evaluator, Task
from bigtrain.tasks.registry import TASKS
from bigtrain.training.preflight import use_output_loss

# Settings that are decided when a model has been trained, or that only training has.
_OF_TRAINING = ["name", "seed", "task", "model.pretrained", "optim", "train", "track", "slurm"]
_OF_TRAINING += ["engine.kind", "engine.offload", "data.tokenizer"]
_OF_TABLES = ["data.columns", "data.missing"]


@dataclass(frozen=True)
class Evaluation:
    """A model's metrics, and what it made of each held-out example. The same on every rank."""

    run: RunDir
    recipe: Recipe
    task: Task
    evaluator: Evaluator
    metrics: dict[str, float]
    predictions: Predictions
    is_main: bool
    """Whether this rank is the one that prints and writes."""


def evaluate_run(run: RunDir, overrides: list[str]) -> Evaluation:
    """Evaluate a finished run's model on its held-out set, or on data named by an override.

    On all ranks that the launcher has started; on any number of them with the same results.
    """
    become_rank_of_slurm_step()
    exported = json.loads((run.export / "bigtrain.json").read_text())
    folder = json.dumps(str(run.export), ensure_ascii=False)  # JSON is YAML
    forced = ["engine.kind=ddp", "engine.offload=none", f"model.pretrained={folder}"]
    _refuse_idle(overrides, "table" in exported)
    if (run.export / "tokenizer.json").is_file():
        forced.append(f"data.tokenizer={folder}")
    recipe = load_recipe(str(run.recipe), [*overrides, *forced]).recipe
    prepared = prepare(recipe, exported)
    device = find_device(recipe.engine.device)
    # One rank's micro-batch on any number of ranks, which take micro-batches in turn.
    plan, _ = make_plan(
        recipe.engine,
        world_size=1,
        samples=len(prepared.train) or len(prepared.eval),
        tokens_per_sample=prepared.cost_on(device.kind),
        bf16_is_fast=device.bf16_is_fast,
    )
    plan = replace(plan, world_size=world_from_environment()[1])
    with ExitStack() as cleanup:
        engine = start_engine(plan, device, {}, 0.0)
        cleanup.push(partial(_leave_group, engine))
        engine.prepare(build_model(recipe, prepared), _idle_optimizer)
        task = TASKS[recipe.task](recipe.task, prepared)
        use_output_loss(engine, task)
        evaluator = task.evaluator(engine.device)
        predictions = predict_held_out(engine, task, evaluator)
        metrics = evaluator.compute()
        # Wait for all: a launcher may end the job soon after the first rank has left.
        engine.gather(None)
    metrics |= values_of(predictions, prepared)
    return Evaluation(run, recipe, task, evaluator, metrics, predictions, engine.main)


def _refuse_idle(overrides: list[str], is_table: bool) -> None:
    """Raises RequestError for overrides that change nothing of an evaluation."""
    idle = [*_OF_TRAINING]
    if is_table:
        idle += _OF_TABLES
    for text in overrides:
        key = text.partition("=")[0].strip()
        if any(key == name or key.startswith(f"{name}.") for name in idle):
            raise RequestError(
                f"{text}: an evaluation takes it as the model was trained",
                "overrides of the data and the engine",
                "data.eval=FILES",
            )


def _leave_group(engine: Engine, kind: type[BaseException] | None, *_: object) -> None:
    """Only the ordinary end is one that all ranks have agreed on."""
    engine.close(all_ranks_end=kind is None)


def _idle_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """An engine wants an optimizer; this one never steps."""
    return torch.optim.SGD(model.parameters(), lr=0.0)
