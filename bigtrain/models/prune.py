"""Pruning: the smallest weights of a pretrained model are set to zero, and stay zero in training.

What is pruned is torch.nn.utils.prune's choice. Its own way of keeping the zeros is not used: it
makes `weight` a product of a parameter `weight_orig` and a buffer, computed in a hook before the
module's forward pass. That hook runs before ZeRO-3 has gathered the parameter, recurrent layers do
not see it, and tied parameters fall apart. Here the weight's gradient is set to zero where the
weight is: an optimizer that sees neither a value nor a gradient leaves a weight at zero (weight
decay, L1, momentum and Adam's moments of zero are zero), under every engine, and names stay as they
are. The masks are a function of the pretrained weights, so a resumed run has the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from bigtrain.config.recipe import PruneConfig
from bigtrain.errors import RequestError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prune_model(model: nn.Module, config: PruneConfig) -> None:
    """Set the smallest weights to zero, and have their gradients be zero from now on.

    Raises RequestError for a model that has nothing of the kind that is to be pruned.
    """
    parameters = _prunable(model, config.structure == "channels")
    if not parameters:
        kind = "convolution" if config.structure == "channels" else "linear layer or convolution"
        raise RequestError(
            f"model.prune: {type(model).__name__} has no {kind}",
            "a model that has some",
            "structure: weights, or no model.prune",
        )
    with torch.no_grad():
        masks = _masks(parameters, config)
        for parameter, mask in zip(parameters, masks, strict=True):
            zero = mask == 0
            parameter.masked_fill_(zero, 0.0)
            if parameter.requires_grad:
                parameter.register_hook(_ZeroGradient(zero))


class _ZeroGradient:
    """Sets a gradient to zero where the weight was pruned."""

    def __init__(self, zero: Tensor) -> None:
        self.zero = zero

    def __call__(self, gradient: Tensor) -> Tensor:
        """`gradient` of the whole parameter."""
        self.zero = self.zero.to(gradient.device)
        return gradient.masked_fill(self.zero, 0.0)


def _prunable(model: nn.Module, channels: bool) -> list[nn.Parameter]:
    """Matrices and kernels, each once. Embeddings, and output layers tied to them, are left."""
    embedded: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            embedded.add(id(module.weight))
    chosen: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if channels and not isinstance(module, _CONVOLUTIONS):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1 and id(parameter) not in embedded:
                chosen[id(parameter)] = parameter
    return list(chosen.values())


def _masks(parameters: list[nn.Parameter], config: PruneConfig) -> list[Tensor]:
    """For each parameter 1 where a weight stays, 0 where it is pruned."""
    if config.scope == "global":
        flat = torch.cat([parameter.flatten() for parameter in parameters])
        mask = _mask(prune.L1Unstructured(config.amount), flat)
        sizes = [parameter.numel() for parameter in parameters]
        masks = []
        for part, parameter in zip(mask.split(sizes), parameters, strict=True):
            masks.append(part.view_as(parameter))
        return masks
    method: Any = prune.L1Unstructured(config.amount)
    if config.structure == "channels":
        method = prune.LnStructured(config.amount, n=2, dim=0)
    return [_mask(method, parameter) for parameter in parameters]


def _mask(method: Any, weights: Tensor) -> Tensor:
    mask: Tensor = method.compute_mask(weights, torch.ones_like(weights))
    return mask
