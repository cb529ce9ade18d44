"""Batches for one rank: its slices of every global batch, in the one order there is."""

import itertools
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bigtrain.config.recipe import AugmentConfig, Recipe
from bigtrain.data.examples import Example, Examples
from bigtrain.data.order import key, mix, samples_at
from bigtrain.errors import BadSampleError

Batch = dict[str, Tensor]
Collate = Callable[[list[Example]], Batch]


class BatchLayout(Protocol):
    """How a global batch is cut over ranks and micro-batches (engine.plan.Plan)."""

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
    """A micro-batch, and what it is made of."""

    batch: Batch
    has_samples: bool  # false where a rank has nothing left and runs along with weight zero
    first: int = 0  # position in the stream of samples
    samples: tuple[int, ...] = ()
    unreadable: tuple[str, ...] = ()  # samples that could not be read and are left out


def train_batches(
    examples: Examples,
    collate: Collate,
    recipe: Recipe,
    layout: BatchLayout,
    data_rank: int,
    first: int,
) -> Iterator[list[MicroBatch]]:
    """For each step, this rank's micro-batches, from position `first` of the stream of samples on. Endless."""
    loader = DataLoader(
        _Stream(examples, recipe.seed, collate, recipe.data.augment),
        batch_size=None,
        sampler=_positions(layout, data_rank, first),
        num_workers=recipe.data.workers,
        persistent_workers=recipe.data.workers > 0,
        worker_init_fn=_leave_signals_to_the_rank,
    )
    micro_batches = iter(loader)
    while True:
        yield [next(micro_batches) for _ in range(layout.accumulation)]


def _leave_signals_to_the_rank(_worker: int) -> None:
    """Slurm and Ctrl-C reach every process of a job; a worker that died of it would cost the last checkpoint."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _positions(layout: BatchLayout, data_rank: int, first: int) -> Iterator[tuple[range, bool]]:
    """Ranges of positions: where the step begins, and the rank's offsets from there."""
    for start in itertools.count(first, layout.global_batch):
        for micro_batch in layout.micro_batches(data_rank):
            # An empty micro_batch takes the batch's first sample: some forward pass must run, whatever it weighs.
            yield (
                range(
                    start + micro_batch.start, start + max(micro_batch.stop, micro_batch.start + 1)
                ),
                len(micro_batch) > 0,
            )


class _Stream(Dataset[MicroBatch]):
    """A range of positions → the collated, augmented micro-batch."""

    def __init__(
        self, examples: Examples, seed: int, collate: Collate, augment: AugmentConfig
    ) -> None:
        self.examples, self.seed, self.collate, self.augment = examples, seed, collate, augment

    def __getitem__(self, asked: tuple[range, bool]) -> MicroBatch:  # type: ignore[override]
        positions, counts = asked
        drawn = samples_at(positions, len(self.examples), self.seed)
        found, bad = self._read(list(zip(positions, drawn, strict=True)))
        if not found:  # all are bad: any good one, for a forward pass that weighs nothing
            others = ((positions.start, index) for index in range(len(self.examples)))
            found, counts = next([f] for o in others for f in self._read([o])[0]), False
        batch = self.collate([example for _, _, example in found])
        if "pixel_values" in batch and (self.augment.crop or self.augment.flip):
            places = [position for position, _, _ in found]
            batch["pixel_values"] = _augmented(
                batch["pixel_values"], self.augment, places, self.seed
            )
        return MicroBatch(
            batch, counts, positions.start, tuple(index for _, index, _ in found), tuple(bad)
        )

    def _read(
        self, wanted: list[tuple[int, int]]
    ) -> tuple[list[tuple[int, int, Example]], list[str]]:
        found, bad = [], []
        for position, index in wanted:
            try:
                found.append((position, index, self.examples[index]))
            except BadSampleError as problem:
                bad.append(problem.found)
        return found, bad


def _augmented(images: Tensor, augment: AugmentConfig, positions: list[int], seed: int) -> Tensor:
    """Random crop after padding, and random flip, of [batch, channels, height, width].

    The draws are a function of (seed, position): the same on any number of ranks, and after a resume.
    A crop of the image, padded by repeating its border, is a shift by as many whole pixels.
    """
    from kornia.geometry.transform import hflip, translate

    draws = [mix(np.asarray(positions, np.uint64) ^ key(seed, 17, number)) for number in range(3)]
    if augment.crop:
        shifts = [
            (draw % np.uint64(2 * augment.crop + 1)).astype(np.float32) - augment.crop
            for draw in draws[:2]
        ]
        images = translate(images, torch.from_numpy(np.stack(shifts, axis=1)), "nearest", "border")
    if augment.flip:
        flipped = torch.from_numpy((draws[2] & np.uint64(1)).astype(bool))
        images = torch.where(flipped[:, None, None, None], hflip(images), images)
    return images


def eval_batches(
    examples: Examples, collate: Collate, layout: BatchLayout, data_rank: int
) -> Iterator[MicroBatch]:
    """Every example once over all ranks, in the same number of micro_batches on each (sharded engines move in step)."""
    mine = range(data_rank, len(examples), layout.data_parallel_size)
    largest_share = -(-len(examples) // layout.data_parallel_size)
    for start in range(0, largest_share, layout.micro_batch):
        indices = list(mine[start : start + layout.micro_batch])
        # A rank that has no example left runs along with one that does not count.
        batch = collate([examples[index] for index in indices or [0]])
        yield MicroBatch(batch, len(indices) > 0)
