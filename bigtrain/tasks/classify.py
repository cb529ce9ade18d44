"""Classification of images, texts and table rows: one class for all three, since only their input differs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryRecall,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassRecall,
)

from bigtrain.data.examples import Example
from bigtrain.tasks.base import Batch, Task, exact_sum, expect_shape, outputs


class Classification(Task):
    """One label per example; cross entropy."""

    def collate(self, examples: list[Example]) -> Batch:
        """Inputs by the name transformers gives them, and labels [batch]."""
        batch = {"labels": torch.tensor([example["label"] for example in examples])}
        if "image" in examples[0]:
            batch["pixel_values"] = torch.stack([example["image"] for example in examples])
        elif "features" in examples[0]:
            batch["features"] = torch.from_numpy(np.stack([example["features"] for example in examples]))
        else:
            texts = [torch.from_numpy(example["text"]) for example in examples]
            batch["input_ids"] = pad_sequence(
                texts, batch_first=True, padding_value=self.corpus.tokenizer.pad_token_id or 0
            )
            batch["attention_mask"] = pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
        return batch

    def weight(self, batch: Batch) -> int:
        return len(batch["labels"])

    def logits(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """[batch, classes], fp32."""
        logits = outputs(model, **{name: x for name, x in batch.items() if name != "labels"})
        expect_shape(logits, (len(batch["labels"]), len(self.corpus.classes)), "[batch, classes]")
        return logits

    def loss_sum(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        logits = self.logits(model, batch)
        return F.cross_entropy(logits, batch["labels"], reduction="sum", label_smoothing=self.label_smoothing)

    def evaluator(self, device: torch.device) -> "ClassificationEvaluator":
        return ClassificationEvaluator(self, device)


class ClassificationEvaluator:
    """loss, accuracy, recall and F1.

    With two classes recall and F1 are those of the second (in alphabetical order: malignant, positive, yes …);
    with more they are means over the classes (macro).
    """

    def __init__(self, task: Classification, device: torch.device) -> None:
        self.task, classes = task, len(task.corpus.classes)
        self.loss, self.count = exact_sum(device), exact_sum(device)
        metrics: dict[str, Any] = {"accuracy": MulticlassAccuracy(classes, average="micro")}
        if classes == 2:
            metrics |= {"recall": BinaryRecall(), "f1": BinaryF1Score()}
        else:
            metrics |= {"recall": MulticlassRecall(classes), "f1": MulticlassF1Score(classes)}
        self.metrics = MetricCollection(metrics, compute_groups=False).to(device)

    def update(self, model: Callable[..., Any], batch: Batch) -> None:
        logits, labels = self.task.logits(model, batch), batch["labels"]
        self.loss.update(F.cross_entropy(logits, labels, reduction="sum"))
        self.count.update(len(labels))
        self.metrics.update(logits.argmax(-1), labels)

    def compute(self) -> dict[str, float]:
        result = {"loss": float(self.loss.compute()) / float(self.count.compute())}
        return result | {name: float(value) for name, value in self.metrics.compute().items()}
