"""Models whose weights are stored as int8 or int4: the file, and how they compute once loaded.

A weight is stored under its name as integers (`NAME.int8`, or `NAME.int4` with two in a byte) and
the numbers to multiply them by (`NAME.scale`): one for each row, or for each group of 32 of a row
in int4. Rows are those of the weight as a matrix: [first dimension, all others].

int8 computes in int8 on the CPU and on GPUs: linear layers round each row of their input to int8
too (dynamically, by its largest element), embeddings look rows up. int8-weights and int4 become
fp32 when they are loaded: smaller files, the speed and memory of fp32. torchao makes the integers
(compression/quantize.py), and is not needed to load them; its own layers of version 0.18 are slower
than fp32 on CPUs without torch.compile.
"""

from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bigtrain.errors import RequestError

Quantization = Literal["int8", "int8-weights", "int4"]
# Not model.safetensors: whoever does not know this format must find no weights, not wrong ones.
FILE_NAME = "quantized.safetensors"
GROUP = 32  # neighbours in a row that have one scale in int4
_PRODUCTS_ON_CPU = 1 << 18  # that exist at one time, so that they stay in a core's cache
_ROWS_ON_GPU = 17  # the fewest that torch's int8 product takes there


class Quantized(NamedTuple):
    """A weight as integers."""

    values: Tensor  # int8, of the weight's shape
    scale: Tensor  # fp32 [rows, groups of a row]

    def to_float(self) -> Tensor:
        """The weight in fp32."""
        rows, groups = self.scale.shape
        grouped = self.values.reshape(rows, groups, -1).float()
        return (grouped * self.scale.unsqueeze(-1)).view(self.values.shape)


def pack_int4(values: Tensor) -> Tensor:
    """int8 in [-8, 7], an even number per row, → uint8 with two in a byte: [rows, columns ÷ 2]."""
    shifted = (values.flatten(1) + 8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """What `pack_int4` packed: int8 [rows, columns]."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=-1)
    return pairs.flatten(1).to(torch.int8) - 8


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows` [..., width], fp32 → whole numbers from -127 to 127, and a scale for each row."""
    largest = rows.abs().amax(-1, keepdim=True)  # torch's vector_norm is slower
    scale = (largest / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (rows / scale).round_(), scale


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, whose input is rounded to int8 row by row."""

    weight: Tensor

    def __init__(self, weight: Quantized, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        self.register_buffer("weight", weight.values)
        self.scale = nn.Parameter(weight.scale.flatten(), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        rows = inputs.reshape(-1, self.in_features).float()
        if rows.is_cuda and not self._fits_gpu(len(rows)):
            weight = self.weight * self.scale.unsqueeze(1)
            outputs = F.linear(rows, weight, self.bias)
        else:
            outputs = self._int8_product(rows)
            if self.bias is not None:
                outputs += self.bias
        return outputs.view(*inputs.shape[:-1], self.out_features).to(inputs.dtype)

    def _fits_gpu(self, rows: int) -> bool:
        in_eights = self.in_features % 8 == 0
        out_eights = self.out_features % 8 == 0
        return in_eights and out_eights and rows >= _ROWS_ON_GPU

    def _int8_product(self, rows: Tensor) -> Tensor:
        """`rows` [rows, in_features], fp32 → [rows, out_features], fp32."""
        int_rows, row_scale = round_rows(rows)
        int_rows = int_rows.to(torch.int8)
        outputs = rows.new_empty(len(rows), self.out_features)
        step = max(1, len(rows))
        if not rows.is_cuda:
            step = max(128, _PRODUCTS_ON_CPU // self.out_features)
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            products = torch._int_mm(int_rows[part], self.weight.T)  # int32, exact
            torch.mul(products, self.scale, out=outputs[part])
            outputs[part].mul_(row_scale[part])
        return outputs


class Int8Embedding(nn.Module):
    """An embedding with int8 rows."""

    weight: Tensor

    def __init__(self, weight: Quantized) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.values.shape
        self.register_buffer("weight", weight.values)
        self.scale = nn.Parameter(weight.scale, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[...] → [..., embedding_dim], fp32."""
        return self.weight[ids] * self.scale[ids]


class QuantizedFile(NamedTuple):
    """What FILE_NAME holds."""

    kind: Quantization
    plain: dict[str, Tensor]  # what is not quantized, fp32
    weights: dict[str, Quantized]


def read_quantized(folder: Path) -> QuantizedFile:
    """The weights of a quantized model. Raises RequestError for a file that cannot be read."""
    path = folder / FILE_NAME
    try:
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("quantization")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as problem:
        raise RequestError(f"{path} cannot be read ({problem})", "a quantized model") from None
    if kind not in get_args(Quantization):
        raise RequestError(
            f"{path} is quantized as {kind!r}",
            f"one of: {', '.join(get_args(Quantization))}",
        )
    weights: dict[str, Quantized] = {}
    for key, scale in tensors.items():
        name, _, last = key.rpartition(".")
        if last != "scale":
            continue
        int8 = tensors.get(f"{name}.int8")
        int4 = tensors.get(f"{name}.int4")
        if int8 is not None:
            weights[name] = Quantized(int8, scale)
        elif int4 is not None:
            weights[name] = Quantized(unpack_int4(int4), scale)
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.rpartition(".")[0] not in weights:
            plain[key] = tensor
    return QuantizedFile(cast(Quantization, kind), plain, weights)


def load_quantized(folder: Path, model: nn.Module) -> nn.Module:
    """Fill `model`, of the folder's architecture, with its quantized weights.

    Raises RequestError unless the file has every weight of the model, and no other.
    """
    file = read_quantized(folder)
    stored = dict(file.plain)
    for name, weight in file.weights.items():
        stored[name] = weight.to_float()
    state = model.state_dict()
    for name, tensor in stored.items():
        place = state.get(name)
        if place is None or place.numel() != tensor.numel():
            raise RequestError(
                f"{folder / FILE_NAME} holds {name} {tuple(tensor.shape)}, which the model has not",
                "the same architecture",
            )
        place.copy_(tensor.view(place.shape))
    filled = {state[name].data_ptr() for name in stored}  # a tied tensor is stored once
    for name, tensor in state.items():
        if tensor.numel() and tensor.data_ptr() not in filled:
            raise RequestError(
                f"{folder / FILE_NAME} has no {name}",
                "all weights of the model",
            )
    if file.kind == "int8":
        _compute_in_int8(model, file.weights)
    return model.requires_grad_(False)


def _compute_in_int8(model: nn.Module, weights: dict[str, Quantized]) -> None:
    """Put int8 layers in the place of linear layers and embeddings; tied ones share their rows."""
    of_parameter: dict[int, Quantized] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights:
            of_parameter[id(parameter)] = weights[name]
    for module in list(model.modules()):
        for name, child in module.named_children():
            quantized = of_parameter.get(id(getattr(child, "weight", None)))
            if quantized is None:
                continue
            # Subclasses may do more with their weights.
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(quantized, child.bias))
            elif type(child) is nn.Embedding and child.max_norm is None:
                setattr(module, name, Int8Embedding(quantized))
