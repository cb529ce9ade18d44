"""Many runs of one recipe: which they are, and how they are started.

Slurm and W&B do the scheduling; here runs are only trained one after another.
"""

import itertools
import json
import math
import random
import re
import shlex
import signal
import subprocess
import sys
from types import FrameType
from typing import Any, NamedTuple

from ruamel.yaml import YAML, YAMLError

from bigtrain.config.loader import LoadedRecipe, dump, load_recipe
from bigtrain.config.secrets import refuse_secrets
from bigtrain.errors import RequestError, StoppedEarly

_RANGE = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\.\.([0-9.]+(?:e[+-]?[0-9]+)?)")
_NAME_LENGTH = 100  # characters, as the recipe's `name` allows
_parse_yaml = YAML(typ="safe", pure=True).load


class Interval(NamedTuple):
    """A range of real numbers to draw from, evenly in the logarithm."""

    low: float
    high: float


Axes = dict[str, list[Any]]  # dotted key → its values, or one Interval


class SweepRun(NamedTuple):
    """One run of a sweep."""

    name: str
    overrides: list[str]


def parse(settings: list[str], draw: int | None) -> Axes:
    """From `optim.lr=1e-4,3e-4 seed=0..4` to the values of each key.

    Values are a list as YAML has them, or a range of whole numbers, both ends included. With `draw`
    (the number of runs) a range of other numbers (1e-5..1e-3) is allowed, to be drawn from.
    Raises RequestError for what is neither, and if no key has more than one value.
    """
    refuse_secrets((setting.partition("=")[0], setting) for setting in settings)
    axes: Axes = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        try:
            items = _parse_yaml(f"[{text}]")
        except (YAMLError, ValueError, RecursionError):
            raise RequestError(
                f"{key}={text}: not a list of YAML values", "key=value,value or key=0..4"
            ) from None
        axes[key] = []
        for item in items:
            axes[key] += _expand_range(f"{key}={text}", item, draw)
    if not all(axes.values()) or not any(_varies(values) for values in axes.values()):
        raise RequestError(
            "no setting has more than one value",
            "a list or a range",
            "optim.lr=1e-4,3e-4 seed=0..4",
        )
    return axes


def base(recipe: str, axes: Axes) -> LoadedRecipe:
    """The recipe with the settings that do not vary."""
    fixed = {key: values[0] for key, values in axes.items() if not _varies(values)}
    return load_recipe(recipe, [_override(key, value) for key, value in fixed.items()])


def expand(recipe: str, axes: Axes, draw: int | None = None) -> list[SweepRun]:
    """All combinations, or `draw` of them at random, the same ones each time.

    Every run has a name of its own. Raises RecipeError for a combination that is no recipe.
    """
    common = base(recipe, axes).recipe
    group = _override("track.group", common.track.group or common.name)
    own_overrides: dict[str, list[str]] = {}
    for combination in _combinations(axes, draw):
        own = [_override(key, value) for key, value in combination.items() if key != "name"]
        varied = {key: value for key, value in combination.items() if _varies(axes[key])}
        name = _run_name(common.name, varied)
        if own_overrides.get(name, own) != own:
            # Two combinations differ only in what the name leaves out: its end, or odd characters.
            name = f"{name[:90]}-{len(own_overrides) + 1}"
        own_overrides[name] = own
    runs = [SweepRun(name, [f"name={name}", group, *own]) for name, own in own_overrides.items()]
    for run in runs:
        load_recipe(recipe, run.overrides)
    return runs


def run_locally(recipe: str, runs: list[SweepRun], launcher: str) -> list[str]:
    """Train the runs one after another; returns the names of those that failed.

    Each is started as `launcher -m bigtrain train …`. A signal is passed on to the run under way;
    then StoppedEarly is raised. Raises RequestError if the launcher cannot be started.
    """
    failed: list[str] = []
    child: subprocess.Popen[bytes] | None = None
    is_stopping = False

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal is_stopping
        is_stopping = True
        if child is not None:
            # torchrun does not pass on SIGUSR1.
            child.send_signal(signal.SIGTERM if number == signal.SIGUSR1 else number)

    for position, run in enumerate(runs, 1):
        label = f"run {position} of {len(runs)}"
        print(f"{label}: {shlex.join(run.overrides)}", file=sys.stderr, flush=True)
        child = _start(launcher, recipe, run)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, pass_on)
        code = child.wait()
        if code != 0:
            failed.append(run.name)
        if is_stopping or code == StoppedEarly.exit_code:
            raise StoppedEarly(f"stopped in {label}; the same command continues from there")
    return failed


