"""Faults on request, to prove what a run survives: BIGTRAIN_FAULT=KIND@RANK:STEP, e.g. kill@1:15.

`kill` is SIGKILL, `stop` SIGSTOP (a rank that hangs); both strike before the step begins.
"""

import os
import signal

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def maybe_inject_fault(rank: int, step: int) -> None:
    """Do to this process what the environment asks for at this step."""
    kind, _, where = os.environ.get("BIGTRAIN_FAULT", "").partition("@")
    if where == f"{rank}:{step}" and kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[kind])
