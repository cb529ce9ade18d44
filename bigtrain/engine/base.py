"""The contract of an engine: a backward that takes a sum and a weight, a step that says whether it was applied."""

import contextlib
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bigtrain.engine.plan import Plan

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


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
        self._host: dict[
            str, Tensor
        ] = {}  # the last snapshot's memory, used again: fresh pages cost six times more

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
                    found[f"{part.name}|{key}|{part.start}"] = value.view(-1)[
                        part.offset : part.offset + part.master.numel()
                    ]
                else:
                    found[f"{part.name}|{key}|scalar"] = torch.as_tensor(value)
        if self.main:
            found |= {
                f"{name}|buffer|scalar": buffer
                for name, buffer in self._persistent_buffers().items()
            }
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
        kind, precision, optimizer = (
            self.plan.kind,
            self.plan.precision,
            type(self._base()).__name__,
        )
        return {
            "engine": kind,
            "world_size": self.world_size,
            "precision": precision,
            "optimizer": optimizer,
        }

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
        found = torch.tensor(known, dtype=torch.float64, pin_memory=cuda).to(
            self.device, non_blocking=True
        )
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
            if getattr(
                module, "track_running_stats", False
            ):  # others are constants, which a mean could move by a bit
                for buffer in (b for b in module.buffers(recurse=False) if b.is_floating_point()):
                    torch.distributed.all_reduce(buffer)
                    buffer.div_(self.world_size)

    def peak_memory(self) -> int:
        """Bytes: the device's peak on CUDA, the process's peak resident set on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )

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
