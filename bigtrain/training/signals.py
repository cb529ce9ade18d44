"""Signals and files only raise a wish; the loop looks at it where all ranks can agree."""

import os
import signal
from types import FrameType

from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_early: list[str] = []  # a signal that came before there was anything to stop


def listen() -> None:
    """Remember signals from the first moment on: a start may take minutes, and Slurm may send SIGUSR1 in its midst.

    Raises RequestError, while nothing is written yet, for a grace period that is no number.
    """
    grace_seconds()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # not Ctrl-C, which ends a start at once
        signal.signal(number, lambda found, _frame: _early.append(signal.Signals(found).name))


def grace_seconds() -> float:
    """How long there is to save after a signal. RequestError when BIGTRAIN_GRACE_SECONDS is no number."""
    # Slurm gives KillWait (30 s) after SIGTERM; slurm/train.sbatch says how long before the end it sends SIGUSR1.
    said = os.environ.get("BIGTRAIN_GRACE_SECONDS") or "30"
    if not said.replace(".", "", 1).isdigit():
        raise RequestError(
            f"BIGTRAIN_GRACE_SECONDS is {said!r}",
            "a number of seconds",
            "export BIGTRAIN_GRACE_SECONDS=120",
        )
    return float(said)


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1, or by a file STOP in the run directory; a second signal changes nothing."""

    def __init__(self, run: RunDir, main: bool = True) -> None:
        """Only the `main` rank looks for files: a shared disk should not be asked by all."""
        self.grace = grace_seconds()
        self.run, self.main = run, main
        self.received: str | None = _early[0] if _early else None
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def wanted(self) -> tuple[bool, bool]:
        """Whether this rank is asked to (stop, save): by a signal, or by a file STOP or SAVE in the run directory."""
        if self.received is None and self.main and (self.run.path / "STOP").exists():
            self.received = "the file STOP"
        return self.received is not None, self.main and (self.run.path / "SAVE").exists()

    def granted(self, stop: bool, save: bool) -> None:
        """The files have been obeyed: the next start must not stop at once."""
        for name, obeyed in (("STOP", stop), ("SAVE", save)):
            if obeyed and self.main:
                (self.run.path / name).unlink(missing_ok=True)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
