"""Batches for one rank: its slices of every global batch, in the one order there is."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bigtrain.config.recipe import AugmentConfig, Recipe
from bigtrain.data.examples import Batch, Example, Examples
from bigtrain.data.order import key, mix, samples_at
from bigtrain.errors import BadSampleError, TrainingFailed

Collate = Callable[[list[Example]], Batch]
_AUGMENT_STREAM = 17  # keeps augmentation's random numbers apart from those of the order


class BatchLayout(Protocol):
    """How a global batch is cut over ranks and micro-batches (engine.plan.Plan)."""

    def at(self, position: int) -> "BatchLayout":
        """The layout of the global batch that begins at `position`."""

    @property
    def data_parallel_size(self) -> int: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    def micro_batches(self, data_rank: int) -> list[range]: ...


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank gets, and which samples it is made of."""

    batch: Batch
    # False: only here so that all ranks run as many forward passes; counts for nothing.
    has_samples: bool
    first: int = 0  # position in the stream of samples
    samples: tuple[int, ...] = ()
    unreadable: tuple[str, ...] = ()  # samples that could not be read and are left out


class _Slice(NamedTuple):
    """The positions of a micro-batch in the stream of samples."""

    positions: range
    has_samples: bool


@dataclass(frozen=True)
class _Sample:
    position: int
    index: int
    example: Example


def train_batches(
    examples: Examples,
    collate: Collate,
    recipe: Recipe,
    layout: BatchLayout,
    data_rank: int,
    first: int,
) -> Iterator[list[MicroBatch]]:
    """This rank's micro-batches of each step, from position `first` of the stream of samples.

    Endless. Raises TrainingFailed if no sample at all can be read.
    """
    workers = recipe.data.workers
    loader = DataLoader(
        _MicroBatches(examples, recipe.seed, collate, recipe.data.augment),
        batch_size=None,
        sampler=_slices(layout, data_rank, first),
        num_workers=workers,
        # Together they hold a whole step; torch's own 2 each may be a part of one.
        prefetch_factor=max(2, layout.accumulation // workers + 1) if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_the_rank,
    )
    micro_batches = iter(loader)
    position = first
    while True:
        step_layout = layout.at(position)
        position += step_layout.global_batch
        # All of a step's, because its first backward pass divides by the targets of all of them.
        # Workers fetch them, and the host collates them, while the device is at the step before.
        of_step = [next(micro_batches) for _ in range(step_layout.accumulation)]
        for micro_batch in of_step:
            if not micro_batch.batch:
                raise TrainingFailed(
                    f"none of the {len(examples):,} training samples can be read any more,"
                    f" e.g. {micro_batch.unreadable[0]}",
                    f"data.train={recipe.data.train} as it was when the run began",
                )
        yield of_step


def _leave_signals_to_the_rank(_worker: int) -> None:
    """Slurm and Ctrl-C reach every process of a job.

    A worker that died of it would cost the last checkpoint.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _slices(layout: BatchLayout, data_rank: int, first: int) -> Iterator[_Slice]:
    """This rank's micro-batches of every global batch from position `first` on. Endless."""
    start = first
    while True:
        step_layout = layout.at(start)
        for offsets in step_layout.micro_batches(data_rank):
            # An empty micro-batch takes one sample all the same: there must be something to run.
            stop = max(offsets.stop, offsets.start + 1)
            positions = range(start + offsets.start, start + stop)
            yield _Slice(positions, has_samples=len(offsets) > 0)
        start += step_layout.global_batch


class _MicroBatches(Dataset[MicroBatch]):
    """A slice of the stream of samples → the collated, augmented micro-batch."""

    def __init__(
        self, examples: Examples, seed: int, collate: Collate, augment: AugmentConfig
    ) -> None:
        self.examples = examples
        self.seed = seed
        self.collate = collate
        self.augment = augment

    def __getitem__(self, slice_of_batch: _Slice) -> MicroBatch:
        indices = samples_at(slice_of_batch.positions, len(self.examples), self.seed)
        samples: list[_Sample] = []
        unreadable: list[str] = []
        for position, index in zip(slice_of_batch.positions, indices, strict=True):
            try:
                samples.append(_Sample(position, index, self.examples[index]))
            except BadSampleError as problem:
                unreadable.append(problem.found)
        has_samples = slice_of_batch.has_samples
        if not samples:
            samples = self._first_readable(slice_of_batch.positions.start)
            has_samples = False
        return MicroBatch(
            self._batch(samples),
            has_samples,
            slice_of_batch.positions.start,
            tuple(sample.index for sample in samples),
            tuple(unreadable),
        )

    def _first_readable(self, position: int) -> list[_Sample]:
        """One sample that can be read, for a forward pass that counts for nothing; or none."""
        for index in range(len(self.examples)):
            with contextlib.suppress(BadSampleError):
                return [_Sample(position, index, self.examples[index])]
        return []

    def _batch(self, samples: list[_Sample]) -> Batch:
        if not samples:
            return {}
        batch = self.collate([sample.example for sample in samples])
        if "pixel_values" in batch and (self.augment.crop or self.augment.flip):
            positions = [sample.position for sample in samples]
            batch["pixel_values"] = _augmented(
                batch["pixel_values"], self.augment, positions, self.seed
            )
        return batch


def _augmented(images: Tensor, augment: AugmentConfig, positions: list[int], seed: int) -> Tensor:
    """Random crop after padding, and random flip, of [batch, channels, height, width].

    The draws are a function of (seed, position): the same on any number of ranks, and after a
    resume. A crop of the image, padded by repeating its border, is a shift by as many whole pixels.
    """
    places = np.asarray(positions, np.uint64)
    draw_x, draw_y, draw_flip = (
        mix(places ^ key(seed, _AUGMENT_STREAM, number)) for number in range(3)
    )
    if augment.crop:
        num_shifts = np.uint64(2 * augment.crop + 1)
        draws = np.stack([draw_x, draw_y], axis=1)
        shifts = (draws % num_shifts).astype(np.int64) - augment.crop
        images = shifted(images, shifts, augment.crop)
    if augment.flip:
        is_flipped = torch.from_numpy((draw_flip & np.uint64(1)).astype(bool))
        images = torch.where(is_flipped[:, None, None, None], images.flip(-1), images)
    return images


def shifted(images: Tensor, shifts: NDArray[np.int64], largest: int) -> Tensor:
    """Each image moved to the right and down by its pixels of `shifts` [batch, 2]."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (largest,) * 4, mode="replicate")
    moved = []
    for image, (right, down) in zip(padded, shifts.tolist(), strict=True):
        left, top = largest - right, largest - down
        moved.append(image[:, top : top + height, left : left + width])
    return torch.stack(moved)


def eval_batches(
    examples: Examples, collate: Collate, layout: BatchLayout, data_rank: int
) -> Iterator[MicroBatch]:
    """Every example once over all ranks, in the same number of micro-batches on each.

    (Sharded engines gather weights together, so all ranks must run as many forward passes.)
    """
    mine = range(data_rank, len(examples), layout.data_parallel_size)
    largest_share = -(-len(examples) // layout.data_parallel_size)
    for start in range(0, largest_share, layout.micro_batch):
        indices = list(mine[start : start + layout.micro_batch])
        # A rank that has no example left runs one that does not count.
        batch = collate([examples[index] for index in indices or [0]])
        yield MicroBatch(batch, len(indices) > 0)
