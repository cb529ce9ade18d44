"""Checks before anything is written.

What the recipe needs is installed, all ranks are alike, the model fits the data.
"""

import contextlib
import importlib.util
import socket
from collections import Counter

import numpy as np
import psutil
import torch
from torch import Tensor

from bigtrain.config.recipe import DistillConfig, OptimConfig, TrackConfig
from bigtrain.config.versions import installed_versions
from bigtrain.data.examples import Examples
from bigtrain.engine.base import Engine
from bigtrain.engine.runtime import explain_out_of_memory
from bigtrain.errors import RequestError
from bigtrain.models.build import output_layer
from bigtrain.models.flops import flop_counter
from bigtrain.models.teacher import load_teacher
from bigtrain.tasks.base import Task, outputs
from bigtrain.tasks.language import TokenTask
from bigtrain.tracking.wandb_sync import logged_in
from bigtrain.training.optimizers import states_per_parameter

_LONGEST_OF = 512  # examples that the longest text is looked for in


def refuse_unusable_trackers(track: TrackConfig) -> None:
    """Raises RequestError for a tracker that is not installed, or has no key."""
    if track.wandb == "online" and not logged_in():
        raise RequestError(
            "track.wandb is online, but W&B has no key",
            "a login",
            "wandb login, or track.wandb=offline",
        )
    for name in track.extra:
        if importlib.util.find_spec(name) is None:
            raise RequestError(
                f"track.extra has {name}, which is not installed",
                "its extra",
                f"pip install 'bigtrain[{name}]'",
            )


def refuse_different_ranks(engine: Engine, task: Task) -> None:
    """Raises RequestError unless all ranks have the same packages and read the same data.

    Every rank has its own installation and reads the data for itself. A collective.
    """
    packages = [f"{package} {version}" for package, version in installed_versions().items()]
    installed = engine.gather(packages)
    expected = installed[0]
    for rank, versions in enumerate(installed):
        if versions != expected:
            pairs = zip(versions, expected, strict=True)
            problems = [
                f"rank {rank} has {other}, rank 0 {own}" for other, own in pairs if other != own
            ]
            raise RequestError(
                "; ".join(problems),
                "the same versions on every rank",
                "bigtrain doctor on every rank shows them all",
            )
    data = engine.gather([len(task.data.train), len(task.data.eval), task.data.unreadable])
    for rank, seen in enumerate(data):
        if seen != data[0]:
            raise RequestError(
                f"rank {rank} sees other data than rank 0: (training, held out, unreadable) {seen},"
                f" not {data[0]}",
                "the same files on every node",
            )


def check_host_memory(engine: Engine, optim: OptimConfig) -> list[str]:
    """A note for each machine that may not have room for checkpoints. A collective.

    All ranks of a machine copy their parts to its memory before they are written. Raises
    RequestError, on all ranks, where the copies are larger than all of it.
    """
    copy = engine.snapshot_bytes(states_per_parameter(optim))
    memory = psutil.virtual_memory()
    report = (socket.gethostname(), copy, memory.total, memory.available)
    needed: Counter[str] = Counter()
    machines: dict[str, tuple[int, int]] = {}
    for host, size, total, available in engine.gather(report):
        needed[host] += size
        machines[host] = (total, available)
    notes = []
    for host, (total, available) in machines.items():
        text = (
            f"checkpoints are copied to memory first: that takes {needed[host] / 2**30:.1f} GiB"
            f" on {host}, which has {total / 2**30:.1f} GiB ({available / 2**30:.1f} GiB free)"
        )
        if needed[host] > total:
            raise RequestError(
                text,
                "room for the copies of all ranks of a machine",
                "more machines, which share the copies; or a smaller model",
            )
        if needed[host] > available:
            notes.append(text)
    return notes


