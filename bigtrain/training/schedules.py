"""The learning rate as a function of the step."""

import math

from bigtrain.config.recipe import OptimConfig


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """The rate for `step` (0-based, counting applied steps) of `steps`.

    Warm-up is linear and reaches the peak in step `warmup_steps - 1`. wsd: warm-up, stable, then linear decay
    (Hu et al. 2024, MiniCPM).
    """
    warmup = optim.warmup_steps
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    floor, left = optim.final_lr_ratio, steps - step
    length = optim.decay_steps if optim.decay_steps is not None else (steps - warmup) // 5
    factors = {
        "constant": 1.0,
        "linear": 1 - (1 - floor) * done,
        "cosine": floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
        "step": optim.decay_factor ** ((step - warmup) // optim.decay_every),
        "exponential": optim.decay_factor ** ((step - warmup) / optim.decay_every),
        "wsd": 1.0 if left > length else floor + (1 - floor) * max(left, 0) / max(1, length),
    }
    return optim.lr * max(factors[optim.schedule], 0.0)
