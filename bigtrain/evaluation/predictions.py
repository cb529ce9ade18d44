"""What a model makes of each held-out example, from all ranks, in the order of the data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.examples import Batch
from bigtrain.engine.base import Engine
from bigtrain.models.output_loss import IGNORED
from bigtrain.tasks.base import Evaluator, Task
from bigtrain.tasks.language import TokenTask

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Predictions:
    """One value per held-out example [examples]; empty where the task has no such thing."""

    loss: NDArray[np.float64]
    """Cross entropy in nats, summed over its target tokens; or its squared error."""
    targets: NDArray[np.int64]
    """Target tokens; 1 for an image or a row."""
    exact: NDArray[np.bool_]
    """Whether each of its target tokens is the likeliest."""
    label: NDArray[Any]
    """Number of the true class, or the true value."""
    predicted: NDArray[Any]
    probability: NDArray[np.float64]
    """Of the predicted class."""
    score: NDArray[np.float64]
    """Of two classes, the probability of the second."""

    def __len__(self) -> int:
        return len(self.loss)


_EMPTY: dict[str, type[Any]] = {
    "loss": np.float64,
    "targets": np.int64,
    "exact": np.bool_,
    "label": np.float64,
    "predicted": np.float64,
    "probability": np.float64,
    "score": np.float64,
}


class _Part(NamedTuple):
    """Consecutive examples of one forward pass."""

    batch: Batch
    has_examples: bool


def predict_held_out(engine: Engine, task: Task, evaluator: Evaluator) -> Predictions:
    """Run the held-out set through the model once, over all ranks, and through `evaluator`.

    The forward passes are the same ones on any number of ranks, which take them in turn: so no
    result depends on the ranks, not even by rounding. A collective.
    """
    engine.model.eval()
    recorder = _Recorder(engine, task)
    with torch.no_grad():
        for part in _parts(engine, task):
            batch = engine.to_device(part.batch)
            with engine.autocast():
                if part.has_examples:
                    recorder.update(evaluator, batch)
                else:
                    task.loss_sum(engine.model, batch)
                evaluator.write(engine.module, batch, part.has_examples, ranks_together=False)
    return _in_order(engine.gather(recorder.parts))


def _parts(engine: Engine, task: Task) -> Iterator[_Part]:
    """This rank's parts of the held-out set: the same number on each rank."""
    examples, size = task.data.eval, engine.plan.micro_batch
    starts = range(0, len(examples), size)
    ranks = engine.data_parallel_size
    rounds = -(-len(starts) // ranks)
    for number in range(engine.data_rank, rounds * ranks, ranks):
        is_there = number < len(starts)
        first = starts[number] if is_there else 0
        numbers = range(first, min(first + size, len(examples)))
        # A rank without a part left runs one example that does not count.
        if not is_there:
            numbers = range(1)
        yield _Part(task.collate([examples[index] for index in numbers]), is_there)


def _in_order(parts_of_ranks: list[list[Columns]]) -> Predictions:
    """The ranks' parts, taken in turn, as one column for each field."""
    num_parts = sum(len(parts) for parts in parts_of_ranks)
    ranks = len(parts_of_ranks)
    parts = [parts_of_ranks[number % ranks][number // ranks] for number in range(num_parts)]
    columns = {}
    for name, kind in _EMPTY.items():
        if parts and name in parts[0]:
            columns[name] = np.concatenate([part[name] for part in parts])
        else:
            columns[name] = np.empty(0, kind)
    return Predictions(**columns)


class _Recorder:
    """Looks at what the model returned while an evaluator used it."""

    def __init__(self, engine: Engine, task: Task) -> None:
        self.engine = engine
        self.task = task
        self.parts: list[Columns] = []
        self._output: Tensor | None = None
        engine.module.register_forward_hook(self._keep_output)

    def _keep_output(self, module: Any, inputs: Any, output: Any) -> None:
        if self._output is None:  # an evaluator may let the model write afterwards
            self._output = getattr(output, "logits", output)

    def update(self, evaluator: Evaluator, batch: Batch) -> None:
        """Add a batch to the evaluator, and note what became of each of its examples."""
        self._output = None
        evaluator.update(self.engine.model, batch)
        assert self._output is not None, "an evaluator runs the model"
        labels = batch["labels"]
        if isinstance(self.task, TokenTask):
            found = _of_tokens(self.task, self._output, labels)
        elif self.task.spec.has_labels:
            found = _of_classes(self._output.float(), labels)
        else:
            found = _of_values(self._output.float(), labels)
        self.parts.append({name: column.cpu().numpy() for name, column in found.items()})


def _of_tokens(task: TokenTask, output: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`labels` [batch, length]; `output`: logits, unless the layer has computed the loss."""
    in_layer = task.output_loss
    if in_layer is not None and in_layer.likeliest is not None:
        losses, likeliest = in_layer.token_losses, in_layer.likeliest
        assert losses is not None, "they come together"
    else:
        logits = output.float()
        likeliest = logits.argmax(-1)
        flat = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        losses = flat.view(labels.shape)
    is_ignored = labels == IGNORED
    return {
        "loss": losses.double().sum(-1),
        "targets": (~is_ignored).sum(-1),
        "exact": ((likeliest == labels) | is_ignored).all(-1),
    }


def _of_classes(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`logits` [batch, classes], `labels` [batch]."""
    log_probs = logits.double().log_softmax(-1)
    probabilities = log_probs.exp()
    predicted = logits.argmax(-1)
    found = {
        "loss": -log_probs.gather(1, labels[:, None])[:, 0],
        "targets": torch.ones_like(labels),
        "label": labels,
        "predicted": predicted,
        "probability": probabilities.gather(1, predicted[:, None])[:, 0],
    }
    if logits.shape[1] == 2:
        found["score"] = probabilities[:, 1]
    return found


def _of_values(output: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`output` [batch] or [batch, 1], `labels` [batch]."""
    predicted = output.flatten().double()
    return {
        "loss": (predicted - labels.double()).square(),
        "targets": torch.ones_like(labels, dtype=torch.int64),
        "label": labels.double(),
        "predicted": predicted,
    }
