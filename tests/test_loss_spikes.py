"""What counts as a loss spike, in numbers worked out by hand."""

import math

import pytest

from bigtrain.training.loss_spikes import WINDOW, is_spike

FLAT = [2.0] * WINDOW
# 1.00, 1.01 … 1.31: the median is 1.155; the 90th percentile, at position 0.9 × 33 of the sorted
# losses, is 1.287. So the bound is 1.155 + 6 × 0.132 = 1.947.
RISING = [1.0 + 0.01 * i for i in range(WINDOW)]


def test_nothing_is_a_spike_before_there_are_enough_losses() -> None:
    assert not is_spike([], 1e9)
    assert not is_spike(FLAT[1:], 1e9)


@pytest.mark.parametrize(("loss", "spiked"), [(2.24, False), (2.25, True), (0.0, False)])
def test_where_losses_do_not_vary_two_percent_of_the_median_is_the_scale(
    loss: float, spiked: bool
) -> None:
    assert is_spike(FLAT, loss) == spiked  # the bound is 2 + 6 × 0.04


@pytest.mark.parametrize(("loss", "spiked"), [(1.94, False), (1.95, True)])
def test_the_scale_is_from_the_median_to_the_90th_percentile(loss: float, spiked: bool) -> None:
    assert is_spike(RISING, loss) == spiked


def test_the_order_of_the_losses_does_not_matter() -> None:
    assert is_spike(RISING[::-1], 1.95)
    assert not is_spike(RISING[::-1], 1.94)


def test_one_spike_does_not_hide_the_next() -> None:
    assert is_spike([*FLAT[1:], 1e6], 2.25)


def test_heavy_tails_widen_the_scale() -> None:
    tail = [2.0] * (WINDOW - 6) + [4.0] * 6
    assert not is_spike(tail, 13.9)  # the bound is 2 + 6 × (4 - 2)
    assert is_spike(tail, 14.1)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_a_spike(loss: float) -> None:
    """Such a step is skipped for its gradient, without a spike being reported."""
    assert not is_spike(FLAT, loss)


def test_negative_losses_have_a_scale_too() -> None:
    below = [-2.0] * WINDOW
    assert not is_spike(below, -1.77)  # the bound is -2 + 6 × 0.04
    assert is_spike(below, -1.75)
