"""The trained model as others load it: Hugging Face's format, or safetensors and a config."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bigtrain.config.recipe import Recipe
from bigtrain.config.task_specs import TASK_SPECS, TaskName
from bigtrain.data.examples import PreparedData
from bigtrain.errors import TrainingFailed
from bigtrain.models import quantized
from bigtrain.models.build import build_model
from bigtrain.models.own import load_own, model_class


def export_model(
    weights: dict[str, Tensor],
    recipe: Recipe,
    prepared: PreparedData,
    folder: Path,
    summary: dict[str, Any],
) -> None:
    """Write the whole `weights` (by parameter name, on the CPU) as a model that others can load.

    Raises TrainingFailed for weights that a transformers model of this recipe has no place for.
    """
    folder.mkdir(exist_ok=True)
    with torch.device("meta"):
        model = build_model(recipe, prepared)
    if hasattr(model, "save_pretrained"):
        # Not strict: a tied weight may be there under one of its names only.
        unexpected = model.load_state_dict(weights, assign=True, strict=False).unexpected_keys
        if unexpected:
            raise TrainingFailed(
                f"the exported model has no place for {', '.join(unexpected)}",
                "the weights of the model that the recipe builds",
            )
        model.tie_weights()  # type: ignore[operator]
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        _save_own(model, weights, recipe.model.name, folder)
    if prepared.tokenizer is not None:
        prepared.tokenizer.save_pretrained(folder)
    about = {
        "task": recipe.task,
        "classes": prepared.classes,
        "image": prepared.image,
        **prepared.preprocessing,
    }
    (folder / "bigtrain.json").write_text(json.dumps(about, indent=2) + "\n")
    (folder / "README.md").write_text(_model_card(recipe, summary))


def _save_own(model: nn.Module, weights: dict[str, Tensor], name: str, folder: Path) -> None:
    """Weights, and what it takes to build the model again."""
    distinct: dict[str, Tensor] = {}
    stored: set[int] = set()  # addresses, so that tied tensors are written once
    for key, tensor in weights.items():
        address = tensor.data_ptr()
        if tensor.numel() and address in stored:
            continue
        stored.add(address)
        distinct[key] = tensor.contiguous()
    save_file(distinct, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": name, "args": model.bigtrain_args}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_exported(folder: Path, task: TaskName) -> nn.Module:
    """The model that a run has exported, or that was made smaller from one."""
    config = json.loads((folder / "config.json").read_text())
    if (folder / quantized.FILE_NAME).is_file():
        return quantized.load_quantized(folder, _unfilled(folder, task, config))
    if "architecture" in config:
        model = _unfilled(folder, task, config)
        load_own(model, folder)
        return model
    from bigtrain.models.hf import auto_class

    auto = auto_class(task, config["model_type"])
    transformer: nn.Module = auto.from_pretrained(folder, dtype=torch.float32)
    return transformer


def _unfilled(folder: Path, task: TaskName, config: dict[str, Any]) -> nn.Module:
    """A model of the folder's architecture, with random weights."""
    if "architecture" in config:
        return model_class(config["architecture"])(**config["args"])
    from transformers import AutoConfig

    from bigtrain.models.hf import auto_class

    auto = auto_class(task, config["model_type"])
    model: nn.Module = auto.from_config(
        AutoConfig.from_pretrained(folder), trust_remote_code=False, dtype=torch.float32
    )
    return model


def _model_card(recipe: Recipe, summary: dict[str, Any]) -> str:
    """What was trained on what, and what was measured (README.md of the export)."""
    rows = []
    for name, value in summary.items():
        if isinstance(value, float):
            rows.append(f"| {name} | {value:.6g} |")
    measured = "\n".join(rows)
    origin = "random weights"
    if recipe.model.pretrained:
        origin = f"pretrained {recipe.model.pretrained}"
    library = "transformers" if TASK_SPECS[recipe.task].is_language else "bigtrain"
    return f"""---
library_name: {library}
tags: [bigtrain, {recipe.task}]
---
# {recipe.name}

A {recipe.model.name} model for {recipe.task}, trained with bigtrain from {origin} on \
`{recipe.data.train}`:
{summary["step"]:,} steps, {summary["samples"]:,} samples, seed {recipe.seed}. \
`recipe.yaml` in the run directory trains it again.

| held-out metric | value |
|---|---|
{measured}
"""
