"""What test_exact.py launches with torchrun: many training cases in one process group, results as JSON.

torchrun --nproc_per_node 2 tests/distributed_cases.py OUT.json CASES.json
"""

import contextlib
import gc
import importlib
import io
import json
import shutil
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.checkpoint.format import committed_checkpoints, verify_checkpoint
from bigtrain.checkpoint.reader import load_checkpoint
from bigtrain.checkpoint.state import TrainState
from bigtrain.checkpoint.writer import CheckpointWriter
from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import Example, PreparedData
from bigtrain.data.loader import train_batches
from bigtrain.data.order import samples_at
from bigtrain.engine.deepspeed_config import render_deepspeed_config
from bigtrain.engine.plan import make_plan
from bigtrain.engine.runtime import Device, world_from_environment
from bigtrain.engine.start import start_engine
from bigtrain.models.build import build_model
from bigtrain.runs.directory import RunDir
from bigtrain.tasks.registry import TASKS
from bigtrain.tracking.base import TrackerGroup
from bigtrain.training.context import TrainContext
from bigtrain.training.evaluation import evaluate
from bigtrain.training.loop import _step
from bigtrain.training.optimizers import make_optimizer

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


class Memory:
    """Examples made from a rule, of uneven lengths."""

    def __init__(self, model: str) -> None:
        self.image = model == "cnn"

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Example:
        draw = np.random.default_rng(index)
        if self.image:
            return {
                "image": torch.from_numpy(draw.normal(size=(1, 8, 8)).astype(np.float32)),
                "label": index % 10,
            }
        return {"tokens": draw.integers(2, VOCABULARY, size=5 + index % 23).astype(np.int64)}


def data_for(model: str) -> PreparedData:
    examples = Memory(model)
    if model == "cnn":
        seen = {"image_mean": [0.0], "image_std": [1.0]}
        return PreparedData(
            examples,
            examples,
            1,
            classes=[str(i) for i in range(10)],
            image=(1, 8, 8),
            preprocessing=seen,
        )
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return PreparedData(
        examples, examples, 16, tokenizer=tokenizer, vocab_size=VOCABULARY, eval_bytes=1000
    )


def recipe_for(case: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "exact",
            "task": "image_classification" if case["model"] == "cnn" else "causal_lm",
            "model": MODELS[case["model"]]
            | ({"dropout": case["dropout"]} if "dropout" in case else {}),
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
            },
            "train": {"steps": case.get("steps", 8)},
        }
    )


KEPT = ("step", "loss", "grad_norm", "applied", "weight", "lr", "samples_digest")


class Collect:
    """A tracker that keeps the training lines."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.events: list[str] = []

    def log(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            self.lines.append({key: record[key] for key in KEPT})
        elif record["kind"] == "event":
            self.events.append(record["event"])

    def close(self, summary: dict[str, Any]) -> None:
        pass


def build(case: dict[str, Any], folder: Path = Path("unused")) -> tuple[TrainContext, Collect]:
    """A run whose checkpoints go to `folder`, ready to step."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    recipe, prepared = recipe_for(case), data_for(case["model"])
    world = world_from_environment()[1]
    plan, _ = make_plan(
        recipe.engine, world_size=world, samples=SAMPLES, tokens_per_sample=16, bf16_is_fast=False
    )
    config = {} if plan.kind == "ddp" else render_deepspeed_config(plan, recipe.optim.clip_norm)
    ranks = start_engine(
        plan, Device(case.get("device", "cpu"), False), config, recipe.optim.clip_norm
    )
    ranks.prepare(
        build_model(recipe, prepared, ranks.shard),
        lambda module: make_optimizer(module, recipe.optim),
    )
    task, collect = TASKS[recipe.task](recipe.task, prepared), Collect()
    run, state = RunDir(folder), TrainState()
    return TrainContext(
        recipe,
        ranks,
        task,
        train_batches(prepared.train, task.collate, recipe, ranks.plan, ranks.rank, 0),
        TrackerGroup(collect),
        state,
        SimpleNamespace(received=None, grace=30.0, wanted=lambda: (False, False)),  # type: ignore[arg-type]
        CheckpointWriter(ranks, run, recipe, state),
        SimpleNamespace(at=lambda place: None, stepped=lambda *_: None, news=[]),  # type: ignore[arg-type]
    ), collect


