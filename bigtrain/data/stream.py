"""Batches for one rank: its slices of every global batch, in the one order there is."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bigtrain.data.examples import Example, Examples
from bigtrain.data.order import key, mix, samples_at
from bigtrain.plan import Plan
from bigtrain.recipe import Augment

Batch = dict[str, Tensor]
Collate = Callable[[list[Example]], Batch]


@dataclass(frozen=True)
class Piece:
    """A micro-batch; `counts` is false where a rank has nothing left and runs along with weight zero."""

    batch: Batch
    counts: bool


def train_batches(
    examples: Examples, plan: Plan, rank: int, seed: int, first: int, collate: Collate, augment: Augment, workers: int
) -> Iterator[list[Piece]]:
    """For each step, this rank's micro-batches, from position `first` of the stream of samples on. Endless."""
    pieces = plan.micro_batches(rank)
    loader = DataLoader(
        _Positions(examples, seed, collate, augment),
        batch_size=None,
        sampler=_Sampler(plan, rank, first),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_the_rank,
    )
    batches = iter(loader)
    while True:
        yield [Piece(next(batches), len(piece) > 0) for piece in pieces]


def _leave_signals_to_the_rank(_worker: int) -> None:
    """Slurm and Ctrl-C reach every process of a job; a worker that died of it would cost the last checkpoint."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class _Sampler:
    """Ranges of positions: where the step begins, and the rank's offsets from there."""

    plan: Plan
    rank: int
    first: int

    def __iter__(self) -> Iterator[range]:
        start = self.first
        while True:
            for piece in self.plan.micro_batches(self.rank):
                # An empty piece takes the batch's first sample: some forward pass must run, whatever it weighs.
                yield range(start + piece.start, start + piece.stop) if piece else range(start, start + 1)
            start += self.plan.global_batch


class _Positions(Dataset[Batch]):
    """A range of positions → the collated, augmented batch."""

    def __init__(self, examples: Examples, seed: int, collate: Collate, augment: Augment) -> None:
        self.examples, self.seed, self.collate, self.augment = examples, seed, collate, augment

    def __getitem__(self, positions: range) -> Batch:  # type: ignore[override]
        indices = samples_at(positions, len(self.examples), self.seed)
        batch = self.collate([self.examples[index] for index in indices])
        if "pixel_values" in batch and (self.augment.crop or self.augment.flip):
            batch["pixel_values"] = _augmented(batch["pixel_values"], self.augment, positions, self.seed)
        return batch


def _augmented(images: Tensor, augment: Augment, positions: range, seed: int) -> Tensor:
    """Random crop after padding, and random flip, of [batch, channels, height, width].

    The draws are a function of (seed, position): the same on any number of ranks, and after a resume.
    A crop of the image, padded by repeating its border, is a shift by as many whole pixels.
    """
    from kornia.geometry.transform import hflip, translate

    draws = [mix(np.asarray(positions, np.uint64) ^ key(seed, 17, number)) for number in range(3)]
    if augment.crop:
        shifts = [(draw % np.uint64(2 * augment.crop + 1)).astype(np.float32) - augment.crop for draw in draws[:2]]
        images = translate(images, torch.from_numpy(np.stack(shifts, axis=1)), "nearest", "border")
    if augment.flip:
        flipped = torch.from_numpy((draws[2] & np.uint64(1)).astype(bool))
        images = torch.where(flipped[:, None, None, None], hflip(images), images)
    return images


def eval_batches(examples: Examples, plan: Plan, rank: int, collate: Collate) -> Iterator[Piece]:
    """Every example once over all ranks, in the same number of pieces on each (sharded engines move in step)."""
    mine = range(rank, len(examples), plan.world_size)
    most = -(-len(examples) // plan.world_size)
    size = plan.micro_batch
    for start in range(0, most, size):
        piece: Any = mine[start : start + size]
        yield Piece(collate([examples[index] for index in piece or [0]]), len(piece) > 0)
