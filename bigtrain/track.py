"""Who is told what happens: metrics.jsonl always, the terminal, and Weights & Biases (imported here only)."""

import contextlib
import importlib
import json
import logging
import math
import os
import queue
import re
import secrets
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import psutil
import requests
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from bigtrain.errors import RequestError
from bigtrain.load import redact
from bigtrain.recipe import Track
from bigtrain.rundir import RunDir, read_metrics, to_json

Record = dict[str, Any]
_TREND = 40  # columns of the panel's bar, and losses of its trend


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
    """A live panel on a terminal; elsewhere a plain line every few seconds. Evaluations and events are a line each."""

    def __init__(self, steps: int, unit: str, console: Console, every: float = 5.0) -> None:
        self.steps, self.unit, self.console, self.every = steps, unit, console, every
        self.last, self.began = -math.inf, (0, 0.0)  # when a line was printed last; the first step seen, and when
        self.record: Record = {}
        self.saved, self.skipped = "none yet", 0
        self.trend = deque[float](maxlen=_TREND)
        self.live = Live(get_renderable=self._panel, console=console) if console.is_terminal and not console.quiet else None
        if self.live is not None:
            self.live.start()

    def log(self, record: Record) -> None:
        if record["kind"] != "train":
            self.saved = f"step {record['step']:,}" if record.get("event") == "checkpoint" else self.saved
            if record.get("event") != "nodes":
                self.console.print(_line(record), highlight=False, markup=False)
            return
        self.record, self.skipped = record, self.skipped + (not record["applied"])
        self.began = self.began if self.began[0] else (record["step"], record["time"])
        if self.live is None and (time.monotonic() - self.last >= self.every or record["step"] == self.steps):
            self.last = time.monotonic()
            text = (
                f"step {record['step']:>{len(str(self.steps))}}/{self.steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}"
                f"  {self._speed()}" + ("" if record["applied"] else "  SKIPPED")
            )
            self.console.print(text, highlight=False, markup=False)
        elif self.live is not None and math.isfinite(record["loss"]):
            self.trend.append(record["loss"])

    def _speed(self) -> str:
        found = self.record
        rate = f"{found[self.unit + '_per_s']:,.0f} {self.unit}/s"
        return f"{rate}  mfu {found['mfu']:.1%}  {found['peak_memory_bytes'] / 2**30:.1f} GiB"

    def _panel(self) -> RenderableType:
        """Drawn by rich's own thread, so that training never waits for a terminal."""
        found, (first, began) = self.record, self.began
        if not found:
            return "waiting for the first step …"
        pace = (found["time"] - began) / max(found["step"] - first, 1)  # evaluations and checkpoints included
        trend = list(self.trend)  # training goes on meanwhile
        low, high = min(trend, default=0.0), max(trend, default=1.0)
        bars = "".join("▁▂▃▄▅▆▇█"[int(7 * (value - low) / max(high - low, 1e-12))] for value in trend)
        table = Table.grid(padding=(0, 2))
        left = timedelta(seconds=round(pace * (self.steps - found["step"])))
        table.add_row("step", f"{found['step']:,} of {self.steps:,}  {found['step'] / self.steps:.0%}  {left} left")
        table.add_row("", ProgressBar(self.steps, found["step"], width=_TREND))
        table.add_row("loss", f"{found['loss']:.4f}  {bars}")
        table.add_row("speed", self._speed())
        table.add_row("", f"lr {found['lr']:.2e}  gradient norm {found['grad_norm']:.3g}")
        table.add_row("kept", f"checkpoint {self.saved}" + (f"  [red]SKIPPED {self.skipped}[/]" if self.skipped else ""))
        return table

    def close(self, summary: Record) -> None:
        if self.live is not None:
            self.live.stop()