def save(training: TrainContext) -> Path:
    """Commit a checkpoint now."""
    training.checkpoints.begin(training.state)
    (saved,) = training.checkpoints.finish()
    assert not saved.problem, saved
    return saved.path


def go_on(training: TrainContext, path: Path) -> str:
    """Load a checkpoint, and take the samples that come next."""
    training.state, moved = load_checkpoint(training.engine, path)
    ranks = training.engine
    task, first = training.task, training.state.samples
    training.batches = train_batches(
        task.data.train, task.collate, training.recipe, ranks.plan, ranks.rank, first
    )
    return moved


def run_exact(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train; losses and norms, and an evaluation where one is asked for."""
    training, collect = build(case)
    for _ in range(training.recipe.train.steps):
        _step(training)
    return {
        "lines": collect.lines,
        "eval": evaluate(training.engine, training.task) if case.get("evaluate") else None,
        "accumulation": training.engine.plan.accumulation,
        "peak_memory": training.engine.peak_memory(),
    }


def run_resume(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train 8 steps straight; again 4, save, build anew, load, 4 more. Final weights must be the same bits."""
    straight, lines = build(case)
    for _ in range(8):
        _step(straight)
    expected = straight.engine.whole_weights()
    half, _ = build(case, folder)
    for _ in range(4):
        _step(half)
    path = save(half)
    resumed, more = build(case)
    moved = go_on(resumed, path)
    for _ in range(4):
        _step(resumed)
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
        _step(training)
    save(training)
    return {}


def run_go_on(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load what `run_save` of another engine or world size left, and train 4 more steps."""
    training, collect = build(case)
    (path,) = committed_checkpoints(RunDir(Path(case["folder"])))
    moved = go_on(training, path)
    for _ in range(4):
        _step(training)
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
        _step(training)
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


def run_lazy(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seven steps, the second not finite, with a line of metrics every step and then every third: the same weights, and
    the host waits for the device in the steps that log alone. (On CUDA torch itself raises where anything else would wait.)
    """
    found, reads = [], []
    for every in (1, 3):
        training, collect = build(case)
        settings = training.recipe.train.model_copy(update={"log_every": every})
        training.recipe = training.recipe.model_copy(update={"train": settings})
        poison(training)
        for step in range(1, 8):
            quiet = step % every != 0 and step < 7
            if training.engine.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error" if quiet else "default")
            with HostReads() as counted:
                _step(training)
            reads += [counted.count] * quiet
        found.append((collect.lines, training.engine.whole_weights()))
    (lines, weights), (few, other_weights) = found
    return {
        "reads": reads,
        "lines": [line for line in lines if line["step"] in (3, 6, 7)] == few,
        "weights": all(torch.equal(weights[name], other_weights[name]) for name in weights),
        "applied": training.state.applied,
        "said": collect.events,
    }


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
        _step(training)
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
    training.stop = SimpleNamespace(wanted=lambda: (mine, False))  # type: ignore[assignment]
    return {"none": training.engine.gather(evaluate(training.engine, training.task, training))}


def run_weights(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The starting weights, by a checksum per tensor."""
    training, _ = build(case)
    return {
        name: float(tensor.double().abs().sum())
        for name, tensor in training.engine.whole_weights().items()
    }


RUN = {
    "exact": run_exact,
    "save": run_save,
    "go_on": run_go_on,
    "resume": run_resume,
    "skip": run_skip,
    "lazy": run_lazy,
    "spike": run_spike,
    "stop_evaluation": run_stop_evaluation,
    "weights": run_weights,
}


def main() -> None:
    """Run every case; a line of JSON, [name, result], is written when one has ended."""
    importlib.import_module("deepspeed")
    importlib.import_module("bigtrain.models.hf")
    # DeepSpeed collects garbage at every start of ZeRO-3, which takes a second with all these.
    gc.freeze()
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    rank = world_from_environment()[0]
    for name, case in cases.items():
        folder = out.parent / name.replace("/", "-")
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                result = RUN[case["run"]](case, folder)
        except Exception:
            result = {"error": traceback.format_exc()}
        if rank == 0:
            with out.open("a") as file:
                file.write(json.dumps([name, result]) + "\n")


def sample_ids(step: int) -> list[int]:
    """The samples of a step, for the reference loop."""
    return samples_at(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH), SAMPLES, 0)


if __name__ == "__main__":
    main()
