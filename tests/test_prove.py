"""How `bigtrain prove` compares final weights; whole proofs are in test_faults.py."""

import torch
from torch import Tensor

from bigtrain.testing.resume_proof import EXACT, TOLERANCE, _compare_weights


def weights() -> dict[str, Tensor]:
    return {
        "norm.weight": torch.ones(8),
        "matrix": torch.full((8, 8), 0.08),
        "bias": torch.full((8,), 1e-5),
        "steps": torch.tensor(12),
    }


def test_equal_weights_are_the_same() -> None:
    assert _compare_weights(weights(), weights(), EXACT.weights).text == "same"


def test_a_wrong_matrix_does_not_hide_behind_a_larger_tensor() -> None:
    """Relative to the norm's weights it would be within the tolerance."""
    wrong = weights()
    wrong["matrix"][3, 3] *= 1.01
    found = _compare_weights(weights(), wrong, TOLERANCE["fp32"].weights)
    assert not found.equal
    assert found.text == "DIFFERENT by 1.0e-02 in matrix"


def test_a_tiny_bias_that_is_mostly_rounding_is_within_the_tolerance() -> None:
    other = weights()
    other["bias"] *= 1.5
    found = _compare_weights(weights(), other, TOLERANCE["fp32"].weights)
    assert found.equal
    assert found.text == "within 5.0e-06"
    assert not _compare_weights(weights(), other, EXACT.weights).equal


def test_nan_and_a_missing_tensor_are_different() -> None:
    broken = weights()
    broken["bias"][0] = torch.nan
    found = _compare_weights(weights(), broken, TOLERANCE["bf16"].weights)
    assert found.text == "DIFFERENT by inf in bias"
    del broken["bias"]
    assert not _compare_weights(weights(), broken, TOLERANCE["bf16"].weights).equal
