"""The learning rate as a pure function of the step.

Each schedule gives a factor of the peak rate. `progress` is the share of the steps after warm-up
that are done, from 0 to 1; `floor` is the factor at the end (`optim.final_lr_ratio`).
"""

import math
from collections.abc import Callable

from bigtrain.config.recipe import OptimConfig


def linear(progress: float, floor: float) -> float:
    """A straight line from 1 to `floor`."""
    return 1 - (1 - floor) * progress


def cosine(progress: float, floor: float) -> float:
    """Half a period of a cosine, from 1 to `floor` (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def step(steps: float, every: int, factor: float) -> float:
    """`factor` once more after each `every` steps."""
    return float(factor ** (steps // every))


def exponential(steps: float, every: int, factor: float) -> float:
    """As `step`, but smooth: `factor` in every `every` steps."""
    return float(factor ** (steps / every))


def wsd(steps_left: float, decay_steps: float, floor: float) -> float:
    """Warm-up, stable, decay: 1 until the last `decay_steps` steps, then a line to `floor`.

    Hu et al. 2024 (MiniCPM, arXiv 2404.06395), with a linear decay.
    """
    if steps_left > decay_steps:
        return 1.0
    return floor + (1 - floor) * max(steps_left, 0) / max(1, decay_steps)


def learning_rate(
    applied: int,
    steps: int,
    optim: OptimConfig,
    progress: Callable[[int], float] = float,
    rate_decays: int = 0,
) -> float:
    """The rate for a step before which `applied` of the run's `steps` steps were applied.

    Warm-up is linear and reaches the peak in the step `applied == warmup_steps - 1`. `progress`
    says how far a run is before a step (Plan.progress); `rate_decays` is how often the plateau
    schedule has lowered the rate so far.
    """
    if applied < optim.warmup_steps:
        return optim.lr * progress(applied + 1) / progress(optim.warmup_steps)
    if optim.schedule == "plateau":
        return optim.lr * optim.decay_factor**rate_decays
    return optim.lr * max(_factor(applied, steps, optim, progress), 0.0)


def _factor(
    applied: int, steps: int, optim: OptimConfig, progress: Callable[[int], float]
) -> float:
    """The rate after warm-up, as a factor of the peak rate."""
    since_warmup = progress(applied) - progress(optim.warmup_steps)
    after_warmup = progress(steps) - progress(optim.warmup_steps)
    share_done = since_warmup / max(1, after_warmup)
    match optim.schedule:
        case "linear":
            return linear(share_done, optim.final_lr_ratio)
        case "cosine":
            return cosine(share_done, optim.final_lr_ratio)
        case "step":
            return step(since_warmup, optim.decay_every, optim.decay_factor)
        case "exponential":
            return exponential(since_warmup, optim.decay_every, optim.decay_factor)
        case "wsd":
            decay_steps = after_warmup // 5
            if optim.decay_steps is not None:
                decay_steps = progress(steps) - progress(max(steps - optim.decay_steps, 0))
            return wsd(progress(steps) - progress(applied), decay_steps, optim.final_lr_ratio)
        case _:
            return 1.0
