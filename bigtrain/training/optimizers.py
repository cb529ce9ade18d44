"""Optimizers (torch's own, on every engine) and the learning rate as a pure function of the step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.adagrad import adagrad

from bigtrain.config.recipe import OptimConfig


class Adagrad(torch.optim.Optimizer):
    """torch's Adagrad with its state made at the first step.

    torch makes it at construction, for which DeepSpeed's ZeRO has a special case that builds the optimizer anew and
    forgets the groups: their decay, their rate, and the parameters themselves (stage_1_and_2.py, stage3.py, 0.19).
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, eps: float) -> None:
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    self.state[p] = {"step": torch.zeros(()), "sum": torch.zeros_like(p)}
            adagrad(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["sum"] for p in parameters],
                [self.state[p]["step"] for p in parameters],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                lr_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, o: torch.optim.SGD(
        groups, lr=o.lr, momentum=o.momentum, nesterov=o.nesterov, fused=True
    ),
    "adam": lambda groups, o: torch.optim.Adam(
        groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True
    ),
    "adamw": lambda groups, o: torch.optim.AdamW(
        groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True
    ),
    "rmsprop": lambda groups, o: torch.optim.RMSprop(
        groups, lr=o.lr, alpha=o.alpha, eps=o.eps, momentum=o.momentum
    ),
    "adagrad": lambda groups, o: Adagrad(groups, lr=o.lr, eps=o.eps),
}


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over two groups: what is decayed (matrices, kernels, embeddings) and what is not."""
    decayed: dict[str, Any] = {"params": [], "weight_decay": optim.weight_decay, "l1": optim.l1}
    kept: dict[str, Any] = {"params": [], "weight_decay": 0.0, "l1": 0.0}
    for parameter in model.parameters():
        if parameter.requires_grad:
            # ds_shape: the whole shape of a parameter that ZeRO-3 has sharded to nothing here
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) > 1 or optim.decay_norms_and_biases else kept)["params"].append(
                parameter
            )
    optimizer = OPTIMIZERS[optim.name](
        [group for group in (decayed, kept) if group["params"]], optim
    )
    if optim.l1:
        optimizer.register_step_pre_hook(_add_l1)
    return optimizer


def _add_l1(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The subgradient of l1 × Σ|w|. It joins after clipping, on whatever shard of the weights a rank owns."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["l1"] and parameter.grad is not None:
                parameter.grad.add_(parameter.detach().sign(), alpha=group["l1"])
