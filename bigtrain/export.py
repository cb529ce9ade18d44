"""The trained model as others load it: Hugging Face format, or safetensors and a small config for our own."""

import json
from typing import Any

import torch

from bigtrain import models
from bigtrain.data import Corpus
from bigtrain.engine import Engine
from bigtrain.recipe import Recipe
from bigtrain.rundir import RunDir


def write(engine: Engine, recipe: Recipe, corpus: Corpus, run: RunDir, summary: dict[str, Any]) -> None:
    """Gather the weights and write `runs/NAME/export`. A collective."""
    engine.sync_buffers()
    weights = engine.whole_weights()
    if not engine.main:
        return
    run.export.mkdir(exist_ok=True)
    with torch.device("meta"):
        model = models.build(recipe, corpus)
    if hasattr(model, "save_pretrained"):
        model.load_state_dict(weights, assign=True, strict=False)
        model.tie_weights()  # type: ignore[operator]
        model.save_pretrained(run.export)  # type: ignore[operator]
    else:
        models.save_own(model, weights, recipe.model.name, run.export)
    if corpus.tokenizer is not None:
        corpus.tokenizer.save_pretrained(run.export)
    about = {"task": recipe.task, "classes": corpus.classes, "image": corpus.image, **corpus.preprocessing}
    (run.export / "bigtrain.json").write_text(json.dumps(about, indent=2) + "\n")
    (run.export / "README.md").write_text(_card(recipe, summary))


def _card(recipe: Recipe, summary: dict[str, Any]) -> str:
    """A model card with what was measured, on what."""
    measured = "\n".join(f"| {k} | {v:.6g} |" for k, v in summary.items() if isinstance(v, float))
    origin = f"pretrained {recipe.model.pretrained}" if recipe.model.pretrained else "random weights"
    return f"""---
library_name: {"transformers" if recipe.task in ("causal_lm", "seq2seq") else "bigtrain"}
tags: [bigtrain, {recipe.task}]
---
# {recipe.name}

A {recipe.model.name} model for {recipe.task}, trained with bigtrain from {origin} on `{recipe.data.train}`:
{summary["step"]:,} steps, {summary["samples"]:,} samples, seed {recipe.seed}. `recipe.yaml` in the run directory trains it again.

| held-out metric | value |
|---|---|
{measured}
"""
