"""Parts of the engine that need no process group."""

import pytest

from bigtrain.engine.peer_loss import lost_a_peer
from bigtrain.engine.plan import Plan
from bigtrain.errors import TrainingFailed


def plan(world_size: int, global_batch: int = 24, micro_batch: int = 4) -> Plan:
    return Plan("ddp", "none", "fp32", world_size, global_batch, micro_batch, False, False)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_rank_has_a_share_of_the_data_of_its_own(world_size: int) -> None:
    cut = plan(world_size)
    data_ranks = [cut.data_rank(rank) for rank in range(world_size)]
    assert sorted(data_ranks) == list(range(cut.data_parallel_size))
    offsets = []
    for data_rank in data_ranks:
        for micro_batch in cut.micro_batches(data_rank):
            offsets += list(micro_batch)
    assert sorted(offsets) == list(range(24))


@pytest.mark.parametrize(
    "text",
    [
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:31337",
        "Connection reset by peer",
        "Timed out waiting 1800000ms for recv operation to complete",
        "NCCL error: remote process exited or there was a network error",
        "ncclRemoteError: A call failed possibly due to a network error",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)",
        "Timed out after 61 seconds waiting for clients. 1/2 clients joined.",
        "The client socket has timed out after 60s while trying to connect to (node1, 29500)",
    ],
)
def test_the_words_of_a_lost_peer(text: str) -> None:
    assert lost_a_peer(RuntimeError(text), world_size=2)
    assert not lost_a_peer(RuntimeError(text), world_size=1), "one process has no peers"
    assert not lost_a_peer(OSError(text), world_size=2), "not a collective: W&B, or a disk"


def test_other_errors_lose_no_peer() -> None:
    assert not lost_a_peer(RuntimeError("CUDA out of memory"), world_size=8)
    assert not lost_a_peer(TrainingFailed("3 steps in a row", "finite numbers"), world_size=8)
