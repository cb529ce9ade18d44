"""Models of transformers, by model type and arguments, or from pretrained safetensors.

Remote code is never run.
"""

import math
from typing import Any

import torch
import transformers
from blake3 import blake3
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.activations import (
    AccurateGELUActivation,
    FastGELUActivation,
    NewGELUActivation,
)

from bigtrain.config.recipe import Recipe
from bigtrain.config.task_specs import TASK_SPECS, TaskName
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

# GELU's approximation by tanh, written out.
_GELU_BY_TANH = (NewGELUActivation, FastGELUActivation, AccurateGELUActivation)

# What a model's constructor raises for arguments that do not fit each other.
_CONSTRUCTOR_ERRORS = (
    TypeError,
    ValueError,
    KeyError,
    AssertionError,
    AttributeError,
    ZeroDivisionError,
)


def build_transformer(
    recipe: Recipe, prepared: PreparedData, shard: Shard | None
) -> PreTrainedModel:
    """The model for the recipe's task, from its config or from pretrained weights."""
    config = _config(recipe, prepared)
    auto = auto_class(recipe.task, recipe.model.name)
    if recipe.model.pretrained and not on_meta():
        model = _pretrained(auto, recipe, config, prepared)
    else:
        model = _without_memory(auto, recipe, config)
        if not on_meta():
            materialise(model, recipe.seed, shard)
        _use_fused_gelu(model)
    _look_at_no_values(model)
    if recipe.model.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = recipe.model.dropout
    return model


def _use_fused_gelu(model: nn.Module) -> None:
    """One kernel in place of the eight that transformers has for the same formula of GELU.

    As it says there: equivalent, and much faster, but not the same to the last bit. So weights that
    were trained with the other keep it.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, _GELU_BY_TANH):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _look_at_no_values(model: PreTrainedModel) -> None:
    """Leave out what makes the host wait for the device in every forward pass.

    Samples here are never packed by their positions: looking for that also costs flash attention
    under torch.compile. And a warning of padding without a mask, which nobody sees.
    """
    library: Any = masking_utils
    library.find_packed_sequence_indices = _do_nothing
    owner: Any
    for owner in filter(_is_transformers, model.modules()):
        owner.warn_if_padding_and_no_attention_mask = _do_nothing


def _is_transformers(module: nn.Module) -> bool:
    return isinstance(module, PreTrainedModel)


def _do_nothing(*_: Any) -> None:
    """In place of functions of transformers."""


def auto_class(task: TaskName, model_name: str) -> Any:
    """The transformers Auto class for a task. Raises RequestError if there is none."""
    name = TASK_SPECS[task].auto_class
    if name is None:
        raise RequestError(
            f"model {model_name}: transformers has none for task {task}",
            "model mlp, linear, or package.module:Class",
        )
    return getattr(transformers, name)


def _without_memory(auto: Any, recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False)
    except _CONSTRUCTOR_ERRORS as problem:
        raise RequestError(
            f"model {recipe.model.name} with {recipe.model.args}: {problem}",
            "a consistent model.args",
        ) from None


def _config(recipe: Recipe, prepared: PreparedData) -> PreTrainedConfig:
    """The model's configuration: its defaults, then what the data says, then what the recipe says.

    Every argument of the recipe must be one that the model knows.
    """
    name = recipe.model.name
    pretrained = recipe.model.pretrained
    defaults = _pretrained_config(pretrained, name) if pretrained else _default_config(name)
    known = set(defaults.to_dict()) | set(getattr(type(defaults), "attribute_map", {}))
    refuse_unknown(recipe, known, f"arguments of {type(defaults).__name__}")
    from_data = {}
    for key, value in _data_arguments(recipe, prepared).items():
        # transformers has these two for every model, whether they are set or not.
        if key in known or key in ("id2label", "decoder_start_token_id"):
            from_data[key] = value
    vocab_size = recipe.model.args.get("vocab_size")
    if vocab_size is None and pretrained:
        vocab_size = getattr(defaults.get_text_config(), "vocab_size", None)
    refuse_small_vocabulary(prepared, vocab_size)
    if prepared.vocab_size is not None and vocab_size is not None:
        from_data["vocab_size"] = vocab_size  # larger than the tokenizer needs
    dropouts = _dropout_arguments(defaults, recipe.model.dropout)
    if recipe.model.dropout is not None and not dropouts:
        raise RequestError(f"model.dropout: {name} has no dropout", "leave model.dropout out")
    from_recipe = dropouts | recipe.model.args
    config_kwargs = from_data | from_recipe
    try:
        if pretrained:
            config = AutoConfig.from_pretrained(
                pretrained, trust_remote_code=False, **config_kwargs
            )
        else:
            config = AutoConfig.for_model(name, **config_kwargs)
    except Exception as problem:  # each config checks its arguments in its own way
        raise RequestError(
            f"model.args: {name} refuses them: {str(problem).splitlines()[0]}",
            "arguments it accepts",
        ) from None
    _refuse_long_samples(recipe, config)
    return config


def _default_config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(name)
    except ValueError:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        raise RequestError(
            f"model.name {name!r} is unknown{nearest(name, [*CONFIG_MAPPING_NAMES, *MODELS])}",
            f"one of {', '.join(MODELS)}, a transformers model type"
            " (gpt2, llama, t5, bert, resnet …), or package.module:Class",
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


def _data_arguments(recipe: Recipe, prepared: PreparedData) -> dict[str, Any]:
    """What the data decides, by the names that transformers' configurations have for it."""
    arguments: dict[str, Any] = {}
    if prepared.tokenizer is not None:
        arguments |= _token_arguments(recipe, prepared.tokenizer)
        arguments["vocab_size"] = prepared.vocab_size
    if prepared.classes:
        names = dict(enumerate(prepared.classes))
        arguments["id2label"] = names
        arguments["label2id"] = {name: number for number, name in names.items()}
    if prepared.image is not None:
        channels, height, _ = prepared.image
        arguments["num_channels"] = channels
        arguments["image_size"] = height
    return arguments


