"""Many runs of one recipe: which they are, and how they are started. Slurm and W&B do the scheduling; nothing here does."""

import itertools
import json
import math
import random
import re
import shlex
import signal
import subprocess
import sys
from typing import Any

from ruamel.yaml import YAML, YAMLError

from bigtrain.config.loader import LoadedRecipe, dump, load_recipe
from bigtrain.config.secrets import refuse_secrets
from bigtrain.errors import RequestError, StoppedEarly

_RANGE = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\.\.([0-9.]+(?:e[+-]?[0-9]+)?)")
_parse = YAML(typ="safe", pure=True).load
Axes = dict[str, list[Any]]  # key → its values; a tuple among them is a range to draw from


def parse(settings: list[str], draw: int | None) -> Axes:
    """From `optim.lr=1e-4,3e-4 seed=0..4` to values: lists as YAML has them, and ranges of whole numbers, both ends included.

    With `draw` a range of other numbers (1e-5..1e-3) may stand there, to be drawn from. RequestError for one that may not.
    """
    refuse_secrets((setting.partition("=")[0], setting) for setting in settings)
    axes: Axes = {}
    for key, _, text in (setting.partition("=") for setting in settings):
        try:
            axes[key] = [
                value
                for item in _parse(f"[{text}]")
                for value in _spread(f"{key}={text}", item, draw)
            ]
        except YAMLError:
            raise RequestError(
                f"{key}={text}: not a list of YAML values", "key=value,value or key=0..4"
            ) from None
    if not all(axes.values()) or not any(map(_varies, axes.values())):
        raise RequestError(
            "no setting has more than one value",
            "a list or a range",
            "optim.lr=1e-4,3e-4 seed=0..4",
        )
    return axes


def _text(value: Any) -> str:
    """A value as an override has it: JSON is YAML."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _varies(values: list[Any]) -> bool:
    return len(values) != 1 or isinstance(values[0], tuple)


def base(recipe: str, axes: Axes) -> LoadedRecipe:
    """The recipe with what does not vary."""
    return load_recipe(
        recipe, [f"{key}={_text(values[0])}" for key, values in axes.items() if not _varies(values)]
    )


def _spread(setting: str, item: Any, draw: int | None) -> list[Any]:
    span = _RANGE.fullmatch(item) if isinstance(item, str) else None
    least, greatest = map(_parse, span.groups()) if span else ("", "")
    if isinstance(least, str) or isinstance(greatest, str):
        return [item]
    if isinstance(least, int) and isinstance(greatest, int) and least <= greatest:
        return list(range(least, greatest + 1))
    if draw is None or not 0 < least < greatest:
        raise RequestError(
            f"{setting}: no end of numbers, or none",
            "0 < least..greatest, and --random N",
            f"{least:g},{greatest:g}",
        )
    return [(float(least), float(greatest))]


def expand(recipe: str, axes: Axes, draw: int | None = None) -> dict[str, list[str]]:
    """Name → overrides of each run: all combinations, or `draw` of them at random (evenly in the logarithm over a range),
    the same ones each time. Raises RecipeError for a combination that is no recipe."""
    if draw is None:
        found = list(itertools.product(*axes.values()))
    else:
        chance = random.Random(0)
        found = [
            tuple(_drawn(chance, chance.choice(values)) for values in axes.values())
            for _ in range(draw)
        ]
    common = base(recipe, axes).recipe
    runs: dict[str, list[str]] = {}
    for values in found:
        varied = [
            (key.rpartition(".")[2], value)
            for key, value in zip(axes, values, strict=True)
            if _varies(axes[key])
        ]
        words = [
            common.name,
            *(
                f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}"
                for key, value in varied
            ),
        ]
        name = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(words))[:100].rstrip("-")
        own = [
            f"{key}={_text(value)}"
            for key, value in zip(axes, values, strict=True)
            if key != "name"
        ]
        if (
            runs.get(name, own)[-len(own) :] != own
        ):  # another run has that name, which is cut or has lost odd characters
            name = f"{name[:90]}-{len(runs) + 1}"
        runs[name] = [
            f"name={name}",
            f"track.group={_text(common.track.group or common.name)}",
            *own,
        ]
        load_recipe(recipe, runs[name])
    return runs


def _drawn(chance: random.Random, value: Any) -> Any:
    return (
        float(f"{math.exp(chance.uniform(*map(math.log, value))):.3g}")
        if isinstance(value, tuple)
        else value
    )


def run_locally(recipe: str, runs: dict[str, list[str]], launcher: str) -> list[str]:
    """Train them one after another; the names of those that failed. StoppedEarly after a signal, which the run gets too."""
    failed, stopped, children = list[str](), list[int](), list[subprocess.Popen[bytes]]()

    def pass_on(number: int, _frame: Any) -> None:
        stopped.append(number)
        children[-1].send_signal(
            signal.SIGTERM if number == signal.SIGUSR1 else number
        )  # torchrun passes on no other

    for number, (name, overrides) in enumerate(runs.items(), 1):
        print(f"run {number} of {len(runs)}: {shlex.join(overrides)}", file=sys.stderr, flush=True)
        try:
            children.append(
                subprocess.Popen(
                    [*shlex.split(launcher), "-m", "bigtrain", "train", recipe, *overrides]
                )
            )
        except (OSError, ValueError) as problem:
            raise RequestError(
                f"--launcher {launcher}: {problem}", "a program that starts python's ranks"
            ) from None
        for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(asked, pass_on)
        failed += [name] * (children[-1].wait() != 0)
        if stopped or children[-1].returncode == StoppedEarly.exit_code:
            raise StoppedEarly(
                f"stopped in run {number} of {len(runs)}; the same command goes on from there"
            )
    return failed


def wandb_file(recipe: str, axes: Axes, draw: int | None) -> str:
    """The sweep as W&B reads it: `wandb sweep FILE`, then `wandb agent …` on each machine."""
    ranges = {key: values[0] for key, values in axes.items() if isinstance(values[0], tuple)}
    parameters: dict[str, Any] = {key: {"values": values} for key, values in axes.items()}
    parameters |= {
        key: {"distribution": "log_uniform_values", "min": a, "max": b}
        for key, (a, b) in ranges.items()
    }
    command = [
        "${env}",
        "${interpreter}",
        "-m",
        "bigtrain",
        "train",
        recipe,
        "--fresh",
        "${args_no_hyphens}",
    ]
    file: dict[str, Any] = {
        "project": base(recipe, axes).recipe.track.project,
        "method": "random" if draw else "grid",
    }
    file |= {
        "metric": {"name": "eval/loss", "goal": "minimize"},
        "parameters": parameters,
        "command": command,
    }
    return dump(file | ({"run_cap": draw} if draw else {}))
