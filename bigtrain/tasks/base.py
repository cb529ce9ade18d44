"""What every task offers the loop, and the calls they share."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.aggregation import SumMetric

from bigtrain.data.examples import Example, PreparedData
from bigtrain.errors import RequestError

Batch = dict[str, Tensor]
# A field of an example → the model's argument, where they are called differently.
_ARGUMENTS = {"image": "pixel_values", "label": "labels", "target": "labels"}
SAMPLES = 8  # rows of a table of examples
IGNORED = -100  # the label of a position that does not count, as torch's cross_entropy has it


class Task:
    """One way of judging a model; holds no state of the run."""

    unit = "samples"  # what metrics.jsonl counts the rate in
    shape = "[batch, classes]"  # of the model's output, in words
    evaluation: "type[Evaluator]"  # what judges the model on the held-out set

    def __init__(self, name: str, prepared: PreparedData, label_smoothing: float = 0.0) -> None:
        self.name, self.data, self.label_smoothing = name, prepared, label_smoothing

    def collate(self, examples: list[Example]) -> Batch:
        """Examples → tensors; keys that are the model's arguments, and `labels`."""
        columns = {
            _ARGUMENTS.get(name, name): [example[name] for example in examples]
            for name in examples[0]
        }
        stack = lambda rows: (
            torch.stack(rows) if isinstance(rows[0], Tensor) else torch.from_numpy(np.asarray(rows))
        )  # noqa: E731
        return {name: stack(rows) for name, rows in columns.items()}

    def padded(self, rows: Iterable[Any]) -> Batch:
        """Token ids of texts of any length: padded on the right, and where they are not padding."""
        texts = [torch.from_numpy(row) for row in rows]
        ids = pad_sequence(
            texts, batch_first=True, padding_value=self.data.tokenizer.pad_token_id or 0
        )
        return {
            "input_ids": ids,
            "attention_mask": pad_sequence([torch.ones_like(t) for t in texts], batch_first=True),
        }

    def num_targets(self, batch: Batch) -> int:
        """What the batch counts: target tokens, images or rows."""
        return len(batch["labels"])

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The model's output in fp32. Raises RequestError if it does not have the task's shape."""
        found = outputs(model, **{name: x for name, x in batch.items() if name != "labels"})
        if found.shape != (expected := self.output_shape(found, batch["labels"])):
            raise RequestError(
                f"the model's output has shape {tuple(found.shape)}",
                f"{self.shape} = {tuple(expected)}",
                "check model.args and the task",
            )
        return found

    def output_shape(self, found: Tensor, labels: Tensor) -> tuple[int, ...]:
        """The shape that `found` should have."""
        return (len(labels), len(self.data.classes))

    def loss_from_logits(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """The loss summed (not averaged) over the batch: a scalar, fp32."""
        flat = logits.flatten(0, -2), labels.flatten()
        return F.cross_entropy(
            *flat, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
        )

    def loss_sum(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """What training minimises, summed over the batch."""
        return self.loss_from_logits(
            self.logits(model, batch), batch["labels"], self.label_smoothing
        )

    def evaluator(self, device: torch.device) -> "Evaluator":
        """A fresh evaluator whose states live on `device`."""
        return self.evaluation(self, device)


class Evaluator:
    """Metrics over a whole evaluation set, on any number of ranks (torchmetrics adds up the ranks' states)."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.total, self.count = task, exact_sum(device), exact_sum(device)

    def update(self, model: Callable[..., Any], batch: Batch) -> None:
        """Add a batch of examples that nobody else adds."""
        logits, labels = self.task.logits(model, batch), batch["labels"]
        self.total.update(self.task.loss_from_logits(logits, labels))
        self.count.update(self.task.num_targets(batch))
        self.add(logits, labels, batch)

    def compute(self) -> dict[str, float]:
        """`loss`, per unit of weight, and the task's metrics by name. A collective."""
        loss = float(self.total.compute()) / float(self.count.compute())
        return {"loss": loss} | self.metrics(loss)

    def add(self, logits: Tensor, labels: Tensor, batch: Batch) -> None:
        """What the task's own metrics make of a batch."""

    def samples(self, model: Callable[..., Any], batch: Batch) -> list[dict[str, Any]]:
        """What the model makes of a few held-out examples, as rows for a table (arrays are images). A collective."""
        return []

    def metrics(self, loss: float) -> dict[str, float]:
        """The task's own metrics."""
        return {}


def outputs(model: Any, **inputs: Tensor) -> Tensor:
    """The model's logits (or predictions) in fp32; float inputs are cast to the dtype of its weights first,
    because an engine may hold these in bf16."""
    dtype = next(model.parameters()).dtype
    result = model(
        **{name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    )
    result = getattr(result, "logits", result)
    if not isinstance(result, Tensor):
        raise RequestError(
            f"the model's forward returned {type(result).__name__}",
            "a tensor, or an object with .logits",
            "return the logits",
        )
    return result.float()


def exact_sum(device: torch.device) -> SumMetric:
    """A sum over batches and ranks in float64: the order of ranks must not show."""
    # by default a NaN is left out, and all NaN is a perfect score
    metric = SumMetric(nan_strategy="disable").to(device)
    metric.set_dtype(torch.float64)
    return metric