class Also:
    """TensorBoard or Trackio, through one of Accelerate's trackers (engine.tracker); training goes on without it."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker

    def log(self, record: Record) -> None:
        try:
            if numbers := _numbers(record):
                self.tracker.log(numbers, step=record["step"])
        except Exception as problem:  # a full disk, or a database that another program holds
            warnings.warn(f"{self.tracker.name} has not taken all: {problem}", stacklevel=1)

    def close(self, summary: Record) -> None:
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Exception):  # Trackio says goodbye
            self.tracker.finish()


def _numbers(record: Record) -> dict[str, float]:
    """What can be drawn over steps, under the names that a tracker shows; of events, what each machine was doing."""
    kind = record["kind"]
    if kind == "event":
        nodes = record["machines"] if record["event"] == "nodes" else {}
        return {f"nodes/{node}/{name}": value for node, values in nodes.items() for name, value in values.items()}
    return {f"{kind}/{k}": v for k, v in record.items() if isinstance(v, int | float) and k not in ("step", "time")}


def _line(record: Record) -> str:
    values = {key: value for key, value in record.items() if key not in ("kind", "step", "event", "time")}
    shown = "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    return f"step {record['step']}  {record.get('event', 'evaluation')}  {shown}"


# Events that someone should be woken for → the title of the alert.
_ALERTS = {"failed": "training failed", "stopped": "stopped early", "hang": "no progress", "checkpoint FAILED": "no checkpoint"}
_START, _END = 5.0, 10.0  # seconds that W&B may take to start and to finish: training waits for neither


class WandB:
    """One W&B run per bigtrain run, whatever ended it on the way; steps are our own, so that a resumed run continues its
    curves. What an earlier life has told W&B is not told again; what it had no time to tell is told first.

    All of it happens in a thread of its own: to begin takes W&B seconds and a line two milliseconds, mostly of waiting.
    """

    def __init__(self, track: Track, run: RunDir, recipe_name: str, config: dict[str, Any], known_id: str, step: int) -> None:
        """`known_id`: from the checkpoint, should the run directory have lost its own; `step`: where the run goes on."""
        importlib.import_module("wandb")  # here: a data worker that is forked while a thread imports could wait for ever
        self.files, self.skipped, self.lost, self.told, self.began = run, False, False, set[tuple[str, int]](), time.time()
        self.run: Any = None
        id_file = run.path / "wandb_id"
        if not id_file.exists():
            id_file.write_text(known_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))  # a W&B sweep has its own
        self.id = id_file.read_text().strip()
        known: dict[str, Any] = {"project": track.project, "group": track.group or recipe_name, "tags": track.tags, "id": self.id}
        known |= {"notes": track.notes, "job_type": "train", "name": run.name, "config": config, "dir": str(run.path)}
        self.todo: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.todo.put(lambda: self._start(track.wandb, step, known))
        self.thread = threading.Thread(target=self._work, daemon=True, name="W&B")
        self.thread.start()

    def _start(self, mode: str, step: int, known: dict[str, Any]) -> None:
        """Begin, offline where W&B's server does not answer in time; and tell what earlier lives had no time to tell."""
        os.environ.setdefault("WANDB_DATA_DIR", str(self.files.path / "wandb"))  # what is to be uploaded stays with the run
        import wandb

        asked = wandb.Settings(silent=True, console="off", init_timeout=_START, finish_timeout=_END, finish_timeout_raises=True)
        self.told = _told_offline(self.files)
        if mode == "online" or (mode == "auto" and logged_in()):
            try:
                requests.head(_server(), timeout=_START)  # W&B itself would hold up the end of a run that could not begin
                self.run = wandb.init(mode="online", resume="allow", settings=asked, **known)
            except Exception as problem:
                self._say(f"does not answer ({type(problem).__name__}): logging offline")
            else:
                last = int(self.run.summary.get("step", 0) or 0)
                self.told |= {(kind, known_step) for kind in ("train", "eval") for known_step in range(last + 1)}
        if self.run is None:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # at the end it would be waited for where nobody answers
        self.run = self.run or wandb.init(mode="offline", settings=asked, **known)
        self.run.define_metric("*", step_metric="step")
        for name, goal in (("eval/loss", "min"), ("train/loss", "min"), ("eval/accuracy", "max"), ("eval/f1", "max")):
            self.run.define_metric(name, step_metric="step", summary=f"{goal},last")
        lines = (line for line in read_metrics(self.files.metrics) if line.get("kind") in ("train", "eval"))
        earlier = (line for line in lines if line.get("step", 0) <= step and line.get("time", 0.0) < self.began)
        for record in {(line["kind"], line["step"]): line for line in earlier}.values():
            self._tell(record)  # a step that was done twice as it was done last; its alerts are of an earlier life

    def log(self, record: Record) -> None:
        kind, step = record["kind"], record["step"]
        if kind == "event" and record["event"] in _ALERTS:
            text = str(record.get("reason") or record.get("places") or "")
            self.todo.put(lambda: self.run.alert(f"{self.files.name}: {_ALERTS[record['event']]}", f"step {step}. {text}"))
        if not self.skipped and (record.get("event") == "step skipped" or not record.get("applied", True)):
            self.skipped = True
            self.todo.put(lambda: self.run.alert(f"{self.files.name}: step skipped", f"step {step}: not finite, or a spike"))
        self.todo.put(lambda: self._tell(record))

    def _tell(self, record: Record) -> None:
        if (numbers := _numbers(record)) and (record["kind"], record["step"]) not in self.told:
            self.run.log({"step": record["step"], **numbers})

    def samples(self, step: int, rows: list[Record]) -> None:
        """A table of what the model made of some held-out examples; arrays are images."""
        self.todo.put(lambda: self.run.log({"step": step, "samples/eval": self._table(rows)}))

    def _table(self, rows: list[Record]) -> Any:
        import wandb

        shown = [[wandb.Image(value) if hasattr(value, "shape") else value for value in row.values()] for row in rows]
        return wandb.Table(columns=list(rows[0]), data=shown)

    def close(self, summary: Record) -> None:
        self.todo.put(lambda: self._finish(summary))
        self.todo.put(None)
        self.thread.join(2 * _END + self.todo.qsize() / 200)  # a line takes it two milliseconds
        if self.thread.is_alive():
            self._say(f"has not taken the last {self.todo.qsize() + 1} lines in time")
        if self.thread.is_alive() or self.lost:
            with contextlib.suppress(Exception):  # one that has ended meanwhile
                for service in [child for child in psutil.Process().children() if child.name().startswith("wandb")]:
                    service.kill()  # at the end of the program W&B would wait for it without a limit
                importlib.import_module("wandb").teardown()

    def _finish(self, summary: Record) -> None:
        """The exported model becomes an artifact, by reference (nothing of it is uploaded or hashed), with its recipe."""
        import wandb

        self.run.summary.update(summary)
        if (self.files.export / "bigtrain.json").is_file():
            artifact = wandb.Artifact(f"{self.files.name}-model", type="model")
            artifact.add_reference(self.files.export.resolve().as_uri(), checksum=False)
            artifact.add_file(str(self.files.recipe))
            self.run.log_artifact(artifact)
        self.run.finish(exit_code=int("step" not in summary))  # of a run that ended before its end

    def _work(self) -> None:
        """W&B's service is a process of its own, which a cluster may end before us: that must not end the run."""
        while (act := self.todo.get()) is not None:
            try:
                act()
            except Exception as problem:
                if not self.lost:
                    self._say(f"is lost ({type(problem).__name__}: {problem}); metrics.jsonl has it all")
                self.lost = True  # and what comes is tried all the same: one bad table is not the end

    def _say(self, what: str) -> None:
        print(f"bigtrain: W&B {what}; later: bigtrain sync {self.files.name}", file=sys.stderr)


