"""Weights & Biases: one W&B run per bigtrain run, told by a thread of its own."""

import contextlib
import importlib
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import requests

from bigtrain.config.recipe import TrackConfig
from bigtrain.runs.directory import RunDir
from bigtrain.runs.metrics_file import Record, read_metrics
from bigtrain.tracking.base import Tracker, numbers_of
from bigtrain.tracking.wandb_sync import logged_in, logged_offline, wandb_server

# Events that someone should be woken for → the title of the alert.
_ALERTS = {
    "failed": "training failed",
    "stopped": "stopped early",
    "hang": "no progress",
    "checkpoint_failed": "no checkpoint",
}
_START, _END = (
    5.0,
    10.0,
)  # seconds that W&B may take to start and to finish: training waits for neither


class WandB(Tracker):
    """One W&B run per bigtrain run, whatever ended it on the way; steps are our own, so that a resumed run continues its
    curves. What an earlier life has told W&B is not told again; what it had no time to tell is told first.

    All of it happens in a thread of its own: to begin takes W&B seconds and a line two milliseconds, mostly of waiting.
    """

    def __init__(
        self,
        track: TrackConfig,
        run: RunDir,
        recipe_name: str,
        config: dict[str, Any],
        known_id: str,
        step: int,
    ) -> None:
        """`known_id`: from the checkpoint, should the run directory have lost its own; `step`: where the run goes on."""
        importlib.import_module(
            "wandb"
        )  # here: a data worker that is forked while a thread imports could wait for ever
        self.files, self.skipped, self.lost, self.told, self.began = (
            run,
            False,
            False,
            set[tuple[str, int]](),
            time.time(),
        )
        self.run: Any = None
        id_file = run.path / "wandb_id"
        if not id_file.exists():
            id_file.write_text(
                known_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            )  # a W&B sweep has its own
        self.id = id_file.read_text().strip()
        known: dict[str, Any] = {
            "project": track.project,
            "group": track.group or recipe_name,
            "tags": track.tags,
            "id": self.id,
        }
        known |= {
            "notes": track.notes,
            "job_type": "train",
            "name": run.name,
            "config": config,
            "dir": str(run.path),
        }
        self.todo: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.todo.put(lambda: self._start(track.wandb, step, known))
        self.thread = threading.Thread(target=self._work, daemon=True, name="W&B")
        self.thread.start()

    def _start(self, mode: str, step: int, known: dict[str, Any]) -> None:
        """Begin, offline where W&B's server does not answer in time; and tell what earlier lives had no time to tell."""
        os.environ.setdefault(
            "WANDB_DATA_DIR", str(self.files.path / "wandb")
        )  # what is to be uploaded stays with the run
        import wandb

        asked = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_START,
            finish_timeout=_END,
            finish_timeout_raises=True,
        )
        self.told = logged_offline(self.files)
        if mode == "online" or (mode == "auto" and logged_in()):
            try:
                requests.head(
                    wandb_server(), timeout=_START
                )  # W&B itself would hold up the end of a run that could not begin
                self.run = wandb.init(mode="online", resume="allow", settings=asked, **known)
            except Exception as problem:
                self._say(f"does not answer ({type(problem).__name__}): logging offline")
            else:
                last = int(self.run.summary.get("step", 0) or 0)
                self.told |= {
                    (kind, known_step)
                    for kind in ("train", "eval")
                    for known_step in range(last + 1)
                }
        if self.run is None:
            os.environ.setdefault(
                "WANDB_ERROR_REPORTING", "false"
            )  # at the end it would be waited for where nobody answers
        self.run = self.run or wandb.init(mode="offline", settings=asked, **known)
        self.run.define_metric("*", step_metric="step")
        for name, goal in (
            ("eval/loss", "min"),
            ("train/loss", "min"),
            ("eval/accuracy", "max"),
            ("eval/f1", "max"),
        ):
            self.run.define_metric(name, step_metric="step", summary=f"{goal},last")
        lines = (
            line
            for line in read_metrics(self.files.metrics)
            if line.get("kind") in ("train", "eval")
        )
        earlier = (
            line
            for line in lines
            if line.get("step", 0) <= step and line.get("time", 0.0) < self.began
        )
        for record in {(line["kind"], line["step"]): line for line in earlier}.values():
            self._tell(
                record
            )  # a step that was done twice as it was done last; its alerts are of an earlier life

    def log(self, record: Record) -> None:
        kind, step = record["kind"], record["step"]
        if kind == "event" and record["event"] in _ALERTS:
            text = str(record.get("reason") or record.get("places") or "")
            self.todo.put(
                lambda: self.run.alert(
                    f"{self.files.name}: {_ALERTS[record['event']]}", f"step {step}. {text}"
                )
            )
        if not self.skipped and (
            record.get("event") == "step_skipped" or not record.get("applied", True)
        ):
            self.skipped = True
            self.todo.put(
                lambda: self.run.alert(
                    f"{self.files.name}: step skipped", f"step {step}: not finite, or a spike"
                )
            )
        self.todo.put(lambda: self._tell(record))

    def _tell(self, record: Record) -> None:
        if (numbers := numbers_of(record)) and (record["kind"], record["step"]) not in self.told:
            self.run.log({"step": record["step"], **numbers})

    def samples(self, step: int, rows: list[Record]) -> None:
        """A table of what the model made of some held-out examples; arrays are images."""
        self.todo.put(lambda: self.run.log({"step": step, "samples/eval": self._table(rows)}))

    def _table(self, rows: list[Record]) -> Any:
        import wandb

        shown = [
            [wandb.Image(value) if hasattr(value, "shape") else value for value in row.values()]
            for row in rows
        ]
        return wandb.Table(columns=list(rows[0]), data=shown)

    def close(self, summary: Record) -> None:
        self.todo.put(lambda: self._finish(summary))
        self.todo.put(None)
        self.thread.join(2 * _END + self.todo.qsize() / 200)  # a line takes it two milliseconds
        if self.thread.is_alive():
            self._say(f"has not taken the last {self.todo.qsize() + 1} lines in time")
        if self.thread.is_alive() or self.lost:
            with contextlib.suppress(Exception):  # one that has ended meanwhile
                for service in [
                    child
                    for child in psutil.Process().children()
                    if child.name().startswith("wandb")
                ]:
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
                    self._say(
                        f"is lost ({type(problem).__name__}: {problem}); metrics.jsonl has it all"
                    )
                self.lost = (
                    True  # and what comes is tried all the same: one bad table is not the end
                )

    def _say(self, what: str) -> None:
        print(f"bigtrain: W&B {what}; later: bigtrain sync {self.files.name}", file=sys.stderr)
