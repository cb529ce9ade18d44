"""Runs side by side: what was set differently, what came of it, and the curves, as a table or one self-contained page."""

import contextlib
import glob
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config.task_specs import lower_is_better
from bigtrain.errors import RequestError
from bigtrain.runs.directory import RUNS, RunDir, asset
from bigtrain.runs.metrics_file import read_columns
from bigtrain.runs.status import COLUMNS, derive_status

BY = {"steps": "step", "samples": "samples", "tokens": "weight", "hours": "hours"}  # --by → column
_POINTS = 800  # of a curve, at most; each is the mean, least and greatest of what it stands for
_WIDE = 5  # runs beside each other on a terminal
# 97.5% quantiles of Student's t by degrees of freedom, for intervals over a few seeds.
_T = [math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]
# What differs between any two runs and says nothing of what was asked for.
_NOISE = ("name", "slurm.job", "git.", "peak_flops", "track.")
Run = dict[str, Any]


def find(references: list[str]) -> tuple[list[RunDir], list[str]]:
    """The runs that names, directories, globs and W&B's folders stand for; and a line for each that stands for none."""
    found: dict[Path, RunDir] = {}
    problems = []
    for reference in references:
        paths = [
            Path(text)
            for pattern in (reference, str(RUNS / reference))
            for text in sorted(glob.glob(pattern))
        ]
        paths = [
            next((p for p in (path, *path.parents) if (p / "recipe.yaml").is_file()), path)
            for path in paths
        ]
        runs = [
            path
            for path in paths
            if (path / "recipe.yaml").is_file() or (path / "metrics.jsonl").is_file()
        ]
        if not runs:
            problems.append(
                f"{reference}: no run (no recipe.yaml or metrics.jsonl there, nor in {RUNS / reference})"
            )
        found |= {path.resolve(): RunDir(path) for path in runs}
    return list(found.values()), problems


def read(run: RunDir) -> Run:
    """All that is compared of one run; ValueError when it has no training step."""
    lines, others = read_columns(run.metrics, COLUMNS)
    status = derive_status(run, lines, others)
    if not len(lines["step"]):
        raise ValueError("no training step in metrics.jsonl")
    _, last = np.unique(
        lines["step"][::-1], return_index=True
    )  # a step that was done twice counts as it was done last
    lines = {name: values[::-1][last] for name, values in lines.items()}
    log_every = np.diff(lines["step"], prepend=0)
    lines["hours"] = np.cumsum(np.nan_to_num(lines["seconds"]) * log_every) / 3600
    evals = {line["step"]: line for line in others if line.get("kind") == "eval"}
    settings = {}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        settings = {
            key: setting["value"] for key, setting in json.loads(run.effective.read_text()).items()
        }
    return {
        "name": run.name,
        "settings": settings,
        "lines": lines,
        "evals": evals,
        "status": status,
    }


def _read_or_why_not(run: RunDir) -> Run | str:
    try:
        return read(run)
    except (OSError, ValueError, TypeError, KeyError) as problem:
        return f"{run.path}: {problem}"


