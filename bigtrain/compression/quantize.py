"""From an exported model to one with int8 or int4 weights (models/quantized.py has the format)."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bigtrain.errors import RequestError
from bigtrain.models.quantized import FILE_NAME, GROUP, Quantization, Quantized, pack_int4


def refuse_without_torchao() -> None:
    """Raises RequestError unless torchao is installed."""
    if importlib.util.find_spec("torchao") is None:
        raise RequestError(
            "quantization needs torchao, which is not installed",
            "the extra `compress`",
            "pip install 'bigtrain[compress]'",
        )


def refuse_quantization(kind: Quantization, model: nn.Module) -> None:
    """Raises RequestError for a model that has no weights that `kind` is for."""
    name = type(model).__name__
    if kind == "int8" and not any(type(module) is nn.Linear for module in model.modules()):
        raise RequestError(
            f"{name} has no linear layer, and int8 computes in linear layers",
            "a model with linear layers",
            "no --int8 for this model",
        )
    if kind == "int4" and not any(_fits_int4(p) for p in _not_embedded(model).values()):
        raise RequestError(
            f"{name} cannot take int4: no weight has rows of a multiple of {GROUP} elements",
            f"rows that divide into groups of {GROUP} neighbours with one scale each",
            "--int8, or widths in model.args that are multiples of 32",
        )


def write_quantized(source: Path, model: nn.Module, kind: Quantization, target: Path) -> None:
    """Write the exported `model` of the folder `source` to the new folder `target`, quantized.

    Weights with two dimensions or more become integers; biases and norms stay as they are. In
    int4, embeddings and what does not divide into groups are int8.
    """
    in_int4: set[str] = set()
    if kind == "int4":
        for name, parameter in _not_embedded(model).items():
            if _fits_int4(parameter):
                in_int4.add(name)
    tensors: dict[str, Tensor] = {}
    for name, tensor in _plain(model).items():
        tensors[name] = tensor.contiguous()
    for name, parameter in model.named_parameters():  # tied ones once
        if parameter.ndim < 2:
            continue
        weight = _quantize(parameter, in_int4=name in in_int4)
        tensors[f"{name}.scale"] = weight.scale
        if name in in_int4:
            tensors[f"{name}.int4"] = pack_int4(weight.values)
        else:
            tensors[f"{name}.int8"] = weight.values
    ignored = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json")
    shutil.copytree(source, target, ignore=ignored)
    save_file(tensors, target / FILE_NAME, metadata={"quantization": kind})
    about = json.loads((source / "bigtrain.json").read_text())
    about["quantization"] = kind
    (target / "bigtrain.json").write_text(json.dumps(about, indent=2) + "\n")


def _plain(model: nn.Module) -> dict[str, Tensor]:
    """What stays as it is: parameters of one dimension, and buffers."""
    plain: dict[str, Tensor] = {}
    every_parameter = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        if name not in every_parameter:
            plain[name] = tensor
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            plain[name] = parameter.detach()
    return plain


def _not_embedded(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name without those of embeddings, which are worth more bits."""
    embedded: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            embedded.add(id(module.weight))
    return {name: p for name, p in model.named_parameters() if id(p) not in embedded}


def _fits_int4(parameter: Tensor) -> bool:
    return parameter.ndim > 1 and parameter[0].numel() % GROUP == 0


def _quantize(parameter: Tensor, in_int4: bool) -> Quantized:
    """A weight as integers, symmetric around 0: by torchao, which knows linear layers best."""
    from torchao import quantization

    matrix = parameter.detach().float().flatten(1)
    holder = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(matrix, requires_grad=False)
    config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    if in_int4:
        int4: Any = torch.int4  # type: ignore[attr-defined]
        groups = quantization.PerGroup(GROUP)
        config = quantization.IntxWeightOnlyConfig(weight_dtype=int4, granularity=groups)
    quantization.quantize_(holder, config)
    weight: Any = holder.weight
    scale = weight.scale.float().reshape(len(matrix), -1)
    return Quantized(weight.qdata.view(parameter.shape).contiguous(), scale.contiguous())
