"""ZeRO 1, 2 and 3 by DeepSpeed, and every trap of it."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.distributed.elastic.utils.distributed import get_free_port

from bigtrain.engine.base import Engine, Fragment, MakeOptimizer, StepResult
from bigtrain.engine.plan import Plan
from bigtrain.engine.runtime import (
    Device,
    apply_compute_options,
    make_accelerator,
    silence_libraries,
)
from bigtrain.errors import TrainingFailed


class DeepSpeedEngine(Engine):
    """ZeRO 1, 2 and 3, with offload. DeepSpeed's own engine is called directly where Accelerate's wrapper would
    decide for itself when gradients meet and how a short group of micro-batches is scaled."""

    def __init__(
        self, plan: Plan, device: Device, ds_config: dict[str, Any], clip_norm: float
    ) -> None:
        # Without this, and with cpu=True, Accelerate drops DeepSpeed silently and runs DDP.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        # What a launcher said is in the plan by now (dsconfig.py); said twice, Accelerate refuses it.
        said = [name for name in os.environ if name.startswith("ACCELERATE_DEEPSPEED_")]
        for name in (
            *said,
            "ACCELERATE_CONFIG_DS_FIELDS",
            "ACCELERATE_USE_CPU",
            "ACCELERATE_MIXED_PRECISION",
        ):
            os.environ.pop(name, None)
        for name, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
        }.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_PORT", str(get_free_port()))
        from accelerate import DeepSpeedPlugin

        silence_libraries()
        self.ds_config = ds_config
        plugin = DeepSpeedPlugin(hf_ds_config=ds_config)
        precision = "bf16" if plan.precision == "bf16" else "no"
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it compiled, on every rank
            if device.kind == "cpu":
                _compile_deepspeeds_part()
            accelerator = make_accelerator(
                device, deepspeed_plugin=plugin, mixed_precision=precision
            )
        super().__init__(plan, accelerator, clip_norm)
        self._init: Any = None
        _forget_in_transformers()

    def shard(self, parameters: list[nn.Parameter]) -> None:
        """ZeRO-3: keep this rank's part of each parameter. Called per layer, so the whole model never stands here."""
        if self.plan.kind != "zero3":
            return
        import deepspeed

        if self._init is None:
            # Never entered as a context: models draw their weights first, and are sharded after (models/hf.py).
            self._init = deepspeed.zero.Init(config_dict_or_path=self.ds_config)
        for parameter in dict.fromkeys(parameters):
            if not hasattr(parameter, "ds_id"):
                dtype = torch.bfloat16 if self.plan.precision == "bf16" else torch.float32
                parameter.data = parameter.data.to(self.device, dtype)
                self._init._zero_init_param(parameter)

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        apply_compute_options(model, self.plan)
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model))
        self.module = self.model.module
        _forget_in_transformers()
        found = (
            self.model.zero_optimization_stage(),
            self.model.gradient_accumulation_steps(),
            self.model.bfloat16_enabled(),
        )
        asked = (int(self.plan.kind[-1]), self.plan.accumulation, self.plan.precision == "bf16")
        if found != asked:
            raise TrainingFailed(
                f"DeepSpeed runs (stage, accumulation, bf16) = {found}", str(asked)
            )
        if self.plan.kind == "zero3":
            _check_overflow_in_every_precision(self.model.optimizer)
        else:
            self.model.optimizer.check_grad_overflow = True

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss_sum: Tensor, weight: Tensor) -> None:
        # DeepSpeed averages over ranks, as DDP does; scale_wrt_gas would divide by the accumulation once more.
        self.model.backward((loss_sum * (self.world_size / weight)).float(), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepResult:
        self._set_rate(learning_rate)
        self.model.step()
        applied = self.model.was_step_applied()
        if not applied and self.plan.offload != "none" and self.plan.kind != "zero3":
            # In bf16 DeepSpeed 0.19 keeps the bad sums of a skipped step, and adds to them for ever.
            zero = self.model.optimizer
            for group in range(len(zero.bit16_groups)):
                zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        return StepResult(applied, float(self.model.get_global_grad_norm()))

    def whole_weights(self) -> dict[str, Tensor]:
        import deepspeed

        weights: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}  # tied parameters stay one tensor
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if id(parameter) not in copies:
                with deepspeed.zero.GatheredParameters(
                    [parameter], enabled=self.plan.kind == "zero3"
                ):
                    copies[id(parameter)] = (
                        parameter.detach().cpu().clone() if self.main else torch.empty(0)
                    )
            weights[name] = copies[id(parameter)]
        weights |= {
            name: tensor.cpu()
            for name, tensor in self.module.state_dict().items()
            if name not in weights
        }
        return weights if self.main else {}

    def fragments(self) -> list[Fragment]:
        zero, found = self.model.optimizer, []
        if self.plan.kind == "zero3":
            for name, p in self._trained():
                group, offset, size = zero.grad_position[zero.get_param_id(p)]
                start = self.rank * p.partition_numel()
                size = max(0, min(size, p.ds_numel - start))  # the last rank's part is padded
                flat = zero.fp32_partitioned_groups_flat[group]
                found.append(Fragment(name, start, flat.data[offset : offset + size], flat, offset))
            return found
        # BF16_Optimizer (ZeRO-1 in bf16) has another name for the same thing
        flats = (
            getattr(zero, "single_partition_of_fp32_groups", None)
            or zero.fp32_groups_flat_partition
        )
        for name, p in self._trained():
            if (part := p._hp_mapping) is not None:
                flat, offset = flats[part.param_group_index], part.hp_fragment_address.start
                master = flat.data[offset : offset + part.hp_fragment_address.numel]
                found.append(Fragment(name, part.lp_fragment_address.start, master, flat, offset))
        return found

    def _fragments_were_written(self) -> None:
        zero = self.model.optimizer
        if self.plan.kind != "zero3":
            zero.update_lp_params()
            return
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _compile_deepspeeds_part() -> None:
    """DeepSpeed compiles a small extension when first used on a CPU, behind a lock that is a mere file: a process that is
    killed meanwhile leaves it, and every later start waits for it for ever (torch/utils/file_baton.py). So compile behind
    a lock of the kernel's, and remove what a dead process left."""
    from deepspeed.comm.torch import build_shm_op
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory("deepspeed_shm_comm", False))
    with FileLock(folder.parent / "bigtrain.guard"):
        (folder / "lock").unlink(missing_ok=True)
        build_shm_op()


def _forget_in_transformers() -> None:
    """Accelerate tells transformers of ZeRO-3, which then builds, fills and gathers models behind our back."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _check_overflow_in_every_precision(optimizer: Any) -> None:
    """ZeRO-3 looks for Inf and NaN in fp16 only, and in fp32 and bf16 would write them into the weights."""

    def check(update_scale: bool = True) -> bool:
        optimizer.check_overflow()
        return bool(
            optimizer._loss_scale_update_and_overflow_cleanup()
            if update_scale
            else optimizer.overflow
        )

    optimizer._overflow_check_and_loss_scale_update = check
