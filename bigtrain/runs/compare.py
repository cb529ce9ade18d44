"""Runs side by side: which settings differ, and what came of them."""

import glob
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.task_specs import lower_is_better
from bigtrain.errors import RequestError
from bigtrain.runs.directory import RUNS, RunDir
from bigtrain.runs.metrics_file import Columns, Record, read_columns
from bigtrain.runs.status import COLUMNS, RunStatus, derive_status
from bigtrain.runs.step_shares import shares

# Settings that differ between any two runs, and were not asked for.
UNIMPORTANT = ("name", "slurm.job", "git.", "peak_flops", "track.")


@dataclass
class Run:
    """What is compared of one run."""

    name: str
    settings: dict[str, Any]  # empty where effective.json is missing
    lines: Columns  # training lines: one per step, in the order of steps; with a column `hours`
    evals: dict[int, Record]  # step → its last evaluation
    status: RunStatus

    def eval_metrics(self) -> list[str]:
        """The names of what was measured on held-out data, in alphabetical order."""
        names: set[str] = set()
        for line in self.evals.values():
            names.update(line)
        return sorted(names - {"kind", "step", "time"})


@dataclass
class Comparison:
    """What `compare` shows of several runs."""

    runs: list[Run]
    settings: dict[str, list[Any]]  # those that differ → the value in each run
    results: list[dict[str, Any]]  # of each run: column → value
    problems: list[str]

    def as_dict(self) -> dict[str, Any]:
        """What `compare --json` prints."""
        return {"settings": self.settings, "results": self.results, "problems": self.problems}


def compare_runs(
    references: list[str], target: float | None = None, price: float = 0.0
) -> Comparison:
    """Read and compare runs; `references`, `target` and `price` as in find_runs and results.

    Raises RequestError when none of them can be read.
    """
    folders, problems = find_runs(references)
    runs = []
    with ThreadPoolExecutor(2) as pool:  # most of the time goes to pyarrow, which releases the GIL
        for outcome in pool.map(_read_or_why_not, folders):
            if isinstance(outcome, Run):
                runs.append(outcome)
            else:
                problems.append(outcome)
    if not runs:
        raise RequestError("\n".join(problems), "run directories", "bigtrain status")
    tasks = sorted({str(run.settings.get("task")) for run in runs if run.settings})
    if len(tasks) > 1:
        names = ", ".join(tasks)
        problems.append(f"different tasks ({names}): their losses cannot be compared")
    rows = [results(run, target, price) for run in runs]
    return Comparison(runs, differences(runs), rows, problems)


def find_runs(references: list[str]) -> tuple[list[RunDir], list[str]]:
    """The runs that names below runs/, directories and globs stand for; a line for each other one.

    A path inside a run, such as a folder of W&B's, stands for that run.
    """
    runs: dict[Path, RunDir] = {}
    problems = []
    for reference in references:
        paths = sorted(glob.glob(reference))
        paths += sorted(glob.glob(str(RUNS / reference)))
        known = False
        for path in paths:
            folder = _enclosing_run(Path(path))
            if folder is not None:
                runs[folder.resolve()] = RunDir(folder)
                known = True
        if not known:
            problems.append(
                f"{reference}: no run"
                f" (no recipe.yaml or metrics.jsonl there, nor in {RUNS / reference})"
            )
    return list(runs.values()), problems


def _enclosing_run(path: Path) -> Path | None:
    """The run directory that a path is, or is in; None if there is none."""
    for folder in (path, *path.parents):
        if (folder / "recipe.yaml").is_file():
            return folder
    return path if (path / "metrics.jsonl").is_file() else None


def _read_or_why_not(run: RunDir) -> Run | str:
    try:
        return read_run(run)
    except (OSError, ValueError, TypeError, KeyError) as problem:
        return f"{run.path}: {problem}"


