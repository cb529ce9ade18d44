"""What the training loop works on, and what it keeps from one step to the next."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from bigtrain.checkpoint.state import TrainState
from bigtrain.checkpoint.writer import CheckpointWriter
from bigtrain.config.recipe import Recipe
from bigtrain.data.loader import MicroBatch
from bigtrain.engine.base import Engine
from bigtrain.engine.batch_norm import RunningStatistics
from bigtrain.engine.stopwatch import Lap, StepClock
from bigtrain.supervision.signals import StopFlag
from bigtrain.supervision.watchdog import Phase, Watchdog
from bigtrain.tasks.base import Task
from bigtrain.tracking.base import TrackerGroup

# Phases that have another name in a line of metrics (runs/step_shares.py).
_PART_OF_PHASE: dict[Phase, str] = {
    "meeting": "communication",
    "update": "optimizer",
    "numbers": "other",
}


class RankRequests(NamedTuple):
    """What the ranks want of each other, as counts that are added up over ranks once per step."""

    stop: float = 0.0  # ranks that were asked to stop
    save: float = 0.0  # ranks that were asked to save a checkpoint
    unreadable: float = 0.0  # samples that could not be read
    written: float = 0.0  # ranks whose part of the checkpoint in progress is on disk


class StepNumbers(NamedTuple):
    """The numbers of one step, summed over ranks where they differ per rank.

    They come from the device in two parts, put together by `train_step` in the order of these
    fields: the outcome of the step, and from `num_targets` on the sums that precede it. The
    requests come last, in their own order.
    """

    loss_sum: float  # NaN in a step that is not logged
    applied: bool
    grad_norm: float
    peak_memory: float  # bytes, of the rank that has most; 0 in a step that is not logged
    num_targets: float
    samples_digest: float
    requests: RankRequests

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / max(self.num_targets, 1)

    @classmethod
    def from_vector(cls, values: list[float]) -> "StepNumbers":
        """The one place where this order is read."""
        loss_sum, applied, grad_norm, peak_memory, num_targets, samples_digest, *requests = values
        return cls(
            loss_sum=loss_sum,
            applied=bool(applied),
            grad_norm=grad_norm,
            peak_memory=peak_memory,
            num_targets=num_targets,
            samples_digest=samples_digest,
            requests=RankRequests(*requests),
        )


@dataclass
class LogInterval:
    """The steps since the last line of metrics."""

    steps: int = 0
    num_targets: float = 0.0  # of these steps, over all ranks
    seconds: dict[str, float] = field(default_factory=dict)  # of these steps, by part

    def add(self, num_targets: float, seconds: dict[str, float]) -> None:
        """A step of so many targets, and its seconds by part."""
        self.steps += 1
        self.num_targets += num_targets
        for part, passed in seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + passed

    def mean_seconds(self, part: str) -> float:
        """Per step, to a tenth of a microsecond."""
        return round(self.seconds.get(part, 0.0) / self.steps, 7)


class InFlightStep(NamedTuple):
    """A step that the device may not have finished yet."""

    learning_rate: float
    micro_batches: list[MicroBatch]
    spiked: bool  # left out because of its loss
    logged: bool
    lap: Lap
    sums: list[float]  # known already; see StepNumbers
    read_outcome: Callable[[], list[float]]  # waits for the device


@dataclass
class RunningProfile:
    """Steps that torch's profiler looks at."""

    first: int
    profiler: torch.profiler.profile
    is_requested: bool  # by a file PROFILE
    steps: int = 0  # done


@dataclass(kw_only=True)
class TrainContext:
    """What the training loop works on; `build_training` in run.py builds it."""

    recipe: Recipe
    engine: Engine
    task: Task
    batches: Iterator[list[MicroBatch]]
    tracker: TrackerGroup
    state: TrainState
    stop: StopFlag
    checkpoints: CheckpointWriter
    watchdog: Watchdog
    clock: StepClock
    running_statistics: RunningStatistics
    # Seconds for one target if all devices ran at their peak; 0 where nothing is known.
    peak_seconds_per_target: float = 0.0
    # Why the last checkpoint could not be written; empty if it was.
    checkpoint_problem: str = ""
    # The last step whose numbers have not been read.
    in_flight: InFlightStep | None = None
    interval: LogInterval = field(default_factory=LogInterval)
    # Of the steps under way, on rank 0.
    profile: RunningProfile | None = None

    def enter(self, phase: Phase) -> None:
        """The loop begins `phase`."""
        self.watchdog.enter(phase)
        self.clock.enter(_PART_OF_PHASE.get(phase, phase))

    @property
    def is_last_step(self) -> bool:
        """Whether no step follows: all are done, or `train.patience` is at its end."""
        patience = self.recipe.train.patience
        is_exhausted = patience is not None and self.state.evaluations_since_best >= patience
        return is_exhausted or self.state.step == self.engine.plan.steps

    def is_due(self, every: int) -> bool:
        """Whether what happens `every` so many steps, and at the end, happens now."""
        return self.state.step % every == 0 or self.is_last_step
