"""What every engine offers the training loop.

Two calls carry the promise that the loss does not depend on the engine: a backward pass that takes
a sum and the number of targets to divide it by, and a step that says whether it was applied.
"""

import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from bigtrain.engine.fragments import BUFFER, WEIGHT, Fragment, Piece, name_of_piece
from bigtrain.engine.plan import Plan
from bigtrain.engine.weight_samples import WeightSample, representatives, sample_weights

Context = AbstractContextManager[Any]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
WholeShape = Callable[[nn.Parameter], tuple[int, ...]]


class StepResult(NamedTuple):
    """The outcome of an optimizer step: numbers, or tensors that the device may still compute."""

    applied: Tensor | bool
    grad_norm: Tensor | float  # before clipping; not finite when the step was skipped for it


class CheckpointSource(Protocol):
    """What `Engine.restore` reads from (checkpoint.shards.Shards)."""

    def keys(self, parameter: str) -> Iterable[str]:
        """`weight`, and the names of the optimizer's state for this parameter."""

    def scalar(self, parameter: str, key: str) -> Tensor | None:
        """What is kept whole; None for what is kept in pieces."""

    def read(self, parameter: str, key: str, piece: Piece, into: Tensor) -> None:
        """Fill `into`, of the piece's shape, with these elements of the parameter."""


