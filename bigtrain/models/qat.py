"""Quantization-aware training: layers compute with the weights that `bigtrain compress` would make.

In every forward pass, weights are rounded as compression/quantize.py rounds them, and for int8 the
rows of linear layers' inputs as Int8Linear rounds them. Gradients go past the rounding as if it
were not there (a straight-through estimator, arXiv 1308.3432), to parameters in full precision,
which keep their names: checkpoints and exports are those of the same model without it.

torchao's own (torchao.quantization.qat, 0.18) is not used. It knows linear layers alone, while all
matrices and kernels are quantized; and it cannot round inputs symmetrically, as int8 does here.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config.recipe import Qat
from bigtrain.errors import RequestError
from bigtrain.models.quantized import GROUP, round_rows


def round_weight(weight: Tensor, bits: int) -> Tensor:
    """A weight as it is after quantization to int8, or to int4 in groups: same shape and dtype."""
    matrix = weight.float().flatten(1)
    grouped = matrix.view(len(matrix), -1, GROUP if bits == 4 else matrix.shape[1])
    top = 2 ** (bits - 1)
    limits = torch.finfo(torch.float32)
    smallest = limits.tiny if bits == 4 else limits.eps
    # torchao's rounding to the last bit: a range of 2^bits - 1 steps, and a product with 1 / scale.
    scale = (grouped.abs().amax(-1, keepdim=True) / (top - 0.5)).clamp_(min=smallest)
    values = (grouped * (1.0 / scale)).round_().clamp_(-top, top - 1)
    return (values * scale).view(weight.shape).to(weight.dtype)


def _round_inputs(inputs: Tensor) -> Tensor:
    """[..., in_features], each row as Int8Linear has it."""
    values, scale = round_rows(inputs.float())
    return (values * scale).to(inputs.dtype)


class _RoundWeight(torch.autograd.Function):
    """`round_weight` with the gradient of the rounded weight as that of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int) -> Tensor:
        return round_weight(weight, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _RoundInputs(torch.autograd.Function):
    """`_round_inputs` with the gradient of the rounded inputs as that of the inputs."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return _round_inputs(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


class QatLinear(nn.Linear):
    """A linear layer that computes with rounded weights."""

    weight_bits: int
    rounds_inputs: bool

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        if self.rounds_inputs:
            input = _RoundInputs.apply(input)
        return F.linear(input, _RoundWeight.apply(self.weight, self.weight_bits), self.bias)


class QatConv1d(nn.Conv1d):
    """A convolution that computes with rounded weights."""

    weight_bits: int

    def forward(self, input: Tensor) -> Tensor:
        """[batch, channels, length] → the same of the output."""
        weight = _RoundWeight.apply(self.weight, self.weight_bits)
        return self._conv_forward(input, weight, self.bias)


class QatConv2d(nn.Conv2d):
    """A convolution that computes with rounded weights."""

    weight_bits: int

    def forward(self, input: Tensor) -> Tensor:
        """[batch, channels, height, width] → the same of the output."""
        weight = _RoundWeight.apply(self.weight, self.weight_bits)
        return self._conv_forward(input, weight, self.bias)


# Exact types: subclasses may do more with their weights.
_ROUNDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QatLinear,
    nn.Conv1d: QatConv1d,
    nn.Conv2d: QatConv2d,
}


def train_quantization_aware(model: nn.Module, qat: Qat) -> None:
    """Have linear layers and convolutions compute with rounded weights, in place.

    Parameters may be sharded already. Raises RequestError for a model without such layers, and for
    one with layers that take their weights as they are (recurrent ones, GPT-2's Conv1D); for int4
    unless some layer has rows that divide into groups.
    """
    layers = [module for module in model.modules() if type(module) in _ROUNDED]
    unrounded: set[str] = set()
    embedded: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.RNNBase) or type(module).__name__ == "Conv1D":
            unrounded.add(type(module).__name__)
        if isinstance(module, nn.Embedding):
            embedded.add(id(module.weight))
    if unrounded or not layers:
        found = ", ".join(sorted(unrounded)) or "no linear layer or convolution"
        raise RequestError(
            f"model.qat: {type(model).__name__} has {found}, where rounding would not be seen",
            "a model of linear layers and convolutions",
            "no model.qat (compress without --qat quantizes such a model too)",
        )
    fitting = [layer for layer in layers if _fits_int4(layer, embedded)]
    if qat == "int4" and not fitting:
        raise RequestError(
            f"model.qat: {type(model).__name__} has no weight with rows of a multiple of {GROUP}",
            f"rows that divide into groups of {GROUP} neighbours with one scale each",
            "model.qat=int8, or widths in model.args that are multiples of 32",
        )
    for layer in layers:
        # The object stays, with its parameters, hooks and ties, as torch's parametrizations do it.
        layer.__class__ = _ROUNDED[type(layer)]
        in_int4 = qat == "int4" and layer in fitting
        layer.weight_bits = 4 if in_int4 else 8  # type: ignore[assignment]
        if isinstance(layer, QatLinear):
            layer.rounds_inputs = qat == "int8"


def _fits_int4(layer: Any, embedded: set[int]) -> bool:
    """Whether the file has the layer's weight in int4. A sharded weight does not show its shape."""
    if id(layer.weight) in embedded:
        return False
    if isinstance(layer, nn.Linear):
        return layer.in_features % GROUP == 0
    length = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    return length % GROUP == 0
