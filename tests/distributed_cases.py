"""What test_exact.py launches with torchrun: many training cases in one process group.

torchrun --nproc_per_node 2 tests/distributed_cases.py FOLDER CASES.json
"""

import contextlib
import gc
import importlib
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial, partialmethod
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bigtrain.checkpoint.format import committed_checkpoints, verify_checkpoint
from bigtrain.checkpoint.reader import load_checkpoint
from bigtrain.checkpoint.state import TrainState
from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import Example, PreparedData
from bigtrain.data.loader import MicroBatch, train_batches
from bigtrain.data.order import samples_at
from bigtrain.engine.deepspeed_config import render_deepspeed_config
from bigtrain.engine.plan import make_plan
from bigtrain.engine.runtime import Device, world_from_environment
from bigtrain.engine.start import start_engine
from bigtrain.errors import TrainingFailed
from bigtrain.models.build import build_model, output_layer
from bigtrain.models.export import export_model
from bigtrain.models.output_loss import OutputLoss
from bigtrain.runs.directory import RunDir
from bigtrain.supervision.endings import exit_code_of
from bigtrain.supervision.signals import StopFlag
from bigtrain.supervision.watchdog import Phase, Watchdog
from bigtrain.tasks.registry import TASKS
from bigtrain.tracking.base import TrackerGroup
from bigtrain.training.context import TrainContext
from bigtrain.training.evaluation import evaluate, evaluate_in_training
from bigtrain.training.loop import _finish_previous_step, train_step
from bigtrain.training.loss_spikes import handle_loss_spike
from bigtrain.training.optimizers import make_optimizer
from bigtrain.training.parameter_groups import groups_in_force
from bigtrain.training.preflight import take_teacher, try_forward
from bigtrain.training.run import _load_best, build_training

COMPILE = nn.Module.compile
SAMPLES, GLOBAL_BATCH, VOCABULARY = 40, 15, 61  # 15 does not divide by 2: shares of 8 and 7


class Twice(nn.Module):
    """Tied embeddings, and one block that is used twice in a forward pass (DeepSpeed#8224)."""

    def __init__(self, vocab_size: int, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.block = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, length] → logits [batch, length, vocabulary]."""
        x = self.embedding(input_ids)
        return self.head(self.block(self.block(x) + x))


class Mixed(nn.Module):
    """Every sort of parameter that ZeRO-3 treats in its own way.

    Frozen, of one element, of odd sizes, and one above the persistence threshold, which is not kept
    whole.
    """

    def __init__(self, vocab_size: int, width: int = 31, wide: int = 3301) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.embedding.weight.requires_grad = False
        self.scale = nn.PReLU()
        self.block = nn.Sequential(
            nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width, bias=False)
        )
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, length] → logits [batch, length, vocabulary]."""
        return self.head(self.block(self.scale(self.embedding(input_ids))))


