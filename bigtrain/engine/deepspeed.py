"""ZeRO 1, 2 and 3 by DeepSpeed, and every trap of it."""

import contextlib
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.elastic.utils.distributed import get_free_port

from bigtrain.engine.base import Context, Engine, MakeOptimizer, StepResult
from bigtrain.engine.batch_norm import use_fp32_statistics
from bigtrain.engine.fragments import Fragment, flat_range
from bigtrain.engine.plan import Plan
from bigtrain.engine.runtime import (
    Device,
    apply_compute_options,
    cores_per_rank,
    make_accelerator,
    prefer_channels_last,
    silence_libraries,
)
from bigtrain.engine.weight_samples import (
    SAMPLE_SIZE,
    WeightSample,
    sample_weights,
)
from bigtrain.errors import TrainingFailed


class DeepSpeedEngine(Engine):
    """ZeRO 1, 2 and 3, with offload.

    DeepSpeed's own engine is called directly where Accelerate's wrapper would decide for itself
    when ranks add gradients, and how a short group of micro-batches is scaled.
    """

    def __init__(
        self, plan: Plan, device: Device, ds_config: dict[str, Any], clip_norm: float
    ) -> None:
        _prepare_environment()
        plugin = _make_plugin(ds_config)
        silence_libraries()
        self.ds_config = ds_config
        precision = "bf16" if plan.precision == "bf16" else "no"
        _compile_nothing()
        if device.kind == "cuda":
            _take_visible_device()
            if plan.offload != "none":
                # The launcher's one thread is for ranks whose devices do the work.
                torch.set_num_threads(cores_per_rank())
        accelerator = make_accelerator(device, deepspeed_plugin=plugin, mixed_precision=precision)
        super().__init__(plan, accelerator, clip_norm)
        self._init: Any = None

    def shard(self, parameters: list[nn.Parameter]) -> None:
        """ZeRO-3: keep this rank's part of each parameter.

        Called layer by layer, so the whole model is never in one process's memory.
        """
        if self.plan.kind != "zero3":
            return
        import deepspeed

        if self._init is None:
            # Never entered as a context: models draw their weights first, and are sharded after
            # (models/hf.py).
            self._init = deepspeed.zero.Init(config_dict_or_path=self.ds_config)
        dtype = torch.bfloat16 if self.plan.precision == "bf16" else torch.float32
        for parameter in dict.fromkeys(parameters):
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(self.device, dtype)
                self._init._zero_init_param(parameter)

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        # DeepSpeed does not move a model whose parameters are sharded already.
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)
        if self.plan.precision == "bf16":
            use_fp32_statistics(model)
        self.channels_last = prefer_channels_last(model, self.device)
        apply_compute_options(model, self.plan)
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model))
        self.module = self.model.module
        self._refuse_another_plan()
        if self.plan.kind != "zero3":
            _wait_less_for_the_device(self.model.optimizer)

    def _refuse_another_plan(self) -> None:
        """Raises TrainingFailed when DeepSpeed has started with other settings than the plan's."""
        planned = (
            int(self.plan.kind[-1]),
            self.plan.accumulation,
            self.plan.precision == "bf16",
        )
        running = (
            self.model.zero_optimization_stage(),
            self.model.gradient_accumulation_steps(),
            self.model.bfloat16_enabled(),
        )
        if running != planned:
            raise TrainingFailed(
                f"DeepSpeed runs (stage, accumulation, bf16) = {running}", str(planned)
            )

    def micro_batch(self, last: bool) -> Context:
        self.model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss_sum: Tensor, num_targets: Tensor) -> None:
        # DeepSpeed averages over ranks, as DDP does; scale_wrt_gas would divide by the
        # accumulation once more.
        loss = (loss_sum * (self.data_parallel_size / num_targets)).float()
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepResult:
        self.set_rate(learning_rate)
        self.model.step()
        applied = self.model.was_step_applied()
        if not applied and self.plan.offload != "none" and self.plan.kind != "zero3":
            # In bf16 DeepSpeed 0.19 keeps the bad sums of a skipped step, and adds to them in every
            # later one.
            zero = self.model.optimizer
            for group in range(len(zero.bit16_groups)):
                zero.averaged_gradients[group] = None
                zero.all_grad_tensors[group] = None
        return StepResult(applied, self.model.get_global_grad_norm())

    def whole_weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}  # by parameter: tied ones stay one tensor
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if id(parameter) not in copies:
                copies[id(parameter)] = self._gathered_copy(parameter)
            weights[name] = copies[id(parameter)]
        for name, tensor in self.module.state_dict().items():
            if name not in weights:
                weights[name] = tensor.cpu()
        return weights if self.main else {}

    def _gathered_copy(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter on the CPU of rank 0; elsewhere nothing. A collective."""
        import deepspeed

        sharded = self.plan.kind == "zero3"
        with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
            return parameter.detach().cpu().clone() if self.main else torch.empty(0)

    def whole_shape(self, parameter: Any) -> tuple[int, ...]:
        # ZeRO-3 leaves an empty tensor where a parameter was, and notes its shape; buffers stay.
        sharded = self.plan.kind == "zero3" and isinstance(parameter, nn.Parameter)
        return tuple(parameter.ds_shape if sharded else parameter.shape)

    def num_elements(self, parameter: Any) -> int:
        return parameter.ds_numel if self.plan.kind == "zero3" else parameter.numel()

    def fragments(self) -> list[Fragment]:
        return self._zero3_fragments() if self.plan.kind == "zero3" else self._zero12_fragments()

    def _zero3_fragments(self) -> list[Fragment]:
        """ZeRO-3 cuts every parameter into one range per rank."""
        zero = self.model.optimizer
        fragments = []
        parameter: Any  # a torch Parameter, to which DeepSpeed has added attributes
        for name, parameter in self._trained():
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            # Cut over all processes (DeepSpeed's world group), as in `_own_part`.
            start = self.rank * parameter.partition_numel()
            # The last rank's part is padded.
            size = max(0, min(size, self.num_elements(parameter) - start))
            flat = zero.fp32_partitioned_groups_flat[group]
            master = flat.data[offset : offset + size]
            fragments.append(Fragment(name, flat_range(start, size), master, flat, offset))
        return fragments

    def groups_by_flat(self) -> dict[int, dict[str, Any]]:
        if self.plan.kind != "zero3":
            return super().groups_by_flat()
        # Its groups are empty but for the moment of their update.
        zero = self.model.optimizer
        groups: dict[int, dict[str, Any]] = {}
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            groups[id(flat)] = zero.param_groups[zero.sub_group_to_group_id[number]]
        return groups

    def _zero12_fragments(self) -> list[Fragment]:
        """ZeRO-1 and 2 cut a group's parameters, laid end to end, into one range per rank."""
        zero = self.model.optimizer
        # BF16_Optimizer (ZeRO-1 in bf16) has another name for the same thing.
        flat_of_group = (
            getattr(zero, "single_partition_of_fp32_groups", None)
            or zero.fp32_groups_flat_partition
        )
        fragments = []
        parameter: Any
        for name, parameter in self._trained():
            mapping = parameter._hp_mapping
            if mapping is None:  # no element of it is this rank's
                continue
            flat = flat_of_group[mapping.param_group_index]
            offset = mapping.hp_fragment_address.start
            size = mapping.hp_fragment_address.numel
            master = flat.data[offset : offset + size]
            piece = flat_range(mapping.lp_fragment_address.start, size)
            fragments.append(Fragment(name, piece, master, flat, offset))
        return fragments

    def weights_in_use(self) -> list[WeightSample]:
        if self.plan.kind != "zero3":
            return super().weights_in_use()
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        chosen = self._representatives()
        # A forward pass reads what is gathered as it is, and gathers the rest from all ranks'
        # parts. So of the rest each rank looks at its own part. Gathering costs more than all else
        # here: it is done for the smallest parameter, where the load has gathered nothing.
        parameter: Any
        not_gathered = []
        for parameter in chosen.values():
            if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE:
                not_gathered.append(parameter)
        to_gather: list[Any] = []
        if len(not_gathered) == len(chosen):
            to_gather = sorted(not_gathered, key=self.num_elements)[:1]
        samples = []
        with deepspeed.zero.GatheredParameters(to_gather, enabled=len(to_gather) > 0):
            for name, parameter in chosen.items():
                if parameter.ds_status is ZeroParamStatus.AVAILABLE:
                    samples += sample_weights(name, parameter, self.rank, self.world_size)
                else:
                    samples.append(self._own_part(name, parameter))
        return samples

    def _own_part(self, name: str, parameter: Any) -> WeightSample:
        """The first elements of this rank's part of a ZeRO-3 parameter; the last part is padded."""
        start = self.rank * parameter.partition_numel()
        length = min(parameter.partition_numel(), parameter.ds_numel - start, SAMPLE_SIZE)
        values = parameter.ds_tensor.detach()[: max(length, 0)].cpu()
        return WeightSample(name, flat_range(start, values.numel()), values)

    def is_sharded(self, parameter: Any) -> bool:
        return self.plan.kind == "zero3" and not parameter.ds_persist

    def _fragments_were_written(self) -> None:
        zero = self.model.optimizer
        if self.plan.kind != "zero3":
            zero.update_lp_params()
            return
        # As in DeepSpeed's own step: forward passes leave whole parameters behind (small ones are
        # kept for good), and DeepSpeed gathers none of them again until they are given back.
        zero._partition_all_parameters()
        zero.invalidate_secondary_tensor()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _prepare_environment() -> None:
    """The environment variables that make Accelerate start DeepSpeed, and no others of its own."""
    # Without this, and with cpu=True, Accelerate drops DeepSpeed silently and runs DDP.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    # What a launcher asked for is in the plan by now (launcher.py). Accelerate refuses settings
    # that come from both sides.
    settled = [name for name in os.environ if name.startswith("ACCELERATE_DEEPSPEED_")]
    settled += ["ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"]
    for name in settled:
        os.environ.pop(name, None)
    # DeepSpeed wants a process group even for one process that no launcher has started.
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(get_free_port()))


