"""How a run that failed ends: its exit code."""

import sys

from bigtrain.engine.runtime import world_from_environment
from bigtrain.errors import LOST_PEERS
from bigtrain.supervision.peer_loss import lost_a_peer


def exit_code_of(problem: BaseException) -> int:
    """3 for what would fail again; 76, with a message, for a collective that lost a peer."""
    if not lost_a_peer(problem, world_from_environment()[1]):
        return 3
    print(
        "bigtrain: lost a peer; the same command resumes from the last checkpoint", file=sys.stderr
    )
    return LOST_PEERS
