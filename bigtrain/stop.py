"""Signals and files only raise a wish; the loop looks at it at a step boundary, where all ranks can agree."""

import signal
from types import FrameType

from bigtrain.rundir import RunDir

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1; a second signal changes nothing."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def wanted(self, run: RunDir) -> tuple[bool, bool]:
        """Whether this rank is asked to (stop, save): by a signal, or by a file STOP or SAVE in the run directory."""
        if self.received is None and (run.path / "STOP").exists():
            self.received = "the file STOP"
        return self.received is not None, (run.path / "SAVE").exists()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