def _take_visible_device() -> None:
    """Make LOCAL_RANK the number of a device, as which DeepSpeed takes it.

    Where each rank sees its own device alone (Slurm's --gpus-per-task), that is 0 on all.
    """
    launched_as = os.environ.setdefault("BIGTRAIN_LOCAL_RANK", os.environ["LOCAL_RANK"])
    os.environ["LOCAL_RANK"] = f"{int(launched_as) % torch.cuda.device_count()}"


def _compile_nothing() -> None:
    """Import DeepSpeed without what it would compile, and no run needs: over a second of a start.

    Its extension for CPUs serves inference alone. DeepSpeed would ask compilers and GPUs which of
    its extensions they can build, and need a C++ compiler on every node. Importing Muon's kernels
    compiles them; TORCHDYNAMO_DISABLE prevents that, and is set during the import alone.
    """
    setting = "TORCHDYNAMO_DISABLE"
    of_user = os.environ.get(setting)
    os.environ[setting] = "1"
    try:
        import deepspeed.ops

        with contextlib.suppress(ImportError):  # where this version of DeepSpeed has it elsewhere
            import deepspeed.runtime.zero.muon.muon_optimizer
    finally:
        del os.environ[setting]
        if of_user is not None:
            os.environ[setting] = of_user
    deepspeed.ops.__compatible_ops__ = {
        "deepspeed_shm_comm": False,
        "deepspeed_not_implemented": False,
    }


