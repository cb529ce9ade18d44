"""What each run below runs/ is doing, read back from its files and from Slurm's queue."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config.loader import load_recipe
from bigtrain.errors import BigtrainError
from bigtrain.runs.directory import RUNS, RunDir
from bigtrain.runs.lock import owner
from bigtrain.runs.metrics_file import read_columns, read_metrics
from bigtrain.runs.slurm_queue import queue

COLUMNS = {"step": "int64", "samples": "int64", "weight": "int64"}
COLUMNS |= dict.fromkeys(
    ("loss", "seconds", "time", "tokens_per_s", "samples_per_s", "mfu", "peak_memory_bytes"),
    "float64",
)
_RECENT = 20  # lines that a rate is taken from
# The last event of a run that is not running → its state.
_ENDS = {"stopped": "stopped", "failed": "FAILED", "lost_peer": "lost a rank", "hang": "HUNG"}


def all_runs() -> list[RunDir]:
    """Every run below runs/, those that were only submitted too, the one that did something last first."""
    found = {
        path.parent for name in ("recipe.yaml", "jobs.jsonl") for path in RUNS.glob(f"*/{name}")
    }
    return [RunDir(path) for path in sorted(found, key=_last_sign, reverse=True)]


def _last_sign(path: Path) -> float:
    signs = [path / name for name in ("metrics.jsonl", "jobs.jsonl", "recipe.yaml")]
    return max((sign.stat().st_mtime for sign in signs if sign.exists()), default=0.0)


def status_or_why_not(run: RunDir) -> dict[str, Any]:
    """As status_of; a run whose files are not what they should be must not hide the others."""
    try:
        return status_of(run)
    except (OSError, ValueError, TypeError, KeyError) as problem:
        unknown = dict.fromkeys(("loss", "samples_per_s", "left", "goodput", "job"))
        none = dict.fromkeys(("step", "steps", "restarts"), 0)
        return {
            "run": run.name,
            "state": "UNREADABLE",
            **none,
            "health": [str(problem)[:100]],
            **unknown,
        }


def status_of(run: RunDir) -> dict[str, Any]:
    """One run: its state, how far and how fast, and what is wrong with it."""
    return derive_status(run, *read_columns(run.metrics, COLUMNS))


def derive_status(
    run: RunDir, lines: dict[str, Any], others: list[dict[str, Any]]
) -> dict[str, Any]:
    """As status_of, from what was read of the run already."""
    events = [event for event in others if event.get("event", "nodes") != "nodes"]
    try:
        settings = load_recipe(str(run.recipe)).recipe.train if run.recipe.is_file() else None
    except BigtrainError:
        settings = None  # written by another version
    began = [event for event in events if event["event"] == "started"]
    step = int(lines["step"][-1]) if len(lines["step"]) else 0
    steps = settings.steps if settings else 0
    state, job = _state(run, events, began, step, steps)
    unit = "tokens" if np.isfinite(lines["tokens_per_s"][-1:]).any() else "samples"
    recent = {name: values[-_RECENT:] for name, values in lines.items()}
    result: dict[str, Any] = {"run": run.name, "state": state, "step": step, "steps": steps}
    result["loss"] = float(lines["loss"][-1]) if step else None
    result[f"{unit}_per_s"] = float(np.median(recent[f"{unit}_per_s"])) if step else None
    result["left"] = (steps - step) * _pace(recent) if state == "running" and step else None
    result["restarts"] = max(len(began) - 1, 0)
    result["goodput"] = goodput(lines, began, state == "running")
    result["job"] = job
    result["health"] = _health(run, recent, events, state)
    return result


def goodput(lines: dict[str, Any], began: list[dict[str, Any]], running: bool) -> float | None:
    """Seconds spent on steps that count ÷ wall time since the first start, waiting in a queue included.

    A step that was done again after a kill counts once. The definition is that of Google's "ML Productivity Goodput".
    """
    if not began or not len(lines["step"]):
        return None
    steps, last = np.unique(
        lines["step"][::-1], return_index=True
    )  # each step's last line, a mean since the line before
    counted = float((lines["seconds"][::-1][last] * np.diff(steps, prepend=0)).sum())
    end = time.time() if running else float(np.nanmax(lines["time"]))
    return min(counted / max(end - float(began[0]["time"]), 1e-9), 1.0)


def _pace(recent: dict[str, Any]) -> float:
    """Seconds per step of late, evaluations and checkpoints included."""
    steps = int(recent["step"][-1] - recent["step"][0])
    passed = float(recent["time"][-1] - recent["time"][0])
    return (
        passed / steps
        if steps > 0 and math.isfinite(passed)
        else float(np.median(recent["seconds"]))
    )


def _state(
    run: RunDir, events: list[dict[str, Any]], began: list[Any], step: int, steps: int
) -> tuple[str, str | None]:
    """(state, Slurm's job): running, queued, requeued, finished, stopped, FAILED, HUNG, or died: killed, and no word of it."""
    holder, alive = owner(run)
    submitted = [line for line in read_metrics(run.path / "jobs.jsonl") if "job" in line]
    job = (
        holder.get("job")
        or (submitted[-1]["job"] if submitted else None)
        or (began[-1].get("job") if began else None)
    )
    queued = queue().get(str(job), "") if job else ""
    if alive or queued in ("RUNNING", "COMPLETING"):
        return ("running" if holder else "starting"), job
    if queued in ("PENDING", "CONFIGURING", "REQUEUED"):
        return ("requeued" if began else "queued"), job
    if alive is None and time.time() - _last_sign(run.path) < 120:
        return "running", job
    if run.summary.is_file() and step >= steps > 0:
        return "finished", job
    ends = [event["event"] for event in events if event["event"] in (*_ENDS, "started")]
    if ends and ends[-1] in _ENDS:
        return _ENDS[ends[-1]], job
    return ("left the queue" if submitted and not began else "died"), job


def _health(
    run: RunDir, recent: dict[str, Any], events: list[dict[str, Any]], state: str
) -> list[str]:
    """What a user should look at, in a few words each; nothing is what it should be."""
    said = []
    if len(recent["loss"]) and not np.isfinite(recent["loss"][-1]):
        said.append("loss not finite")
    saves = [event for event in events if event["event"].startswith("checkpoint")]
    if saves and saves[-1]["event"] == "checkpoint_failed":
        said.append(f"checkpoint not written: {saves[-1]['reason']}")
    if spikes := sum(event["event"] == "loss_spike" for event in events):
        said.append(f"{spikes} loss spike{'s' * (spikes > 1)}")
    if slow := {event["rank"] for event in events[-10:] if event["event"] == "straggler"}:
        said.append(f"slow ranks: {', '.join(map(str, sorted(slow)))}")
    if state == "running" and len(recent["step"]):
        silent, usual = time.time() - _last_sign(run.path), _pace(recent)
        if silent > max(60, 20 * usual):
            said.append(f"no step for {silent:,.0f} s")
    if state in _ENDS.values() and (
        reasons := [event["reason"] for event in events if "reason" in event]
    ):
        said.append(str(reasons[-1]))
    return said


def show(found: list[dict[str, Any]]) -> None:
    """A table on the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {
        "running": "green",
        "starting": "green",
        "finished": "",
        "queued": "cyan",
        "requeued": "cyan",
        "stopped": "yellow",
    }
    table = Table(
        *["run", "state", "step", "loss", "rate", "left", "restarts", "goodput", "health"], box=None
    )
    for one in found:
        unit = next(name for name in one if name.endswith("_per_s"))
        table.add_row(
            Text(one["run"]),
            Text(one["state"], style=styles.get(one["state"], "bold red")),
            f"{one['step']:,}/{one['steps']:,}",
            "" if one["loss"] is None else f"{one['loss']:.4f}",
            "" if one[unit] is None else f"{one[unit]:,.0f} {unit.removesuffix('_per_s')}/s",
            "" if one["left"] is None else _duration(one["left"]),
            f"{one['restarts']}",
            "" if one["goodput"] is None else f"{one['goodput']:.0%}",
            Text("; ".join(one["health"]) or "ok", style="red" if one["health"] else ""),
        )
    Console().print(table if found else "no runs below runs/ yet: bigtrain train RECIPE")


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return (
        f"{hours} h {minutes:02} min"
        if hours
        else f"{minutes} min"
        if minutes
        else f"{seconds:.0f} s"
    )
