"""The trained model as others load it: Hugging Face format, or safetensors and a small config for our own."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import PreparedData
from bigtrain.models.build import build_model
from bigtrain.models.own import load_own, model_class


def save_own(model: nn.Module, weights: dict[str, Tensor], name: str, folder: Path) -> None:
    """Weights and what it takes to build the model again; tied tensors once."""
    kept: dict[int | str, tuple[str, Tensor]] = {}
    for key, tensor in weights.items():
        kept.setdefault(tensor.data_ptr() if tensor.numel() else key, (key, tensor.contiguous()))
    save_file(dict(kept.values()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({"architecture": name, "args": model.bigtrain_args}, indent=2) + "\n"
    )


def load_exported(folder: Path, task: str) -> nn.Module:
    """The model that a run has exported."""
    config = json.loads((folder / "config.json").read_text())
    if "architecture" not in config:
        from bigtrain.models.hf import auto_class

        whole: nn.Module = auto_class(task, config["model_type"]).from_pretrained(
            folder, dtype=torch.float32
        )
        return whole
    model = model_class(config["architecture"])(**config["args"])
    load_own(model, folder)
    return model


def export_model(
    weights: dict[str, Tensor],
    recipe: Recipe,
    prepared: PreparedData,
    folder: Path,
    summary: dict[str, Any],
) -> None:
    """Write the whole `weights` (by parameter name, on the CPU) as a model that others can load."""
    folder.mkdir(exist_ok=True)
    with torch.device("meta"):
        model = build_model(recipe, prepared)
    if hasattr(model, "save_pretrained"):
        model.load_state_dict(weights, assign=True, strict=False)
        model.tie_weights()  # type: ignore[operator]
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        save_own(model, weights, recipe.model.name, folder)
    if prepared.tokenizer is not None:
        prepared.tokenizer.save_pretrained(folder)
    about = {
        "task": recipe.task,
        "classes": prepared.classes,
        "image": prepared.image,
        **prepared.preprocessing,
    }
    (folder / "bigtrain.json").write_text(json.dumps(about, indent=2) + "\n")
    (folder / "README.md").write_text(_card(recipe, summary))


def _card(recipe: Recipe, summary: dict[str, Any]) -> str:
    """A model card with what was measured, on what."""
    measured = "\n".join(f"| {k} | {v:.6g} |" for k, v in summary.items() if isinstance(v, float))
    origin = (
        f"pretrained {recipe.model.pretrained}" if recipe.model.pretrained else "random weights"
    )
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
