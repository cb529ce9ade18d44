"""Parts of parameters: which elements a rank holds, and their name in a checkpoint.

A name is `parameter|key|place`. `key` is `weight` or what the optimizer calls its state; `place`
says where the part begins, its tensor's shape how far it reaches. What is kept once and is no part
of anything (an optimizer's step, a buffer) has the place `scalar`.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

WEIGHT = "weight"
BUFFER = "buffer"
_WHOLE = "scalar"


@dataclass(frozen=True)
class Piece:
    """Which elements of a parameter: a box in its coordinates, as torch's DCP describes shards.

    ZeRO's partitions are not boxes: a piece with a single offset is a range of the flattened
    (row-major) parameter. For a parameter of one dimension the two are the same.
    """

    offsets: tuple[int, ...]  # of the first element
    shape: tuple[int, ...]

    @property
    def is_range(self) -> bool:
        return len(self.offsets) == 1


def flat_range(start: int, length: int) -> Piece:
    """The elements `start` … `start + length - 1` of the flattened parameter."""
    return Piece((start,), (length,))


@dataclass(frozen=True)
class Fragment:
    """A rank's part of one parameter.

    `master` is an fp32 view of it, in the piece's shape. The optimizer keeps its state for the
    tensor `flat`, in whose elements the part begins at `offset`.
    """

    name: str  # the parameter's
    piece: Piece
    master: Tensor
    flat: Tensor
    offset: int

    def of_state(self, state: Tensor) -> Tensor:
        """This part's share of an optimizer state that has the shape of `flat`: a view."""
        end = self.offset + self.master.numel()
        return state.view(-1)[self.offset : end].view(self.piece.shape)


class StoredName(NamedTuple):
    """A checkpoint tensor's name, taken apart."""

    parameter: str
    key: str
    offsets: tuple[int, ...] | None  # None: it is kept whole


def name_of_piece(parameter: str, key: str, piece: Piece | None) -> str:
    """A tensor's name in a checkpoint; `piece` is None for what is kept whole."""
    if piece is None:
        return f"{parameter}|{key}|{_WHOLE}"
    place = ",".join(str(offset) for offset in piece.offsets)
    return f"{parameter}|{key}|{place}"


def parse_name(name: str) -> StoredName:
    """What `name_of_piece` wrote."""
    parameter, key, place = name.split("|")
    if place == _WHOLE:
        return StoredName(parameter, key, None)
    offsets = tuple(int(offset) for offset in place.split(","))
    return StoredName(parameter, key, offsets)
