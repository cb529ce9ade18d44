"""What every task offers the loop, and the calls they share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torchmetrics.aggregation import SumMetric

from bigtrain.data.examples import Corpus, Example
from bigtrain.errors import RequestError

Batch = dict[str, Tensor]
IGNORED = -100  # the label of a position that does not count, as torch's cross_entropy has it


class Evaluator(Protocol):
    """Metrics over a whole evaluation set, on any number of ranks (torchmetrics adds up the ranks' states)."""

    def update(self, model: Callable[..., Any], batch: Batch) -> None: ...
    def compute(self) -> dict[str, float]: ...


class Task(ABC):
    """One way of judging a model; holds no state of the run."""

    unit = "samples"  # what metrics.jsonl counts the rate in

    def __init__(self, name: str, corpus: Corpus, label_smoothing: float = 0.0) -> None:
        self.name, self.corpus, self.label_smoothing = name, corpus, label_smoothing

    @abstractmethod
    def collate(self, examples: list[Example]) -> Batch:
        """Examples → tensors; keys that are the model's arguments, and `labels`."""

    @abstractmethod
    def weight(self, batch: Batch) -> int:
        """What the batch counts: target tokens, images or rows."""

    @abstractmethod
    def loss_sum(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The training loss summed (not averaged) over the batch: a scalar, fp32."""

    @abstractmethod
    def evaluator(self, device: torch.device) -> Evaluator:
        """A fresh evaluator whose states live on `device`."""


def outputs(model: Any, **inputs: Tensor) -> Tensor:
    """The model's logits (or predictions) in fp32; float inputs are cast to the dtype of its weights first,
    because an engine may hold these in bf16."""
    dtype = next(model.parameters()).dtype
    result = model(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()})
    result = getattr(result, "logits", result)
    if not isinstance(result, Tensor):
        raise RequestError(
            f"the model's forward returned {type(result).__name__}",
            "a tensor, or an object with .logits",
            "return the logits",
        )
    return result.float()


def expect_shape(found: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raises RequestError if the model's output does not have the shape its task needs."""
    if tuple(found.shape) != expected:
        raise RequestError(
            f"the model's output has shape {tuple(found.shape)}",
            f"{meaning} = {expected}",
            "check model.args and the task",
        )


def exact_sum(device: torch.device) -> SumMetric:
    """A sum over batches and ranks in float64: the order of ranks must not show."""
    metric = SumMetric(nan_strategy="disable").to(
        device
    )  # by default a NaN is left out, and all NaN is a perfect score
    metric.set_dtype(torch.float64)
    return metric
