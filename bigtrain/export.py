"""The trained model as others load it: Hugging Face format, or safetensors and a small config for our own."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

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
        _write_own(model, weights, recipe, run.export)
    if corpus.tokenizer is not None:
        corpus.tokenizer.save_pretrained(run.export)
    about = {"task": recipe.task, "classes": corpus.classes, "image": corpus.image, **corpus.preprocessing}
    (run.export / "bigtrain.json").write_text(json.dumps(about, indent=2) + "\n")
    (run.export / "README.md").write_text(_card(recipe, summary))


def _write_own(model: nn.Module, weights: dict[str, Tensor], recipe: Recipe, folder: Path) -> None:
    kept: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not any(tensor.data_ptr() == other.data_ptr() and tensor.numel() for other in kept.values()):
            kept[name] = tensor.contiguous()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": recipe.model.name, "args": model.bigtrain_args}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


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
