"""Evaluate a finished run's model again."""

import json

import torch

from bigtrain.config.loader import load_recipe
from bigtrain.data.datasets import prepare
from bigtrain.engine.plan import make_plan
from bigtrain.engine.runtime import find_device
from bigtrain.engine.start import start_engine
from bigtrain.models.build import build_model
from bigtrain.runs.directory import RunDir
from bigtrain.tasks.registry import TASKS
from bigtrain.training.evaluation import evaluate


def evaluate_run(run: RunDir, overrides: list[str]) -> dict[str, float]:
    """The metrics of a finished run's model on its held-out set (or on data named by an override), in one process."""
    forced = ["engine.kind=ddp", "engine.offload=none", f"model.pretrained={run.export}"]
    forced += [f"data.tokenizer={run.export}"] * (run.export / "tokenizer.json").is_file()
    recipe = load_recipe(str(run.recipe), [*overrides, *forced]).recipe
    prepared = prepare(recipe, json.loads((run.export / "bigtrain.json").read_text()))
    device = find_device(recipe.engine.device)
    plan, _ = make_plan(
        recipe.engine, 1, len(prepared.train), prepared.tokens_per_sample, device.bf16_is_fast
    )
    ranks = start_engine(plan, device, {}, 0.0)
    ranks.prepare(
        build_model(recipe, prepared), lambda module: torch.optim.SGD(module.parameters(), lr=0.0)
    )
    return evaluate(ranks, TASKS[recipe.task](recipe.task, prepared)) or {}
