"""From the recipe's model section to a module: ours, one of transformers', or the user's."""

from typing import Any

from torch import nn

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import PreparedData
from bigtrain.models.arguments import Shard, on_meta
from bigtrain.models.own import MODELS, build_own


def build_model(recipe: Recipe, prepared: PreparedData, shard: Shard | None = None) -> nn.Module:
    """The model with its starting weights, on the CPU (or inside `torch.device("meta")` on none).

    The weights depend on the seed alone, never on the engine or the number of ranks. `shard` is
    called with parameters as soon as they hold their values, so that a sharding engine can free
    what other ranks keep. Raises RequestError for names, arguments and shapes that do not fit.
    """
    name = recipe.model.name
    if name in MODELS or ":" in name:
        model = build_own(recipe, prepared)
    else:
        # transformers takes two seconds to import, which our own models need not pay
        from bigtrain.models.hf import build_transformer

        model = build_transformer(recipe, prepared, shard)
    if recipe.model.prune and not on_meta():
        from bigtrain.models.prune import prune_model

        prune_model(model, recipe.model.prune)
    if recipe.model.qat and not on_meta():
        from bigtrain.models.qat import train_quantization_aware

        train_quantization_aware(model, recipe.model.qat)
    if shard is not None:
        shard(list(model.parameters()))
    return model


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The linear layer that makes a language model's logits, as `get_output_embeddings` says.

    None for a model without that method, or without one plain such layer.
    """
    get_layer: Any = getattr(model, "get_output_embeddings", None)
    layer = get_layer() if callable(get_layer) else None
    return layer if type(layer) is nn.Linear else None
