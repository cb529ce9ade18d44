"""The trained model as others load it: Hugging Face's format, or safetensors and a config."""

import json
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bigtrain.config.recipe import Recipe
from bigtrain.config.secrets import redact
from bigtrain.config.task_specs import TaskName
from bigtrain.data.examples import PreparedData
from bigtrain.errors import RequestError, TrainingFailed
from bigtrain.models import quantized
from bigtrain.models.build import build_model
from bigtrain.models.model_card import ExportOrigin, end_of_run, model_card
from bigtrain.models.model_inputs import describe_inputs
from bigtrain.models.own import MODELS, load_own, model_class
from bigtrain.models.weight_files import WEIGHTS, Tensors, weight_files, write_weight_files
from bigtrain.runs.directory import RunDir
from bigtrain.runs.hashes import file_hash, text_hash

DtypeName = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# In front of our models' names in config.json, where transformers' have their type.
OWN_TYPE = "bigtrain_"
ONNX_MODEL = "model.onnx"


class WeightSource(Protocol):
    """Whole parameters and buffers, one at a time."""

    def names(self) -> Collection[str]:
        """Under any one of its names where a tensor has several."""

    def read(self, name: str) -> Tensor:
        """On the CPU."""

    def dtype(self, name: str) -> torch.dtype | None:
        """Of the tensor that `read` returns; None: the model's own."""


class WeightsInMemory:
    """All of them at once."""

    def __init__(self, weights: Tensors) -> None:
        self.weights = weights

    def names(self) -> Collection[str]:
        return self.weights.keys()

    def read(self, name: str) -> Tensor:
        return self.weights[name]

    def dtype(self, name: str) -> torch.dtype:
        """ZeRO's weights are bf16 where the run's are."""
        return self.weights[name].dtype


class Stored(NamedTuple):
    """How weights are written."""

    dtype: DtypeName | None = None
    """Of parameters; buffers (BatchNorm's statistics) keep theirs. None: as they are trained."""
    max_bytes: int = 5_000_000_000
    """Of a file; 10⁹ are transformers' GB."""


AS_TRAINED = Stored()


def export_model(
    weights: Tensors,
    recipe: Recipe,
    prepared: PreparedData,
    folder: Path,
    summary: dict[str, Any],
    run: RunDir | None = None,
) -> None:
    """Write the whole `weights` (by parameter name, on the CPU) as a model that others can load.

    `folder` is replaced, once all is written. Raises TrainingFailed for weights that the recipe's
    model has no place for, or that are not all there.
    """
    with whole_folder(folder, replace=True) as partial_folder:
        source = WeightsInMemory(weights)
        write_export(source, recipe, prepared, partial_folder, end_of_run(summary, run))


@contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to write in, which becomes `folder` if nothing fails, and goes if anything does.

    One that is there and empty is filled: it may be the one that the user is in.
    """
    folder = folder.resolve()
    partial_folder = folder.with_name(f".{folder.name}.bigtrain-partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    try:
        yield partial_folder
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        if folder.is_dir() and not replace:
            for path in list(partial_folder.iterdir()):
                path.rename(folder / path.name)
            partial_folder.rmdir()
        else:
            partial_folder.rename(folder)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise


def write_export(
    source: WeightSource,
    recipe: Recipe,
    prepared: PreparedData,
    folder: Path,
    origin: ExportOrigin,
    stored: Stored = AS_TRAINED,
) -> dict[str, str]:
    """Write the model of the recipe with the weights of `source` to `folder`, which is empty.

    Returns the weight files' hashes by name. Holds no more than a layer in memory besides `source`.
    Raises TrainingFailed unless the model has a place for each weight, and each of its own is
    there.
    """
    with torch.device("meta"):
        model = build_model(recipe, prepared)
    hashes = _write_weights(model, source, folder, stored)
    if hasattr(model, "save_pretrained"):
        _write_transformers_config(model, folder, _dtype_in_file(model, source, stored))
    else:
        config = _own_config(model, recipe, prepared)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if prepared.tokenizer is not None:
        prepared.tokenizer.save_pretrained(folder)
    about = describe_inputs(recipe, prepared) | {"export": _identity(recipe, origin, hashes)}
    (folder / "bigtrain.json").write_text(json.dumps(about, indent=2) + "\n")
    write_card(folder, recipe, origin, hashes)
    return hashes


def write_card(folder: Path, recipe: Recipe, origin: ExportOrigin, hashes: dict[str, str]) -> None:
    """README.md, with a secret that the recipe may name redacted."""
    card = redact(model_card(recipe, origin, hashes))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _identity(recipe: Recipe, origin: ExportOrigin, hashes: dict[str, str]) -> str:
    """Which export it is: for people, and a hash of all its weights."""
    return f"{recipe.name}, {origin.weights}, {_weights_in_identity(hashes)}"


def _weights_in_identity(hashes: dict[str, str]) -> str:
    return f"weights {text_hash(json.dumps(hashes, sort_keys=True))[:16]}"


def damaged_weight_files(folder: Path) -> list[str]:
    """The names of an export's weight files that are not as they were written.

    By the hash of all in bigtrain.json, which exports of the first versions do not have, and those
    of each in the model card.
    """
    identity = json.loads((folder / "bigtrain.json").read_text()).get("export", "")
    hashes = {}
    for path in weight_files(folder):
        hashes[path.name] = file_hash(path) if path.is_file() else "missing"
    if not identity or identity.endswith(_weights_in_identity(hashes)):
        return []
    card_file = folder / "README.md"
    card = card_file.read_text(encoding="utf-8") if card_file.is_file() else ""
    damaged = [name for name, digest in hashes.items() if f"`{digest}`" not in card]
    return damaged or list(hashes) or [WEIGHTS]


def _write_weights(
    model: nn.Module, source: WeightSource, folder: Path, stored: Stored
) -> dict[str, str]:
    """The files' hashes by name."""
    stored_names = names_in_source(model, source.names())
    state = model.state_dict(keep_vars=True)
    layers = []
    converts = _has_conversions(model)
    for names in _layers(list(stored_names)) if converts else [[name] for name in stored_names]:
        layer = {}
        for name in names:
            own = state[name].detach()
            layer[name] = own.to(source.dtype(stored_names[name]) or own.dtype)
        layers.append(layer)

    def cast(name: str, tensor: Tensor) -> Tensor:
        is_number = tensor.is_floating_point() and isinstance(state[name], nn.Parameter)
        return tensor.to(DTYPES[stored.dtype]) if stored.dtype and is_number else tensor

    def in_file(layer: Tensors, read: bool) -> Tensors:
        tensors = {}
        for name, planned in layer.items():
            tensor = source.read(stored_names[name]) if read else planned
            tensors[name] = cast(name, tensor)
        return _as_transformers_saves(model, tensors) if converts else tensors

    planned = [in_file(layer, read=False) for layer in layers]

    def read_layer(number: int) -> Tensors:
        return in_file(layers[number], read=True)

    return write_weight_files(folder, planned, read_layer, stored.max_bytes)


