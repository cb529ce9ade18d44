"""Whole weights, one tensor at a time: of checkpoints of any engine, or of an export."""

import gc
import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bigtrain.checkpoint.format import MANIFEST
from bigtrain.checkpoint.shards import Shards
from bigtrain.engine.fragments import BUFFER, WEIGHT, Piece, flat_range
from bigtrain.models.weight_files import Tensors, weight_files

# Pages of mapped files stay in memory until they are closed: then.
_MAPPED_BYTES = 256 * 2**20


class CheckpointWeights:
    """The weights and buffers of a committed checkpoint, without an engine and without ranks."""

    def __init__(self, path: Path, frozen: Tensors | None = None) -> None:
        """`frozen`: what was not trained, and so is not in the checkpoint."""
        self.path = path
        self.shapes: dict[str, list[int]] = json.loads((path / MANIFEST).read_text())["shapes"]
        self.frozen = frozen or {}
        self._shards: Shards | None = None
        self._bytes_read = 0

    def names(self) -> Collection[str]:
        return self.shapes.keys() | self.frozen.keys()

    def read(self, name: str) -> Tensor:
        """In fp32, or in fp64 where the checkpoint has that."""
        if name in self.frozen:
            return self.frozen[name]
        shards = self._opened()
        buffer = shards.scalar(name, BUFFER)
        if buffer is not None:
            return buffer
        shape = self.shapes[name]
        stored = shards.pieces[name][WEIGHT][0]
        if stored.piece.is_range:
            piece = flat_range(0, torch.Size(shape).numel())
        else:
            piece = Piece((0,) * len(shape), tuple(shape))
        dtype = torch.float64 if stored.file.get_slice(stored.name).get_dtype() == "F64" else None
        values = torch.empty(piece.shape, dtype=dtype)
        shards.read(name, WEIGHT, piece, values)
        self._bytes_read += values.nbytes
        return values.view(shape)

    def dtype(self, name: str) -> None:
        """The model's own: checkpoints hold what the optimizer updates."""

    def is_trained(self, name: str) -> bool:
        """Whether it is a trained parameter, not a buffer."""
        return name in self._opened().pieces

    def _opened(self) -> Shards:
        if self._shards is None or self._bytes_read > _MAPPED_BYTES:
            self._shards = None
            gc.collect(0)
            self._shards = Shards(self.path, self.shapes)
            self._bytes_read = 0
        return self._shards


class ExportedWeights:
    """The weights of an export."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self.files[name] = path

    def names(self) -> Collection[str]:
        return self.files.keys()

    def read(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name).clone()

    def dtype(self, name: str) -> torch.dtype:
        return self.read(name).dtype


class MeanWeights:
    """The mean of several checkpoints' weights; of buffers the last one's."""

    def __init__(self, checkpoints: list[CheckpointWeights]) -> None:
        self.checkpoints = checkpoints
        self.buffers: Tensors = {}  # what is to take the place of the last one's

    def names(self) -> Collection[str]:
        return self.checkpoints[-1].names()

    def read(self, name: str) -> Tensor:
        """Added up in fp64."""
        last = self.checkpoints[-1].read(name)
        if name in self.buffers:
            return self.buffers[name]
        if not self.checkpoints[-1].is_trained(name):
            return last
        total = last.double()
        for checkpoint in self.checkpoints[:-1]:
            total += checkpoint.read(name)
        return (total / len(self.checkpoints)).to(last.dtype)

    def dtype(self, name: str) -> None:
        """The model's own."""
