"""Which sample comes at which position: a pure function of (seed, epoch, position), in O(1) memory.

Resuming is therefore one integer, and neither ranks nor micro-batches have a say in the order.
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
Positions = NDArray[np.uint64]


def mix(x: Positions) -> Positions:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): 64 well-mixed bits from each 64-bit number."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: int) -> np.uint64:
    """One 64-bit key from several numbers; their order matters."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return np.uint64(state[0])


def permute(positions: Positions, n: int, seed_key: np.uint64) -> Positions:
    """The image of `positions` (each below n) under a pseudo-random permutation of 0 … n-1.

    A balanced Feistel network over the next even power of two, walked until it lands inside (Black & Rogaway
    2002, "Ciphers with arbitrary finite domains"): four tries at most on average.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    x = positions.astype(np.uint64)
    outside = np.ones(len(x), bool)
    while outside.any():
        left, right = x[outside] >> bits, x[outside] & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mix(right ^ seed_key ^ np.uint64(turn << 56)) & mask)
        x[outside] = (left << bits) | right
        outside = x >= np.uint64(n)
    return x


def samples_at(positions: range, n: int, seed: int) -> list[int]:
    """Sample indices at global `positions` of an endless stream: every epoch of n visits each sample once."""
    where = np.asarray(positions, np.uint64)
    epochs, within = where // np.uint64(n), where % np.uint64(n)
    indices = np.empty(len(where), np.uint64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permute(within[here], n, key(seed, int(epoch)))
    return [int(index) for index in indices]
