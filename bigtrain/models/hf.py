"""Models of transformers, by model type and arguments, or from pretrained safetensors. Remote code is never run."""

import math
from typing import Any, cast

import torch
import transformers
from blake3 import blake3
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import PreparedData
from bigtrain.errors import RequestError
from bigtrain.models.arguments import (
    Shard,
    nearest,
    on_meta,
    refuse_small_vocabulary,
    refuse_unknown,
)
from bigtrain.models.own import MODELS

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
AUTO = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image_classification": "AutoModelForImageClassification",
    "text_classification": "AutoModelForSequenceClassification",
}


def build_transformer(
    recipe: Recipe, prepared: PreparedData, shard: Shard | None
) -> PreTrainedModel:
    """The model for the recipe's task, from its config or from pretrained weights."""
    config = _config(recipe, prepared)
    auto = auto_class(recipe.task, recipe.model.name)
    if recipe.model.pretrained and not on_meta():
        model = _pretrained(auto, recipe, config)
    else:
        try:
            with torch.device("meta"):
                model = auto.from_config(config, trust_remote_code=False)
        except (
            TypeError,
            ValueError,
            KeyError,
            AssertionError,
            AttributeError,
            ZeroDivisionError,
        ) as problem:
            found = f"model {recipe.model.name} with {recipe.model.args}: {problem}"
            raise RequestError(found, "a consistent model.args") from None
        if not on_meta():
            materialise(model, recipe.seed, shard)
    for module in model.modules():
        if recipe.model.dropout is not None and isinstance(module, nn.Dropout):
            module.p = recipe.model.dropout
    return model


def auto_class(task: str, model_name: str) -> Any:
    """The transformers Auto class for a task."""
    if task not in AUTO:
        raise RequestError(
            f"model {model_name}: transformers has none for task {task}",
            "model mlp, linear, or package.module:Class",
        )
    return getattr(transformers, AUTO[task])


def _config(recipe: Recipe, prepared: PreparedData) -> PreTrainedConfig:
    """The model's configuration: the recipe's arguments and what the data says, every key known to the model."""
    name, args, pretrained = recipe.model.name, recipe.model.args, recipe.model.pretrained
    default = _pretrained_config(pretrained, name) if pretrained else _default_config(name)
    known = set(default.to_dict()) | set(getattr(type(default), "attribute_map", {}))
    refuse_unknown(recipe, known, f"arguments of {type(default).__name__}")
    facts = {
        key: value
        for key, value in _facts(recipe, prepared).items()
        if key in known or key == "id2label"
    }
    vocab_size = args.get(
        "vocab_size", getattr(default.get_text_config(), "vocab_size", None) if pretrained else None
    )
    refuse_small_vocabulary(prepared, vocab_size)
    if prepared.vocab_size is not None and vocab_size is not None:
        facts["vocab_size"] = vocab_size
    dropouts = _dropouts(default, recipe.model.dropout)
    if recipe.model.dropout is not None and not dropouts:
        raise RequestError(f"model.dropout: {name} has no dropout", "leave model.dropout out")
    settings = facts | dropouts | args
    try:
        if pretrained:
            config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False, **settings)
        else:
            config = AutoConfig.for_model(name, **settings)
    except Exception as problem:  # each config checks its arguments in its own way
        raise RequestError(
            f"model.args: {name} refuses them: {str(problem).splitlines()[0]}",
            "arguments it accepts",
        ) from None
    _check_length(recipe, config)
    return config


def _default_config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(name)
    except ValueError:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        raise RequestError(
            f"model.name {name!r} is unknown{nearest(name, [*CONFIG_MAPPING_NAMES, *MODELS])}",
            f"one of {', '.join(MODELS)}, a transformers model type (gpt2, llama, t5, bert, resnet …), or package.module:Class",
        ) from None


def _pretrained_config(folder: str, name: str) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as problem:
        raise RequestError(
            f"model.pretrained: no model at {folder!r} ({str(problem).splitlines()[0]})",
            "a local folder or a hub id",
        ) from None
    if config.model_type != name:
        raise RequestError(
            f"model.pretrained: {folder} holds a {config.model_type}, but model.name is {name}",
            "the same type",
        )
    return config


