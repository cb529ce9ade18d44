"""The curves that the page of `compare` draws: thinned out, and averaged over seeds."""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.runs.compare import UNIMPORTANT, Run
from bigtrain.runs.metrics_file import Columns

# What curves are drawn over → the column of the training lines.
AXES = {
    "steps": "step",
    "samples": "samples",
    "tokens": "weight",
    "hours": "hours",
}
_MAX_POINTS = 800  # of one curve
# 97.5% quantiles of Student's t by degrees of freedom, for intervals over a few seeds.
_T_QUANTILES = [math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


@dataclass
class Curve:
    """Points that stand for several values each; all arrays have one length."""

    axes: Columns  # steps, samples, tokens, hours → the place of each point
    mean: NDArray[Any]
    low: NDArray[Any]  # least value, or lower end of the interval
    high: NDArray[Any]  # greatest value, or upper end

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.axes,
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
        }


@dataclass
class CurveSet:
    """The curves of one run, or averages over runs that differ in nothing but the seed."""

    name: str
    group: str
    averaged: bool
    metrics: dict[str, Curve]

    def as_dict(self) -> dict[str, Any]:
        """What the page's script reads: an average has `fold` instead of `group`."""
        return {
            "name": self.name,
            "fold" if self.averaged else "group": self.group,
            "metrics": {name: curve.as_dict() for name, curve in self.metrics.items()},
        }


def all_curves(runs: list[Run]) -> list[CurveSet]:
    """The curves of each run, and then of each group of several seeds."""
    curve_sets = []
    groups: dict[str, list[dict[str, Curve]]] = {}
    for run, group in zip(runs, seed_groups(runs), strict=True):
        metrics = _metric_curves(run)
        curve_sets.append(CurveSet(run.name, group, averaged=False, metrics=metrics))
        groups.setdefault(group, []).append(metrics)
    for group, members in groups.items():
        count = len(members)
        if count > 1:
            name = f"{group} ({count} seeds)"
            averages = average_seeds(members)
            curve_sets.append(CurveSet(name, group, averaged=True, metrics=averages))
    return curve_sets


def seed_groups(runs: list[Run]) -> list[str]:
    """For each run the name of the first run that it differs from in nothing but the seed."""
    first_names: dict[str, str] = {}
    return [first_names.setdefault(_group_key(run), run.name) for run in runs]


def _group_key(run: Run) -> str:
    """Equal for runs that differ in nothing but the seed; of a run without settings, its name."""
    ignored = (*UNIMPORTANT, "versions.", "threads")
    kept = {}
    for key, value in run.settings.items():
        if key != "seed" and not key.startswith(ignored):
            kept[key] = value
    return json.dumps(kept, sort_keys=True) if kept else run.name


def _metric_curves(run: Run) -> dict[str, Curve]:
    """Metric → its curve: the training loss, and what was measured on held-out data."""
    metrics = {"loss": thin_out(run.lines, run.lines["loss"])}
    eval_steps = sorted(run.evals)
    line_steps = run.lines["step"]
    # The training line of each evaluation's step, or the first one after it.
    places = np.searchsorted(line_steps, np.array(eval_steps))
    last = len(line_steps) - 1
    places = np.clip(places, 0, last)
    eval_lines = {column: run.lines[column][places] for column in AXES.values()}
    for name in run.eval_metrics():
        values = [_number(run.evals[step].get(name)) for step in eval_steps]
        metrics[f"held-out {name}"] = thin_out(eval_lines, np.array(values))
    return metrics


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def thin_out(lines: Columns, values: NDArray[Any]) -> Curve:
    """At most _MAX_POINTS points: each has the mean, least and greatest of neighbouring values.

    It is placed where the last of these values is. Values that are not finite do not count; a point
    that stands for no other has NaN.
    """
    bins = min(len(values), _MAX_POINTS)
    edges = np.linspace(0, len(values), bins + 1)
    begins = np.unique(edges.astype(int))[:-1]
    ends = np.append(begins[1:], len(values)) - 1
    finite = np.where(np.isfinite(values), values, np.nan)
    totals = np.add.reduceat(np.nan_to_num(finite), begins)
    counts = np.add.reduceat(np.isfinite(values), begins)
    with np.errstate(invalid="ignore"):  # 0 / 0, for a point without a finite value
        mean = totals / counts
    return Curve(
        axes={axis: lines[column][ends] for axis, column in AXES.items()},
        mean=mean,
        low=np.fmin.reduceat(finite, begins),
        high=np.fmax.reduceat(finite, begins),
    )


def average_seeds(members: list[dict[str, Curve]]) -> dict[str, Curve]:
    """The mean over seeds with its 95% interval (Student's t), up to the last common step."""
    averaged = {}
    for name in members[0]:
        curves = [member[name] for member in members if name in member]
        if len(curves) == len(members):
            averaged[name] = _average(curves)
    return averaged


def _average(curves: list[Curve]) -> Curve:
    longest = max(curves, key=lambda curve: len(curve.mean))
    last_step = min(curve.axes["steps"][-1] for curve in curves)
    steps = longest.axes["steps"]
    steps = steps[steps <= last_step]
    values = np.stack([np.interp(steps, curve.axes["steps"], curve.mean) for curve in curves])
    mean = values.mean(0)
    count = len(curves)
    quantile = 1.96
    if count <= len(_T_QUANTILES):
        quantile = _T_QUANTILES[count - 1]
    half_width = quantile * values.std(0, ddof=1) / math.sqrt(count)
    return Curve(
        axes={axis: places[: len(steps)] for axis, places in longest.axes.items()},
        mean=mean,
        low=mean - half_width,
        high=mean + half_width,
    )
