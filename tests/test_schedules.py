"""The learning rate, step by step, against numbers worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from bigtrain.config.recipe import OptimConfig
from bigtrain.engine.plan import BatchRamp, Plan
from bigtrain.training import schedules
from bigtrain.training.schedules import learning_rate


def rates(steps: int, **settings: Any) -> list[float]:
    """The rate of every step of a run of `steps` steps, with a peak of 8."""
    optim = OptimConfig.model_validate({"lr": 8.0, **settings})
    return [learning_rate(applied, steps, optim) for applied in range(steps)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [8, 8, 8, 8]),
        ({"schedule": "linear"}, [8, 6, 4, 2]),
        # from 8 to a quarter of it: 6 in four steps of 1.5
        ({"schedule": "linear", "final_lr_ratio": 0.25}, [8, 6.5, 5, 3.5]),
        # (1 + cos(0°, 45°, 90°, 135°)) / 2 = 1, 0.8536, 0.5, 0.1464
        ({"schedule": "cosine"}, [8, 6.8284271, 4, 1.1715729]),
        # between 8 and 4: 4 + 4 × the factors above
        ({"schedule": "cosine", "final_lr_ratio": 0.5}, [8, 7.4142136, 6, 4.5857864]),
        ({"schedule": "step", "decay_every": 2, "decay_factor": 0.5}, [8, 8, 4, 4]),
        ({"schedule": "step", "decay_every": 1, "decay_factor": 0.1}, [8, 0.8, 0.08, 0.008]),
        # 0.25 in two steps is 0.5 in each
        ({"schedule": "exponential", "decay_every": 2, "decay_factor": 0.25}, [8, 4, 2, 1]),
        # two steps are left before the third one
        ({"schedule": "wsd", "decay_steps": 2}, [8, 8, 8, 4]),
        ({"schedule": "wsd", "decay_steps": 4, "final_lr_ratio": 0.5}, [8, 7, 6, 5]),
        ({"schedule": "wsd", "decay_steps": 0}, [8, 8, 8, 8]),
    ],
)
def test_rates_of_four_steps(settings: dict[str, Any], expected: list[float]) -> None:
    assert rates(4, **settings) == pytest.approx(expected)


def test_wsd_decays_in_the_last_fifth() -> None:
    assert rates(10, schedule="wsd") == [8, 8, 8, 8, 8, 8, 8, 8, 8, 4]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # four steps of warm-up reach the peak in the fourth; then the schedule's own four steps
        ("constant", [2, 4, 6, 8, 8, 8, 8, 8]),
        ("linear", [2, 4, 6, 8, 8, 6, 4, 2]),
        ("cosine", [2, 4, 6, 8, 8, 6.8284271, 4, 1.1715729]),
        ("step", [2, 4, 6, 8, 8, 8, 4, 4]),
        ("exponential", [2, 4, 6, 8, 8, 5.6568542, 4, 2.8284271]),
        ("wsd", [2, 4, 6, 8, 8, 8, 8, 4]),
    ],
)
def test_rates_after_warm_up(schedule: str, expected: list[float]) -> None:
    optional = {"decay_steps": 2} if schedule == "wsd" else {}
    found = rates(8, schedule=schedule, warmup_steps=4, decay_every=2, decay_factor=0.5, **optional)
    assert found == pytest.approx(expected)


def test_warm_up_longer_than_the_run() -> None:
    assert rates(3, schedule="cosine", warmup_steps=8) == [1, 2, 3]


def test_plateau_follows_the_evaluations() -> None:
    optim = OptimConfig(lr=8.0, schedule="plateau", warmup_steps=2, decay_factor=0.5)
    assert [learning_rate(applied, 9, optim, rate_decays=1) for applied in range(4)] == [4, 8, 4, 4]
    assert learning_rate(5, 9, optim, rate_decays=3) == 1


def test_on_a_ramp_schedules_go_by_samples() -> None:
    """Four steps of 2 samples and four of 6: half of the 32 samples are seen after 6 steps."""
    plan = Plan("ddp", "none", "fp32", 1, 6, 6, "none", False, steps=8)
    plan = replace(plan, ramp=BatchRamp.of_sizes({0: 2, 4: 6}))
    assert [plan.progress(step) for step in (0, 4, 5, 8)] == [0, 4, 7, 16]
    linear = OptimConfig(lr=8.0, schedule="linear")
    rates = [learning_rate(applied, 8, linear, plan.progress) for applied in range(8)]
    assert rates == [8, 7.5, 7, 6.5, 6, 4.5, 3, 1.5]
    wsd = OptimConfig(lr=8.0, schedule="wsd", decay_steps=2)
    assert learning_rate(7, 8, wsd, plan.progress) == 4, "its decay has as many steps as asked for"


def test_the_steps_of_a_ramp() -> None:
    ramp = BatchRamp.of_sizes({0: 2, 4: 6, 6: 1})
    assert [ramp.size_at(position) for position in (0, 7, 8, 19, 20, 21)] == [2, 2, 6, 6, 1, 1]
    for steps in range(1, 9):
        assert ramp.steps_for(ramp.samples_before(steps)) == steps
    assert ramp.steps_for(9) == 5


def test_schedules_by_themselves() -> None:
    assert schedules.linear(0.25, 0.2) == pytest.approx(0.8)
    assert schedules.cosine(1.0, 0.1) == pytest.approx(0.1)
    assert schedules.cosine(2.0, 0.1) == pytest.approx(0.1), "nothing rises again after the end"
    assert schedules.step(299, 100, 0.5) == 0.25
    assert schedules.exponential(150, 100, 0.25) == 0.125
    assert schedules.wsd(11, 10, 0.0) == 1.0
    assert schedules.wsd(1, 10, 0.0) == pytest.approx(0.1)
