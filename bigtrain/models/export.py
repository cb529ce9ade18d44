"""The trained model as others load it: Hugging Face format, or safetensors and a small config for our own."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import PreparedData
from bigtrain.engine.base import Engine
from bigtrain.errors import RequestError
from bigtrain.models.build import build_model
from bigtrain.models.hf import auto_class
from bigtrain.models.own import model_class
from bigtrain.runs.directory import RunDir


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
        ___MODIMPORT___

        whole: nn.Module = auto_class(task, config["model_type"]).from_pretrained(
            folder, dtype=torch.float32
        )
        return whole
    model = model_class(config["architecture"])(**config["args"])
    load_own(model, folder)
    return model


def load_own(model: nn.Module, folder: Path) -> None:
    """Weights of one of our models, or of a user's class, from an exported run."""
    path = folder / "model.safetensors"
    try:
        weights = load_file(path)
    except (OSError, ValueError, SafetensorError) as problem:
        raise RequestError(
            f"model.pretrained: {path} cannot be read ({problem})",
            "a folder with model.safetensors",
        ) from None
    expected = model.state_dict()
    for name, tensor in weights.items():
        if name not in expected or expected[name].shape != tensor.shape:
            has = tuple(expected[name].shape) if name in expected else "no such tensor"
            raise RequestError(
                f"model.pretrained: {path} holds {name} {tuple(tensor.shape)}; the model has {has}",
                "the same architecture",
            )
    lacking = model.load_state_dict(weights, strict=False).missing_keys
    alike = {expected[name].data_ptr() for name in weights}  # tied tensors are stored once
    if lacking := [name for name in lacking if expected[name].data_ptr() not in alike]:
        raise RequestError(f"model.pretrained: {path} has no {lacking[0]}", "the same architecture")


def export_model(
    engine: Engine, recipe: Recipe, corpus: PreparedData, run: RunDir, summary: dict[str, Any]
) -> None:
    """Gather the weights and write `runs/NAME/export`. A collective."""
    engine.sync_buffers()
    weights = engine.whole_weights()
    if not engine.main:
        return
    run.export.mkdir(exist_ok=True)
    with torch.device("meta"):
        model = build_model(recipe, corpus)
    if hasattr(model, "save_pretrained"):
        model.load_state_dict(weights, assign=True, strict=False)
        model.tie_weights()  # type: ignore[operator]
        model.save_pretrained(run.export)  # type: ignore[operator]
    else:
        save_own(model, weights, recipe.model.name, run.export)
    if corpus.tokenizer is not None:
        corpus.tokenizer.save_pretrained(run.export)
    about = {
        "task": recipe.task,
        "classes": corpus.classes,
        "image": corpus.image,
        **corpus.preprocessing,
    }
    (run.export / "bigtrain.json").write_text(json.dumps(about, indent=2) + "\n")
    (run.export / "README.md").write_text(_card(recipe, summary))


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