def _facts(recipe: Recipe, prepared: PreparedData) -> dict[str, Any]:
    """What the data knows and the model's configuration may ask for."""
    facts: dict[str, Any] = {}
    if prepared.tokenizer is not None:
        pad, end = prepared.tokenizer.pad_token_id, prepared.tokenizer.eos_token_id
        start = end if prepared.tokenizer.bos_token_id is None else prepared.tokenizer.bos_token_id
        ids = {"pad_token_id": pad, "eos_token_id": end, "bos_token_id": start}
        facts |= {"vocab_size": prepared.vocab_size} | {
            key: number for key, number in ids.items() if number is not None
        }
        if recipe.task == "causal_lm":
            facts["is_decoder"] = True  # else BERT and its family look ahead
        if recipe.task == "seq2seq":
            facts["decoder_start_token_id"] = pad
    if prepared.classes:
        numbers = {label: number for number, label in enumerate(prepared.classes)}
        facts |= {"id2label": dict(enumerate(prepared.classes)), "label2id": numbers}
    if prepared.image is not None:
        facts |= {"num_channels": prepared.image[0], "image_size": prepared.image[1]}
    return facts


def _dropouts(config: PreTrainedConfig, dropout: float | None) -> dict[str, float]:
    """Every dropout of a configuration set to one value (each architecture has its own names for them)."""
    if dropout is None:
        return {}
    numbers = {
        key: value for key, value in config.to_dict().items() if isinstance(value, int | float)
    }
    return {key: dropout for key in numbers if "dropout" in key or key.endswith("pdrop")}


def _check_length(recipe: Recipe, config: PreTrainedConfig) -> None:
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if recipe.data.seq_len > (most or 0) > 0 and recipe.task in (
        "causal_lm",
        "text_classification",
        "seq2seq",
    ):
        raise RequestError(
            f"data.seq_len is {recipe.data.seq_len}, but the model has {most} positions",
            f"data.seq_len of at most {most}",
            f"data.seq_len={most}, or more positions in model.args",
        )


def _pretrained(auto: Any, recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    folder = recipe.model.pretrained
    torch.manual_seed(recipe.seed)  # for a new head
    try:
        model, report = auto.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
        raise RequestError(
            f"model.pretrained: {folder} cannot be loaded: {str(problem).splitlines()[0]}",
            "safetensors of this architecture and shape",
        ) from None
    # A new head for a new task is drawn; a layer that the file does not have would be a silent lie.
    if lacking := [
        name for name in report["missing_keys"] if any(part.isdigit() for part in name.split("."))
    ]:
        raise RequestError(
            f"model.pretrained: {folder} has no {lacking[0]}", "all layers of the model"
        )
    return model


def materialise(model: PreTrainedModel, seed: int, shard: Shard | None = None) -> None:
    """Give a model on the meta device memory and its starting weights, module by module.

    Each module draws from a seed made of (seed, its name): the draws depend neither on the order nor on the engine.
    transformers' own rules (`_init_weights`) say what is drawn. With `shard`, an element of a list of layers is
    handed over as soon as it is drawn, so a rank holds one layer and its shards, not the model.
    (Building inside `deepspeed.zero.Init` instead starts wrongly: transformers#43847, #44236.)
    """
    with torch.no_grad():
        _materialise(model, "", model, seed, shard, {})
    model.tie_weights()
    _all_drawn(model)


def _materialise(
    module: nn.Module,
    name: str,
    owner: PreTrainedModel,
    seed: int,
    shard: Shard | None,
    made: dict[int, nn.Parameter],
) -> None:
    owner = module if isinstance(module, PreTrainedModel) else owner
    for key, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            fresh = nn.Parameter(
                torch.full_like(parameter, math.nan, device="cpu"), parameter.requires_grad
            )
            module._parameters[key] = made.setdefault(id(parameter), fresh)
    for key, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[key] = torch.zeros_like(buffer, device="cpu")
    for key, child in module.named_children():
        _materialise(child, f"{name}.{key}", owner, seed, shard, made)
        if shard is not None and isinstance(module, nn.ModuleList):
            _all_drawn(child)
            shard(list(child.parameters()))
    torch.manual_seed(int.from_bytes(blake3(f"{seed}{name}".encode()).digest(7), "big"))
    owner._init_weights(module)
    if hasattr(module, "reset_parameters") and any(
        p.isnan().any() for p in module.parameters(recurse=False)
    ):
        cast(
            Any, module
        ).reset_parameters()  # transformers has no rule for it (RegNet's squeeze-and-excitation, for one)


def _all_drawn(module: nn.Module) -> None:
    if left := [name for name, parameter in module.named_parameters() if parameter.isnan().any()]:
        raise RequestError(
            f"nothing gives {left[0]} of {type(module).__name__} a starting value",
            "another model type",
        )
