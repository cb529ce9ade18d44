"""What each run below runs/ is doing, read back from its files and from Slurm's queue."""

import math
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config.loader import load_recipe
from bigtrain.errors import BigtrainError
from bigtrain.runs.directory import RUNS, RunDir
from bigtrain.runs.events import Event
from bigtrain.runs.lock import Owner, is_alive, read_owner
from bigtrain.runs.metrics_file import Columns, Record, read_columns, read_metrics
from bigtrain.runs.slurm_queue import queue
from bigtrain.runs.step_shares import PARTS, column_of, in_words, shares

# The keys of training lines that status and compare read.
COLUMNS = {
    "step": "int64",
    "samples": "int64",
    "weight": "int64",
    "loss": "float64",
    "seconds": "float64",
    "time": "float64",
    "tokens_per_s": "float64",
    "samples_per_s": "float64",
    "mfu": "float64",
    "peak_memory_bytes": "float64",
    **{column_of(part): "float64" for part in PARTS},
}
_PIPE_WIDTH = 1000  # columns: one line per run, for grep
_RECENT = 20  # training lines that a rate is taken from
# The last event of a run that is not running → its state.
_ENDS: dict[Event, str] = {
    "stopped": "stopped",
    "failed": "FAILED",
    "lost_peer": "lost a rank",
    "hang": "HUNG",
}
_SAVES: tuple[Event, ...] = ("checkpoint", "checkpoint_failed")
_STYLES = {
    "running": "green",
    "starting": "green",
    "finished": "",
    "queued": "cyan",
    "requeued": "cyan",
    "stopped": "yellow",
}


@dataclass
class RunStatus:
    """What `status` shows of one run."""

    run: str
    state: str
    step: int = 0
    steps: int = 0  # train.steps; 0 if it is not known
    loss: float | None = None
    rate: float | None = None  # in units per second
    unit: str = "samples"  # or tokens
    left: float | None = None  # seconds until the last step, of a run that is running
    restarts: int = 0
    goodput: float | None = None
    shares: dict[str, float] = field(default_factory=dict)  # of the recent steps' time, by part
    job: str | None = None  # in Slurm
    health: list[str] = field(default_factory=list)  # what to look at; empty: all is well

    def as_dict(self) -> dict[str, Any]:
        """What `status --json` prints: the rate has its unit in its key."""
        values = {}
        for key, value in vars(self).items():
            if key == "rate":
                values[f"{self.unit}_per_s"] = value
            elif key != "unit":
                values[key] = value
        return values


def all_runs() -> list[RunDir]:
    """Every run below runs/, also those only queued; the one with the newest files first."""
    files = [*RUNS.glob("*/recipe.yaml"), *RUNS.glob("*/jobs.jsonl")]
    folders = {file.parent for file in files}
    return [RunDir(folder) for folder in sorted(folders, key=_last_change, reverse=True)]


def _last_change(folder: Path) -> float:
    files = [folder / name for name in ("metrics.jsonl", "jobs.jsonl", "recipe.yaml")]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def status_or_why_not(run: RunDir) -> RunStatus:
    """As status_of; but a run whose files cannot be understood must not hide the others."""
    try:
        return status_of(run)
    except (OSError, ValueError, TypeError, KeyError) as problem:
        return RunStatus(run.name, "UNREADABLE", health=[str(problem)[:100]])


def status_of(run: RunDir) -> RunStatus:
    """One run: its state, how far and how fast it is, and what is wrong with it."""
    lines, others = read_columns(run.metrics, COLUMNS)
    return derive_status(run, lines, others)


def derive_status(run: RunDir, lines: Columns, others: list[Record]) -> RunStatus:
    """As status_of, from the lines of metrics.jsonl: what read_columns returns for COLUMNS."""
    events = [line for line in others if "event" in line and line["event"] != "nodes"]
    starts = [event for event in events if event["event"] == "started"]
    owner = read_owner(run)
    submitted = [line for line in read_metrics(run.path / "jobs.jsonl") if "job" in line]
    status = RunStatus(run.name, "", steps=_planned_steps(run))
    if len(lines["step"]):
        status.step = int(lines["step"][-1])
    status.job = _slurm_job(owner, submitted, starts)
    status.state = _state(status, run, owner, submitted, events)
    recent = {name: values[-_RECENT:] for name, values in lines.items()}
    if np.isfinite(recent["tokens_per_s"][-1:]).any():
        status.unit = "tokens"
    if status.step:
        status.loss = float(lines["loss"][-1])
        status.rate = float(np.median(recent[f"{status.unit}_per_s"]))
        if status.state == "running":
            status.left = (status.steps - status.step) * _seconds_per_step(recent)
    status.shares = shares(recent)
    turns = [event for event in events if event["event"] in ("started", "finished")]
    status.restarts = sum(
        before["event"] == after["event"] == "started" for before, after in pairwise(turns)
    )
    status.goodput = goodput(lines, turns, status.state == "running")
    status.health = _health(run, recent, events, status.state)
    return status


def _planned_steps(run: RunDir) -> int:
    """`train.steps` of a run; 0 if it is not known."""
    settings = run.settings()
    if "train.steps" in settings:
        return int(settings["train.steps"])
    try:
        recipe = load_recipe(str(run.recipe)).recipe if run.recipe.is_file() else None
        return (recipe.train.steps or 0) if recipe else 0
    except BigtrainError:  # written by another version
        return 0


