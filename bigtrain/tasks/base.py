"""What every task offers the loop, and the calls they share."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bigtrain.config.task_specs import TASK_SPECS, TaskName
from bigtrain.data.examples import Batch, Example, PreparedData
from bigtrain.errors import RequestError
from bigtrain.models.output_loss import IGNORED
from bigtrain.models.teacher import Teacher

if TYPE_CHECKING:
    from torchmetrics.aggregation import SumMetric

Rows = list[dict[str, Any]]  # of a table
# A field of an example → the model's argument, where they are called differently.
_ARGUMENTS = {"image": "pixel_values", "label": "labels", "target": "labels"}
SAMPLES = 8  # rows of a table of examples


class Task:
    """One way of judging a model: how to collate examples, what they count, and the loss.

    It has no state of the run. A batch is a dictionary of tensors by the model's argument names,
    [batch, …] each, and `labels`.
    """

    logits_shape = "[batch, classes]"  # of the model's output, in words
    evaluator_class: "type[Evaluator]"
    teacher: Teacher | None = None  # a trained model that training imitates too

    def __init__(
        self, name: TaskName, prepared: PreparedData, label_smoothing: float = 0.0
    ) -> None:
        self.name = name
        self.spec = TASK_SPECS[name]
        self.data = prepared
        self.label_smoothing = label_smoothing

    @property
    def unit(self) -> str:
        """What metrics.jsonl counts the rate in."""
        return self.spec.unit

    def collate(self, examples: list[Example]) -> Batch:
        """Fields of equal shape, stacked: [batch, …] each."""
        batch: Batch = {}
        for field in examples[0]:
            values = [example[field] for example in examples]
            name = _ARGUMENTS.get(field, field)
            if isinstance(values[0], Tensor):
                batch[name] = torch.stack(values)
            else:
                batch[name] = torch.from_numpy(np.asarray(values))
        return batch

    def pad(self, rows: Iterable[NDArray[np.int64]]) -> Batch:
        """Token ids of any length → `input_ids` and `attention_mask` [batch, length].

        Padded on the right.
        """
        texts = [torch.from_numpy(row) for row in rows]
        padding = self.data.tokenizer.pad_token_id or 0
        masks = [torch.ones_like(text) for text in texts]
        return {
            "input_ids": pad_sequence(texts, batch_first=True, padding_value=padding),
            "attention_mask": pad_sequence(masks, batch_first=True),
        }

    def num_targets(self, batch: Batch) -> int:
        """What the batch counts: target tokens, images or rows."""
        return len(batch["labels"])

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The model's output in fp32. Raises RequestError if it does not have the task's shape."""
        logits = outputs(model, **model_inputs(batch))
        expected = self.expected_shape(logits, batch["labels"])
        if logits.shape != expected:
            raise RequestError(
                f"the model's output has shape {tuple(logits.shape)}",
                f"{self.logits_shape} = {expected}",
                "check model.args and the task",
            )
        return logits

    def expected_shape(self, logits: Tensor, labels: Tensor) -> tuple[int, ...]:
        """The shape that `logits` should have."""
        return (len(labels), len(self.data.classes))

    def loss_from_logits(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """The loss summed (not averaged) over the batch: a scalar, fp32."""
        return F.cross_entropy(
            logits.flatten(0, -2),
            labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=smoothing,
        )

    def loss_sum(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """What training minimises, summed over the batch: a scalar, fp32."""
        logits = self.logits(model, batch)
        loss = self.loss_from_logits(logits, batch["labels"], self.label_smoothing)
        if self.teacher is None:
            return loss
        with self.teacher.autocast():
            taught = self.logits(self.teacher.model, batch)
        return self.teacher.blend(loss, logits, taught, batch["labels"])

    def evaluator(self, device: torch.device) -> "Evaluator":
        """A fresh evaluator with its states on `device`."""
        return self.evaluator_class(self, device)


class Evaluator:
    """Metrics over a whole evaluation set, on any number of ranks.

    torchmetrics adds up the ranks' states: `update` with each batch of this rank, then `compute` on
    all ranks. It takes longer to import than torch, so a start does without it.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.total = exact_sum(device)  # of the loss
        self.count = exact_sum(device)  # of target tokens, images or rows

    def update(self, model: Callable[..., Any], batch: Batch) -> None:
        """Add a batch of examples that no other rank adds."""
        labels = batch["labels"]
        logits = self.task.logits(model, batch)
        self.add_loss(self.task.loss_from_logits(logits, labels), batch)
        self.add(logits, labels, batch)

    def add_loss(self, loss_sum: Tensor, batch: Batch) -> None:
        """Add the summed loss of a batch, a scalar."""
        self.total.update(loss_sum)
        self.count.update(self.task.num_targets(batch))

    def compute(self) -> dict[str, float]:
        """`loss` per target token, image or row, and the task's metrics by name. A collective."""
        loss = float(self.total.compute()) / float(self.count.compute())
        return {"loss": loss} | self.metrics(loss)

    def add(self, logits: Tensor, labels: Tensor, batch: Batch) -> None:
        """Add a batch to the task's own metrics.

        `logits` have the shape of Task.expected_shape, `labels` [batch, …].
        """

    def write(self, model: Any, batch: Batch, has_samples: bool, ranks_together: bool) -> None:
        """Let the model write what a metric is computed from. A collective with `ranks_together`.

        `has_samples`: the batch counts.
        """

    def samples(self, model: Any, batch: Batch) -> Rows:
        """What the model makes of a few held-out examples: rows for a table (arrays are images).

        A collective.
        """
        return []

    def metrics(self, loss: float) -> dict[str, float]:
        """The task's own metrics by name, `loss` being known. A collective."""
        return {}


def model_inputs(batch: Batch) -> Batch:
    """The batch without its labels: the model's arguments."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def outputs(model: Any, **inputs: Tensor) -> Tensor:
    """The model's logits (or predictions) in fp32.

    Float inputs are cast to the dtype of the weights first, because an engine may keep these in
    bf16.
    """
    dtype = next(model.parameters()).dtype
    for name, tensor in inputs.items():
        if tensor.is_floating_point():
            inputs[name] = tensor.to(dtype)
    result = model(**inputs)
    logits = getattr(result, "logits", result)
    if not isinstance(logits, Tensor):
        raise RequestError(
            f"the model's forward returned {type(logits).__name__}",
            "a tensor, or an object with .logits",
            "return the logits",
        )
    return logits.float()


def exact_sum(device: torch.device) -> "SumMetric":
    """A sum over batches and ranks in float64, so that the order of ranks does not show."""
    from torchmetrics.aggregation import SumMetric

    # By default a NaN is left out, and all NaN is a perfect score.
    metric = SumMetric(nan_strategy="disable").to(device)
    metric.set_dtype(torch.float64)
    return metric
