"""Regression: one number per row, squared error."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.regression import R2Score

from bigtrain.data.examples import Example
from bigtrain.tasks.base import Batch, Task, exact_sum, expect_shape, outputs


class Regression(Task):
    """Loss is the mean squared error, in the target's own units."""

    def collate(self, examples: list[Example]) -> Batch:
        features = torch.from_numpy(np.stack([example["features"] for example in examples]))
        return {"features": features, "labels": torch.tensor([example["target"] for example in examples])}

    def weight(self, batch: Batch) -> int:
        return len(batch["labels"])

    def predictions(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """[batch], fp32."""
        found = outputs(model, features=batch["features"])
        found = found.squeeze(-1) if found.ndim == 2 else found
        expect_shape(found, (len(batch["labels"]),), "[batch] or [batch, 1]")
        return found

    def loss_sum(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        return F.mse_loss(self.predictions(model, batch), batch["labels"], reduction="sum")

    def evaluator(self, device: torch.device) -> "RegressionEvaluator":
        return RegressionEvaluator(self, device)


class RegressionEvaluator:
    """loss = mse, and R²: the share of the held-out targets' variance that is explained."""

    def __init__(self, task: Regression, device: torch.device) -> None:
        self.task = task
        self.squares, self.count = exact_sum(device), exact_sum(device)
        self.r2 = R2Score().set_dtype(torch.float64).to(device)

    def update(self, model: Callable[..., Any], batch: Batch) -> None:
        predictions, labels = self.task.predictions(model, batch).double(), batch["labels"].double()
        self.squares.update(F.mse_loss(predictions, labels, reduction="sum"))
        self.count.update(len(labels))
        self.r2.update(predictions, labels)

    def compute(self) -> dict[str, float]:
        mse = float(self.squares.compute()) / float(self.count.compute())
        # one row has no variance to explain
        r2 = float(self.r2.compute()) if self.count.compute() > 1 else math.nan
        return {"loss": mse, "mse": mse, "r2": r2}