def _token_arguments(recipe: Recipe, tokenizer: Any) -> dict[str, Any]:
    """The ids of special tokens, and whether the model may look ahead."""
    spec = TASK_SPECS[recipe.task]
    begin = tokenizer.bos_token_id
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id if begin is None else begin,
    }
    arguments: dict[str, Any] = {key: value for key, value in ids.items() if value is not None}
    if spec.predicts == "next_token":
        arguments["is_decoder"] = True  # else BERT and its family look ahead
    elif spec.predicts == "text":
        arguments["decoder_start_token_id"] = tokenizer.pad_token_id
    return arguments


def _dropout_arguments(config: PreTrainedConfig, dropout: float | None) -> dict[str, float]:
    """Every dropout of a configuration set to one value; each architecture has its own names."""
    arguments: dict[str, float] = {}
    if dropout is None:
        return arguments
    for key, value in config.to_dict().items():
        is_dropout = "dropout" in key or key.endswith("pdrop")
        if is_dropout and isinstance(value, int | float):
            arguments[key] = dropout
    return arguments


def _refuse_long_samples(recipe: Recipe, config: PreTrainedConfig) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if TASK_SPECS[recipe.task].data != "text" or not positions or positions < 0:
        return
    if recipe.data.seq_len > positions:
        raise RequestError(
            f"data.seq_len is {recipe.data.seq_len}, but the model has {positions} positions",
            f"data.seq_len of at most {positions}",
            f"data.seq_len={positions}, or more positions in model.args",
        )


def _pretrained(
    auto: Any, recipe: Recipe, config: PreTrainedConfig, prepared: PreparedData
) -> PreTrainedModel:
    """The pretrained weights; for other classes with a new head, which a note tells of."""
    folder = recipe.model.pretrained
    may_have_new_head = TASK_SPECS[recipe.task].has_labels
    torch.manual_seed(recipe.seed)  # for a new head
    try:
        model, report = auto.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=may_have_new_head,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
        raise RequestError(
            f"model.pretrained: {folder} cannot be loaded: {str(problem).splitlines()[0]}",
            "safetensors of this architecture and shape",
        ) from None
    # A new head for a new task is drawn; a layer that the file does not have would be a silent lie.
    drawn = sorted(name for name, *_ in report["mismatched_keys"])
    for name in drawn:
        if name.startswith(f"{model.base_model_prefix}."):
            raise RequestError(
                f"model.pretrained: {name} has another shape in {folder}", "the same architecture"
            )
    if drawn:
        count = len(prepared.classes)
        prepared.notes.append(f"{', '.join(drawn)}: drawn anew, for {count} other classes")
    for name in report["missing_keys"]:
        in_a_layer = any(part.isdigit() for part in name.split("."))
        if in_a_layer:
            raise RequestError(
                f"model.pretrained: {folder} has no {name}", "all layers of the model"
            )
    return model


def materialise(model: PreTrainedModel, seed: int, shard: Shard | None = None) -> None:
    """Give a model on the meta device memory and its starting weights, module by module.

    Each module draws from a seed made of (seed, its name): the draws depend neither on the order
    nor on the engine. transformers' own rules (`_init_weights`) say what is drawn. With `shard`, an
    element of a list of layers is passed to it as soon as it is drawn, so a rank holds one layer
    and its shards, not the model. (Building inside `deepspeed.zero.Init` instead starts wrongly:
    transformers#43847, #44236.)
    """
    with torch.no_grad():
        _materialise(model, "", model, seed, shard, {})
    model.tie_weights()
    _refuse_undrawn(model)


def _materialise(
    module: nn.Module,
    name: str,
    owner: PreTrainedModel,
    seed: int,
    shard: Shard | None,
    made: dict[int, nn.Parameter],
) -> None:
    """`owner` has the rules for `module`; `made`: old parameter's id → new one, for tied ones."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    for key, parameter in module._parameters.items():
        if parameter is not None and parameter.is_meta:
            # NaN until it is drawn, so that what no rule draws is found.
            undrawn = torch.full_like(parameter, math.nan, device="cpu")
            fresh = nn.Parameter(undrawn, parameter.requires_grad)
            module._parameters[key] = made.setdefault(id(parameter), fresh)
    for key, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[key] = torch.zeros_like(buffer, device="cpu")
    for key, child in module.named_children():
        _materialise(child, f"{name}.{key}", owner, seed, shard, made)
        if shard is not None and isinstance(module, nn.ModuleList):
            _refuse_undrawn(child)
            shard(list(child.parameters()))
    torch.manual_seed(int.from_bytes(blake3(f"{seed}{name}".encode()).digest(7), "big"))
    owner._init_weights(module)
    reset_parameters: Any = getattr(module, "reset_parameters", None)
    if reset_parameters is not None:
        own_parameters = module.parameters(recurse=False)
        if any(parameter.isnan().any() for parameter in own_parameters):
            # transformers has no rule for it (RegNet's squeeze-and-excitation, for one)
            reset_parameters()


def _refuse_undrawn(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.isnan().any():
            raise RequestError(
                f"nothing gives {name} of {type(module).__name__} a starting value",
                "another model type",
            )
