"""Arguments of models: what the data decides, and what is refused."""

import difflib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from bigtrain.config.recipe import Recipe
from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.data.examples import PreparedData
from bigtrain.errors import RequestError

Shard = Callable[[list[nn.Parameter]], None]


def on_meta() -> bool:
    """Whether models are being built without memory, inside `torch.device("meta")`."""
    return torch.get_default_device().type == "meta"


def shape_arguments(recipe: Recipe, prepared: PreparedData) -> dict[str, Any]:
    """The model's shape as the data has it, by all names that our models or a user's may use."""
    spec = TASK_SPECS[recipe.task]
    num_outputs: int | None = 1
    if spec.has_labels:
        num_outputs = len(prepared.classes)
    elif spec.is_language:
        num_outputs = prepared.vocab_size
    arguments = {
        "num_outputs": num_outputs,
        "num_classes": num_outputs,
        "vocab_size": prepared.vocab_size,
        "per_position": spec.is_packed,
        "in_features": prepared.features,
        "cardinalities": prepared.cardinalities or None,
    }
    if prepared.image is not None:
        channels, height, width = prepared.image
        arguments |= {
            "in_channels": channels,
            "image_size": height,
            "in_features": channels * height * width,
            "row_width": channels * width,
        }
    return {name: value for name, value in arguments.items() if value is not None}


def refuse_unknown(recipe: Recipe, known: Collection[str], expected: str) -> None:
    """Raises RequestError for an argument that the model does not know."""
    for key in recipe.model.args:
        if key not in known:
            raise RequestError(
                f"model.args.{key}: {recipe.model.name} has no such argument{nearest(key, known)}",
                expected,
            )


def refuse_small_vocabulary(prepared: PreparedData, size: int | None) -> None:
    """Raises RequestError for a model of `size` token ids, if the data has more."""
    if size is None or prepared.vocab_size is None or size >= prepared.vocab_size:
        return
    raise RequestError(
        f"the tokenizer has {prepared.vocab_size:,} entries, but the model's vocabulary {size:,}:"
        " some token ids would be beyond it",
        f"model.args.vocab_size of at least {prepared.vocab_size}",
        "leave model.args.vocab_size out",
    )


def nearest(name: str, known: Collection[str]) -> str:
    """`; did you mean …?`, or nothing if no known name is like it."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
