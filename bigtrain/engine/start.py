"""From a plan to a running engine."""

import os
from typing import Any

from bigtrain.data.token_cache import cache_root
from bigtrain.engine.base import Engine
from bigtrain.engine.ddp import DDPEngine
from bigtrain.engine.deepspeed import DeepSpeedEngine
from bigtrain.engine.plan import Plan
from bigtrain.engine.runtime import (
    Device,
    grow_memory_in_place,
    keep_freed_memory,
    set_arithmetic,
    silence_libraries,
)
from bigtrain.errors import TrainingFailed


def start_engine(plan: Plan, device: Device, ds_config: dict[str, Any], clip_norm: float) -> Engine:
    """Join the other ranks and return the plan's engine.

    Raises TrainingFailed if what started is not what the plan says, and RequestError for a
    precision that the device does not have.
    """
    silence_libraries()
    set_arithmetic(device, plan)
    if plan.compile:
        # torch's own place is in /tmp, which a restart on another machine does not find.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "compiled"))
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    if device.kind == "cpu":
        keep_freed_memory()
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Beside a GPU, DeepSpeed with any back-end would be given the GPU.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    else:
        grow_memory_in_place()
    engine: Engine
    if plan.kind == "ddp":
        engine = DDPEngine(plan, device, clip_norm)
    else:
        engine = DeepSpeedEngine(plan, device, ds_config, clip_norm)
    if engine.world_size != plan.world_size:
        raise TrainingFailed(
            f"the process group has {engine.world_size} ranks",
            f"{plan.world_size}, as the launcher said",
        )
    if engine.device.type != device.kind:
        raise TrainingFailed(f"Accelerate chose {engine.device.type}", device.kind)
    return engine