def wandb_file(recipe: str, axes: Axes, draw: int | None) -> str:
    """The sweep as W&B reads it: `wandb sweep FILE`, then `wandb agent …` on each machine.

    Raises RequestError for a range among other values, which W&B cannot draw from.
    """
    parameters = {key: _wandb_parameter(key, values) for key, values in axes.items()}
    train = ["-m", "bigtrain", "train", recipe, "--fresh", "${args_no_hyphens}"]
    sweep: dict[str, Any] = {
        "project": base(recipe, axes).recipe.track.project,
        "method": "random" if draw else "grid",
        "metric": {"name": "eval/loss", "goal": "minimize"},
        "parameters": parameters,
        "command": ["${env}", "${interpreter}", *train],
    }
    if draw:
        sweep["run_cap"] = draw
    return dump(sweep)


def _wandb_parameter(key: str, values: list[Any]) -> dict[str, Any]:
    intervals = [value for value in values if isinstance(value, Interval)]
    if not intervals:
        return {"values": values}
    if len(values) > 1:
        raise RequestError(
            f"{key} has a range and other values", "for W&B one range, or values without ranges"
        )
    low, high = intervals[0]
    return {"distribution": "log_uniform_values", "min": low, "max": high}


def _expand_range(setting: str, item: Any, draw: int | None) -> list[Any]:
    """The numbers of a range as a list, or its Interval; of anything else the item alone."""
    match = _RANGE.fullmatch(item) if isinstance(item, str) else None
    if match is None:
        return [item]
    low, high = (_parse_yaml(text) for text in match.groups())
    if isinstance(low, str) or isinstance(high, str):
        return [item]
    if isinstance(low, int) and isinstance(high, int) and low <= high:
        return list(range(low, high + 1))
    if draw is None or not 0 < low < high:
        raise RequestError(
            f"{setting}: not an ascending range of whole numbers",
            "whole numbers least..greatest, or with --random N any numbers above 0",
            f"{low:g},{high:g}",
        )
    return [Interval(float(low), float(high))]


def _varies(values: list[Any]) -> bool:
    return len(values) != 1 or isinstance(values[0], Interval)


def _override(key: str, value: Any) -> str:
    """`key=value` for the command line: JSON is YAML."""
    return f"{key}={json.dumps(value, ensure_ascii=False, default=str)}"


def _combinations(axes: Axes, draw: int | None) -> list[dict[str, Any]]:
    """Dotted key → value, for each run."""
    if draw is None:
        products = itertools.product(*axes.values())
        return [dict(zip(axes, values, strict=True)) for values in products]
    rng = random.Random(0)
    return [
        {key: _draw(rng, rng.choice(values)) for key, values in axes.items()} for _ in range(draw)
    ]


def _draw(rng: random.Random, value: Any) -> Any:
    """A value, or a number drawn from an interval, to three digits."""
    if not isinstance(value, Interval):
        return value
    drawn = math.exp(rng.uniform(math.log(value.low), math.log(value.high)))
    return float(f"{drawn:.3g}")


def _run_name(recipe_name: str, varied: dict[str, Any]) -> str:
    """A name that tells what varies, e.g. tiny-lm-lr0.001-seed2."""
    words = [recipe_name]
    for key, value in varied.items():
        shown = f"{value:g}" if isinstance(value, float) else f"{value}"
        words.append(key.rpartition(".")[2] + shown)
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(words))[:_NAME_LENGTH].rstrip("-")


def _start(launcher: str, recipe: str, run: SweepRun) -> subprocess.Popen[bytes]:
    try:
        command = [*shlex.split(launcher), "-m", "bigtrain", "train", recipe, *run.overrides]
        return subprocess.Popen(command)
    except (OSError, ValueError) as problem:
        raise RequestError(
            f"--launcher {launcher}: {problem}", "a program that starts python's ranks"
        ) from None
