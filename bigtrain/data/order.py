"""Which sample comes at which position: a pure function of (seed, epoch, position), in O(1) memory.

Resuming is therefore one integer, and neither ranks nor micro-batches have a say in the order.
"""

import numpy as np
from numpy.typing import NDArray

# SplitMix64's constants (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_ROUNDS = 6  # of the Feistel network

Positions = NDArray[np.uint64]


def mix(x: Positions) -> Positions:
    """SplitMix64's finaliser: 64 well-mixed bits from each 64-bit number."""
    x = x + _GOLDEN_GAMMA
    x = _xor_shifted(x, 30) * _FIRST_FACTOR
    x = _xor_shifted(x, 27) * _SECOND_FACTOR
    return _xor_shifted(x, 31)


def _xor_shifted(x: Positions, bits: int) -> Positions:
    return x ^ (x >> np.uint64(bits))


def key(*parts: int) -> np.uint64:
    """One 64-bit key from several numbers; their order matters."""
    state = 0
    for part in parts:
        state = _mix_one(state ^ (part & _MASK_64))
    return np.uint64(state)


def _mix_one(x: int) -> int:
    """As `mix`, for one number: numpy would take ten times longer, in every step."""
    x = (x + int(_GOLDEN_GAMMA)) & _MASK_64
    x = ((x ^ (x >> 30)) * int(_FIRST_FACTOR)) & _MASK_64
    x = ((x ^ (x >> 27)) * int(_SECOND_FACTOR)) & _MASK_64
    return x ^ (x >> 31)


def permute(positions: Positions, n: int, seed_key: np.uint64) -> Positions:
    """The image of `positions` (each below n) under a pseudo-random permutation of 0 … n-1.

    A permutation of 0 … 4^k-1, the smallest such range that holds n, is applied again to what
    lands outside until all is inside (Black & Rogaway 2002, "Ciphers with arbitrary finite
    domains"): four times at most on average.
    """
    bits = max(n - 1, 1).bit_length()
    half_bits = (bits + 1) // 2
    images = positions.astype(np.uint64)
    outside = np.ones(len(images), bool)
    while outside.any():
        again = _feistel(images[outside], half_bits, seed_key)
        images[outside] = again
        outside = images >= np.uint64(n)
    return images


def _feistel(x: Positions, half_bits: int, seed_key: np.uint64) -> Positions:
    """A balanced Feistel network: a permutation of the numbers of 2 × `half_bits` bits."""
    bits = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left = x >> bits
    right = x & mask
    for turn in range(_ROUNDS):
        round_key = seed_key ^ np.uint64(turn << 56)
        scrambled = mix(right ^ round_key) & mask
        left, right = right, left ^ scrambled
    return (left << bits) | right


def samples_at(positions: range, n: int, seed: int) -> list[int]:
    """Sample indices at `positions` of the endless stream; each epoch has all n samples once."""
    stream = np.asarray(positions, np.uint64)
    epochs, places = np.divmod(stream, np.uint64(n))
    indices = np.empty_like(stream)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        epoch_key = key(seed, int(epoch))
        permuted = permute(places[in_epoch], n, epoch_key)
        indices[in_epoch] = permuted
    return indices.tolist()
