"""A few weights as forward passes read them, to be compared with a checkpoint after a load.

An engine may keep copies of the weights that a load does not reach. Training would then go on from
a mixture of old and new weights, and no number would look wrong at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from bigtrain.engine.fragments import Piece, flat_range

SAMPLE_SIZE = 1024  # elements looked at in one place of a parameter


@dataclass(frozen=True)
class WeightSample:
    """A few elements of one parameter, as the next forward pass reads them."""

    name: str
    piece: Piece
    values: Tensor  # in the precision of forward passes, on the CPU


def representatives(
    module: nn.Module,
    num_elements: Callable[[Tensor], int],
    is_sharded: Callable[[nn.Parameter], bool],
) -> dict[str, nn.Parameter]:
    """A few trained parameters by name, of each sort that a load might forget.

    The first, the last, the smallest, the largest, one that has two names, and the smallest that
    the engine keeps sharded between forward passes.
    """
    names: dict[nn.Parameter, str] = {}  # in the model's order
    tied: list[nn.Parameter] = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter in names:
            tied.append(parameter)
        elif parameter.requires_grad:
            names[parameter] = name
    in_order = list(names)
    by_size = sorted(in_order, key=num_elements)
    sharded = [parameter for parameter in by_size if is_sharded(parameter)]
    chosen = [in_order[0], in_order[-1], by_size[0], by_size[-1], *tied[:1], *sharded[:1]]
    return {names[parameter]: parameter for parameter in chosen}


def sample_weights(name: str, whole: Tensor, rank: int, world_size: int) -> list[WeightSample]:
    """Elements of `rank`'s choice from a parameter that this rank has whole.

    Sharding cuts a parameter into `world_size` equal parts, and each may be wrong by itself: every
    rank looks at two of them, and all ranks together at each.
    """
    flat = whole.detach().view(-1)
    part_size = max(1, math.ceil(flat.numel() / world_size))
    num_parts = math.ceil(flat.numel() / part_size)
    stride = math.ceil(num_parts / 2)
    samples = []
    for part in range(rank % stride, num_parts, stride):
        start = part * part_size
        values = flat[start : start + min(part_size, SAMPLE_SIZE)].cpu()
        samples.append(WeightSample(name, flat_range(start, values.numel()), values))
    return samples