def results(run: Run, target: float | None, price: float) -> dict[str, Any]:
    """The numbers of one run's row. `target`: a training loss to reach; `price` per GPU-hour (or rank-hour)."""
    lines, status, settings = run["lines"], run["status"], run["settings"]
    losses = lines["loss"]
    row: dict[str, Any] = {
        "run": run["name"],
        "state": status["state"],
        "steps": int(lines["step"][-1]),
    }
    row["loss"] = float(losses[-1])
    row["best loss"] = float(np.nanmin(losses)) if np.isfinite(losses).any() else None
    for name in sorted(
        {key for line in run["evals"].values() for key in line} - {"kind", "step", "time"}
    ):
        values = [
            line[name]
            for _, line in sorted(run["evals"].items())
            if isinstance(line.get(name), int | float)
        ]
        if values:
            row[f"held-out {name}"] = values[-1]
            row[f"best held-out {name}"] = min(values) if lower_is_better(name) else max(values)
    row["hours"] = float(lines["hours"][-1])
    if target is not None:
        smooth = _smooth(losses, min(50, max(len(losses) // 20, 1)))
        reached = np.flatnonzero(smooth <= target)
        row[f"steps to {target:g}"] = int(lines["step"][reached[0]]) if len(reached) else None
        row[f"hours to {target:g}"] = float(lines["hours"][reached[0]]) if len(reached) else None
    for unit in ("tokens_per_s", "samples_per_s", "mfu"):
        if np.isfinite(lines[unit]).any():
            row[unit] = float(np.nanmedian(lines[unit]))
    if np.isfinite(memory := lines["peak_memory_bytes"]).any():
        row["memory GiB"] = float(np.nanmax(memory)) / 2**30
    row |= {"restarts": status["restarts"], "goodput": status["goodput"]}
    if price:
        row["cost"] = price * row["hours"] * int(settings.get("engine.world_size", 1))
    return row


def differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Setting → its value in each run, where they are not all the same."""
    rows = _by_key([run["settings"] for run in runs]).items()
    return {
        key: values
        for key, values in rows
        if not key.startswith(_NOISE) and any(value != values[0] for value in values)
    }


def _by_key(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Key → its value in each row; keys in the order in which they come up."""
    return {
        key: [row.get(key) for row in rows]
        for key in dict.fromkeys(key for row in rows for key in row)
    }


def curves(runs: list[Run]) -> list[dict[str, Any]]:
    """What the page draws: for each run and each group of seeds, by metric, downsampled points against every abscissa."""
    drawn = []
    for run, group in zip(runs, seed_groups(runs), strict=True):
        metrics = {"loss": _thin(run["lines"], run["lines"]["loss"])}
        steps = np.array(sorted(run["evals"]))
        where = np.clip(
            np.searchsorted(run["lines"]["step"], steps), 0, len(run["lines"]["step"]) - 1
        )
        for name in sorted(
            {key for line in run["evals"].values() for key in line} - {"kind", "step", "time"}
        ):
            values = np.array([_number(run["evals"][step].get(name)) for step in steps])
            metrics[f"held-out {name}"] = _thin(
                {key: run["lines"][key][where] for key in BY.values()}, values
            )
        drawn.append({"name": run["name"], "group": group, "metrics": metrics})
    groups: dict[str, list[Any]] = {}
    for one in drawn:
        groups.setdefault(one["group"], []).append(one["metrics"])
    folded = [{"name": f"{name} ({len(members)} seeds)", "fold": name, "metrics": _fold(members)}
              for name, members in groups.items() if len(members) > 1]  # fmt: skip
    return drawn + folded


def seed_groups(runs: list[Run]) -> list[str]:
    """A name for each run; the same for runs that differ in nothing but the seed."""
    names: dict[str, str] = {}
    found = []
    for run in runs:
        kept = {
            k: v
            for k, v in run["settings"].items()
            if k != "seed" and not k.startswith((*_NOISE, "versions.", "threads"))
        }
        found.append(
            names.setdefault(json.dumps(kept, sort_keys=True) if kept else run["name"], run["name"])
        )
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _thin(against: dict[str, Any], values: Any) -> dict[str, Any]:
    """At most _POINTS bins: the last abscissa of each, and the mean, least and greatest of its values that are finite."""
    edges = np.unique(np.linspace(0, len(values), min(len(values), _POINTS) + 1).astype(int))[:-1]
    ends = np.append(edges[1:], len(values)) - 1
    finite = np.where(np.isfinite(values), values, np.nan)
    with np.errstate(invalid="ignore"):  # none of a bin's values may be
        mean = np.add.reduceat(np.nan_to_num(finite), edges) / np.add.reduceat(
            np.isfinite(values), edges
        )
    thin: dict[str, Any] = {by: against[column][ends] for by, column in BY.items()}
    return thin | {
        "mean": mean,
        "low": np.fmin.reduceat(finite, edges),
        "high": np.fmax.reduceat(finite, edges),
    }


def _fold(members: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds and its 95% interval (Student's t), where all of them have values."""
    folded = {}
    for name in set.intersection(*(set(member) for member in members)):
        curves_ = [member[name] for member in members]
        longest = max(curves_, key=lambda curve: len(curve["steps"]))
        grid = longest["steps"][longest["steps"] <= min(curve["steps"][-1] for curve in curves_)]
        values = np.stack([np.interp(grid, curve["steps"], curve["mean"]) for curve in curves_])
        mean, count = values.mean(0), len(values)
        half = (
            (_T[count - 1] if count <= len(_T) else 1.96) * values.std(0, ddof=1) / math.sqrt(count)
        )
        folded[name] = {by: longest[by][: len(grid)] for by in BY} | {
            "mean": mean,
            "low": mean - half,
            "high": mean + half,
        }
    return folded


def _smooth(values: Any, window: int) -> Any:
    """Means over the last `window` values, of those that are finite."""
    finite = np.isfinite(values)
    total, count = np.cumsum(np.where(finite, values, 0.0)), np.cumsum(finite)
    total[window:], count[window:] = (
        total[window:] - total[:-window].copy(),
        count[window:] - count[:-window].copy(),
    )
    return total / np.maximum(count, 1)


def compare(
    references: list[str], target: float | None = None, price: float = 0.0
) -> tuple[dict[str, Any], list[Run]]:
    """What is shown of several runs (`settings` that differ, `results`, `problems`), and the runs as read.

    Raises RequestError when none of them can be read.
    """
    found, problems = find(references)
    with ThreadPoolExecutor(
        2
    ) as pool:  # most of the time is spent in pyarrow, which lets go of the GIL
        all_read = list(pool.map(_read_or_why_not, found))
    runs = [each for each in all_read if isinstance(each, dict)]
    problems += [each for each in all_read if isinstance(each, str)]
    if not runs:
        raise RequestError("\n".join(problems), "run directories", "bigtrain status")
    if len(tasks := {run["settings"].get("task") for run in runs if run["settings"]}) > 1:
        problems.append(
            f"different tasks ({', '.join(sorted(map(str, tasks)))}): their losses cannot be compared"
        )
    rows = [results(run, target, price) for run in runs]
    return {"settings": differences(runs), "results": rows, "problems": problems}, runs


def page(compared: dict[str, Any], runs: list[Run], by: str) -> str:
    """One HTML page with everything in it: no network, no other file."""
    data = _plain(compared | {"curves": curves(runs), "by": by})
    text = (
        json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        .replace("</", "<\\/")
        .replace("<!--", "<\\!--")
    )
    return (
        asset("templates", "compare.html")
        .read_text(encoding="utf-8")
        .replace("/*DATA*/ null", text)
    )


def _plain(value: Any) -> Any:
    """As JSON has it: numbers that are not finite become null, others keep six digits."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [
            _plain(inner) for inner in (value.tolist() if isinstance(value, np.ndarray) else value)
        ]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def to_csv(rows: list[dict[str, Any]]) -> str:
    """The results, one run a line."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, list(_by_key(rows)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def show(compared: dict[str, Any]) -> None:
    """Two tables on the terminal, a column for each run: what differs, and what came of it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table
    from rich.text import Text

    screen, rows = Console(), compared["results"]
    columns = {key: values for key, values in _by_key(rows).items() if key != "run"}
    for title, lines in (("settings that differ", compared["settings"]), ("results", columns)):
        for first in range(0, len(rows), _WIDE):
            some = slice(first, first + _WIDE)
            names = (
                Column(escape(row["run"]), overflow="fold") for row in rows[some]
            )  # their ends tell runs of a sweep apart
            table = Table(title if lines else "no setting differs", *names, box=None)
            for key, values in lines.items():
                table.add_row(key, *(Text(_short(value)) for value in values[some]))
            screen.print(table, "")
    for problem in compared["problems"]:
        screen.print(f"note: {problem}", markup=False, highlight=False)


def _short(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if type(value) is int
        else str(value)
    )
