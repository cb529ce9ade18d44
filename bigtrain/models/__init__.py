"""From the recipe's model section to a module: our own models, any of transformers', or the user's class."""

import difflib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bigtrain.data.examples import Corpus
from bigtrain.errors import RequestError
from bigtrain.models.cnn import CNN
from bigtrain.models.mlp import MLP, Linear
from bigtrain.models.rnn import RNN
from bigtrain.recipe import Recipe

MODELS: dict[str, type[nn.Module]] = {"cnn": CNN, "rnn": RNN, "mlp": MLP, "linear": Linear}
Shard = Callable[[list[nn.Parameter]], None]


def build(recipe: Recipe, corpus: Corpus, shard: Shard | None = None) -> nn.Module:
    """The model with its starting weights, on the CPU (or on the meta device inside `torch.device("meta")`).

    The weights depend on the seed alone, never on the engine or the number of ranks. `shard` is called with
    parameters as soon as they hold their values, so that a sharding engine can let go of what is not its own.
    Raises RequestError for names, arguments and shapes that do not fit.
    """
    name = recipe.model.name
    if name in MODELS or ":" in name:
        model = _own(recipe, corpus)
    else:
        from bigtrain.models import hf  # two seconds that our own models need not pay

        model = hf.build(recipe, corpus, shard)
    if shard is not None:
        shard(list(model.parameters()))
    return model


def _on_meta() -> bool:
    return torch.get_default_device().type == "meta"


def shapes(recipe: Recipe, corpus: Corpus) -> dict[str, Any]:
    """What the data says of a model's shape, by the argument names our models (and a user's class) may have."""
    classes = len(corpus.classes) or (corpus.vocab_size if recipe.task in ("causal_lm", "seq2seq") else 1)
    facts: dict[str, Any] = {"num_outputs": classes, "num_classes": classes, "vocab_size": corpus.vocab_size}
    facts |= {"per_position": recipe.task == "causal_lm", "in_features": corpus.features, "dropout": recipe.model.dropout}
    if corpus.image is not None:
        channels, height, width = corpus.image
        facts |= {"in_channels": channels, "image_size": height, "in_features": channels * height * width}
        facts |= {"row_width": channels * width}
    return {key: value for key, value in facts.items() if value is not None}


_SERVES = {
    "cnn": ("image_classification",),
    "rnn": ("causal_lm", "text_classification", "image_classification"),
    "mlp": ("image_classification", "tabular_classification", "regression"),
    "linear": ("image_classification", "tabular_classification", "regression"),
}


def _class(name: str) -> type[nn.Module]:
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
        raise RequestError(f"model.name {name!r} is not a torch.nn.Module class", "a subclass of torch.nn.Module")
    return found


def _own(recipe: Recipe, corpus: Corpus) -> nn.Module:
    """Our model, or the user's, with the recipe's arguments, and those shapes of the data that it has a name for."""
    name = recipe.model.name
    if name in _SERVES and recipe.task not in _SERVES[name]:
        able = [other for other, tasks in _SERVES.items() if recipe.task in tasks]
        expected = f"one of: {', '.join(able)}, or a transformers model type" if able else "a transformers model type, e.g. t5"
        raise RequestError(f"model {name} does not serve task {recipe.task}", expected)
    cls = _class(name)
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        refuse_unknown(recipe, parameters, f"one of: {', '.join(parameters)}")
    facts = {key: value for key, value in shapes(recipe, corpus).items() if key in parameters}
    if recipe.model.dropout is not None and "dropout" not in parameters:
        raise RequestError(f"model.dropout: {name} takes no dropout", "leave model.dropout out")
    args = facts | recipe.model.args
    refuse_small_vocabulary(corpus, args.get("vocab_size"))
    torch.manual_seed(recipe.seed)  # modules are built in the same order everywhere, so the draws are the same
    try:
        model = cls(**args)
    except Exception as problem:  # the constructor may refuse in any way
        refusal = f"{name} refuses {args}: {type(problem).__name__}: {problem}"
        raise RequestError(f"model.args: {refusal}", "arguments it accepts") from None
    model.bigtrain_args = args  # type: ignore[assignment]  # what export writes down to build it again
    if recipe.model.pretrained and not _on_meta():
        _load_own(model, Path(recipe.model.pretrained))
    return model


def refuse_unknown(recipe: Recipe, known: Collection[str], expected: str) -> None:
    """Raises RequestError for an argument that the model does not know."""
    for key in recipe.model.args:
        if key not in known:
            raise RequestError(f"model.args.{key}: {recipe.model.name} has no such argument{nearest(key, known)}", expected)


def refuse_small_vocabulary(corpus: Corpus, size: int | None) -> None:
    """Raises RequestError for a model of `size` token ids, if the data has more."""
    if size is not None and corpus.vocab_size is not None and size < corpus.vocab_size:
        tokens = corpus.vocab_size
        raise RequestError(
            f"the tokenizer has {tokens:,} entries, but the model's vocabulary {size:,}: some token ids would be beyond it",
            f"model.args.vocab_size of at least {tokens}",
            "leave model.args.vocab_size out",
        )


def nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def save_own(model: nn.Module, weights: dict[str, Tensor], name: str, folder: Path) -> None:
    """Weights and what it takes to build the model again; tied tensors once."""
    kept: dict[int | str, tuple[str, Tensor]] = {}
    for key, tensor in weights.items():
        kept.setdefault(tensor.data_ptr() if tensor.numel() else key, (key, tensor.contiguous()))
    save_file(dict(kept.values()), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architecture": name, "args": model.bigtrain_args}, indent=2) + "\n")


def load_exported(folder: Path, task: str) -> nn.Module:
    """The model that a run has exported."""
    config = json.loads((folder / "config.json").read_text())
    if "architecture" not in config:
        from bigtrain.models import hf

        whole: nn.Module = hf.auto_class(task, config["model_type"]).from_pretrained(folder, dtype=torch.float32)
        return whole
    model = _class(config["architecture"])(**config["args"])
    _load_own(model, folder)
    return model


def _load_own(model: nn.Module, folder: Path) -> None:
    """Weights of one of our models, or of a user's class, from an exported run."""
    path = folder / "model.safetensors"
    try:
        weights = load_file(path)
    except (OSError, ValueError, SafetensorError) as problem:
        raise RequestError(f"model.pretrained: {path} cannot be read ({problem})", "a folder with model.safetensors") from None
    expected = model.state_dict()
    for name, tensor in weights.items():
        if name not in expected or expected[name].shape != tensor.shape:
            has = tuple(expected[name].shape) if name in expected else "no such tensor"
            raise RequestError(
                f"model.pretrained: {path} holds {name} {tuple(tensor.shape)}; the model has {has}", "the same architecture"
            )
    lacking = model.load_state_dict(weights, strict=False).missing_keys
    alike = {expected[name].data_ptr() for name in weights}  # tied tensors are stored once
    if lacking := [name for name in lacking if expected[name].data_ptr() not in alike]:
        raise RequestError(f"model.pretrained: {path} has no {lacking[0]}", "the same architecture")