def names_in_source(model: nn.Module, available: Collection[str]) -> dict[str, str]:
    """Each tensor's name in an export → its name in the source; tied ones once.

    Raises TrainingFailed for a name that is missing, and for one that is left over.
    """
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied.setdefault(id(tensor), []).append(name)
    # transformers loads a tied tensor under the name that is no key here.
    copies = getattr(model, "all_tied_weights_keys", None) or {}
    names: dict[str, str] = {}
    for group in tied.values():
        kept = next((name for name in group if name not in copies), group[0])
        found = next((name for name in group if name in available), None)
        if found is None:
            raise TrainingFailed(
                f"there is no {kept} among the weights", "all weights of the recipe's model"
            )
        names[kept] = found
    left_over = set(available).difference(*tied.values())
    if left_over:
        raise TrainingFailed(
            f"the exported model has no place for {', '.join(sorted(left_over))}",
            "the weights of the model that the recipe builds",
        )
    return names


def _layers(names: list[str]) -> list[list[str]]:
    """Which tensors are read together: those of a layer."""
    layers: dict[str, list[str]] = {}
    for name in names:
        numbered = re.match(r".*?\.\d+\.", name)
        layers.setdefault(numbered.group() if numbered else name, []).append(name)
    return list(layers.values())


def _has_conversions(model: nn.Module) -> bool:
    """Whether transformers stores it otherwise (experts: one tensor here, one each in the file)."""
    if not hasattr(model, "save_pretrained"):
        return False
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))  # type: ignore[arg-type]


def _as_transformers_saves(model: nn.Module, tensors: Tensors) -> Tensors:
    """The tensors as `save_pretrained` would write them."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, tensors))  # type: ignore[arg-type]


def _dtype_in_file(model: Any, source: WeightSource, stored: Stored) -> torch.dtype:
    """Of the parameters as they are written."""
    if stored.dtype:
        return DTYPES[stored.dtype]
    available = source.names()
    name = next(name for name, _ in model.named_parameters() if name in available)
    return source.dtype(name) or model.dtype


def _write_transformers_config(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """As its `save_pretrained` does."""
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _own_config(model: nn.Module, recipe: Recipe, prepared: PreparedData) -> dict[str, Any]:
    """What it takes to build the model again, here or by transformers (models/auto.py)."""
    name = recipe.model.name
    config: dict[str, Any] = {"architecture": name, "args": model.bigtrain_args}
    if name in MODELS:
        config |= {"model_type": OWN_TYPE + name, "task": recipe.task}
        if prepared.classes:
            config["id2label"] = dict(enumerate(prepared.classes))
            config["label2id"] = {label: number for number, label in enumerate(prepared.classes)}
    return config


def load_exported(folder: Path, task: TaskName) -> nn.Module:
    """The model that a run has exported, or that was made smaller from one.

    Raises RequestError for a folder that holds ONNX instead of weights.
    """
    if (folder / ONNX_MODEL).is_file() and not weight_files(folder):
        raise RequestError(
            f"{folder} holds an ONNX model, {ONNX_MODEL}, and no weights",
            "a folder that was exported without --format onnx",
            f"onnxruntime.InferenceSession({str(folder / ONNX_MODEL)!r})",
        )
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
