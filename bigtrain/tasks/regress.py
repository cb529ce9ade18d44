"""Regression: one number per row, squared error."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.data.examples import Batch
from bigtrain.tasks.base import Evaluator, Task


class RegressionEvaluator(Evaluator):
    """loss = mse, and R²: the share of the held-out targets' variance that is explained."""

    def __init__(self, task: Task, device: torch.device) -> None:
        from torchmetrics.regression import R2Score

        super().__init__(task, device)
        r2 = R2Score().set_dtype(torch.float64)
        self.r2 = r2.to(device)

    def add(self, logits: Tensor, labels: Tensor, batch: Batch) -> None:
        """`logits` [batch] or [batch, 1], `labels` [batch]."""
        predictions = logits.flatten()
        self.r2.update(predictions.double(), labels.double())

    def metrics(self, loss: float) -> dict[str, float]:
        metrics = {"mse": loss, "r2": math.nan}
        if self.count.compute() > 1:  # one row has no variance to explain
            metrics["r2"] = float(self.r2.compute())
        return metrics


class Regression(Task):
    """Loss is the mean squared error, in the target's own units."""

    logits_shape = "[batch] or [batch, 1]"
    evaluator_class = RegressionEvaluator

    def expected_shape(self, logits: Tensor, labels: Tensor) -> tuple[int, ...]:
        if logits.ndim <= 1:
            return (len(labels),)
        return (len(labels), 1)

    def loss_from_logits(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """The squared errors, summed over the batch: a scalar, fp32."""
        predictions = logits.flatten()
        return F.mse_loss(predictions, labels, reduction="sum")
