"""Accelerate and DeepSpeed, and every trap of theirs, in one room.

The rest of bigtrain sees ranks, a backward that takes a sum and a weight, and a step that says whether it was
applied. Nothing here knows what is trained.
"""

import contextlib
import ctypes
import io
import logging
import math
import os
import resource
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.distributed.elastic.utils.distributed import get_free_port

from bigtrain.errors import RequestError, TrainingFailed
from bigtrain.plan import Plan

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
_SAMPLE = 1024  # elements looked at in one place, when weights are compared with a checkpoint


@dataclass(frozen=True)
class Device:
    """What one rank computes on, known before any process group exists."""

    kind: str  # cpu | cuda
    bf16_is_fast: bool


def find_device(asked: str) -> Device:
    """`auto`, `cpu` or `cuda`; RequestError when CUDA is asked for and absent."""
    cuda = torch.cuda.is_available()
    if asked == "cuda" and not cuda:
        built = torch.version.cuda or "without CUDA"
        raise RequestError(
            f"engine.device is cuda, but torch {torch.__version__} (built {built}) sees no CUDA device",
            "a visible GPU and a CUDA build of torch",
            "engine.device=cpu, or nvidia-smi to see what the machine has",
        )
    if cuda and asked != "cpu":
        return Device("cuda", torch.cuda.is_bf16_supported())
    # Measured: bf16 products are faster than fp32 with AVX512_BF16 (1.5×) and AMX (9×), far slower without either.
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return Device("cpu", bool(flags.get("avx512_bf16") or flags.get("amx_bf16")))


def tracker(kind: str, project: str, run: str, folder: Path, step: int) -> Any:
    """Accelerate's tracker of that kind, begun: TensorBoard's files below `folder`, Trackio's where Trackio keeps them.

    `step`: where the run goes on; what TensorBoard was told of later steps, by a life that was killed, is forgotten.
    """
    from accelerate import tracking

    if kind == "tensorboard":
        begun: Any = tracking.TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
    else:
        import trackio

        begun = tracking.TrackioTracker(project, name=run, resume="allow")
        begun.finish = trackio.finish  # Accelerate's own leaves the run to be finished, and said goodbye to, once more at exit
    with contextlib.redirect_stdout(sys.stderr):  # Trackio greets
        begun.start()
    return begun


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun, accelerate launch and bigtrain's Slurm scripts set them; (0, 1) without."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class StepResult(NamedTuple):
    """What became of an optimizer step: numbers, or tensors on a device that may not have come so far yet."""

    applied: Tensor | bool
    grad_norm: Tensor | float  # before clipping; not finite when the step was skipped for it


@dataclass(frozen=True)
class Fragment:
    """A rank's part of one parameter: `master` is a flat fp32 view of it, elements `start` … of the whole parameter.

    The optimizer keeps its state for `flat`, in which the part begins at `offset`.
    """

    name: str
    start: int
    master: Tensor
    flat: Tensor
    offset: int


@dataclass(frozen=True)
class Sample:
    """A few elements of one parameter, from element `start` on, as the next forward pass will read them."""

    name: str
    start: int
    values: Tensor  # flat, in the precision of forward passes, on the CPU


