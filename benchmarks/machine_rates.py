"""What this machine can do at best, which rates of `make bench` are to be seen beside.

python benchmarks/machine_rates.py (one process; under torchrun: gloo's all-reduce)

Prints a line of JSON: fp32 and bf16 matrix products in GFLOP/s, memory bandwidth in GB/s (read and
written), and for two ranks what an all-reduce of 64 MiB takes in, in GB/s per rank.
"""

import json
import os
import statistics
import time
from collections.abc import Callable

import torch

SIZE = 2048  # rows and columns of the matrices
COPIED = 256 << 20  # bytes
REDUCED = 64 << 20  # bytes
TRIES = 7


def seconds(work: Callable[[], object]) -> float:
    """The median time of several calls, after one that warms up."""
    work()
    times = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def matrix_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a product of two square matrices."""
    left = torch.randn(SIZE, SIZE).to(dtype)
    right = torch.randn(SIZE, SIZE).to(dtype)
    product = torch.empty_like(left)
    return 2e-9 * SIZE**3 / seconds(lambda: torch.mm(left, right, out=product))


def bandwidth() -> float:
    """GB/s of a copy: what is read and what is written."""
    source = torch.ones(COPIED // 4)
    target = torch.zeros_like(source)
    return 2e-9 * COPIED / seconds(lambda: target.copy_(source))


def all_reduce_rate() -> float:
    """GB/s per rank of a sum over ranks."""
    values = torch.ones(REDUCED // 4)
    return 1e-9 * REDUCED / seconds(lambda: torch.distributed.all_reduce(values))


def main() -> None:
    """Measure, and print on the first rank."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
        rates = {"gloo_GB_per_s": all_reduce_rate()}
        is_first = torch.distributed.get_rank() == 0
        torch.distributed.destroy_process_group()
    else:
        is_first = True
        rates = {
            "fp32_GFLOP_per_s": matrix_rate(torch.float32),
            "bf16_GFLOP_per_s": matrix_rate(torch.bfloat16),
            "memory_GB_per_s": bandwidth(),
        }
    if is_first:
        print(json.dumps(rates))


if __name__ == "__main__":
    main()
