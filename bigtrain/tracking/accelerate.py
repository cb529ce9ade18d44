"""TensorBoard and Trackio, through Accelerate's trackers."""

import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

from bigtrain.runs.metrics_file import Record
from bigtrain.tracking.base import Tracker, numbers_of


def start_accelerate_tracker(kind: str, project: str, run: str, folder: Path, step: int) -> Any:
    """Start Accelerate's tracker of that kind, "tensorboard" or "trackio".

    TensorBoard writes below `folder`, Trackio where Trackio keeps its files.
    `step`: where training starts. TensorBoard drops what it has of later steps, from a process that
    was killed: they are done again.
    """
    from accelerate import tracking

    if kind == "tensorboard":
        tracker: Any = tracking.TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
    else:
        import trackio

        tracker = tracking.TrackioTracker(project, name=run, resume="allow")
        # Accelerate's own leaves Trackio's run open, which then ends and prints once more at exit.
        tracker.finish = trackio.finish
    with contextlib.redirect_stdout(sys.stderr):  # Trackio prints a greeting
        tracker.start()
    return tracker


class AccelerateTracker(Tracker):
    """What start_accelerate_tracker has started; a failure of it does not end training."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker

    def log(self, record: Record) -> None:
        numbers = numbers_of(record)
        if not numbers:
            return
        try:
            self.tracker.log(numbers, step=record["step"])
        except Exception as problem:  # a full disk, or a database that another program holds
            warnings.warn(f"{self.tracker.name} has not taken all: {problem}", stacklevel=1)

    def close(self, summary: Record) -> None:
        # Trackio prints where its page is.
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Exception):
            self.tracker.finish()
