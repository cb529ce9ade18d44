"""All that the loop moves."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from bigtrain.checkpoint.format import committed_checkpoints
from bigtrain.checkpoint.state import TrainState
from bigtrain.checkpoint.writer import CheckpointWriter, SavedCheckpoint
from bigtrain.config.recipe import Recipe, TrainConfig
from bigtrain.data.loader import MicroBatch
from bigtrain.engine.base import Engine
from bigtrain.tasks.base import Task
from bigtrain.tracking.base import TrackerGroup
from bigtrain.training.signals import StopFlag
from bigtrain.training.watchdog import Watchdog


@dataclass
class LogInterval:
    """The steps since the last line of metrics: seconds that the loop spent in them, their number, and what they weighed."""

    seconds: float = 0.0
    began: float = 0.0  # when the one under way did
    steps: int = 0
    weight: float = 0.0


class InFlightStep(NamedTuple):
    """A step that the device may not have finished yet."""

    rate: float
    micro_batches: list[MicroBatch]
    spiked: bool
    logged: bool
    numbers: Callable[
        [], list[float]
    ]  # waits: loss, applied, gradient norm, weight, digest, wishes


@dataclass
class TrainContext:
    """All that the loop moves; built by run.py."""

    recipe: Recipe
    engine: Engine
    task: Task
    batches: Iterator[list[MicroBatch]]
    tracker: TrackerGroup
    state: TrainState
    stop: StopFlag
    checkpoints: CheckpointWriter
    watch: Watchdog
    work: float = 0.0  # seconds that one unit of weight would take if all devices ran at their peak
    failed: str = ""  # why the last checkpoint could not be written
    pending: InFlightStep | None = None  # the step that was begun last, until it is settled
    lap: LogInterval = field(default_factory=LogInterval)


class RankRequests(NamedTuple):
    """What any rank was asked to do, and what each has done: numbers that ranks add up once per step."""

    stop: float = 0.0
    save: float = 0.0
    bad: float = 0.0  # samples that could not be read
    written: float = 0.0  # ranks whose part of the checkpoint under way is on disk


def last_good_checkpoint(t: TrainContext) -> str:
    good = [path.name for path in committed_checkpoints(t.checkpoints.run)][-1:] or ["none"]
    return f"the last good checkpoint is {good[0]}"


def report_checkpoints(t: TrainContext, all_saved: list[SavedCheckpoint]) -> None:
    """A checkpoint that could not be written is reported, and training goes on: the one before is still there."""
    for saved in all_saved:
        t.failed = saved.problem
        if saved.problem:
            t.tracker.event(saved.step, "checkpoint_failed", reason=saved.problem)
            continue
        times = {"seconds": saved.seconds, "blocked": saved.blocked, "writing": saved.writing}
        t.tracker.event(saved.step, "checkpoint", path=str(saved.path), **times)
        if (needed := saved.blocked + saved.writing) > t.stop.grace:
            t.tracker.event(
                saved.step,
                "checkpoint_slow",
                seconds=needed,
                reason=f"a signal leaves {t.stop.grace:.0f} s: ask for more (sbatch --signal=USR1@SECONDS)",
            )


def is_due(step: int, settings: TrainConfig, every: int) -> bool:
    return step % every == 0 or step == settings.steps
