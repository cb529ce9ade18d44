"""TensorBoard and Trackio, through Accelerate's trackers."""

import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

from bigtrain.runs.metrics_file import Record
from bigtrain.tracking.base import Tracker, numbers_of


def start_accelerate_tracker(kind: str, project: str, run: str, folder: Path, step: int) -> Any:
    """Accelerate's tracker of that kind, begun: TensorBoard's files below `folder`, Trackio's where Trackio keeps them.

    `step`: where the run goes on; what TensorBoard was told of later steps, by a life that was killed, is forgotten.
    """
    from accelerate import tracking

    if kind == "tensorboard":
        begun: Any = tracking.TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
    else:
        import trackio

        begun = tracking.TrackioTracker(project, name=run, resume="allow")
        begun.finish = (
            trackio.finish
        )  # Accelerate's own leaves the run to be finished, and said goodbye to, once more at exit
    with contextlib.redirect_stdout(sys.stderr):  # Trackio greets
        begun.start()
    return begun


class AccelerateTracker(Tracker):
    """TensorBoard or Trackio, through one of Accelerate's trackers (start_accelerate_tracker); training goes on without it."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker

    def log(self, record: Record) -> None:
        try:
            if numbers := numbers_of(record):
                self.tracker.log(numbers, step=record["step"])
        except Exception as problem:  # a full disk, or a database that another program holds
            warnings.warn(f"{self.tracker.name} has not taken all: {problem}", stacklevel=1)

    def close(self, summary: Record) -> None:
        with (
            contextlib.redirect_stdout(sys.stderr),
            contextlib.suppress(Exception),
        ):  # Trackio says goodbye
            self.tracker.finish()
