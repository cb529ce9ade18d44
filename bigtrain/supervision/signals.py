"""Signals, and files in the run directory, are requests: the loop obeys when it can.

STOP and SAVE concern all ranks, which agree on the step. PROFILE concerns rank 0 alone.
"""

import os
import signal
from types import FrameType

from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Signals that came before there was a StopFlag to receive them. A global, because signal handlers
# are the process's own: `listen` is called long before the run directory is known.
_early: list[str] = []


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
        # The name of the signal, or of the file; None: nobody asked.
        self.received: str | None = _early[0] if _early else None
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def requested(self) -> bool:
        """Whether this rank was asked to stop."""
        if self.received is None and self.main and (self.run.path / "STOP").exists():
            self.received = "the file STOP"
        return self.received is not None

    def save_requested(self) -> bool:
        """Whether there is a file SAVE in the run directory: save, and train on."""
        return self.main and (self.run.path / "SAVE").exists()

    def profile_requested(self) -> bool:
        """Whether there is a file PROFILE in the run directory."""
        return self.main and (self.run.path / "PROFILE").exists()

    def acknowledge(self) -> None:
        """The run stops: the next start must not stop at once."""
        self._remove("STOP")

    def acknowledge_save(self) -> None:
        """The checkpoint is written."""
        self._remove("SAVE")

    def acknowledge_profile(self) -> None:
        """The profile is written, or cannot be."""
        self._remove("PROFILE")

    def _remove(self, name: str) -> None:
        if self.main:
            (self.run.path / name).unlink(missing_ok=True)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
