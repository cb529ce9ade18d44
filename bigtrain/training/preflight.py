"""Checks before anything is written: all ranks alike, and the model fits the data."""

import contextlib
from importlib.metadata import version

import numpy as np
import torch

from bigtrain.engine.base import Engine
from bigtrain.engine.flops import flop_counter
from bigtrain.errors import RequestError
from bigtrain.tasks.base import Task, outputs
from bigtrain.training.settings import PACKAGES


def refuse_other_ranks(ranks: Engine, task: Task) -> None:
    """Every rank has its own installation and reads the data for itself: all must have the same."""
    versions = ranks.gather([f"{package} {version(package)}" for package in PACKAGES])
    for rank, seen in enumerate(versions):
        if pairs := [
            (theirs, ours) for theirs, ours in zip(seen, versions[0], strict=True) if theirs != ours
        ]:
            raise RequestError(
                "; ".join(f"rank {rank} has {theirs}, rank 0 {ours}" for theirs, ours in pairs),
                "the same versions on every rank",
                "bigtrain doctor on every rank shows them all",
            )
    found = ranks.gather([len(task.data.train), len(task.data.eval), task.data.unreadable])
    if different := [rank for rank, seen in enumerate(found) if seen != found[0]]:
        raise RequestError(
            f"rank {different[0]} sees other data than rank 0: (training, held out, bad) {found[different[0]]}, not {found[0]}",
            "the same files on every node",
        )


def try_forward(ranks: Engine, task: Task) -> float:
    """Two examples through the model before anything is written: it must fit the data and the task. A collective.

    Returns the floating-point operations of a forward pass per unit of weight (token, image, row).
    """
    train = task.data.train
    if task.data.tokenizer is not None:  # the longest text: positions may run out
        size = lambda i: sum(
            len(value) for value in train[i].values() if isinstance(value, np.ndarray)
        )  # noqa: E731
        longest = max(range(min(512, len(train))), key=size)
    else:
        longest = len(train) - 1
    batch = ranks.to_device(task.collate([train[longest], train[0]]))
    name = type(ranks.module).__name__
    ranks.model.eval()
    try:
        with torch.no_grad(), ranks.autocast():
            # What is compiled cannot be counted; and to say so imports torch._dynamo, which takes seconds.
            eager = (
                torch.compiler.set_stance("force_eager")
                if ranks.plan.compile
                else contextlib.nullcontext()
            )
            with flop_counter() as counted, eager:
                task.loss_sum(ranks.model, batch)
            looks_ahead = task.spec.is_packed and _looks_ahead(ranks, task, batch)
    except RequestError:
        raise
    except Exception as problem:  # whatever a model says of an input that does not fit it
        given = ", ".join(
            f"{key} {list(tensor.shape)}" for key, tensor in batch.items() if key != "labels"
        )
        raise RequestError(
            f"{name}.forward does not fit task {task.name}: {type(problem).__name__}: {problem}",
            f"forward({given}) → logits",
            "other model.args, or another model, for this data",
        ) from None
    if looks_ahead:
        raise RequestError(
            f"{name} sees the tokens it is to predict",
            "a causal language model (gpt2, llama, rnn …)",
        )
    return counted.get_total_flops() / task.num_targets(batch)


def _looks_ahead(ranks: Engine, task: Task, batch: dict[str, torch.Tensor]) -> bool:
    """Whether another second half changes what is said of the first."""
    ids, half = batch["input_ids"][:1], batch["input_ids"].shape[1] // 2
    other = torch.cat([ids[:, :half], (ids[:, half:] + 1) % (task.data.vocab_size or 2)], dim=1)
    before, after = (outputs(ranks.model, input_ids=tokens)[:, :half] for tokens in (ids, other))
    return half > 0 and bool((before - after).abs().max() > 1e-3 * before.std())
