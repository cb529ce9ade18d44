"""One process, or torch's DistributedDataParallel."""

import contextlib
import math
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.engine.base import Engine, Fragment, MakeOptimizer, StepResult
from bigtrain.engine.plan import Plan
from bigtrain.engine.runtime import Device, apply_compute_options, make_accelerator


class DDPEngine(Engine):
    """One process, or torch's DistributedDataParallel: fp32 weights, bf16 by autocast."""

    def __init__(self, plan: Plan, device: Device, clip_norm: float) -> None:
        for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
            os.environ.pop(name, None)
        super().__init__(
            plan,
            make_accelerator(device, cpu=device.kind == "cpu", mixed_precision="no"),
            clip_norm,
        )

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.module = model.to(self.device)
        self.optimizer = make_optimizer(self.module)
        apply_compute_options(self.module, self.plan)
        self.model = self.module
        if self.world_size > 1:
            with (
                warnings.catch_warnings()
            ):  # 2.13 renames broadcast_buffers; 2.10 has no other name
                warnings.simplefilter("ignore", FutureWarning)
                # Buffers are averaged when they matter (sync_buffers), on every engine alike.
                self.model = torch.nn.parallel.DistributedDataParallel(
                    self.module,
                    device_ids=[self.device.index] if self.device.type == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                    # A user's class may leave a parameter out of a step; looking for it costs ours nothing.
                    find_unused_parameters=not type(self.module).__module__.startswith(
                        ("transformers.", "bigtrain.")
                    ),
                )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16"
        )

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last or self.world_size == 1 else self.model.no_sync()

    def backward(self, loss_sum: Tensor, weight: Tensor) -> None:
        # DDP averages over ranks, so the sum is world_size times too small without this factor.
        (loss_sum * (self.world_size / weight)).float().backward()

    def step(self, learning_rate: float) -> StepResult:
        self._set_rate(learning_rate)
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm or math.inf)
        applied = norm.isfinite()
        # torch's fused optimizers leave a step out by themselves, so nobody waits to see the norm. (But SGD takes the
        # momentum of a first step that it left out from memory that nobody wrote.)
        fused = getattr(
            self.optimizer, "_step_supports_amp_scaling", False
        ) and not self.optimizer.defaults.get("momentum")
        if fused:
            self.optimizer.found_inf = (~applied).float()
        if fused or applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(applied, norm)

    def whole_weights(self) -> dict[str, Tensor]:
        if not self.main:
            return {}
        return {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}

    def fragments(self) -> list[Fragment]:
        return [Fragment(name, 0, p.data.view(-1), p, 0) for name, p in self._trained()]

    def _to_save(self) -> list[Fragment]:
        """Every rank holds everything, so each writes its share of the parameters."""
        return self.fragments()[self.rank :: self.world_size]

    def _fragments_were_written(self) -> None:
        """They are the weights."""