def _segments(run: RunDir) -> list[Path]:
    """W&B's folders of a run, one per life, in their order."""
    return sorted(path for path in (run.path / "wandb").glob("*run-*-*") if path.is_dir() and not path.is_symlink())


def _wandb(*arguments: str) -> subprocess.CompletedProcess[str]:
    """W&B's own command line."""
    return subprocess.run([sys.executable, "-m", "wandb", *arguments], capture_output=True, text=True, check=False)


def _told_offline(run: RunDir) -> set[tuple[str, int]]:
    """(kind, step) of what earlier offline segments hold, as W&B's own reader finds it: a killed one may lack its end."""
    told = set()
    for file in (file for folder in _segments(run) for file in folder.glob("*.wandb")):
        for line in _wandb("leet", "inspect", "--json", str(file)).stdout.splitlines():
            with contextlib.suppress(ValueError):
                item = json.loads(line).get("history", {}).get("item", {})
                told |= {(key.split("/")[0], item["step"]) for key in item if "/" in key and "step" in item}
    return told


def sync(run: RunDir) -> str:
    """Upload what was logged offline, every segment once and in order, by W&B's own sync; what it said.

    Raises RequestError when there is nothing, or W&B refuses.
    """
    folders = [str(path) for path in _segments(run)]
    if not folders:
        raise RequestError(f"{run.path}/wandb holds nothing to sync", "a run with track.wandb on")
    # One id: then W&B appends the segments in order of their start, where it would overwrite (wandb#3841).
    done = _wandb("sync", "--yes", "--include-online", "--id", (run.path / "wandb_id").read_text().strip(), *folders)
    said = (done.stdout + done.stderr).strip()
    if done.returncode != 0 or "error" in said.lower():
        raise RequestError(f"wandb sync: {said[-500:]}", "W&B's server to answer", "the same command, later")
    return said


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def logged_in() -> bool:
    """Whether W&B has a key for its server, in the environment or in netrc."""
    return bool(os.environ.get("WANDB_API_KEY")) or requests.utils.get_netrc_auth(_server()) is not None


