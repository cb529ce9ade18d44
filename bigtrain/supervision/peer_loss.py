"""Whether an error means that another rank is gone."""

# Parts of the error texts of collectives whose peer died, in lower case.
_SIGNS = (
    # gloo
    "connection closed by",
    "connection reset",
    "broken pipe",
    "timed out waiting",
    "socket closed",
    # NCCL
    "remote process exited",
    "ncclremoteerror",
    "watchdog caught collective operation timeout",
    # torch's store, and the first meeting of the ranks
    "waiting for clients",
    "client socket has timed out",
    "connection refused",
    "connectfullmesh",
    "wait timeout",
)


def lost_a_peer(problem: BaseException, world_size: int) -> bool:
    """Whether `problem` is that of a collective that lost a peer.

    torch has no exception of its own for it, so the words of the message decide. One process alone
    has no peers to lose.
    """
    if world_size == 1 or not isinstance(problem, RuntimeError):
        return False
    text = str(problem).lower()
    return any(sign in text for sign in _SIGNS)
