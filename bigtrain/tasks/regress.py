"""Regression: one number per row, squared error."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.regression import R2Score

from bigtrain.tasks.base import Batch, Evaluator, Task


class RegressionEvaluator(Evaluator):
    """loss = mse, and R²: the share of the held-out targets' variance that is explained."""

    def __init__(self, task: Task, device: torch.device) -> None:
        super().__init__(task, device)
        self.r2 = R2Score().set_dtype(torch.float64).to(device)

    def add(self, logits: Tensor, labels: Tensor, batch: Batch) -> None:
        self.r2.update(logits.flatten().double(), labels.double())

    def metrics(self, loss: float) -> dict[str, float]:
        # one row has no variance to explain
        return {
            "mse": loss,
            "r2": float(self.r2.compute()) if self.count.compute() > 1 else math.nan,
        }


class Regression(Task):
    """Loss is the mean squared error, in the target's own units."""

    shape, evaluation = "[batch] or [batch, 1]", RegressionEvaluator

    def output_shape(self, found: Tensor, labels: Tensor) -> tuple[int, ...]:
        return (len(labels), 1)[: max(1, found.ndim)]

    def loss_from_logits(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        return F.mse_loss(logits.flatten(), labels, reduction="sum")
