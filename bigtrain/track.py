"""Who is told what happens: metrics.jsonl always, the terminal, and Weights & Biases (imported here only)."""

import math
import netrc
import os
import secrets
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import urlparse

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bigtrain.recipe import Track
from bigtrain.rundir import RunDir, to_json

Record = dict[str, Any]


class Tracker(Protocol):
    """Somewhere records go."""

    def log(self, record: Record) -> None: ...
    def close(self, summary: Record) -> None: ...


class MetricsFile:
    """metrics.jsonl: append-only, one JSON object a line, on disk after every line."""

    def __init__(self, run: RunDir) -> None:
        self.file = run.metrics.open("a", encoding="utf-8")
        if self.file.tell() and not run.metrics.read_bytes().endswith(b"\n"):
            self.file.write("\n")  # the last run died in the middle of a line

    def log(self, record: Record) -> None:
        self.file.write(to_json(record) + "\n")
        self.file.flush()

    def close(self, summary: Record) -> None:
        self.file.close()


class Terminal:
    """A progress bar on a terminal; elsewhere a plain line every few seconds, and one per evaluation."""

    def __init__(self, steps: int, unit: str, console: Console, every: float = 5.0) -> None:
        self.steps, self.unit, self.console, self.every = steps, unit, console, every
        self.last = -math.inf
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = ("{task.description}", BarColumn(bar_width=20), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task("training", total=steps, text="")
            self.bar.start()

    def log(self, record: Record) -> None:
        if record["kind"] != "train":
            self.console.print(_line(record), highlight=False)
            return
        text = (
            f"step {record['step']:>{len(str(self.steps))}}/{self.steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}"
            f"  {record[self.unit + '_per_s']:,.0f} {self.unit}/s" + ("" if record["applied"] else "  SKIPPED")
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=record["step"], text=text)
        elif time.monotonic() - self.last >= self.every or record["step"] == self.steps:
            self.last = time.monotonic()
            self.console.print(text, highlight=False)

    def close(self, summary: Record) -> None:
        if self.bar is not None:
            self.bar.stop()


def _line(record: Record) -> str:
    values = {key: value for key, value in record.items() if key not in ("kind", "step", "event", "time")}
    shown = "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    name = "evaluation" if record["kind"] == "eval" else record["event"]
    return f"step {record['step']}  {name}  {shown}"


class WandB:
    """One W&B run per bigtrain run; steps are our own, so that a resumed run continues its curves."""

    def __init__(self, track: Track, run: RunDir, recipe_name: str, config: dict[str, Any], known_id: str) -> None:
        """`known_id`: from the checkpoint, should the run directory have lost its own."""
        import wandb

        id_file = run.path / "wandb_id"
        if not id_file.exists():
            id_file.write_text(known_id or secrets.token_hex(4))
        self.id = id_file.read_text().strip()
        mode: Any = track.wandb if track.wandb != "auto" else "online" if logged_in() else "offline"
        self.run: Any = wandb.init(
            project=track.project,
            group=track.group or recipe_name,
            tags=track.tags,
            name=run.name,
            id=self.id,
            resume="allow" if mode == "online" else None,
            config=config,
            dir=str(run.path),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run.define_metric("*", step_metric="step")

    def log(self, record: Record) -> None:
        prefix = {"train": "train", "eval": "eval"}.get(record["kind"])
        if prefix is None:
            return
        numbers = {f"{prefix}/{k}": v for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "time")}
        self._try(lambda: self.run.log({"step": record["step"], **numbers}))

    def close(self, summary: Record) -> None:
        self._try(lambda: (self.run.summary.update(summary), self.run.finish()))

    def _try(self, act: Callable[[], Any]) -> None:
        """W&B's service is a process of its own, which a cluster may end before us: that must not end the run."""
        try:
            if self.run is not None:
                act()
        except Exception as problem:
            self.run = None
            print(f"bigtrain: W&B is lost ({type(problem).__name__}: {problem}); metrics.jsonl has it all", file=sys.stderr)


def logged_in() -> bool:
    """Whether W&B has a key for its server, in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Everyone:
    """Records to all trackers, in order; ranks other than the first have none."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = list(trackers)

    def log(self, record: Record) -> None:
        record["time"] = time.time()
        for tracker in self.trackers:
            tracker.log(record)

    def event(self, step: int, event: str, **details: Any) -> None:
        """Something that happened, with what it takes to be understood."""
        self.log({"kind": "event", "step": step, "event": event, **details})

    def close(self, summary: Record) -> None:
        for tracker in self.trackers:
            tracker.close(summary)


def console(as_json: bool = False) -> Console:
    """Where a person reads: standard output, or standard error when a program reads the other."""
    return Console(stderr=as_json, soft_wrap=True)
