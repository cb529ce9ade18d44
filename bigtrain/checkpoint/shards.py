"""Read a checkpoint's tensors as whole parameters, however they were cut when they were written."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from bigtrain.engine.fragments import Piece, parse_name
from bigtrain.errors import RequestError


class _StoredPiece(NamedTuple):
    """A piece of a parameter in one of the files."""

    name: str  # in the file
    file: Any  # open
    piece: Piece


class Shards:
    """All ranks' files of a checkpoint: any part of any parameter can be read.

    safetensors only: a checkpoint holds no code, and none is run.
    """

    def __init__(self, path: Path, shapes: dict[str, list[int]]) -> None:
        """`shapes`: the whole parameters' shapes by name, from the manifest."""
        self.shapes = shapes
        # Both by parameter, then by key.
        self.pieces: dict[str, dict[str, list[_StoredPiece]]] = {}
        self.scalars: dict[str, dict[str, Tensor]] = {}
        for path_of_rank in sorted(path.glob("rank-*.safetensors")):
            file = safe_open(path_of_rank, framework="pt")
            for name in file.keys():  # noqa: SIM118
                self._add(name, file)

    def _add(self, name: str, file: Any) -> None:
        parameter, key, offsets = parse_name(name)
        if offsets is None:
            scalars = self.scalars.setdefault(parameter, {})
            if key not in scalars:  # ranks that share a parameter each write its optimizer's step
                scalars[key] = file.get_tensor(name)
            return
        piece = Piece(offsets, tuple(file.get_slice(name).get_shape()))
        pieces_by_key = self.pieces.setdefault(parameter, {})
        pieces_by_key.setdefault(key, []).append(_StoredPiece(name, file, piece))

    def keys(self, parameter: str) -> list[str]:
        """`weight`, and the names of the optimizer's state for this parameter."""
        return [*self.pieces[parameter], *self.scalars.get(parameter, {})]

    def scalar(self, parameter: str, key: str) -> Tensor | None:
        """What is kept whole; None for what is kept in pieces."""
        return self.scalars.get(parameter, {}).get(key)

    def read(self, parameter: str, key: str, piece: Piece, into: Tensor) -> None:
        """Fill `into`, of the piece's shape, with these elements of the parameter.

        Raises RequestError if the checkpoint does not hold them all.
        """
        copied = 0
        for stored in self.pieces[parameter][key]:
            if len(stored.piece.offsets) == len(piece.offsets):
                copied += _copy_common_box(stored, piece, into)
            else:
                copied += _copy_common_elements(stored, piece, into, self.shapes[parameter])
        if copied != into.numel():
            raise RequestError(
                f"the checkpoint's {parameter} has another size", "a checkpoint of the same model"
            )


def _copy_common_box(stored: _StoredPiece, wanted: Piece, into: Tensor) -> int:
    """Copy the elements that two boxes, or two ranges, have in common; returns their number."""
    source: list[slice] = []
    target: list[slice] = []
    for stored_start, stored_size, wanted_start, wanted_size in zip(
        stored.piece.offsets,
        stored.piece.shape,
        wanted.offsets,
        wanted.shape,
        strict=True,
    ):
        first = max(stored_start, wanted_start)
        last = min(stored_start + stored_size, wanted_start + wanted_size)
        last = max(first, last)
        source.append(slice(first - stored_start, last - stored_start))
        target.append(slice(first - wanted_start, last - wanted_start))
    common = into[tuple(target)]
    if common.numel() > 0:
        piece_of_file = stored.file.get_slice(stored.name)
        common.copy_(piece_of_file[tuple(source)])
    return common.numel()


def _copy_common_elements(
    stored: _StoredPiece,
    wanted: Piece,
    into: Tensor,
    whole_shape: list[int],
) -> int:
    """The same for a box and a range, through each element's index in the flattened parameter."""
    values = stored.file.get_tensor(stored.name).to(into)
    if wanted.is_range:
        box, flat = stored.piece, wanted
    else:
        box, flat = wanted, stored.piece
    index_in_range = _flat_indices(box, whole_shape) - flat.offsets[0]
    in_both = (index_in_range >= 0) & (index_in_range < flat.shape[0])
    common = index_in_range[in_both]
    if wanted.is_range:
        into[common] = values[in_both]
    else:
        into[in_both] = values[common]
    return common.numel()


def _flat_indices(box: Piece, whole_shape: list[int]) -> Tensor:
    """The index of each of the box's elements in the flattened (row-major) parameter."""
    indices = torch.zeros(box.shape, dtype=torch.int64)
    for dimension, whole_size in enumerate(whole_shape):
        start = box.offsets[dimension]
        coordinates = torch.arange(start, start + box.shape[dimension])
        one_dimension = [1] * len(whole_shape)
        one_dimension[dimension] = -1
        indices = indices * whole_size + coordinates.view(one_dimension)
    return indices
