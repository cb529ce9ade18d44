"""How a run that failed ends: its exit code."""

import sys

from bigtrain.engine.runtime import world_from_environment
from bigtrain.errors import LOST_PEERS


def exit_code_of(problem: BaseException) -> int:
    """3 for what would fail again; 76 for a collective that lost a peer."""
    if not lost_a_peer(problem):
        return 3
    print(
        "bigtrain: lost a peer; the same command goes on from the last checkpoint", file=sys.stderr
    )
    return LOST_PEERS


def lost_a_peer(problem: BaseException) -> bool:
    """Whether the words are those of a collective that lost a peer."""
    gloo = [
        "connection closed by",
        "connection reset",
        "broken pipe",
        "timed out waiting",
        "socket closed",
    ]
    lost = [
        *gloo,
        "remote process exited",
        "ncclremoteerror",
        "watchdog caught collective operation timeout",
    ]
    lost += [
        "waiting for clients",
        "client socket has timed out",
        "connection refused",
        "connectfullmesh",
        "wait timeout",
    ]
    alone = world_from_environment()[1] == 1
    return (
        not alone
        and isinstance(problem, RuntimeError)
        and any(sign in str(problem).lower() for sign in lost)
    )