class Block(nn.Module):
    """A layer with a parameter of its own, and an activation that overwrites its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.inner = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(inplace=True), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, features: Tensor) -> Tensor:
        """[…, width] → [… , width]."""
        return features + self.dropout(self.scale * self.inner(features))


class Stack(nn.Module):
    """A user's model with repeated layers."""

    def __init__(self, vocab_size: int, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, length] → logits [batch, length, vocabulary]."""
        return self.head(self.blocks(self.embedding(input_ids)))


MODELS: dict[str, dict[str, Any]] = {
    "transformer": {
        "name": "llama",
        "args": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
    },
    "rnn": {"name": "rnn", "args": {"cell": "gru", "embed": 24, "hidden": 32, "layers": 2}},
    "cnn": {"name": "cnn", "args": {"channels": [8, 16]}},
    "twice": {"name": "distributed_cases:Twice"},
}
# Models for a few cases, beside those that every engine is tested with.
OTHER_MODELS = {
    "mixed": {"name": "distributed_cases:Mixed"},
    "stack": {"name": "distributed_cases:Stack"},
}
# Beside those above in make gpu alone: both have buffers, and the second's BatchNorm sees the cut.
ON_GPUS: dict[str, dict[str, Any]] = {
    "bert": {
        "name": "bert",
        "args": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        "dropout": 0.0,
    },
    "resnet": {
        "name": "resnet",
        "args": {
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
        },
    },
}
TASK_OF = {
    "cnn": "image_classification",
    "resnet": "image_classification",
    "bert": "text_classification",
}


class Memory:
    """Examples made from a rule, of uneven lengths."""

    def __init__(self, model: str) -> None:
        self.task = TASK_OF.get(model, "causal_lm")

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Example:
        draw = np.random.default_rng(index)
        if self.task == "image_classification":
            return {
                "image": torch.from_numpy(draw.normal(size=(1, 8, 8)).astype(np.float32)),
                "label": index % 10,
            }
        tokens = draw.integers(2, VOCABULARY, size=5 + index % 23).astype(np.int64)
        if self.task == "text_classification":
            return {"text": tokens, "label": index % 10}
        return {"tokens": tokens}


def data_for(model: str) -> PreparedData:
    examples = Memory(model)
    classes = [str(i) for i in range(10)]
    if examples.task == "image_classification":
        seen = {"image_mean": [0.0], "image_std": [1.0]}
        return PreparedData(
            examples,
            examples,
            1,
            classes=classes,
            image=(1, 8, 8),
            preprocessing=seen,
        )
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return PreparedData(
        examples,
        examples,
        16,
        tokenizer=tokenizer,
        vocab_size=VOCABULARY,
        eval_bytes=1000,
        classes=classes,
    )


def recipe_for(case: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "exact",
            "task": TASK_OF.get(case["model"], "causal_lm"),
            "model": (MODELS | OTHER_MODELS | ON_GPUS)[case["model"]]
            | ({"dropout": case["dropout"]} if "dropout" in case else {})
            | case.get("start", {}),
            "data": {"train": "none", "seq_len": 32},
            "optim": {
                "name": "adamw",
                "lr": 5e-3,
                "weight_decay": 0.1,
                "clip_norm": 0.5,
                **case.get("optim", {}),
            },
            "engine": {
                "kind": case["kind"],
                "offload": case.get("offload", "none"),
                "precision": case["precision"],
                "global_batch": case.get("global_batch", GLOBAL_BATCH),
                "micro_batch": case["micro_batch"],
                "reduce_dtype": case.get("reduce_dtype", "fp32"),
                "compile": case.get("compile", "auto"),
                "activation_checkpointing": case.get("activation_checkpointing", "auto"),
            },
            "train": {"steps": case.get("steps", 8), "distill": case.get("distill")},
        }
    )


KEPT = ("step", "loss", "grad_norm", "applied", "weight", "lr", "samples_digest")


class Collect:
    """A tracker that keeps the training lines."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.seconds: list[dict[str, float]] = []  # of each line: where the time went
        self.events: list[str] = []

    def log(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            self.lines.append({key: record[key] for key in KEPT})
            self.seconds.append({key: record[key] for key in record if key.startswith("seconds")})
        elif record["kind"] == "event":
            self.events.append(record["event"])

    def close(self, summary: dict[str, Any]) -> None:
        pass


class FixedStop(StopFlag):
    """Asks for a stop, or never; listens to no signal."""

    def __init__(self, stop: bool = False) -> None:
        self.stop = stop
        self.received = None
        self.grace_seconds = 30.0

    def requested(self) -> bool:
        return self.stop

    def save_requested(self) -> bool:
        return False


class NoWatchdog(Watchdog):
    """Watches nothing: no thread, no store."""

    def __init__(self) -> None:
        self.pending_events = deque()

    def report_to(self, tracker: TrackerGroup, step: int, logs: Path) -> None:
        pass

    def enter(self, phase: Phase) -> None:
        pass

    def step_done(self, step: int, seconds: float) -> None:
        pass

    def was_busy(self, seconds: float) -> None:
        pass


def build(case: dict[str, Any], folder: Path = Path("unused")) -> tuple[TrainContext, Collect]:
    """A run whose checkpoints go to `folder`, ready to step."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    recipe, prepared = recipe_for(case), data_for(case["model"])
    plan, _ = make_plan(
        recipe.engine,
        world_size=world_from_environment()[1],
        samples=SAMPLES,
        tokens_per_sample=16,
        bf16_is_fast=False,
        train=recipe.train,
    )
    config = {} if plan.kind == "ddp" else render_deepspeed_config(plan, recipe.optim.clip_norm)
    if "kept_whole" in case:  # ZeRO-3 keeps parameters of up to so many elements whole
        config["zero_optimization"]["stage3_param_persistence_threshold"] = case["kept_whole"]
    device = Device(case.get("device", "cpu"), False)
    engine = start_engine(plan, device, config, recipe.optim.clip_norm)
    model = build_model(recipe, prepared, engine.shard)
    # This backend writes no code: the same graphs, without minutes of C++.
    backend = case.get("backend", "aot_eager")
    nn.Module.compile = partialmethod(COMPILE, backend=backend)
    engine.prepare(
        model, partial(make_optimizer, optim=recipe.optim, whole_shape=engine.whole_shape)
    )
    collect = Collect()
    training = build_training(
        recipe=recipe,
        engine=engine,
        task=TASKS[recipe.task](recipe.task, prepared),
        run=RunDir(folder),
        state=TrainState(),
        tracker=TrackerGroup(collect),
        stop=FixedStop(),
        watchdog=NoWatchdog(),
    )
    layer = output_layer(engine.module)
    if layer is not None and case["model"] != "cnn":
        # Without a trial: some cases are about what a first forward pass meets.
        training.task.output_loss = OutputLoss(layer)
    return training, collect


def save(training: TrainContext) -> Path:
    """Commit a checkpoint now."""
    _finish_previous_step(training)
    training.checkpoints.begin(training.state)
    (saved,) = training.checkpoints.finish()
    assert not saved.problem, saved
    return saved.path


def go_on(training: TrainContext, path: Path) -> str:
    """Load a checkpoint, and take the samples that come next."""
    restored = load_checkpoint(training.engine, path)
    training.state = restored.state
    engine = training.engine
    task, first = training.task, training.state.samples
    training.batches = train_batches(
        task.data.train, task.collate, training.recipe, engine.plan, engine.data_rank, first
    )
    return restored.moved


def compiled_graphs() -> int:
    """How many torch.compile has made in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else int(utils.counters["stats"]["unique_graphs"])


def run_exact(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train; losses and norms, and an evaluation where one is asked for."""
    training, collect = build(case)
    if training.engine.device.type == "cuda":
        gc.collect()  # what earlier cases have left
        torch.cuda.empty_cache()
        training.engine.reset_peak_memory()
    ends = []
    if case.get("compile"):
        torch._dynamo.reset()  # else what an earlier case has compiled would serve this one too
    graphs = compiled_graphs()
    for _ in range(training.recipe.train.steps):
        train_step(training)
        ends.append(time.perf_counter())
    return {
        "compiled_graphs": compiled_graphs() - graphs,
        "lines": collect.lines,
        "seconds": statistics.median(after - before for before, after in pairwise(ends)),
        "eval": evaluate(training.engine, training.task) if case.get("evaluate") else None,
        "accumulation": training.engine.plan.accumulation,
        "peak_memory": training.engine.peak_memory(),
    }


def run_resume(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train 8 steps straight; again 4, save, build anew, load, 4 more: the same final bits."""
    straight, lines = build(case)
    for _ in range(8):
        train_step(straight)
    expected = straight.engine.whole_weights()
    half, _ = build(case, folder)
    for _ in range(4):
        train_step(half)
    path = save(half)
    resumed, more = build(case)
    moved = go_on(resumed, path)
    for _ in range(4):
        train_step(resumed)
    found = resumed.engine.whole_weights()
    return {
        "problems": verify_checkpoint(path),
        "moved": moved,
        "same_losses": lines.lines[4:] == more.lines,
        "same_weights": all(torch.equal(expected[name], found[name]) for name in expected),
    }


def run_save(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train 4 steps and save where another world size finds it."""
    training, _ = build(case, Path(case["folder"]))
    for _ in range(4):
        train_step(training)
    save(training)
    return {}


def run_go_on(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load what `run_save` of another engine or world size left, and train 4 more steps."""
    training, collect = build(case)
    (path,) = committed_checkpoints(RunDir(Path(case["folder"])))
    moved = go_on(training, path)
    for _ in range(4):
        train_step(training)
    return {"lines": collect.lines, "moved": moved}


def poison(training: TrainContext) -> None:
    """Make the loss of rank 0 NaN in step 2."""
    inner = training.task.loss_sum

    def poisoned(model: Any, batch: dict[str, Tensor]) -> Tensor:
        loss = inner(model, batch)
        return (
            loss * float("nan") if training.state.step == 1 and training.engine.rank == 0 else loss
        )

    training.task.loss_sum = poisoned  # type: ignore[method-assign]


def run_skip(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A NaN on rank 0 in step 2: all ranks skip it together, and go on unharmed."""
    training, collect = build(case)
    poison(training)
    for _ in range(3):
        train_step(training)
    _finish_previous_step(training)
    weights = training.engine.whole_weights()
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    return {
        "applied": [line["applied"] for line in collect.lines],
        "finite": finite,
        "count": training.state.applied,
    }


class HostReads(TorchDispatchMode):
    """Counts how often the host waits for a number of the device's (item, float, bool)."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class HostCopies(TorchFunctionMode):
    """Counts tensors that are sent to the host and waited for."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.Tensor.cpu
        return func(*args, **(kwargs or {}))


class StandInStream:
    """Stands in for CUDA's streams and events; counts how often the host waits for one.

    (Never `query` without a result: the caller then waits.)
    """

    waits = 0

    def __call__(self, *_: Any, **__: Any) -> "StandInStream":
        return StandInStream()

    def synchronize(self, *_: Any) -> None:
        StandInStream.waits += 1

    def query(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name in ("wait_stream", "wait_event", "record", "record_event"):
            return lambda *_: None
        raise AttributeError(name)


@contextlib.contextmanager
def deepspeed_as_on_cuda() -> Iterator[None]:
    """Let DeepSpeed do as on a device that runs behind the host: streams, events and waits."""
    from deepspeed.accelerator import get_accelerator

    stand_in = StandInStream()
    with ExitStack() as patches:
        of_cpu = patch.multiple(
            type(get_accelerator()),
            is_synchronized_device=lambda _self: False,
            synchronize=lambda _self, *_: stand_in.synchronize(),
            current_stream=lambda _self, *_: stand_in,
            default_stream=lambda _self, *_: stand_in,
            Stream=stand_in,
            Event=stand_in,
        )
        patches.enter_context(of_cpu)
        patches.enter_context(patch.object(torch.Tensor, "record_stream", lambda *_: None))
        yield


def run_waits(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """How often the host waits for the device in a step that logs nothing.

    The numbers of the step before, which the loop takes from an event, are not among them.
    """
    if case.get("device") == "cuda":
        return run_waits_on_cuda(case)
    with deepspeed_as_on_cuda():
        training, _ = build(case)
        num_targets = training.task.num_targets

        def counted_on_the_host(batch: dict[str, Tensor]) -> int:
            with _disable_current_modes():
                return num_targets(batch)

        training.task.num_targets = counted_on_the_host  # type: ignore[method-assign]
        settings = training.recipe.train.model_copy(update={"log_every": 100})
        training.recipe = training.recipe.model_copy(update={"train": settings})
        train_step(training)  # the first one makes what the others use
        train_step(training)
        StandInStream.waits = 0
        with HostReads() as reads, HostCopies() as copies:
            train_step(training)
    return {"reads": reads.count + copies.count, "synchronisations": StandInStream.waits}


def run_waits_on_cuda(case: dict[str, Any]) -> dict[str, Any]:
    """The same as torch itself sees it: what it warns of, with the place of each."""
    training, _ = build(case)
    settings = training.recipe.train.model_copy(update={"log_every": 100})
    training.recipe = training.recipe.model_copy(update={"train": settings})
    for _ in range(3):
        train_step(training)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_step(training)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits)
    return {"places": dict(places)}


def run_lazy(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seven steps, the second not finite, with a line of metrics every step, then every third.

    The same weights and lines; and the host waits for the device in the last step alone. (On CUDA
    torch itself raises where anything else would wait.)
    """
    found, reads = [], []
    for every in (1, 3):
        training, collect = build(case)
        settings = training.recipe.train.model_copy(update={"log_every": every})
        training.recipe = training.recipe.model_copy(update={"train": settings})
        poison(training)
        written = []
        for step in range(1, 8):
            quiet = step < 7
            if training.engine.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error" if quiet else "default")
            with HostReads() as counted:
                train_step(training)
            reads += [counted.count] * quiet
            written.append(len(collect.lines))
        found.append((collect.lines, training.engine.whole_weights(), written))
    (lines, weights, each), (few, other_weights, _) = found
    return {
        "reads": reads,
        "written": each,
        "lines": [line for line in lines if line["step"] in (3, 6, 7)] == few,
        "weights": all(torch.equal(weights[name], other_weights[name]) for name in weights),
        "applied": training.state.applied,
        "said": collect.events,
    }


def run_parts(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Four steps, with data that takes 20 ms on rank 0 and 80 ms on rank 1."""
    training, collect = build(case)
    batches, rank = training.batches, training.engine.rank

    def slow() -> Iterator[list[MicroBatch]]:
        for micro_batches in batches:
            time.sleep(0.02 + 0.06 * rank)
            yield micro_batches

    training.batches = slow()
    for _ in range(4):
        train_step(training)
    _finish_previous_step(training)
    return {"seconds": collect.seconds}


def run_spike(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The second batch's loss is fifty times too high: left out, or gone back from and round."""
    training, collect = build(case, folder)
    inner, seen = training.task.loss_sum, []
    policy = {"train": training.recipe.train.model_copy(update={"on_spike": case["on_spike"]})}
    training.recipe = training.recipe.model_copy(update=policy)

    def scaled(model: Any, batch: dict[str, Tensor]) -> Tensor:
        return inner(model, batch) * (50 if training.state.samples == GLOBAL_BATCH else 1)

    training.task.loss_sum = scaled  # type: ignore[method-assign]
    training.state.recent = [4.0 + 0.01 * (i % 5) for i in range(32)]
    for number in range(3):
        train_step(training)
        seen.append((training.state.step, training.state.samples // GLOBAL_BATCH))
        if number == 0:
            save(training)
    applied = [line["applied"] for line in collect.lines]
    return {
        "applied": applied,
        "events": collect.events,
        "seen": seen,
        "count": training.state.applied,
    }


def run_stop_evaluation(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One rank is told to stop while all evaluate: all leave together."""
    training, _ = build(case)
    mine = training.engine.rank == training.engine.world_size - 1
    training.stop = FixedStop(mine)
    return {"none": training.engine.gather(evaluate_in_training(training))}


def run_rates(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Groups with rates of their own: half of the schedule's, and none at all."""
    training, collect = build(case)
    matrices, others = training.engine.optimizer.param_groups
    matrices["lr_scale"] = 0.5
    others["lr_scale"] = 0.0
    weights = training.engine.whole_weights()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    train_step(training)
    _finish_previous_step(training)
    after = training.engine.whole_weights()
    return {
        "schedule": collect.lines[0]["lr"],
        "rates": [group["lr"] for group in training.engine.optimizer.param_groups],
        "names": [matrices["names"], others["names"]],
        "moved": [name for name in before if not torch.equal(before[name], after[name])],
    }


def run_groups(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Groups as the recipe asks for them: as the engine has them, and what they do in three steps.

    Of each parameter's part on this rank: the rate and the decay of the group that updates it.
    """
    training, collect = build(case)
    engine = training.engine
    in_force = groups_in_force(engine, training.recipe.optim)
    before = {name: tensor.clone() for name, tensor in engine.whole_weights().items()}
    for _ in range(3):
        train_step(training)
    _finish_previous_step(training)
    after = engine.whole_weights()
    updated_by, groups = {}, engine.groups_by_flat()
    for fragment in engine.fragments():
        group = groups[id(fragment.flat)]
        updated_by[fragment.name] = [group["lr"], group["weight_decay"]]
    return {
        "lines": collect.lines,
        "in_force": in_force,
        "updated_by": engine.gather(updated_by),
        "moved": [name for name in before if not torch.equal(before[name], after[name])],
    }


def write_export(folder: Path, seed: int) -> Path:
    """The small CNN as a run would export it, with the weights of a seed."""
    case = {"model": "cnn", "kind": "ddp", "precision": "fp32", "micro_batch": 1}
    recipe, prepared = recipe_for(case).model_copy(update={"seed": seed}), data_for("cnn")
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(build_model(recipe, prepared).state_dict())
    export_model(weights, recipe, prepared, folder, {"step": 0, "samples": 0})
    return folder


def run_compress(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a pruned model with a teacher; stop after four of eight steps, and resume."""
    own = Path(tempfile.mkdtemp())  # not below `folder`, which rank 0 may still be clearing
    exports = [str(write_export(own / f"seed-{seed}", seed)) for seed in (0, 1)]
    case = case | {
        "start": {"pretrained": exports[0], "prune": {"amount": 0.5}},
        "distill": {"teacher": exports[1], "temperature": 3.0, "alpha": 0.7},
    }
    runs = []
    for checkpoints in (folder, Path("unused")):
        training, collect = build(case, checkpoints)
        take_teacher(training.engine, training.task, training.recipe.train.distill)
        runs.append((training, collect))
        if len(runs) == 1:
            for _ in range(4):
                train_step(training)
            save(training)
        else:
            go_on(training, committed_checkpoints(RunDir(folder))[0])
        for _ in range(4):
            train_step(training)
        weights = training.engine.whole_weights()
        runs[-1] = (weights, collect.lines)
    (straight, lines), (resumed, more) = runs
    return {
        "lines": lines,
        "zeros": {name: int((tensor == 0).sum()) for name, tensor in straight.items()},
        "same_losses": lines[4:] == more,
        "same_weights": all(torch.equal(straight[name], resumed[name]) for name in straight),
    }


def run_weights(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The starting weights, by a checksum per tensor."""
    training, _ = build(case)
    return {
        name: float(tensor.double().abs().sum())
        for name, tensor in training.engine.whole_weights().items()
    }


def saved_weights(path: Path) -> dict[str, Tensor]:
    """The trained parameters of a checkpoint, put together from all ranks' pieces."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for file in sorted(path.glob("rank-*.safetensors")):
        for key, tensor in load_file(file).items():
            name, kind, start = key.split("|")
            if kind == "weight":
                pieces.setdefault(name, []).append((int(start), tensor))
    shapes = json.loads((path / "manifest.json").read_text())["shapes"]
    whole = {}
    for name, parts in pieces.items():
        flat = torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])
        whole[name] = flat.view(shapes[name])
    return whole


def differences(
    training: TrainContext, expected: dict[str, Tensor], act: Callable[[], Any]
) -> list[str]:
    """Parameters that differ from `expected` in the first forward pass of `act`, on any rank."""
    module = training.engine.module
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    seen: dict[str, Tensor] = {}

    def look(submodule: nn.Module, *_: Any) -> None:
        for parameter in submodule.parameters(recurse=False):
            seen.setdefault(names[id(parameter)], parameter.detach().clone())

    hooks = [submodule.register_forward_pre_hook(look) for submodule in module.modules()]
    act()
    for hook in hooks:
        hook.remove()
    assert seen.keys() == expected.keys(), seen.keys() ^ expected.keys()
    wrong = []
    for name, used in seen.items():
        if not torch.equal(used.cpu(), expected[name].to(used.dtype)):
            wrong.append(name)
    return [name for of_rank in training.engine.gather(wrong) for name in of_rank]


def run_in_use(case: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    """Which weights forward passes use after a load that is not the first thing that happens.

    As a run does it: at the start, in an evaluation; after a step; after a rewind; and when the
    best checkpoint is exported. Returns those that are not the checkpoint's, by when.
    """
    first, _ = build(case, folder)
    frozen = {name for name, p in first.engine.module.named_parameters() if not p.requires_grad}
    kept = {name: x for name, x in first.engine.whole_weights().items() if name in frozen}
    kept = first.engine.gather(kept)[0]
    for _ in range(2):
        train_step(first)
    path = save(first)
    expected = saved_weights(path) | kept
    ctx, _ = build(case, folder)
    train_config = ctx.recipe.train.model_copy(update={"on_spike": "rewind"})
    ctx.recipe = ctx.recipe.model_copy(update={"train": train_config})
    step = partial(train_step, ctx)
    found = {}
    try_forward(ctx.engine, ctx.task)
    go_on(ctx, path)
    evaluation = partial(evaluate, ctx.engine, ctx.task)
    found["a start, in evaluation"] = differences(ctx, expected, evaluation)
    found["a start, in training"] = differences(ctx, expected, step)
    go_on(ctx, path)
    found["a step, in training"] = differences(ctx, expected, step)
    evaluate(ctx.engine, ctx.task)
    ctx.state.recent = [4.0 + 0.01 * (i % 5) for i in range(32)]
    handle_loss_spike(ctx, 1e9, False)
    found["a rewind, in training"] = differences(ctx, expected, step)
    train_step(ctx)
    ctx.state.best_step = 2
    best = partial(_load_best, ctx, ctx.checkpoints.run)
    found["the best, in evaluation"] = differences(ctx, expected, best)
    exported = ctx.engine.gather(ctx.engine.whole_weights())[0]
    found["the best, exported"] = []
    for name, tensor in expected.items():
        if not torch.equal(exported[name], tensor.to(exported[name].dtype)):
            found["the best, exported"].append(name)
    return found


def run_sabotage(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A load that leaves old weights with the forward passes: how it ends, on each rank."""
    first, _ = build(case, folder)
    train_step(first)
    path = save(first)
    second, _ = build(case)
    try_forward(second.engine, second.task)
    second.engine.model.optimizer._partition_all_parameters = lambda: None
    try:
        go_on(second, path)
    except TrainingFailed as problem:
        return {"ends": second.engine.gather((exit_code_of(problem), str(problem)))}
    return {"ends": []}


def run_last_rank_fails(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An error that no other rank can notice."""
    rank, world_size = world_from_environment()
    assert rank < world_size - 1, "the last rank fails"
    return {}


RUN = {
    "last_rank_fails": run_last_rank_fails,
    "in_use": run_in_use,
    "sabotage": run_sabotage,
    "exact": run_exact,
    "save": run_save,
    "go_on": run_go_on,
    "resume": run_resume,
    "skip": run_skip,
    "lazy": run_lazy,
    "parts": run_parts,
    "waits": run_waits,
    "spike": run_spike,
    "stop_evaluation": run_stop_evaluation,
    "rates": run_rates,
    "groups": run_groups,
    "compress": run_compress,
    "weights": run_weights,
}


def main() -> None:
    """Run every case; a line of JSON, [name, result], is written when one has ended.

    Each rank writes a file of its own: rank 0 every result, the others their errors.
    """
    importlib.import_module("deepspeed")
    importlib.import_module("bigtrain.models.hf")
    # DeepSpeed collects garbage at every start of ZeRO-3, which takes a second with all these.
    gc.freeze()
    results, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    rank = world_from_environment()[0]
    for name, case in cases.items():
        folder = results / name.replace("/", "-")
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                result = RUN[case["run"]](case, folder)
        except Exception:
            result = {"error": f"rank {rank}: {traceback.format_exc()}"}
        if rank == 0 or "error" in result:
            with (results / f"rank-{rank}.jsonl").open("a") as file:
                file.write(json.dumps([name, result]) + "\n")


def sample_ids(step: int) -> list[int]:
    """The samples of a step, for the reference loop."""
    return samples_at(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH), SAMPLES, 0)


if __name__ == "__main__":
    main()
