"""What the training loop works on, and what it keeps from one step to the next."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from bigtrain.checkpoint.state import TrainState
from bigtrain.checkpoint.writer import CheckpointWriter
from bigtrain.config.recipe import Recipe, TrainConfig
from bigtrain.data.loader import MicroBatch
from bigtrain.engine.base import Engine
from bigtrain.engine.batch_norm import RunningStatistics
from bigtrain.engine.stopwatch import Stopwatch
from bigtrain.tasks.base import Task
from bigtrain.tracking.base import TrackerGroup
from bigtrain.training.signals import StopFlag
from bigtrain.training.watchdog import Watchdog


class RankRequests(NamedTuple):
    """What the ranks want of each other, as counts that are added up over ranks once per step."""

    stop: float = 0.0  # ranks that were asked to stop
    save: float = 0.0  # ranks that were asked to save a checkpoint
    unreadable: float = 0.0  # samples that could not be read
    written: float = 0.0  # ranks whose part of the checkpoint in progress is on disk

    def or_those_of(self, other: "RankRequests") -> "RankRequests":
        """The larger of the two counts, for each request."""
        return RankRequests(*map(max, self, other))


class StepNumbers(NamedTuple):
    """The numbers of one step, summed over ranks where they differ per rank.

    They come from the device as one vector, put together by `train_step` in the order of these
    fields; the requests come last, in their own order.
    """

    loss_sum: float  # NaN in a step that is not logged
    applied: bool
    grad_norm: float
    peak_memory: float  # bytes, of the rank that has most; 0 in a step that is not logged
    num_targets: float
    samples_digest: float
    requests: RankRequests

    @classmethod
    def from_vector(cls, values: list[float]) -> "StepNumbers":
        """The one place where the order of the vector is read."""
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
    seconds: float = 0.0  # that the loop spent in the steps before the current one
    step_began: float = 0.0  # when the current step began (time.perf_counter)


class InFlightStep(NamedTuple):
    """A step that the device may not have finished yet."""

    learning_rate: float
    micro_batches: list[MicroBatch]
    spiked: bool  # left out because of its loss
    logged: bool
    fetch_seconds: float  # of this rank, until it had its micro-batches
    forward: Stopwatch
    read_vector: Callable[[], list[float]]  # waits for the device; see StepNumbers


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
    running_statistics: RunningStatistics
    # Seconds for one target if all devices ran at their peak; 0 where nothing is known.
    peak_seconds_per_target: float = 0.0
    # Why the last checkpoint could not be written; empty if it was.
    checkpoint_problem: str = ""
    # The last step whose numbers have not been read.
    in_flight: InFlightStep | None = None
    interval: LogInterval = field(default_factory=LogInterval)


def is_due(step: int, settings: TrainConfig, every: int) -> bool:
    """Whether something that happens `every` so many steps, and at the end, happens at `step`."""
    return step % every == 0 or step == settings.steps
