"""What a compressed model is worth, measured from its written files alone."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import Batch, PreparedData
from bigtrain.engine.runtime import find_device
from bigtrain.evaluation.report_metrics import CONFIDENCE, RESAMPLES
from bigtrain.models.export import load_exported
from bigtrain.models.output_loss import IGNORED
from bigtrain.models.quantized import FILE_NAME, read_quantized
from bigtrain.tasks.base import Task
from bigtrain.tasks.registry import TASKS

_TOKENS_AT_ONCE = 2048
SECONDS_PER_TIMING = 0.5
_FEWEST_RUNS = 7


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    model: str
    folder: str
    bytes: int
    """Of the files of weights."""
    metric: str
    value: float
    low: float
    """`low` to `high`: where 95% of the values are for examples drawn with replacement."""
    high: float
    latency_ms: float
    """Median time of a forward pass of one held-out example."""
    relative_latency: float
    """The same ÷ the original model's, each of which was timed in turn with this one's."""
    samples_per_s: float
    """In batches."""
    sparsity: float
    """The part of the stored weights that is zero."""


class Bench:
    """The held-out examples and the device that all models of a table are measured with."""

    def __init__(self, recipe: Recipe, prepared: PreparedData, original: Path) -> None:
        """`original`: the folder of the model that the others are made of."""
        self.task: Task = TASKS[recipe.task](recipe.task, prepared)
        self.device = torch.device(find_device(recipe.engine.device).kind)
        fitting = _TOKENS_AT_ONCE // prepared.tokens_per_sample
        self.batch_size = max(1, min(64, fitting))
        self.original = self._load(original)

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name()
        return f"CPU, {torch.get_num_threads()} threads"

    def measure(self, name: str, folder: Path) -> Row:
        """Load a model from its folder, evaluate and time it."""
        model = self._load(folder)
        with torch.inference_mode():
            metric, values = self._values(model)
            original, one = self._seconds([self.original, model], 1)
            (many,) = self._seconds([model], self.batch_size)
        low, high = bootstrap_interval(values)
        return Row(
            model=name,
            folder=str(folder),
            bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            metric=metric,
            value=float(values.mean()),
            low=low,
            high=high,
            latency_ms=one * 1e3,
            relative_latency=one / original,
            samples_per_s=min(self.batch_size, len(self.task.data.eval)) / many,
            sparsity=sparsity(folder),
        )

    def _load(self, folder: Path) -> nn.Module:
        return load_exported(folder, self.task.name).eval().to(self.device)

    def _batch(self, first: int, size: int) -> Batch:
        examples = self.task.data.eval
        stop = min(first + size, len(examples))
        chosen = [examples[index] for index in range(first, stop)]
        batch = self.task.collate(chosen)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _values(self, model: nn.Module) -> tuple[str, NDArray[np.float64]]:
        """The metric's name, and of each held-out example a value; their mean is the metric."""
        parts = []
        for first in range(0, len(self.task.data.eval), self.batch_size):
            batch = self._batch(first, self.batch_size)
            logits = self.task.logits(model, batch)
            parts.append(_values_of(self.task, logits, batch["labels"]))
        values = torch.cat(parts).double().cpu().numpy()
        data, spec = self.task.data, self.task.spec
        if data.eval_bytes is not None:
            return "bits_per_byte", values * (len(values) / math.log(2) / data.eval_bytes)
        if spec.is_language:
            return "exact_match", values
        return ("accuracy" if spec.has_labels else "mse"), values

    def _seconds(self, models: list[nn.Module], size: int) -> list[float]:
        """Each model's median time for a forward pass of `size` examples; they take turns."""
        batch = self._batch(0, size)
        for model in models:
            self.task.logits(model, batch)
        taken: list[list[float]] = [[] for _ in models]
        while sum(taken[0]) < SECONDS_PER_TIMING or len(taken[0]) < _FEWEST_RUNS:
            for model, of_model in zip(models, taken, strict=True):
                began = time.perf_counter()
                self.task.logits(model, batch)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                of_model.append(time.perf_counter() - began)
        return [float(np.median(of_model)) for of_model in taken]


def _values_of(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Of each example [batch]: is it right (0 or 1), its nats, or its squared error."""
    if task.spec.predicts == "number":
        return (logits.flatten() - labels).square()
    if task.spec.has_labels:
        return (logits.argmax(-1) == labels).float()
    if task.spec.predicts == "text":
        is_right = logits.argmax(-1) == labels
        is_right |= labels == IGNORED
        return is_right.all(-1).float()
    losses = []
    for row, label in zip(logits, labels, strict=True):
        losses.append(task.loss_from_logits(row, label))
    return torch.stack(losses)


def bootstrap_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 95% interval of the mean: of examples drawn with replacement, RESAMPLES times."""
    draw = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = draw.integers(len(values), size=len(values))
        means[index] = values[drawn].mean()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def sparsity(folder: Path) -> float:
    """The part of the weights in a model's files that is zero."""
    zeros = total = 0
    for tensor in _stored(folder):
        zeros += tensor.numel() - int(tensor.count_nonzero())
        total += tensor.numel()
    return zeros / max(total, 1)


def _stored(folder: Path) -> list[Tensor]:
    if (folder / FILE_NAME).is_file():
        file = read_quantized(folder)
        return [*file.plain.values(), *(weight.values for weight in file.weights.values())]
    tensors = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            tensors += [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
    return tensors
