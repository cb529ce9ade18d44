"""Device, process group, memory allocator and library settings of this process."""

import contextlib
import ctypes
import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigtrain.engine.plan import Plan
from bigtrain.engine.repeated_layers import checkpoint_layers, compile_layers
from bigtrain.errors import RequestError


@dataclass(frozen=True)
class Device:
    """What one rank computes on, known before any process group exists."""

    kind: str  # cpu | cuda
    bf16_is_fast: bool
    has_tf32: bool = False


def find_device(setting: str) -> Device:
    """The device for `auto`, `cpu` or `cuda`; RequestError when CUDA is asked for and absent."""
    cuda = torch.cuda.is_available()
    if setting == "cuda" and not cuda:
        built = torch.version.cuda or "without CUDA"
        raise RequestError(
            f"engine.device is cuda, but torch {torch.__version__} (built {built}) "
            "sees no CUDA device",
            "a visible GPU and a CUDA build of torch",
            "engine.device=cpu, or nvidia-smi to see what the machine has",
        )
    if cuda and setting != "cpu":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device("cuda", is_native, has_tf32=torch.cuda.get_device_capability() >= (8, 0))
    return Device("cpu", bf16_is_fast=_cpu_is_fast_in_bf16())


def _cpu_is_fast_in_bf16() -> bool:
    """Whether products in bf16 are faster than in fp32.

    Measured: 9 times with AMX; with AVX512_BF16 alone 1.5 times on AMD's processors, but 0.5 times
    on Intel's (virtual machines may hide their AMX). Without either they are far slower.
    """
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if flags.get("amx_bf16"):
        return True
    processor = Path("/proc/cpuinfo")
    is_amd = processor.exists() and "AuthenticAMD" in processor.read_text()
    return bool(flags.get("avx512_bf16")) and is_amd


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as torchrun, accelerate and our Slurm scripts set them; else (0, 1)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def cores_per_rank() -> int:
    """Processor cores that this process may use, shared with the launcher's others if any."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    # torchrun's ranks share them; srun gives each rank its own, and sets no such number.
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def silence_libraries() -> None:
    """Silence what means nothing to a user; warnings about the user's own code still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in (
        "accelerate",
        "DeepSpeed",
        "torch.distributed",
        "torch._higher_order_ops",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("deepspeed", "accelerate", "torch", "transformers", "torchmetrics"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of giving it back to the system.

    Measured on the CPU: a fifth less time per step.
    """
    # From malloc.h.
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 256 << 20)


def grow_memory_in_place() -> None:
    """CUDA memory in segments that grow: less fragmentation, so fewer ends near the limit.

    As launch/env.sh has it, for a process that it has not started. torch takes this at any time
    before it asks for memory. A user's own settings may name another allocator, and stay alone.
    """
    # PYTORCH_ALLOC_CONF, and PYTORCH_CUDA_ALLOC_CONF as it was called.
    is_set = any(name.endswith("_ALLOC_CONF") for name in os.environ)
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if change is not None and not is_set:
        change("expandable_segments:True")


def set_arithmetic(device: Device, plan: Plan) -> None:
    """Let products of fp32 numbers be TF32's where the plan says so, and nowhere else.

    torch's defaults differ: convolutions and recurrent layers use TF32, matrix products do not.
    Raises RequestError for tf32 on a device without it.
    """
    is_tf32 = plan.precision == "tf32"
    if is_tf32 and not device.has_tf32:
        raise RequestError(
            "engine.precision is tf32, but this device has no TF32",
            "an NVIDIA GPU from the A100's generation on",
            "engine.precision=auto",
        )
    if device.kind == "cuda":
        # For `bigtrain prove`. What has no such algorithm keeps its own: the proof then says so.
        if os.environ.get("BIGTRAIN_DETERMINISTIC"):
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.allow_tf32 = is_tf32
        torch.set_float32_matmul_precision("high" if is_tf32 else "highest")


def make_accelerator(device: Device, **settings: Any) -> Any:
    """Accelerate's Accelerator; starts the process group if a launcher started this process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import InitProcessGroupKwargs

    # Accelerate keeps its choices for the process; a second training may want another engine.
    if PartialState._shared_state and world_from_environment()[1] > 1:
        raise RequestError(
            "a second training on several ranks in one process",
            "one training in each process that the launcher starts",
            "a script that trains one recipe, started once for each",
        )
    AcceleratorState._reset_state(reset_partial_state=True)
    if "WORLD_SIZE" not in os.environ:
        return Accelerator(**settings)
    # The backend is named because Accelerate's guess leaves each CPU rank alone (world size 1). The
    # time limit is above every one of the watchdog's, which says more before it ends a run.
    backend = "nccl" if device.kind == "cuda" else "gloo"
    group = InitProcessGroupKwargs(backend=backend, timeout=timedelta(hours=2))
    return Accelerator(kwargs_handlers=[group], **settings)


def explain_out_of_memory(
    problem: torch.OutOfMemoryError, plan: Plan, model: nn.Module
) -> tuple[str, str, str]:
    """What was asked for and what is free, in torch's words; what is needed; what to set."""
    asked_and_free = str(problem).split(" Including")[0].split(" Of the allocated")[0]
    remedies = []
    if plan.micro_batch > 1:
        remedies.append(f"engine.micro_batch={plan.micro_batch // 2}")
    has_layers = any(isinstance(part, nn.ModuleList | nn.Sequential) for part in model.modules())
    if has_layers and plan.activation_checkpointing == "none":
        remedies.append("engine.activation_checkpointing=selective")
    if has_layers and plan.activation_checkpointing != "full":
        remedies.append("engine.activation_checkpointing=full")
    if plan.kind != "zero3":
        remedies.append("engine.kind=zero3")
    remedies.append("a smaller model, or more ranks")
    return asked_and_free, "what fits the device's memory", ", or ".join(remedies)


def prefer_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Whether images should come with their channels last, as tensor cores want them.

    On CPUs too: measured, a tenth of a CNN's step in fp32. For several convolutions, in models of
    ours or of transformers: a user's own may `view` what only NCHW allows. Weights stay as they
    are, so checkpoints do; kernels take the layout of the images. On CUDA, also lets cuDNN try its
    algorithms for each shape.
    """
    is_known = type(model).__module__.startswith(("transformers.", "bigtrain."))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    if not is_known or convolutions < 2:
        return False
    if device.type == "cuda":
        # Choices by the clock differ from run to run.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    return True


def apply_compute_options(model: Any, plan: Plan) -> None:
    """Activation checkpointing and compilation, as the plan has them.

    Raises RequestError for activation checkpointing of a model without repeated layers.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            # Keys and values kept for generation would only cost memory, and a layer that is
            # computed again would add its own a second time.
            config.use_cache = False
    if plan.activation_checkpointing != "none":
        checkpoint_layers(model, plan.activation_checkpointing)
    if plan.compile:
        compile_layers(model)
