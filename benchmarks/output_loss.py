"""The loss of an output layer with and without logits: memory and time, forward and backward.

    python benchmarks/output_loss.py [vocabulary ...]

Memory is what is allocated at its peak beyond inputs, weights and their gradients.
"""

import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigtrain.models.output_loss import OutputLoss

WIDTH = 256
ROWS = 2048


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, sum(self.alive.values()))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage.data_ptr()
        if address not in self.alive and storage.nbytes() > 0:
            self.alive[address] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, address, None)


def both_ways(vocabulary: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions that do a forward and a backward pass: from logits, and without them."""
    torch.manual_seed(0)
    hidden = torch.randn(1, ROWS, WIDTH, requires_grad=True)
    labels = torch.randint(vocabulary, (1, ROWS))
    layer = nn.Linear(WIDTH, vocabulary, bias=False)
    output_loss = OutputLoss(layer)

    def from_logits() -> None:
        logits = layer(hidden)
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()

    def without_logits() -> None:
        output_loss.loss_sum(lambda: layer(hidden), labels).backward()

    return from_logits, without_logits


def peak_memory(act: Callable[[], None]) -> int:
    """Bytes at the peak of `act`, which has run once before."""
    act()
    with PeakMemory() as memory:
        act()
    return memory.peak


def best_seconds(act: Callable[[], None], tries: int = 5) -> float:
    """The quickest of a few runs."""
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def main() -> None:
    print(f"{ROWS} rows of width {WIDTH}, fp32, {torch.get_num_threads()} threads")
    for vocabulary in [int(argument) for argument in sys.argv[1:]] or [8192, 32768, 131072]:
        from_logits, without_logits = both_ways(vocabulary)
        plain, small = peak_memory(from_logits), peak_memory(without_logits)
        slow, fast = best_seconds(from_logits), best_seconds(without_logits)
        print(
            f"vocabulary {vocabulary:7,}: {plain / 2**20:8,.0f} MiB → {small / 2**20:6,.0f} MiB"
            f" (1/{plain / small:.1f}), {slow * 1000:7,.0f} ms → {fast * 1000:7,.0f} ms"
            f" ({fast / slow:.2f} ×)"
        )


if __name__ == "__main__":
    main()
