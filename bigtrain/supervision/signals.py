"""Signals, and files in the run directory, are requests: the loop obeys when it can.

STOP and SAVE concern all ranks, which agree on the step. PROFILE concerns rank 0 alone.
"""

import math
import os
import signal
import time
from types import FrameType

from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Signals that came before there was a StopFlag to receive them. A global, because signal handlers
# are the process's own: `listen` is called long before the run directory is known.
_early: list[str] = []
_FILES = ("STOP", "SAVE", "PROFILE")
_LOOK_EVERY = 0.05  # seconds between two looks for them


def listen() -> None:
    """Remember signals from the first moment on: a start may take minutes.

    Raises RequestError, while nothing is written yet, if BIGTRAIN_GRACE_SECONDS is not a number.
    """
    grace_seconds()
    # Not Ctrl-C, which ends a start at once.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _remember_early)


def _remember_early(number: int, _frame: FrameType | None) -> None:
    _early.append(signal.Signals(number).name)


def grace_seconds() -> float:
    """Seconds there are to save after a signal, from BIGTRAIN_GRACE_SECONDS (default: 30).

    Slurm waits KillWait (30 s) after SIGTERM; slurm/train.sbatch says how long before the end of
    the job it sends SIGUSR1. Raises RequestError for what is not a number.
    """
    text = os.environ.get("BIGTRAIN_GRACE_SECONDS") or "30"
    if not text.replace(".", "", 1).isdigit():
        raise RequestError(
            f"BIGTRAIN_GRACE_SECONDS is {text!r}",
            "a number of seconds",
            "export BIGTRAIN_GRACE_SECONDS=120",
        )
    return float(text)


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1, or by a file STOP in the run directory.

    A second signal changes nothing.
    """

    def __init__(self, run: RunDir, main: bool = True) -> None:
        """Only the `main` rank looks for files: not all should ask a shared disk."""
        self.grace_seconds = grace_seconds()
        self.run = run
        self.main = main
        self._looked = -math.inf  # when it last looked for files, by the monotonic clock
        self._found: set[str] = set()
        # The name of the signal, or of the file; None: nobody asked.
        self.received: str | None = _early[0] if _early else None
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        if self.received is None and self._finds("STOP"):
            self.received = "the file STOP"
        return self.received is not None

    def save_requested(self) -> bool:
        """Whether there is a file SAVE in the run directory: save, and train on."""
        return self._finds("SAVE")

    def profile_requested(self) -> bool:
        """Whether there is a file PROFILE in the run directory."""
        return self._finds("PROFILE")

    def acknowledge(self) -> None:
        """The run stops: the next start must not stop at once."""
        self._remove("STOP")

    def acknowledge_save(self) -> None:
        """The checkpoint is written."""
        self._remove("SAVE")

    def acknowledge_profile(self) -> None:
        """The profile is written, or cannot be."""
        self._remove("PROFILE")

    def _finds(self, name: str) -> bool:
        """Whether this rank has found a file, now or a moment ago: a look costs as a small step."""
        now = time.monotonic()
        if self.main and now - self._looked > _LOOK_EVERY:
            self._looked = now
            self._found = {each for each in _FILES if (self.run.path / each).exists()}
        return name in self._found

    def _remove(self, name: str) -> None:
        if self.main:
            (self.run.path / name).unlink(missing_ok=True)
            self._found.discard(name)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
