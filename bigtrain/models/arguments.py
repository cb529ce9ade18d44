"""Arguments of models: what the data decides, and what is refused."""

import difflib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import PreparedData
from bigtrain.errors import RequestError

Shard = Callable[[list[nn.Parameter]], None]


def on_meta() -> bool:
    return torch.get_default_device().type == "meta"


def data_shapes(recipe: Recipe, prepared: PreparedData) -> dict[str, Any]:
    """What the data says of a model's shape, by the argument names our models (and a user's class) may have."""
    classes = len(prepared.classes) or (
        prepared.vocab_size if recipe.task in ("causal_lm", "seq2seq") else 1
    )
    facts: dict[str, Any] = {
        "num_outputs": classes,
        "num_classes": classes,
        "vocab_size": prepared.vocab_size,
    }
    facts |= {
        "per_position": recipe.task == "causal_lm",
        "in_features": prepared.features,
        "dropout": recipe.model.dropout,
    }
    if prepared.image is not None:
        channels, height, width = prepared.image
        facts |= {
            "in_channels": channels,
            "image_size": height,
            "in_features": channels * height * width,
        }
        facts |= {"row_width": channels * width}
    return {key: value for key, value in facts.items() if value is not None}


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
    if size is not None and prepared.vocab_size is not None and size < prepared.vocab_size:
        tokens = prepared.vocab_size
        raise RequestError(
            f"the tokenizer has {tokens:,} entries, but the model's vocabulary {size:,}: some token ids would be beyond it",
            f"model.args.vocab_size of at least {tokens}",
            "leave model.args.vocab_size out",
        )


def nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