class Engine(ABC):
    """One rank's part in a training run."""

    def __init__(self, plan: Plan, accelerator: Any, clip_norm: float) -> None:
        self.plan = plan
        self.accelerator = accelerator
        self.clip_norm = clip_norm
        # All processes count for collectives; for the data and the loss, the data-parallel ones.
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.data_rank = plan.data_rank(self.rank)
        self.data_parallel_size = plan.data_parallel_size
        self.main = self.rank == 0
        self.device: torch.device = accelerator.device
        self.model: Any = None  # what to call for a forward pass
        self.module: Any = None  # the user's module below it
        self.optimizer: Any = None
        self.channels_last = False  # how images are laid out
        # The last snapshot's memory, used again: new pages cost six times more.
        self._host: dict[str, Tensor] = {}

    def shard(self, parameters: list[nn.Parameter]) -> None:  # noqa: B027
        """Take over parameters that have just got their values; does nothing without sharding."""

    @abstractmethod
    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Place the model and its optimizer on the devices."""

    @abstractmethod
    def micro_batch(self, last: bool) -> Context:
        """Surrounds a micro-batch's forward and backward pass; ranks add gradients in the last."""

    @abstractmethod
    def backward(self, loss_sum: Tensor, num_targets: Tensor) -> None:
        """Gradients of `loss_sum` ÷ `num_targets`, summed over data-parallel ranks.

        Both are scalars: `loss_sum` of this micro-batch, `num_targets` of the whole global batch.
        """

    @abstractmethod
    def step(self, learning_rate: float) -> StepResult:
        """Clip and update; all ranks skip the step together when a gradient is not finite."""

    @abstractmethod
    def whole_weights(self) -> dict[str, Tensor]:
        """All parameters and buffers by name, on rank 0's CPU (elsewhere: empty). A collective."""

    @abstractmethod
    def fragments(self) -> list[Fragment]:
        """This rank's parts of the trained parameters, as views that can be read and written."""

    @abstractmethod
    def _fragments_were_written(self) -> None:
        """Carry new fp32 values over to the weights that forward passes use."""

    def whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape of the whole parameter, of which this rank may hold a part or nothing."""
        return tuple(parameter.shape)

    def num_elements(self, parameter: Tensor) -> int:
        """The number of elements of the whole parameter."""
        return parameter.numel()

    def snapshot(self) -> dict[str, Tensor]:
        """This rank's share of all that training changes, copied to the host, by checkpoint name.

        The names say nothing of engine, stage or rank, so any engine on any number of ranks can
        read them back. The next snapshot overwrites this one.
        """
        cuda = self.device.type == "cuda"
        pinned = self._snapshot_is_pinned()
        tensors = self._tensors_to_save()
        for name, tensor in tensors.items():
            host = self._host.get(name)
            if host is None or host.shape != tensor.shape:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
                self._host[name] = host
            host.copy_(tensor.detach(), non_blocking=True)
        if cuda:
            torch.cuda.synchronize()
        return {name: self._host[name] for name in tensors}

    def _snapshot_is_pinned(self) -> bool:
        """Only pinned memory takes copies from a GPU at full speed. Offloaded state is no copy."""
        return self.device.type == "cuda" and self.plan.offload == "none"

    def snapshot_bytes(self, states_per_parameter: int) -> int:
        """What `snapshot` will take of this rank's host memory, but for buffers, which are small.

        `states_per_parameter`: tensors of its size that the optimizer keeps, from its first step.
        """
        total = 0
        for part in self._fragments_to_save():
            size = part.master.nbytes
            if self._snapshot_is_pinned() and size:
                # torch rounds a pinned block up to a power of two (CachingHostAllocator.h).
                size = 1 << (size - 1).bit_length()
            total += size * (1 + states_per_parameter)
        return total

    def _tensors_to_save(self) -> dict[str, Tensor]:
        """This rank's share of weights, optimizer state and buffers, where they are, by name."""
        tensors: dict[str, Tensor] = {}
        for part in self._fragments_to_save():
            stored_name = name_of_piece(part.name, WEIGHT, part.piece)
            tensors[stored_name] = part.master
            for key, value in self._base().state[part.flat].items():
                if value.shape == part.flat.shape:
                    stored_name = name_of_piece(part.name, key, part.piece)
                    tensors[stored_name] = part.of_state(value)
                else:
                    stored_name = name_of_piece(part.name, key, None)
                    tensors[stored_name] = torch.as_tensor(value)
        if self.main:
            for name, buffer in self._persistent_buffers().items():
                stored_name = name_of_piece(name, BUFFER, None)
                tensors[stored_name] = buffer
        return tensors

    def facts(self) -> dict[str, Any]:
        """For a checkpoint's manifest: how it was written, which need not be how it is read."""
        return {
            "engine": self.plan.kind,
            "world_size": self.world_size,
            "precision": self.plan.precision,
            "optimizer": type(self._base()).__name__,
        }

    def shapes(self) -> dict[str, list[int]]:
        """What a checkpoint must hold: trained parameters and saved buffers, with whole shapes."""
        tensors: dict[str, Tensor] = dict(self._trained())
        tensors |= self._persistent_buffers()
        return {name: list(self.whole_shape(tensor)) for name, tensor in tensors.items()}

    def restore(self, source: CheckpointSource, with_optimizer: bool = True) -> None:
        """Take back what any engine's `snapshot` held."""
        for part in self.fragments():
            state = self._base().state[part.flat]
            for key in source.keys(part.name) if with_optimizer else [WEIGHT]:
                number = source.scalar(part.name, key)
                if number is not None:
                    # torch keeps a fused optimizer's step on the device, another's on the host.
                    fused = self._base().param_groups[0].get("fused")
                    state[key] = number.to(part.flat.device if fused else "cpu")
                    continue
                if key == WEIGHT:
                    values = part.master
                else:
                    if key not in state:
                        state[key] = torch.zeros_like(part.flat)
                    values = part.of_state(state[key])
                source.read(part.name, key, part.piece, into=values)
        for name, buffer in self._persistent_buffers().items():
            saved = source.scalar(name, BUFFER)
            assert saved is not None, f"{name} is in the manifest's shapes"
            buffer.copy_(saved)
        self._fragments_were_written()

    def weights_in_use(self) -> list[WeightSample]:
        """A few elements of a few parameters as the next forward pass reads them. A collective."""
        samples = []
        for name, parameter in self._representatives().items():
            samples += sample_weights(name, parameter, self.rank, self.world_size)
        return samples

    def _representatives(self) -> dict[str, nn.Parameter]:
        return representatives(self.module, self.num_elements, self.is_sharded)

    def is_sharded(self, parameter: nn.Parameter) -> bool:
        """Whether this rank holds only a part of `parameter` between forward passes."""
        return False

    def _fragments_to_save(self) -> list[Fragment]:
        """The fragments that this rank, and no other, writes to a checkpoint."""
        return self.fragments()

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters by name; the others stay as they were at the start, unsaved."""
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _base(self) -> torch.optim.Optimizer:
        """torch's own optimizer: Accelerate and DeepSpeed keep what they wrap as `.optimizer`."""
        optimizer = self.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return cast(torch.optim.Optimizer, optimizer)

    def _persistent_buffers(self) -> dict[str, Tensor]:
        saved_names = self.module.state_dict().keys()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in saved_names}

    def autocast(self) -> Context:
        """The precision of forward passes, in training and in evaluation."""
        return nullcontext()

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch on the device. CUDA copies without waiting only from pinned memory."""
        if self.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        images = moved.get("pixel_values")
        if images is not None and self.channels_last:
            moved["pixel_values"] = images.contiguous(memory_format=torch.channels_last)
        return moved

    def put(self, *values: Tensor | float) -> Tensor:
        """Numbers of host and device in one tensor: float64, on the device, without waiting."""
        cuda = self.device.type == "cuda"
        on_host = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
        host = torch.tensor(on_host, dtype=torch.float64, pin_memory=cuda)
        numbers = host.to(self.device, non_blocking=True)
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                numbers[index] = value
        return numbers

    def sum(self, *values: Tensor | float) -> Tensor:
        """Values added up over ranks; float64, on the device. A collective."""
        total = self.put(*values)
        if self.world_size > 1:
            torch.distributed.all_reduce(total)
        return total

    def read(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Send numbers to the host. The returned function waits until they have arrived.

        It does not wait for work that the device was given after them.
        """
        if self.device.type != "cuda":
            return numbers.tolist
        host = torch.empty_like(numbers, device="cpu", pin_memory=True)
        arrived = torch.cuda.Event()
        host.copy_(numbers, non_blocking=True)
        arrived.record()

        def wait() -> list[float]:
            arrived.synchronize()
            return host.tolist()

        return wait

    def gather(self, value: Any) -> list[Any]:
        """A small value of every rank, in order of rank, on every rank. A collective: all wait."""
        from accelerate.utils import gather_object

        return cast(list[Any], gather_object([value]))

    def sync_buffers(self) -> None:
        """Give every rank the mean of BatchNorm's running statistics, which differ by rank."""
        if self.world_size == 1:
            return
        for module in self.module.modules():
            # Other modules' buffers are constants, which a mean could change by a bit.
            if not getattr(module, "track_running_stats", False):
                continue
            for buffer in module.buffers(recurse=False):
                if buffer.is_floating_point():
                    torch.distributed.all_reduce(buffer)
                    buffer.div_(self.world_size)

    def peak_memory(self) -> int:
        """Bytes: torch's largest reserve on CUDA, the process's peak resident set on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def reset_peak_memory(self) -> None:
        """On CUDA, forget what was needed before training, by the trial forward pass above all."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_of_each_rank(self) -> list[float]:
        """This rank's peak in its own place and 0 in the others': a sum over ranks has them all."""
        peaks = [0.0] * self.world_size
        peaks[self.rank] = self.peak_memory()
        return peaks

    def close(self, all_ranks_end: bool = True) -> None:
        """Leave the process group; a rank that ends alone on CUDA only stops using it.

        NCCL's group waits for its kernels when it is destroyed, and so for peers that are still in
        a collective with this rank (torchtitan#1342).
        """
        if self.device.type == "cuda" and not all_ranks_end:
            return
        if self.world_size > 1 and torch.distributed.is_initialized():
            # A gloo thread gives up the last collective's tensors under the GIL, after the
            # collective is done. The group's destructor waits for that thread while it holds the
            # GIL itself: a deadlock, or an abort at exit. So let the thread have the GIL first
            # (pytorch#56297, #179291; seen in one of forty ends of a two-rank run).
            time.sleep(0.1)
            torch.distributed.destroy_process_group()

    def groups_by_flat(self) -> dict[int, dict[str, Any]]:
        """id() of a fragment's flat tensor → the optimizer's group that updates it."""
        groups: dict[int, dict[str, Any]] = {}
        for group in self._base().param_groups:
            groups |= {id(flat): group for flat in group["params"]}
        return groups

    def set_rate(self, rate: float) -> None:
        """Give each group of parameters the rate, times the group's own `lr_scale`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
