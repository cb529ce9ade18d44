"""Time of the device itself, which runs behind the host that gives it work."""

import time

import torch


class Stopwatch:
    """Adds up the seconds of a device between starts and stops.

    On CUDA by events, so that neither waits: a slow GPU is seen, which the host's clock around
    launches would not show.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None
        if device.type == "cuda":
            self._events = []
        self._began = 0.0
        self._seconds = 0.0

    def start(self) -> None:
        if self._events is not None:
            begin = torch.cuda.Event(enable_timing=True)
            self._events.append((begin, torch.cuda.Event(enable_timing=True)))
            begin.record()
        self._began = time.perf_counter()

    def stop(self) -> None:
        if self._events is not None:
            self._events[-1][1].record()
        self._seconds += time.perf_counter() - self._began

    def seconds(self) -> float:
        """Read on CUDA only once the device has passed the last stop."""
        if self._events is None:
            return self._seconds
        return sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