def try_forward(engine: Engine, task: Task) -> float:
    """Run two examples through the model: it must fit the data and the task. A collective.

    Returns the floating-point operations of a forward pass per target (token, image, row).
    Raises RequestError if the model does not fit.
    """
    batch = _probe_batch(engine, task)
    model_name = type(engine.module).__name__
    engine.model.eval()
    try:
        with torch.no_grad(), engine.autocast(), without_compiling(engine):
            with flop_counter() as counted:
                task.loss_sum(engine.model, batch)
            looks_ahead = task.spec.is_packed and _looks_ahead(engine, task, batch)
    except RequestError:
        raise
    except torch.OutOfMemoryError as problem:
        raise RequestError(*explain_out_of_memory(problem, engine.plan, engine.module)) from None
    except Exception as problem:  # whatever a model says of an input that does not fit it
        inputs = [f"{key} {list(x.shape)}" for key, x in batch.items() if key != "labels"]
        raise RequestError(
            f"{model_name}.forward does not fit task {task.name}:"
            f" {type(problem).__name__}: {problem}",
            f"forward({', '.join(inputs)}) → logits",
            "other model.args, or another model, for this data",
        ) from None
    if looks_ahead:
        raise RequestError(
            f"{model_name} sees the tokens it is to predict",
            "a causal language model (gpt2, llama, rnn …)",
        )
    return counted.get_total_flops() / task.num_targets(batch)


def use_output_loss(engine: Engine, task: Task) -> bool:
    """Compute the loss in the model's output layer, without logits, where that is the same loss.

    A collective. Returns whether it will be.
    """
    layer = output_layer(engine.module)
    if layer is None or not isinstance(task, TokenTask):
        return False
    batch = _probe_batch(engine, task)
    engine.model.eval()
    with torch.no_grad(), engine.autocast(), without_compiling(engine):
        return task.use_output_layer(layer, engine.model, batch)


def take_teacher(engine: Engine, task: Task, distill: DistillConfig) -> None:
    """Let the task's loss imitate a teacher from now on. The loss then needs logits.

    Raises RequestError for a teacher that does not fit. A collective.
    """
    teacher = load_teacher(distill, task.name, task.data)
    teacher.move(engine.device, in_bf16=engine.plan.precision == "bf16")
    task.teacher = teacher
    try_forward(engine, task)


def _probe_batch(engine: Engine, task: Task) -> dict[str, Tensor]:
    """Two examples, the longest among them, on the device."""
    train = task.data.train
    return engine.to_device(task.collate([train[_longest(task, train)], train[0]]))


def without_compiling(engine: Engine) -> contextlib.AbstractContextManager[object]:
    """A context in which the model is not compiled.

    What is compiled cannot be counted; and it would be compiled for these shapes of batch first.
    """
    if engine.plan.compile:
        return torch.compiler.set_stance("force_eager")
    # set_stance imports torch._dynamo, which takes seconds.
    return contextlib.nullcontext()


def _longest(task: Task, examples: Examples) -> int:
    """The index of the longest text, for which positions may run out; of other data the last."""
    if task.data.tokenizer is None:
        return len(examples) - 1
    return max(range(min(_LONGEST_OF, len(examples))), key=lambda i: _length(examples, i))


def _length(examples: Examples, index: int) -> int:
    """The tokens in all fields of an example."""
    return sum(len(value) for value in examples[index].values() if isinstance(value, np.ndarray))


def _looks_ahead(engine: Engine, task: Task, batch: dict[str, Tensor]) -> bool:
    """Whether other tokens in the second half change the logits of the first."""
    tokens = batch["input_ids"][:1]
    half = tokens.shape[1] // 2
    other_half = (tokens[:, half:] + 1) % (task.data.vocab_size or 2)
    other_tokens = torch.cat([tokens[:, :half], other_half], dim=1)
    logits = outputs(engine.model, input_ids=tokens)[:, :half]
    other_logits = outputs(engine.model, input_ids=other_tokens)[:, :half]
    return half > 0 and bool((logits - other_logits).abs().max() > 1e-3 * logits.std())
