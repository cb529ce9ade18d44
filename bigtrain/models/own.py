"""Our own models, and a user's class."""

import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bigtrain.config.recipe import Recipe
from bigtrain.config.task_specs import TASK_SPECS, Data, Prediction, TaskName
from bigtrain.data.examples import PreparedData
from bigtrain.errors import RequestError
from bigtrain.models.arguments import (
    on_meta,
    refuse_small_vocabulary,
    refuse_unknown,
    shape_arguments,
)
from bigtrain.models.cnn import CNN
from bigtrain.models.mlp import MLP, Linear
from bigtrain.models.rnn import RNN
from bigtrain.models.weight_files import WEIGHTS, weight_files


@dataclass(frozen=True)
class OwnModel:
    """One of our models: what it reads, and what it can predict from it."""

    model_class: type[nn.Module]
    data: tuple[Data, ...]
    predicts: tuple[Prediction, ...]

    def serves(self, task: TaskName) -> bool:
        spec = TASK_SPECS[task]
        return spec.data in self.data and spec.predicts in self.predicts


MODELS = {
    "cnn": OwnModel(CNN, ("image",), ("class",)),
    "rnn": OwnModel(RNN, ("text", "image"), ("next_token", "class")),
    "mlp": OwnModel(MLP, ("image", "table"), ("class", "number")),
    "linear": OwnModel(Linear, ("image", "table"), ("class", "number")),
}


def model_class(name: str) -> type[nn.Module]:
    """One of MODELS, or a user's `package.module:Class`, from this folder or along PYTHONPATH."""
    if name in MODELS:
        return MODELS[name].model_class
    module_name, _, class_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        value = getattr(importlib.import_module(module_name), class_name)
    except Exception as problem:  # the user's module may fail in any way
        raise RequestError(
            f"model.name {name!r}: {type(problem).__name__}: {problem}",
            "package.module:Class, importable from here",
            "PYTHONPATH=FOLDER",
        ) from None
    if not (isinstance(value, type) and issubclass(value, nn.Module)):
        raise RequestError(
            f"model.name {name!r} is not a torch.nn.Module class", "a subclass of torch.nn.Module"
        )
    return value


def build_own(recipe: Recipe, prepared: PreparedData) -> nn.Module:
    """Our model or the user's, with the recipe's arguments and with the data's shape.

    It gets those arguments of the shape that its constructor has a name for.
    """
    name = recipe.model.name
    if name in MODELS and not MODELS[name].serves(recipe.task):
        _refuse_task(recipe)
    cls = model_class(name)
    parameters = inspect.signature(cls).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if not takes_any:
        refuse_unknown(recipe, parameters, f"one of: {', '.join(parameters)}")
    from_data: dict[str, Any] = {}
    for argument, value in shape_arguments(recipe, prepared).items():
        if argument in parameters:
            from_data[argument] = value
    from_recipe: dict[str, Any] = {}
    if recipe.model.dropout is not None:
        if "dropout" not in parameters:
            raise RequestError(f"model.dropout: {name} takes no dropout", "leave model.dropout out")
        from_recipe["dropout"] = recipe.model.dropout
    from_recipe |= recipe.model.args
    arguments = from_data | from_recipe
    refuse_small_vocabulary(prepared, arguments.get("vocab_size"))
    # Modules are built in the same order everywhere, so the draws are the same on every rank.
    torch.manual_seed(recipe.seed)
    try:
        model = cls(**arguments)
    except Exception as problem:  # the constructor may refuse in any way
        raise RequestError(
            f"model.args: {name} refuses {arguments}: {type(problem).__name__}: {problem}",
            "arguments it accepts",
        ) from None
    # Kept on the module, because it is wrapped and sharded before export writes them down.
    model.bigtrain_args = arguments  # type: ignore[assignment]
    if recipe.model.pretrained and not on_meta():
        load_own(model, Path(recipe.model.pretrained))
    return model


def _refuse_task(recipe: Recipe) -> None:
    able = [name for name, model in MODELS.items() if model.serves(recipe.task)]
    expected = "a transformers model type, e.g. t5"
    if able:
        expected = f"one of: {', '.join(able)}, or a transformers model type"
    raise RequestError(f"model {recipe.model.name} does not serve task {recipe.task}", expected)


def load_own(model: nn.Module, folder: Path) -> None:
    """Fill one of our models, or a user's, with the weights of an exported run.

    Raises RequestError unless the file has every weight of the model, and no other.
    """
    path = folder / WEIGHTS
    weights: dict[str, Tensor] = {}
    try:
        for file in weight_files(folder) or [path]:
            weights |= load_file(file)
    except (OSError, ValueError, KeyError, SafetensorError) as problem:
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
    missing = model.load_state_dict(weights, strict=False).missing_keys
    missing = [name for name in missing if not _is_tied(name, weights, expected)]
    if missing:
        raise RequestError(f"model.pretrained: {path} has no {missing[0]}", "the same architecture")


def _is_tied(name: str, stored: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    """Whether a tensor of the model is the same as one that is stored (under one name only)."""
    return any(state[other].data_ptr() == state[name].data_ptr() for other in stored)