def read_run(run: RunDir) -> Run:
    """All that is compared of one run. Raises ValueError when it has no training step."""
    lines, others = read_columns(run.metrics, COLUMNS)
    if not len(lines["step"]):
        raise ValueError("no training step in metrics.jsonl")
    status = derive_status(run, lines, others)
    # A step that was repeated after a kill counts as it was done last.
    _, last = np.unique(lines["step"][::-1], return_index=True)
    lines = {name: values[::-1][last] for name, values in lines.items()}
    steps_per_line = np.diff(lines["step"], prepend=0)
    seconds = np.nan_to_num(lines["seconds"]) * steps_per_line
    lines["hours"] = np.cumsum(seconds) / 3600
    evals = {line["step"]: line for line in others if line.get("kind") == "eval"}
    return Run(run.name, run.settings(), lines, evals, status)


def results(run: Run, target: float | None, price: float) -> dict[str, Any]:
    """The columns of one run's row.

    `target`: a training loss, to say when it was reached.
    `price`: of one rank's GPU per hour, for the cost.
    """
    losses = run.lines["loss"]
    hours = float(run.lines["hours"][-1])
    row: dict[str, Any] = {
        "run": run.name,
        "state": run.status.state,
        "steps": int(run.lines["step"][-1]),
        "loss": float(losses[-1]),
        "best loss": None,
    }
    if np.isfinite(losses).any():
        row["best loss"] = float(np.nanmin(losses))
    row |= _eval_results(run)
    row["hours"] = hours
    if target is not None:
        row |= _reached(run, target)
    for name in ("tokens_per_s", "samples_per_s", "mfu"):
        rates = run.lines[name]
        if np.isfinite(rates).any():
            row[name] = float(np.nanmedian(rates))
    memory = run.lines["peak_memory_bytes"]
    if np.isfinite(memory).any():
        row["memory GiB"] = float(np.nanmax(memory)) / 2**30
    for part, share in shares(run.lines).items():
        row[f"share {part}"] = share
    row["restarts"] = run.status.restarts
    row["goodput"] = run.status.goodput
    if price:
        ranks = int(run.settings.get("engine.world_size", 1))
        row["cost"] = price * hours * ranks
    return row


def _eval_results(run: Run) -> dict[str, Any]:
    """The last and the best value of each metric on held-out data."""
    row = {}
    for name in run.eval_metrics():
        values = [run.evals[step].get(name) for step in sorted(run.evals)]
        numbers = [value for value in values if isinstance(value, int | float)]
        if numbers:
            best = min if lower_is_better(name) else max
            row[f"held-out {name}"] = numbers[-1]
            row[f"best held-out {name}"] = best(numbers)
    return row


def _reached(run: Run, target: float) -> dict[str, Any]:
    """When the smoothed training loss came down to the target; None: never."""
    losses = run.lines["loss"]
    window = min(50, max(len(losses) // 20, 1))
    reached = np.flatnonzero(_moving_mean(losses, window) <= target)
    steps = None
    hours = None
    if len(reached):
        first = reached[0]
        steps = int(run.lines["step"][first])
        hours = float(run.lines["hours"][first])
    return {f"steps to {target:g}": steps, f"hours to {target:g}": hours}


def _moving_mean(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Means over the last `window` values, of those that are finite; shape as `values`."""
    finite = np.isfinite(values)
    total = np.cumsum(np.where(finite, values, 0.0))
    count = np.cumsum(finite)
    total[window:] -= total[:-window].copy()
    count[window:] -= count[:-window].copy()
    return np.asarray(total / np.maximum(count, 1))


def differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Setting → its value in each run, where they are not all the same."""
    differing = {}
    rows = [run.settings for run in runs]
    for key, values in values_by_key(rows).items():
        same = all(value == values[0] for value in values)
        if not same and not key.startswith(UNIMPORTANT):
            differing[key] = values
    return differing


def values_by_key(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Key → its value in each row, or None; keys in the order in which rows bring them up."""
    keys: dict[str, None] = {}
    for row in rows:
        keys |= dict.fromkeys(row)
    return {key: [row.get(key) for row in rows] for key in keys}