def _elements(named: tuple[str, Any]) -> int:
    """The size of a (name, parameter), wherever its elements are."""
    parameter = named[1]
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class Engine(ABC):
    """One rank's share of a training run."""

    def __init__(self, plan: Plan, accelerator: Any, clip_norm: float) -> None:
        self.plan, self.accelerator, self.clip_norm = plan, accelerator, clip_norm
        self.rank: int = accelerator.process_index
        self.main = self.rank == 0
        self.world_size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.model: Any = None  # what to call for a forward pass
        self.module: Any = None  # the user's module below it
        self.optimizer: Any = None
        self._host: dict[str, Tensor] = {}  # the last snapshot's memory, used again: fresh pages cost six times more

    def shard(self, parameters: list[nn.Parameter]) -> None:  # noqa: B027
        """Take over parameters that have just been given their values; engines that do not shard leave them."""

    @abstractmethod
    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Place the model and its optimizer on the devices."""

    @abstractmethod
    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the forward and backward pass of one micro-batch; gradients meet in the last one."""

    @abstractmethod
    def backward(self, loss_sum: Tensor, weight: Tensor) -> None:
        """Gradients of `loss_sum` ÷ `weight`, the weight of the whole global batch, summed over ranks."""

    @abstractmethod
    def step(self, learning_rate: float) -> StepResult:
        """Clip and update; every rank skips together when a gradient is not finite."""

    @abstractmethod
    def whole_weights(self) -> dict[str, Tensor]:
        """All parameters and buffers on the CPU of rank 0 (elsewhere: an empty dictionary). A collective."""

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """This rank's parts of the parameters, as views that can be read and written."""

    @abstractmethod
    def _fragments_were_written(self) -> None:
        """Carry new fp32 values over to the weights that forward passes use."""

    def snapshot(self) -> dict[str, Tensor]:
        """This rank's share of all that training changes, copied to the host: `parameter|key|start` → flat values.

        The names say nothing of engine, stage or rank, so any engine on any number of ranks can read them back.
        The next snapshot overwrites this one.
        """
        found: dict[str, Tensor] = {}
        for part in self._to_save():
            found[f"{part.name}|weight|{part.start}"] = part.master
            for key, value in self._base().state[part.flat].items():
                if value.shape == part.flat.shape:
                    found[f"{part.name}|{key}|{part.start}"] = value.view(-1)[part.offset : part.offset + part.master.numel()]
                else:
                    found[f"{part.name}|{key}|scalar"] = torch.as_tensor(value)
        if self.main:
            found |= {f"{name}|buffer|scalar": buffer for name, buffer in self._persistent_buffers().items()}
        cuda = self.device.type == "cuda"
        for name, tensor in found.items():
            if name not in self._host or self._host[name].shape != tensor.shape:
                self._host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
            self._host[name].copy_(tensor.detach(), non_blocking=True)
        if cuda:
            torch.cuda.synchronize()
        return {name: self._host[name] for name in found}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's manifest says of the engine that wrote it, and another may have otherwise."""
        kind, precision, optimizer = self.plan.kind, self.plan.precision, type(self._base()).__name__
        return {"engine": kind, "world_size": self.world_size, "precision": precision, "optimizer": optimizer}

    def shapes(self) -> dict[str, list[int]]:
        """What a checkpoint must hold, by name: trained parameters and kept buffers, with their whole shapes."""
        named = [*self._trained(), *self._persistent_buffers().items()]
        return {name: list(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in named}

    def restore(self, source: Any, with_optimizer: bool = True) -> None:
        """Take back what any engine's `snapshot` held (`source`: checkpoint.Shards)."""
        for part in self.fragments():
            state = self._base().state[part.flat]
            for key in source.pieces[part.name] if with_optimizer else ["weight"]:
                if (number := source.scalar(part.name, key)) is not None:
                    # torch keeps an optimizer's step on the device where it is fused, on the host where it is not.
                    fused = self._base().param_groups[0].get("fused")
                    state[key] = number.to(part.flat.device if fused else "cpu")
                    continue
                if key != "weight" and key not in state:
                    state[key] = torch.zeros_like(part.flat)
                whole = part.master if key == "weight" else state[key].view(-1)[part.offset :]
                source.read(part.name, key, part.start, whole[: part.master.numel()])
        for name, buffer in self._persistent_buffers().items():
            buffer.copy_(source.scalar(name, "buffer"))
        self._fragments_were_written()

    def weights_in_use(self) -> list[Sample]:
        """A few elements of a few parameters as the next forward pass will read them. A collective."""
        samples = []
        for name, parameter in self._representatives():
            samples += self._sample(name, parameter.detach().view(-1))
        return samples

    def _representatives(self) -> list[tuple[str, Any]]:
        """A few trained parameters, of each sort that a load might forget: the first, the last, the
        smallest, the largest, and one that has two names."""
        trained = self._trained()
        by_size = sorted(trained, key=_elements)
        uses: Counter[int] = Counter()
        for _, parameter in self.module.named_parameters(remove_duplicate=False):
            uses[id(parameter)] += 1
        chosen = [trained[0], trained[-1], by_size[0], by_size[-1]]
        for named in trained:
            if uses[id(named[1])] > 1:
                chosen.append(named)
                break
        return list(dict.fromkeys(chosen))

    def _sample(self, name: str, whole: Tensor) -> list[Sample]:
        """Elements from two of the equal parts that sharding makes of a parameter; ranks look at
        different parts."""
        part_size = max(1, math.ceil(whole.numel() / self.world_size))
        parts = math.ceil(whole.numel() / part_size)
        apart = math.ceil(parts / 2)
        samples = []
        for part in range(self.rank % apart, parts, apart):
            start = part * part_size
            stop = start + min(part_size, _SAMPLE)
            samples.append(Sample(name, start, whole[start:stop].cpu()))
        return samples

    def _to_save(self) -> list[Fragment]:
        return self.fragments()

    def _trained(self) -> list[tuple[str, Any]]:
        """A parameter that is not trained is what it was at the start, and is not saved."""
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _base(self) -> torch.optim.Optimizer:
        """torch's optimizer below DeepSpeed's."""
        found: Any = self.optimizer
        while not isinstance(found, torch.optim.Optimizer) or hasattr(found, "optimizer"):
            found = found.optimizer
        return cast(torch.optim.Optimizer, found)

    def _persistent_buffers(self) -> dict[str, Tensor]:
        kept = self.module.state_dict().keys()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of forward passes, in training and in evaluation."""
        return contextlib.nullcontext()

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def put(self, *values: Tensor | float) -> Tensor:
        """Numbers of host and device side by side: float64, on the device, without waiting for it."""
        cuda = self.device.type == "cuda"
        known = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
        found = torch.tensor(known, dtype=torch.float64, pin_memory=cuda).to(self.device, non_blocking=True)
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                found[place] = value
        return found

    def sum(self, *values: Tensor | float) -> Tensor:
        """Values added up over ranks, as `put` has them."""
        total = self.put(*values)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total

    def read(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Send numbers to the host; what is returned waits until they are there, and not for what the device does since."""
        if self.device.type != "cuda":
            return numbers.tolist
        here, arrived = torch.empty_like(numbers, device="cpu", pin_memory=True), torch.cuda.Event()
        here.copy_(numbers, non_blocking=True)
        arrived.record()

        def arrive() -> list[float]:
            arrived.synchronize()
            return here.tolist()

        return arrive

    def gather(self, value: Any) -> list[Any]:
        """A small value of every rank, in order of rank, on every rank; so each waits for all."""
        from accelerate.utils import gather_object

        return cast(list[Any], gather_object([value]))

    def sync_buffers(self) -> None:
        """Give every rank the mean of all ranks' float buffers (BatchNorm's running statistics differ per rank)."""
        if self.world_size == 1:
            return
        for module in self.module.modules():
            if getattr(module, "track_running_stats", False):  # others are constants, which a mean could move by a bit
                for buffer in (b for b in module.buffers(recurse=False) if b.is_floating_point()):
                    torch.distributed.all_reduce(buffer)
                    buffer.div_(self.world_size)

    def peak_memory(self) -> int:
        """Bytes: the device's peak on CUDA, the process's peak resident set on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def close(self) -> None:
        if self.world_size > 1 and torch.distributed.is_initialized():
            # A gloo thread lets go of the last collective's tensors under the GIL, after the collective is done. The
            # group's destructor joins that thread while it holds the GIL: a deadlock, or at exit an abort. So leave
            # the GIL to it first (pytorch#56297, #179291; seen in one of forty ends of a two-rank run).
            time.sleep(0.1)
            torch.distributed.destroy_process_group()

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def start(plan: Plan, device: Device, ds_config: dict[str, Any], clip_norm: float) -> Engine:
    """Join the other ranks and return the plan's engine. Raises TrainingFailed if what started is not the plan."""
    _quiet()
    if device.kind == "cpu":
        _keep_freed_memory()
        os.environ["DS_ACCELERATOR"] = "cpu"
    engine = _DDP(plan, device, clip_norm) if plan.kind == "ddp" else _DeepSpeed(plan, device, ds_config, clip_norm)
    if engine.world_size != plan.world_size:
        raise TrainingFailed(f"the process group has {engine.world_size} ranks", f"{plan.world_size}, as the launcher said")
    if engine.device.type != device.kind:
        raise TrainingFailed(f"Accelerate chose {engine.device.type}", device.kind)
    return engine


def _quiet() -> None:
    """Silence what says nothing to a user; warnings about their own code still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("accelerate", "DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("deepspeed", "accelerate", "torch", "transformers", "torchmetrics"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of giving it back: a fifth less time per step on the CPU, measured."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
            libc.mallopt(option, value)


def _accelerator(device: Device, **settings: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # The backend is named because Accelerate's guess leaves each CPU rank alone with itself (world size 1);
    # one bare process, which has no group, must not name one.
    # Its time limit lies above every one of the watchdog's (watch.py), which says more before it ends a run.
    backend = "nccl" if device.kind == "cuda" else "gloo"
    group = InitProcessGroupKwargs(backend=backend, timeout=timedelta(hours=2))
    return Accelerator(kwargs_handlers=[group] if "WORLD_SIZE" in os.environ else None, **settings)


def _compute_options(model: Any, plan: Plan) -> None:
    """Activation checkpointing and compilation, as the plan has them."""
    if plan.activation_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise RequestError(
                f"engine.activation_checkpointing: {type(model).__name__} does not support it",
                "a transformers model",
                "engine.activation_checkpointing=false",
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(model, "config") and hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # keys and values kept for generation would only cost memory
    if plan.compile:
        model.compile()


class _DDP(Engine):
    """One process, or torch's DistributedDataParallel: fp32 weights, bf16 by autocast."""

    def __init__(self, plan: Plan, device: Device, clip_norm: float) -> None:
        for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
            os.environ.pop(name, None)
        super().__init__(plan, _accelerator(device, cpu=device.kind == "cpu", mixed_precision="no"), clip_norm)

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.module = model.to(self.device)
        self.optimizer = make_optimizer(self.module)
        _compute_options(self.module, self.plan)
        self.model = self.module
        if self.world_size > 1:
            with warnings.catch_warnings():  # 2.13 renames broadcast_buffers; 2.10 has no other name
                warnings.simplefilter("ignore", FutureWarning)
                # Buffers are averaged when they matter (sync_buffers), on every engine alike.
                self.model = torch.nn.parallel.DistributedDataParallel(
                    self.module,
                    device_ids=[self.device.index] if self.device.type == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                    # A user's class may leave a parameter out of a step; looking for it costs ours nothing.
                    find_unused_parameters=not type(self.module).__module__.startswith(("transformers.", "bigtrain.")),
                )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16")

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
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False) and not self.optimizer.defaults.get("momentum")
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


