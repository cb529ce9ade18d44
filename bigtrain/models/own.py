"""Our own models, and a user's class."""

import importlib
import inspect
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import PreparedData
from bigtrain.errors import RequestError
from bigtrain.models.arguments import data_shapes, on_meta, refuse_small_vocabulary, refuse_unknown
from bigtrain.models.cnn import CNN
from bigtrain.models.mlp import MLP, Linear
from bigtrain.models.rnn import RNN

MODELS: dict[str, type[nn.Module]] = {"cnn": CNN, "rnn": RNN, "mlp": MLP, "linear": Linear}
_SERVES = {
    "cnn": ("image_classification",),
    "rnn": ("causal_lm", "text_classification", "image_classification"),
    "mlp": ("image_classification", "tabular_classification", "regression"),
    "linear": ("image_classification", "tabular_classification", "regression"),
}


def model_class(name: str) -> type[nn.Module]:
    """One of MODELS, or the class that `package.module:Class` stands for, found from here or along PYTHONPATH."""
    if name in MODELS:
        return MODELS[name]
    module_name, _, class_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as problem:  # the user's module may fail in any way
        raise RequestError(
            f"model.name {name!r}: {type(problem).__name__}: {problem}",
            "package.module:Class, importable from here",
            "PYTHONPATH=FOLDER",
        ) from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise RequestError(
            f"model.name {name!r} is not a torch.nn.Module class", "a subclass of torch.nn.Module"
        )
    return found


def build_own(recipe: Recipe, prepared: PreparedData) -> nn.Module:
    """Our model, or the user's, with the recipe's arguments, and those shapes of the data that it has a name for."""
    name = recipe.model.name
    if name in _SERVES and recipe.task not in _SERVES[name]:
        able = [other for other, tasks in _SERVES.items() if recipe.task in tasks]
        expected = (
            f"one of: {', '.join(able)}, or a transformers model type"
            if able
            else "a transformers model type, e.g. t5"
        )
        raise RequestError(f"model {name} does not serve task {recipe.task}", expected)
    cls = model_class(name)
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        refuse_unknown(recipe, parameters, f"one of: {', '.join(parameters)}")
    facts = {
        key: value for key, value in data_shapes(recipe, prepared).items() if key in parameters
    }
    if recipe.model.dropout is not None and "dropout" not in parameters:
        raise RequestError(f"model.dropout: {name} takes no dropout", "leave model.dropout out")
    args = facts | recipe.model.args
    refuse_small_vocabulary(prepared, args.get("vocab_size"))
    torch.manual_seed(
        recipe.seed
    )  # modules are built in the same order everywhere, so the draws are the same
    try:
        model = cls(**args)
    except Exception as problem:  # the constructor may refuse in any way
        refusal = f"{name} refuses {args}: {type(problem).__name__}: {problem}"
        raise RequestError(f"model.args: {refusal}", "arguments it accepts") from None
    model.bigtrain_args = args  # type: ignore[assignment]  # what export writes down to build it again
    if recipe.model.pretrained and not on_meta():
        load_own(model, Path(recipe.model.pretrained))
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
