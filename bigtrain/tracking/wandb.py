"""Weights & Biases: one W&B run per bigtrain run, written by a thread of its own."""

import contextlib
import importlib
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import psutil

from bigtrain.config.recipe import TrackConfig
from bigtrain.config.task_specs import MetricName, lower_is_better
from bigtrain.runs.directory import RunDir
from bigtrain.runs.events import EVENT_TEXTS, Event
from bigtrain.runs.metrics_file import Record, read_metrics
from bigtrain.tracking.base import Tracker, numbers_of
from bigtrain.tracking.wandb_sync import logged_in, logged_offline, wandb_server

# Events that W&B sends an alert for.
_ALERTS: tuple[Event, ...] = ("failed", "stopped", "hang", "checkpoint_failed")
# Metrics whose best value W&B shows beside the last.
_BEST = ("train/loss", *(f"eval/{metric}" for metric in get_args(MetricName)))
# Seconds that W&B may take to start and to finish, so that training waits for neither.
_START_TIMEOUT = 5.0
_FINISH_TIMEOUT = 10.0
_LINES_PER_SECOND = 200  # that W&B takes, at least


class WandB(Tracker):
    """One W&B run per bigtrain run, however often it was killed and resumed.

    Lines have our own steps, so that a resumed run continues its curves. What W&B has from an
    earlier process is not logged again; what that process had no time to log is logged first.

    All of it happens in a thread: W&B takes seconds to start and two milliseconds for a line, most
    of it waiting. The thread starts with the first line of training, so that the first step, and a
    restart's, does not share its processor with W&B's imports. By then data workers are there too:
    one that is forked while another thread imports could wait for ever.
    """

    def __init__(
        self,
        track: TrackConfig,
        run_dir: RunDir,
        recipe_name: str,
        config: dict[str, Any],
        known_id: str,
        step: int,
    ) -> None:
        """`known_id`: from the checkpoint, in case the run directory has lost its own.
        `step`: where training starts.
        """
        self.run_dir = run_dir
        self.run: Any = None  # W&B's, once it has started
        self.id = _wandb_id(run_dir, known_id)
        self.logged = set[tuple[str, int]]()  # (kind, step) of what W&B has from earlier processes
        self.began = time.time()  # lines before this are of earlier processes
        self.skip_alerted = False  # an alert for the first skipped step is enough
        self.failed = False  # W&B has raised an error
        self.actions: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        arguments = {
            "project": track.project,
            "group": track.group or recipe_name,
            "tags": track.tags,
            "id": self.id,
            "notes": track.notes,
            "job_type": "train",
            "name": run_dir.name,
            "config": config,
            "dir": str(run_dir.path),
        }
        self.actions.put(partial(self._start, track.wandb, arguments, step))
        self.thread = threading.Thread(target=self._work, daemon=True, name="W&B")

    def log(self, record: Record) -> None:
        event = record.get("event")
        if record["kind"] in ("train", "eval") or event in _ALERTS:
            self._start_thread()
        if event in _ALERTS:
            details = record.get("reason") or record.get("places") or ""
            self._alert(EVENT_TEXTS[event], f"step {record['step']}. {details}")
        skipped = event == "step_skipped" or not record.get("applied", True)
        if skipped and not self.skip_alerted:
            self.skip_alerted = True
            self._alert("step skipped", f"step {record['step']}: not finite, or a spike")
        self.actions.put(partial(self._log, record))

    def samples(self, step: int, rows: list[Record]) -> None:
        """A table of what the model made of some held-out examples; arrays become images."""
        self.actions.put(partial(self._log_table, step, rows))

    def close(self, summary: Record) -> None:
        """Finish the run in W&B, and wait for it, but not for longer than it needs."""
        self._start_thread()
        self.actions.put(partial(self._finish, summary))
        self.actions.put(None)
        self.thread.join(2 * _FINISH_TIMEOUT + self.actions.qsize() / _LINES_PER_SECOND)
        late = self.thread.is_alive()
        if late:
            self._warn(f"has not taken the last {self.actions.qsize() + 1} lines in time")
        if late or self.failed:
            _end_service()

    def _start_thread(self) -> None:
        if self.thread.ident is None:
            self.thread.start()

    def _alert(self, title: str, text: str) -> None:
        self.actions.put(partial(self._send_alert, f"{self.run_dir.name}: {title}", text))

    def _warn(self, problem: str) -> None:
        later = f"later: bigtrain sync {self.run_dir.name}"
        print(f"bigtrain: W&B {problem}; {later}", file=sys.stderr)

    # The methods below are called in the thread only.

    def _work(self) -> None:
        """Do what `actions` has, until None.

        W&B's service is a process of its own, which a cluster may end: that must not end training.
        """
        for action in iter(self.actions.get, None):
            try:
                action()
            except Exception as problem:
                if not self.failed:
                    name = type(problem).__name__
                    self._warn(f"failed ({name}: {problem}); metrics.jsonl has everything")
                self.failed = True  # later actions are still tried: it may be one bad table only

    def _start(self, mode: str, arguments: dict[str, Any], step: int) -> None:
        """Start W&B, offline if its server is silent; log what earlier processes could not."""
        # What waits to be uploaded stays with the run.
        os.environ.setdefault("WANDB_DATA_DIR", str(self.run_dir.path / "wandb"))
        import wandb

        arguments["settings"] = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_START_TIMEOUT,
            finish_timeout=_FINISH_TIMEOUT,
            finish_timeout_raises=True,
        )
        self.logged = logged_offline(self.run_dir)
        if mode == "online" or (mode == "auto" and logged_in()):
            self._start_online(arguments)
        if self.run is None:
            # Reporting its own errors, W&B would wait at the end for a server that does not answer.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            self.run = wandb.init(mode="offline", **arguments)
        self.run.define_metric("*", step_metric="step")
        for name in _BEST:
            goal = "min" if lower_is_better(name.split("/")[1]) else "max"
            self.run.define_metric(name, step_metric="step", summary=f"{goal},last")
        self._log_earlier(step)

    def _start_online(self, arguments: dict[str, Any]) -> None:
        """Leaves `run` as it is where W&B's server does not answer."""
        import requests
        import wandb

        try:
            # Asked first: a run that W&B could not start would delay the end of training.
            requests.head(wandb_server(), timeout=_START_TIMEOUT)
            self.run = wandb.init(mode="online", resume="allow", **arguments)
        except Exception as problem:
            self._warn(f"does not answer ({type(problem).__name__}): logging offline")
            return
        last_step = int(self.run.summary.get("step", 0) or 0)
        for known_step in range(last_step + 1):
            self.logged |= {("train", known_step), ("eval", known_step)}

    def _log_earlier(self, step: int) -> None:
        """Log the lines up to `step` that earlier processes wrote to metrics.jsonl.

        A step that was repeated is logged as it was done last.
        """
        earlier: dict[tuple[str, int], Record] = {}
        for line in read_metrics(self.run_dir.metrics):
            of_earlier = line.get("step", 0) <= step and line.get("time", 0.0) < self.began
            if line.get("kind") in ("train", "eval") and of_earlier:
                earlier[line["kind"], line["step"]] = line
        for record in earlier.values():
            self._log(record)

    def _log(self, record: Record) -> None:
        numbers = numbers_of(record)
        if numbers and (record["kind"], record["step"]) not in self.logged:
            self.run.log({"step": record["step"], **numbers})

    def _log_table(self, step: int, rows: list[Record]) -> None:
        import wandb

        table = wandb.Table(columns=list(rows[0]))
        for row in rows:
            values = [
                wandb.Image(each) if hasattr(each, "shape") else each for each in row.values()
            ]
            table.add_data(*values)
        self.run.log({"step": step, "samples/eval": table})

    def _send_alert(self, title: str, text: str) -> None:
        self.run.alert(title, text)

    def _finish(self, summary: Record) -> None:
        """The exported model becomes an artifact with its recipe.

        By reference: nothing of the model is uploaded or hashed.
        """
        import wandb

        self.run.summary.update(summary)
        export = self.run_dir.export
        if (export / "bigtrain.json").is_file():
            artifact = wandb.Artifact(f"{self.run_dir.name}-model", type="model")
            artifact.add_reference(export.resolve().as_uri(), checksum=False)
            artifact.add_file(str(self.run_dir.recipe))
            self.run.log_artifact(artifact)
        finished = "step" in summary  # not so if training ended before its last step
        self.run.finish(exit_code=0 if finished else 1)


def _wandb_id(run_dir: RunDir, known_id: str) -> str:
    """The run's id in W&B, kept in the run directory; a W&B sweep brings its own."""
    file = run_dir.path / "wandb_id"
    if not file.exists():
        file.write_text(known_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    return file.read_text().strip()


def _end_service() -> None:
    """Kill W&B's process: at the end of the program W&B would wait for it without a limit.

    It may end by itself at the same time. And teardown() ends the program with that process's
    exit code, unless it finds the connection closed already.
    """
    with contextlib.suppress(Exception, SystemExit):
        for child in psutil.Process().children():
            if child.name().startswith("wandb"):
                child.kill()
        importlib.import_module("wandb").teardown()