class _DeepSpeed(Engine):
    """ZeRO 1, 2 and 3, with offload. DeepSpeed's own engine is called directly where Accelerate's wrapper would
    decide for itself when gradients meet and how a short group of micro-batches is scaled."""

    def __init__(self, plan: Plan, device: Device, ds_config: dict[str, Any], clip_norm: float) -> None:
        # Without this, and with cpu=True, Accelerate drops DeepSpeed silently and runs DDP.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        # What a launcher said is in the plan by now (dsconfig.py); said twice, Accelerate refuses it.
        said = [name for name in os.environ if name.startswith("ACCELERATE_DEEPSPEED_")]
        for name in (*said, "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
            os.environ.pop(name, None)
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_PORT", str(get_free_port()))
        from accelerate import DeepSpeedPlugin

        _quiet()
        self.ds_config = ds_config
        plugin = DeepSpeedPlugin(hf_ds_config=ds_config)
        precision = "bf16" if plan.precision == "bf16" else "no"
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it compiled, on every rank
            if device.kind == "cpu":
                _compile_deepspeeds_part()
            accelerator = _accelerator(device, deepspeed_plugin=plugin, mixed_precision=precision)
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
        _compute_options(model, self.plan)
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model))
        self.module = self.model.module
        _forget_in_transformers()
        found = (self.model.zero_optimization_stage(), self.model.gradient_accumulation_steps(), self.model.bfloat16_enabled())
        asked = (int(self.plan.kind[-1]), self.plan.accumulation, self.plan.precision == "bf16")
        if found != asked:
            raise TrainingFailed(f"DeepSpeed runs (stage, accumulation, bf16) = {found}", str(asked))
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
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.plan.kind == "zero3"):
                    copies[id(parameter)] = parameter.detach().cpu().clone() if self.main else torch.empty(0)
            weights[name] = copies[id(parameter)]
        weights |= {name: tensor.cpu() for name, tensor in self.module.state_dict().items() if name not in weights}
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
        flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
        for name, p in self._trained():
            if (part := p._hp_mapping) is not None:
                flat, offset = flats[part.param_group_index], part.hp_fragment_address.start
                master = flat.data[offset : offset + part.hp_fragment_address.numel]
                found.append(Fragment(name, part.lp_fragment_address.start, master, flat, offset))
        return found

    def weights_in_use(self) -> list[Sample]:
        if self.plan.kind != "zero3":
            return super().weights_in_use()
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        # A forward pass reads what is gathered as it stands, and gathers the rest first. To gather is
        # expensive: it is done for the smallest; of the others this rank's own part is looked at.
        sharded = []
        for name, parameter in self._trained():
            if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE:
                sharded.append((name, parameter))
        to_gather = sorted(sharded, key=_elements)[:1]
        own_parts = {part.name: part for part in self.fragments()}
        samples = []
        gathered = deepspeed.zero.GatheredParameters([p for _, p in to_gather], enabled=bool(to_gather))
        with gathered:
            for name, parameter in dict.fromkeys([*self._representatives(), *to_gather]):
                if parameter.ds_status is ZeroParamStatus.AVAILABLE:
                    samples += self._sample(name, parameter.detach().view(-1))
                    continue
                part = own_parts[name]
                size = min(part.master.numel(), _SAMPLE)
                samples.append(Sample(name, part.start, parameter.ds_tensor.detach()[:size].cpu()))
        return samples

    def _fragments_were_written(self) -> None:
        zero = self.model.optimizer
        if self.plan.kind != "zero3":
            zero.update_lp_params()
            return
        # As in DeepSpeed's own step: forward passes leave whole parameters behind (small ones are kept for ever), and
        # DeepSpeed gathers none of them again until they are given back.
        zero._partition_all_parameters()
        zero.invalidate_secondary_tensor()
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
        return bool(optimizer._loss_scale_update_and_overflow_cleanup() if update_scale else optimizer.overflow)

    optimizer._overflow_check_and_loss_scale_update = check
