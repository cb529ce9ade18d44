"""Forward passes of models on a CUDA device that does not exist: fake tensors have only shapes.

python tests/cuda_forward.py GUARD.so RECIPE ...

Parameters and buffers are where ZeRO-3 leaves them. Operations on tensors of several devices are
refused, as on a real device. A process of its own: without a real device torch may abort.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bigtrain.config.loader import load_recipe
from bigtrain.data.datasets import prepare
from bigtrain.engine.deepspeed import DeepSpeedEngine
from bigtrain.engine.plan import Plan
from bigtrain.models.build import build_model
from bigtrain.tasks.registry import TASKS


def sharding_engine(device: str) -> Any:
    """ZeRO-3 without DeepSpeed: what is prepared stays as it is."""
    engine: Any = object.__new__(DeepSpeedEngine)
    engine.plan = Plan("zero3", "none", "fp32", 1, 4, 4, "none", False)
    engine.device = torch.device(device)
    engine._refuse_another_plan = lambda: None

    def prepare(model: nn.Module, optimizer: Any) -> Any:
        return SimpleNamespace(module=model, optimizer=SimpleNamespace()), optimizer

    engine.accelerator = SimpleNamespace(prepare=prepare)
    return engine


def place_as_sharded(model: nn.Module, device: torch.device) -> None:
    """Parameters on the device and buffers on the CPU, as after `Engine.shard`."""
    moved: dict[int, nn.Parameter] = {}  # by the old one: tied ones stay one
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = nn.Parameter(torch.empty_like(old, device=device))
                module._parameters[name] = moved.setdefault(id(old), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


TEXT = ["data.train=python-stdlib", "data.tokenizer=bytes", "data.seq_len=32"]
OVERRIDES = {
    "stdlib-classifier": ["data.tokenizer=bytes", "data.seq_len=32"],
    "gpt2-124m": [*TEXT, "data.eval_fraction=0.1"],
    "llama-1b": [*TEXT, "data.eval_fraction=0.1"],
}


def device_of_loss(ref: str) -> str:
    recipe = load_recipe(ref, OVERRIDES.get(ref, [])).recipe
    prepared = prepare(recipe)
    task = TASKS[recipe.task](recipe.task, prepared)
    real_batch = task.collate([prepared.train[0], prepared.train[1]])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        with torch.device("meta"):
            model = build_model(recipe, prepared)
        engine = sharding_engine("cuda")
        place_as_sharded(model, engine.device)
        engine.prepare(model, lambda _model: None)
        batch = {}
        for name, tensor in real_batch.items():
            batch[name] = mode.from_tensor(tensor).to("cuda")
        return task.loss_sum(engine.model.module, batch).device.type


def main(guard: str, *refs: str) -> None:
    torch.ops.load_library(guard)
    for ref in refs:
        try:
            print(ref, device_of_loss(ref), flush=True)
        except Exception as problem:
            print(ref, f"{type(problem).__name__}: {problem}".splitlines()[0], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
