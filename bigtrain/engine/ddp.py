"""One process, or torch's DistributedDataParallel."""

import contextlib
import math
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket

from bigtrain.engine.base import Context, Engine, MakeOptimizer, StepResult
from bigtrain.engine.fragments import Fragment, flat_range
from bigtrain.engine.plan import Plan
from bigtrain.engine.runtime import (
    Device,
    apply_compute_options,
    make_accelerator,
    prefer_channels_last,
)


class DDPEngine(Engine):
    """One process, or torch's DistributedDataParallel: fp32 weights, bf16 by autocast."""

    def __init__(self, plan: Plan, device: Device, clip_norm: float) -> None:
        for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
            os.environ.pop(name, None)
        accelerator = make_accelerator(device, cpu=device.kind == "cpu", mixed_precision="no")
        super().__init__(plan, accelerator, clip_norm)

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.module = model.to(self.device)
        self.optimizer = make_optimizer(self.module)
        self.channels_last = prefer_channels_last(self.module, self.device)
        apply_compute_options(self.module, self.plan)
        self.model = self.module
        if self.world_size > 1:
            self.model = self._wrap()

    def _wrap(self) -> nn.Module:
        """The module in DistributedDataParallel."""
        # A user's class may leave a parameter out of a step; looking for it would cost ours time.
        is_ours = type(self.module).__module__.startswith(("transformers.", "bigtrain."))
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; 2.10 has no other name.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = torch.nn.parallel.DistributedDataParallel(
                self.module,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                # Buffers are averaged when they matter (sync_buffers), on every engine alike.
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=not is_ours,
            )
        if self.plan.reduce_dtype == "bf16":
            wrapped.register_comm_hook(None, _reduce_in_bf16)
        return wrapped

    def autocast(self) -> Context:
        bf16 = self.plan.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def micro_batch(self, last: bool) -> Context:
        if last or self.world_size == 1:
            return contextlib.nullcontext()
        return self.model.no_sync()

    def backward(self, loss_sum: Tensor, num_targets: Tensor) -> None:
        # DDP averages over ranks, which makes the sum data_parallel_size times too small.
        (loss_sum * (self.data_parallel_size / num_targets)).float().backward()

    def step(self, learning_rate: float) -> StepResult:
        self.set_rate(learning_rate)
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm or math.inf)
        applied = norm.isfinite()
        if self._can_skip_on_device():
            self.optimizer.found_inf = (~applied).float()
            self.optimizer.step()
        elif applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(applied, norm)

    def _can_skip_on_device(self) -> bool:
        """Whether the optimizer skips a step by itself, so that the host need not see the norm.

        torch's fused ones do. But SGD, when it skips its first step, takes its momentum from memory
        that was never written.
        """
        is_fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return is_fused and not self.optimizer.defaults.get("momentum")

    def whole_weights(self) -> dict[str, Tensor]:
        if not self.main:
            return {}
        return {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}

    def fragments(self) -> list[Fragment]:
        fragments = []
        for name, parameter in self._trained():
            whole = flat_range(0, parameter.numel())
            master = parameter.data.view(-1)
            fragments.append(Fragment(name, whole, master, flat=parameter, offset=0))
        return fragments

    def _fragments_to_save(self) -> list[Fragment]:
        """Every rank holds everything, so each writes its share of the parameters."""
        return self.fragments()[self.rank :: self.world_size]

    def _fragments_were_written(self) -> None:
        """Forward passes use them as they are."""


def _reduce_in_bf16(group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """torch's own hook. Under its own name DDP takes it with NCCL alone; gloo can do it too."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return default_hooks.bf16_compress_hook(group, bucket)
