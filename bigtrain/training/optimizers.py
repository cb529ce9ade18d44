"""Optimizers: torch's own, on every engine."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adagrad import adagrad

from bigtrain.config.recipe import OptimConfig
from bigtrain.engine.base import WholeShape
from bigtrain.training.parameter_groups import make_groups

Groups = list[dict[str, Any]]


class Adagrad(torch.optim.Optimizer):
    """torch's Adagrad with its state made at the first step.

    torch makes it at construction. For that DeepSpeed's ZeRO has a special case which builds the
    optimizer anew and forgets the groups: their decay, their rate, and the parameters themselves
    (stage_1_and_2.py, stage3.py, 0.19).
    """

    def __init__(self, groups: Groups, lr: float, eps: float) -> None:
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in parameters]
            adagrad(
                parameters,
                [p.grad for p in parameters],
                [state["sum"] for state in states],
                [state["step"] for state in states],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                lr_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["sum"] = torch.zeros_like(parameter)
        return state


def _sgd(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        fused=True,
    )


def _adam(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def _adamw(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def _rmsprop(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(
        groups,
        lr=optim.lr,
        alpha=optim.alpha,
        eps=optim.eps,
        momentum=optim.momentum,
    )


def _adagrad(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    return Adagrad(groups, lr=optim.lr, eps=optim.eps)


# optim.name → a function from groups of parameters to the optimizer.
OPTIMIZERS: dict[str, Callable[[Groups, OptimConfig], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
}


def states_per_parameter(optim: OptimConfig) -> int:
    """How many tensors of a parameter's size the optimizer comes to keep for it."""
    if optim.name in ("adam", "adamw"):
        return 2
    return (optim.name != "sgd") + (optim.momentum > 0)


def make_optimizer(
    model: nn.Module, optim: OptimConfig, whole_shape: WholeShape
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the groups of parameter_groups.make_groups, whose errors it has.

    `whole_shape` gives a parameter's shape as it is before any sharding (Engine.whole_shape).
    """
    groups = make_groups(model, optim, whole_shape)
    optimizer = OPTIMIZERS[optim.name](groups, optim)
    if optim.l1:
        optimizer.register_step_pre_hook(_add_l1)
    return optimizer


def _add_l1(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The subgradient of l1 × Σ|w|, added after clipping to what this rank has of the weights."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["l1"] and parameter.grad is not None:
                parameter.grad.add_(parameter.detach().sign(), alpha=group["l1"])
