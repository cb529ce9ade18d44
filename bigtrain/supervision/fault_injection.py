"""Faults on request, to prove what a run survives: BIGTRAIN_FAULT=KIND@RANK:STEP, as kill@1:15.

`kill` is SIGKILL; `stop` is SIGSTOP, a rank that hangs. Both come before the step begins.
"""

import os
import signal

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def maybe_inject_fault(rank: int, step: int) -> None:
    """Send this process the signal that BIGTRAIN_FAULT names, if it names this rank and step."""
    fault = os.environ.get("BIGTRAIN_FAULT", "")
    kind, _, place = fault.partition("@")
    if place != f"{rank}:{step}":
        return
    number = _SIGNALS.get(kind)
    if number is not None:
        os.kill(os.getpid(), number)
