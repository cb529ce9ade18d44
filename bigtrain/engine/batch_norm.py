"""BatchNorm's running statistics: fp32 on every engine, and moved once a step."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """Makes a step's micro-batches count as one forward pass for BatchNorm's running statistics.

    torch moves the statistics once per forward pass, so they would depend on how many micro-batches
    a rank makes of its share of the global batch. Here each micro-batch has a momentum such that
    all of them together move the statistics once, by their mean. (Ranks are averaged when it
    matters: Engine.sync_buffers.)
    """

    def __init__(self, model: nn.Module) -> None:
        self._momenta: list[tuple[_BatchNorm, float]] = []
        for module in model.modules():
            if not isinstance(module, _BatchNorm) or not module.track_running_stats:
                continue
            if module.momentum is not None:  # None: a plain mean over all forward passes
                self._momenta.append((module, module.momentum))

    def enter(self, number: int, count: int) -> None:
        """The forward pass of micro-batch `number` (from 0) of `count` comes next.

        One beyond the last (`number` = `count`) has no samples that count, and moves nothing.
        """
        for module, momentum in self._momenta:
            if number < count:
                share = momentum / count
                module.momentum = share / (1.0 - (count - 1 - number) * share)
            else:
                module.momentum = 0.0
            if number > 0 and module.num_batches_tracked is not None:
                module.num_batches_tracked.sub_(1)


def use_fp32_statistics(model: nn.Module) -> None:
    """Let BatchNorm layers with bf16 weights run beside their statistics, which stay fp32.

    torch refuses bf16 weights beside fp32 statistics; and in bf16, statistics would hardly move.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = _fp32_forward(module)  # type: ignore[assignment, method-assign]


def _fp32_forward(module: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """The forward pass of torch's _BatchNorm, with weight and bias cast to fp32."""

    def forward(features: Tensor) -> Tensor:
        momentum = module.momentum
        tracks = module.training and module.track_running_stats
        if tracks and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(module.num_batches_tracked)
        uses_statistics = not module.training or module.track_running_stats
        return F.batch_norm(
            features,
            module.running_mean if uses_statistics else None,
            module.running_var if uses_statistics else None,
            None if module.weight is None else module.weight.float(),
            None if module.bias is None else module.bias.float(),
            training=module.training or module.running_mean is None,
            momentum=momentum or 0.0,
            eps=module.eps,
        )

    return forward
