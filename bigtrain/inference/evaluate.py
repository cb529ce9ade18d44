"""Evaluate a finished run's model again."""

import json

import torch
from torch import nn

from bigtrain.config.loader import load_recipe
from bigtrain.data.datasets import prepare
from bigtrain.engine.plan import make_plan
from bigtrain.engine.runtime import find_device
from bigtrain.engine.start import start_engine
from bigtrain.models.build import build_model
from bigtrain.runs.directory import RunDir
from bigtrain.tasks.registry import TASKS
from bigtrain.training.evaluation import evaluate
from bigtrain.training.preflight import use_output_loss


def evaluate_run(run: RunDir, overrides: list[str]) -> dict[str, float]:
    """The metrics of a finished run's model on its held-out set (or on data named by an override).

    In one process.
    """
    exported = json.loads((run.export / "bigtrain.json").read_text())
    folder = json.dumps(str(run.export), ensure_ascii=False)  # JSON is YAML
    forced = ["engine.kind=ddp", "engine.offload=none", f"model.pretrained={folder}"]
    if (run.export / "tokenizer.json").is_file():
        forced.append(f"data.tokenizer={folder}")
    recipe = load_recipe(str(run.recipe), [*overrides, *forced]).recipe
    prepared = prepare(recipe, exported)
    device = find_device(recipe.engine.device)
    plan, _ = make_plan(
        recipe.engine,
        world_size=1,
        samples=len(prepared.train),
        tokens_per_sample=prepared.cost_on(device.kind),
        bf16_is_fast=device.bf16_is_fast,
    )
    engine = start_engine(plan, device, {}, 0.0)
    engine.prepare(build_model(recipe, prepared), _idle_optimizer)
    task = TASKS[recipe.task](recipe.task, prepared)
    use_output_loss(engine, task)
    return evaluate(engine, task)


def _idle_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """An engine wants an optimizer; this one never steps."""
    return torch.optim.SGD(model.parameters(), lr=0.0)