class Everyone:
    """Records to all trackers, in order; ranks other than the first have none."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = list(trackers)

    def log(self, record: Record) -> None:
        record["time"] = time.time()
        for tracker in self.trackers:
            tracker.log(record)

    def event(self, step: int, event: str, **details: Any) -> None:
        """Something that happened, with what it takes to be understood; no secret that an error may have named."""
        self.log({"kind": "event", "step": step, "event": event, **json.loads(redact(to_json(details)))})

    def samples(self, step: int, rows: list[Record]) -> None:
        """Examples for those trackers that have room for them."""
        for tracker in self.trackers:
            if rows and isinstance(tracker, WandB):
                tracker.samples(step, rows)

    def close(self, summary: Record) -> None:
        for tracker in self.trackers:
            tracker.close(summary)


def console(as_json: bool = False, quiet: bool = False) -> Console:
    """Where a person reads: standard output, or standard error when a program reads the other."""
    return Console(stderr=as_json, soft_wrap=True, quiet=quiet)


class _Redacted(logging.Formatter):
    """Without secrets, also in a traceback. (A filter would not do: what fails in one, fails in who logs.)"""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def keep_warnings(run: RunDir, rank: int) -> None:
    """What libraries warn of goes to `runs/NAME/logs/rank-N.log`; what the user's own code does, to rank 0's terminal too."""
    shown, seen = logging.StreamHandler(), set[str]()
    kept: logging.Handler = logging.NullHandler()
    with contextlib.suppress(OSError):  # a disk that shows this rank no run directory must not end the run
        run.logs.mkdir(parents=True, exist_ok=True)
        kept = logging.FileHandler(run.logs / f"rank-{rank}.log")
    kept.setFormatter(_Redacted("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    shown.setFormatter(_Redacted())
    theirs = re.compile(rf"site-packages|dist-packages|^{re.escape(sysconfig.get_paths()['stdlib'])}")

    def is_new(record: logging.LogRecord) -> bool:  # Python forgets what it has warned of whenever a filter changes
        known = record.getMessage() in seen
        seen.add(record.getMessage())
        return not known

    shown.addFilter(lambda record: not theirs.search(record.getMessage() if record.name == "py.warnings" else record.pathname))
    logging.getLogger().handlers = [kept, shown] if rank == 0 else [kept]
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addFilter(is_new)
    warnings.resetwarnings()
    for name in ("accelerate", "DeepSpeed", "torch.distributed", "transformers"):  # which speak to the terminal themselves
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.WARNING)
