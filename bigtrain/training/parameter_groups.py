"""Which parameters are trained, at which rate and with which decay; read back from the engine."""

import difflib
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from bigtrain.config.recipe import GroupConfig, OptimConfig
from bigtrain.engine.base import Engine, WholeShape
from bigtrain.errors import RequestError, TrainingFailed

Group = dict[str, Any]  # as torch's optimizers take them


class GroupSettings(NamedTuple):
    """What the parameters of a group have in common."""

    weight_decay: float
    l1: float
    lr_scale: float

    def as_group(self) -> Group:
        """An empty group."""
        return {"params": [], "names": [], **self._asdict()}


def make_groups(model: nn.Module, optim: OptimConfig, whole_shape: WholeShape) -> list[Group]:
    """Groups: what is decayed (matrices, kernels, embeddings), the rest, and those asked for.

    Freezes what `optim.groups` says. `whole_shape` gives a parameter's shape as it is before any
    sharding (Engine.whole_shape). Each group names its parameters (`names`); its rate is the
    schedule's times its `lr_scale`. Raises RequestError for a pattern that no parameter is left
    for, and if nothing is left to train.
    """
    decayed = GroupSettings(optim.weight_decay, optim.l1, 1.0)
    not_decayed = GroupSettings(0.0, 0.0, 1.0)
    groups = {settings: settings.as_group() for settings in (decayed, not_decayed)}
    _refuse_idle_patterns(model, optim)
    for name, parameter in model.named_parameters():
        if _asked_for(name, optim).frozen:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        settings = _settings_of(name, whole_shape(parameter), optim)
        group = groups.setdefault(settings, settings.as_group())
        group["params"].append(parameter)
        group["names"].append(name)
    used = [group for group in groups.values() if group["params"]]
    if not used:
        raise RequestError(
            "optim.groups: every parameter is frozen", "at least one that is trained"
        )
    return used


def _asked_for(name: str, optim: OptimConfig) -> GroupConfig:
    """The settings of the first pattern of `optim.groups` that a parameter's name fits."""
    for pattern, asked in optim.groups.items():
        if fnmatchcase(name, pattern):
            return asked
    return GroupConfig()


def _settings_of(name: str, shape: tuple[int, ...], optim: OptimConfig) -> GroupSettings:
    """What a parameter of this name and whole shape is to be trained with."""
    asked = _asked_for(name, optim)
    is_decayed = len(shape) > 1 or optim.decay_norms_and_biases
    weight_decay = optim.weight_decay if is_decayed else 0.0
    if asked.weight_decay is not None:
        weight_decay = asked.weight_decay
    return GroupSettings(weight_decay, optim.l1 if is_decayed else 0.0, asked.lr_scale)


def _refuse_idle_patterns(model: nn.Module, optim: OptimConfig) -> None:
    names = [name for name, _ in model.named_parameters()]
    idle = dict(optim.groups)
    for name in names:
        fitting = [pattern for pattern in optim.groups if fnmatchcase(name, pattern)]
        if fitting:
            idle.pop(fitting[0], None)
    for pattern in idle:
        near = difflib.get_close_matches(pattern.strip("*."), names, n=1, cutoff=0.0)
        raise RequestError(
            f"optim.groups: no parameter is left for the pattern {pattern!r}",
            f"a pattern of names such as {near[0]}",
            f"optim.groups='{{\"{near[0].split('.')[0]}.*\": {{lr_scale: 0.1}}}}'",
        )


def groups_in_force(engine: Engine, optim: OptimConfig) -> list[dict[str, Any]]:
    """The groups as the engine's optimizer has them, and what is frozen; for effective.json.

    Raises TrainingFailed if the engine updates any of this rank's parameters at another rate or
    with another decay than the recipe says: DeepSpeed has merged groups (DeepSpeed#6873).
    """
    engine.set_rate(optim.lr)
    parameters = dict(engine.module.named_parameters())
    groups = engine.groups_by_flat()
    for fragment in engine.fragments():
        shape = engine.whole_shape(parameters[fragment.name])
        wanted = _settings_of(fragment.name, shape, optim)
        expected = (optim.lr * wanted.lr_scale, wanted.weight_decay)
        group = groups.get(id(fragment.flat), {"lr": None, "weight_decay": None})
        if (group["lr"], group["weight_decay"]) != expected:
            raise TrainingFailed(
                f"{fragment.name} has rate and decay ({group['lr']}, {group['weight_decay']})"
                " in the engine's optimizer",
                f"{expected}, as the recipe says",
            )
    counted: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        row: dict[str, Any] = {"frozen": True}
        if parameter.requires_grad:
            row = _settings_of(name, engine.whole_shape(parameter), optim)._asdict()
        kept = counted.setdefault(tuple(row.items()), {**row, "parameters": 0, "elements": 0})
        kept["parameters"] += 1
        kept["elements"] += engine.num_elements(parameter)
    return list(counted.values())