def goodput(lines: Columns, turns: list[Record], running: bool) -> float | None:
    """Seconds spent on steps that count ÷ wall time since the first start, queueing included.

    `turns`: the events `started` and `finished`. A step repeated after a kill counts once, and the
    time between a finish and a start with more steps not at all. The definition is Google's "ML
    Productivity Goodput".
    """
    if not turns or not len(lines["step"]):
        return None
    # Of each step the last line; its seconds are a mean over the steps since the line before.
    steps, last = np.unique(lines["step"][::-1], return_index=True)
    seconds = lines["seconds"][::-1][last]
    counted = float((seconds * np.diff(steps, prepend=0)).sum())
    end = time.time() if running else float(np.nanmax(lines["time"]))
    wall_time = end - float(turns[0]["time"])
    for before, after in pairwise(turns):
        if before["event"] == "finished":
            wall_time -= min(after["time"], end) - min(before["time"], end)
    return min(counted / max(wall_time, 1e-9), 1.0)


def _seconds_per_step(recent: Columns) -> float:
    """Over the recent lines, evaluations and checkpoints included."""
    steps = int(recent["step"][-1] - recent["step"][0])
    seconds = float(recent["time"][-1] - recent["time"][0])
    if steps > 0 and math.isfinite(seconds):
        return seconds / steps
    return float(np.median(recent["seconds"]))


def _state(
    status: RunStatus,
    run: RunDir,
    owner: Owner | None,
    submitted: list[Record],
    events: list[Record],
) -> str:
    """From the run's lock, Slurm's queue, and the last event that begins or ends a run."""
    alive = is_alive(owner) if owner is not None else False
    started = any(event["event"] == "started" for event in events)
    queued = queue().get(status.job, "") if status.job else ""
    if alive or queued in ("RUNNING", "COMPLETING"):
        return "running" if owner is not None else "starting"
    if queued in ("PENDING", "CONFIGURING", "REQUEUED"):
        return "requeued" if started else "queued"
    if alive is None and time.time() - _last_change(run.path) < 120:
        return "running"
    names = [event["event"] for event in events]
    reached_its_end = status.step >= status.steps > 0 or "out_of_patience" in names
    if run.summary.is_file() and reached_its_end:
        return "finished"
    turns = [name for name in names if name == "started" or name in _ENDS]
    if turns and turns[-1] in _ENDS:
        return _ENDS[turns[-1]]
    return "left the queue" if submitted and not started else "died"


def _slurm_job(owner: Owner | None, submitted: list[Record], starts: list[Record]) -> str | None:
    """The job of the run's owner, else the last one submitted, else that of the last start."""
    if owner is not None and owner.job:
        return owner.job
    if submitted:
        return str(submitted[-1]["job"])
    if starts and starts[-1].get("job"):
        return str(starts[-1]["job"])
    return None


def _health(run: RunDir, recent: Columns, events: list[Record], state: str) -> list[str]:
    """What a user should look at, in a few words each; empty: all is well."""
    problems = []
    if len(recent["loss"]) and not np.isfinite(recent["loss"][-1]):
        problems.append("loss not finite")
    saves = [event for event in events if event["event"] in _SAVES]
    if saves and saves[-1]["event"] == "checkpoint_failed":
        problems.append(f"checkpoint not written: {saves[-1]['reason']}")
    spikes = sum(event["event"] == "loss_spike" for event in events)
    if spikes:
        problems.append("1 loss spike" if spikes == 1 else f"{spikes} loss spikes")
    slow_ranks = {event["rank"] for event in events[-10:] if event["event"] == "straggler"}
    if slow_ranks:
        problems.append(f"slow ranks: {', '.join(map(str, sorted(slow_ranks)))}")
    if state == "running" and len(recent["step"]):
        silence = time.time() - _last_change(run.path)
        if silence > max(60, 20 * _seconds_per_step(recent)):
            problems.append(f"no step for {silence:,.0f} s")
    reasons = [event["reason"] for event in events if "reason" in event]
    if state in _ENDS.values() and reasons:
        problems.append(str(reasons[-1]))
    return problems


def show(statuses: list[RunStatus]) -> None:
    """A table on the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not statuses:
        Console().print("no runs below runs/ yet: bigtrain train RECIPE")
        return
    table = Table(box=None, collapse_padding=True, pad_edge=False)
    for head in ("run", "state", "step", "loss", "rate", "left", "restarts", "goodput", "health"):
        is_whole = head in ("state", "step", "loss", "rate")
        table.add_column(head, overflow="fold", no_wrap=is_whole)
    for status in statuses:
        table.add_row(
            Text(status.run),
            Text(status.state, style=_STYLES.get(status.state, "bold red")),
            f"{status.step:,}/{status.steps:,}",
            "" if status.loss is None else f"{status.loss:.4f}",
            "" if status.rate is None else f"{status.rate:,.0f} {status.unit}/s",
            "" if status.left is None else _duration(status.left),
            f"{status.restarts}",
            "" if status.goodput is None else f"{status.goodput:.0%}",
            Text("; ".join(status.health) or "ok", style="red" if status.health else ""),
        )
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(table)
    if len(statuses) == 1 and statuses[0].shares:
        console.print(f"time of a step: {in_words(statuses[0].shares)}", highlight=False)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    if minutes:
        return f"{minutes} min"
    return f"{seconds:.0f} s"
