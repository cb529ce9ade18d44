"""Parts of the engine that need no process group."""

import pytest
import torch
from torch import nn

from bigtrain.engine.batch_norm import RunningStatistics, use_fp32_statistics
from bigtrain.engine.plan import Plan
from bigtrain.errors import TrainingFailed
from bigtrain.supervision.peer_loss import lost_a_peer


def plan(world_size: int, global_batch: int = 24, micro_batch: int = 4) -> Plan:
    return Plan("ddp", "none", "fp32", world_size, global_batch, micro_batch, "none", False)


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


@pytest.mark.parametrize("count", [1, 2, 5])
def test_batch_norm_moves_once_a_step_whatever_the_number_of_micro_batches(count: int) -> None:
    norm = nn.BatchNorm1d(3)
    torch.manual_seed(0)
    micro_batches = [torch.randn(8, 3) for _ in range(count)]
    statistics = RunningStatistics(nn.Sequential(norm))
    for number, features in enumerate(micro_batches):
        statistics.enter(number, count)
        norm(features)
    statistics.enter(count, count)  # one without samples moves nothing
    norm(torch.full((8, 3), 1e6))
    mean = torch.stack([features.mean(0) for features in micro_batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    variance = torch.stack([features.var(0) for features in micro_batches]).mean(0)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * variance)
    assert norm.num_batches_tracked == 1


def test_batch_norm_in_bf16_keeps_its_statistics_in_fp32() -> None:
    torch.manual_seed(0)
    features = torch.randn(64, 3, 4, 4)
    expected, norm = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    for parameter in norm.parameters():
        parameter.data = parameter.data.bfloat16()
    use_fp32_statistics(norm)
    for _ in range(3):
        found = norm(features.bfloat16())
        torch.testing.assert_close(found.float(), expected(features), rtol=0.02, atol=0.02)
    assert norm.running_mean.dtype is torch.float32
    torch.testing.assert_close(norm.running_var, expected.running_var, rtol=1e-2, atol=0)
    assert norm.eval()(features.bfloat16()).dtype is torch.bfloat16
