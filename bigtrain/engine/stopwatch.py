"""Where the time of a step goes, by the clock of the device, which runs behind the host."""

import time
from itertools import pairwise
from typing import Any, NamedTuple

import torch


class _Mark(NamedTuple):
    """The moment at which a part of the step begins."""

    part: str
    moment: Any  # by the host's clock, in seconds; on CUDA an event


class Lap(NamedTuple):
    """The parts of one step in their order; the last mark is where the step ends."""

    marks: list[_Mark]

    def seconds(self) -> dict[str, float]:
        """Seconds by part. To be read on CUDA once the device has passed the end of the lap."""
        seconds: dict[str, float] = {}
        for begin, end in pairwise(self.marks):
            if isinstance(begin.moment, float):
                passed = end.moment - begin.moment
            else:
                passed = begin.moment.elapsed_time(end.moment) / 1000
            seconds[begin.part] = seconds.get(begin.part, 0.0) + passed
        return seconds


class StepClock:
    """Cuts the time of the training loop into parts without gaps, so that they add up.

    On CUDA by events that the device passes in the order of its work: nobody waits for them. What
    the host does while the device is busy then counts as nothing, and a slow device is seen, which
    the host's clock around launches would not show. On the CPU by the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._marks: list[_Mark] = []

    def enter(self, part: str) -> None:
        """`part` begins, unless it is under way; the one before ends."""
        if not self._marks or self._marks[-1].part != part:
            self._marks.append(_Mark(part, self._now()))

    def lap(self) -> Lap:
        """All since the last lap. The part that is under way continues in the next."""
        end = _Mark(self._marks[-1].part, self._now())
        lap = Lap([*self._marks, end])
        self._marks = [end]
        return lap

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