def _make_plugin(ds_config: dict[str, Any]) -> Any:
    """What makes Accelerate start DeepSpeed, and transformers know nothing of it.

    Told of ZeRO-3, transformers would build, fill and gather models in its own way.
    """
    from accelerate import DeepSpeedPlugin

    class Plugin(DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """Accelerate tells transformers here, and imports it for that."""

    return Plugin(hf_ds_config=ds_config)


def _wait_less_for_the_device(optimizer: Any) -> None:
    """Leave out numbers that ZeRO-1 and 2 would read from the device, and read others together.

    The places are those of DeepSpeed 0.19.8. Every sum keeps its order, so no bit changes; how
    often the host waits is in tests/host_waits.json.
    """
    # Look for Inf and NaN in fp32 and bf16 too (stage_1_and_2.py:3042; ZeRO-3 always does). The
    # norm shows them, so nothing else need look: not all gradients in the step (3030), nor, with
    # offload, each one in each backward pass (1792).
    optimizer.check_grad_overflow = True
    optimizer.check_overflow = _nothing
    optimizer.update_offload_overflow_tracker = _nothing
    if not hasattr(optimizer, "complete_grad_norm_calculation_for_cpu_offload"):
        return  # BF16_Optimizer, ZeRO-1 in bf16
    finish_norm = optimizer.complete_grad_norm_calculation_for_cpu_offload

    def norm_of_offloaded(parameters: list[Any]) -> Tensor:
        """With offload it reads the norm of each parameter (1929): here all arrive at once."""
        norms: dict[Any, Any] = optimizer.norm_for_param_grads
        used = [key for key in map(optimizer.get_param_id, parameters) if key in norms]
        if used:
            # numpy's numbers have the `item` that is asked of them.
            on_host = torch.stack([norms[key] for key in used]).cpu().numpy()
            norms.update(zip(used, on_host, strict=True))
        return finish_norm(parameters)

    def clip(gradients: list[Tensor], norm: Tensor) -> None:
        """The norm is looked at once in a step, not once more for each group (3203)."""
        if optimizer.clip_grad > 0:
            excess = ((norm + 1e-6) / optimizer.clip_grad).clamp(min=1.0)
            for gradient in gradients:
                gradient.data.mul_(1.0 / excess)

    optimizer.complete_grad_norm_calculation_for_cpu_offload = norm_of_offloaded
    optimizer.unscale_and_clip_grads = clip


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a look for Inf and NaN."""
