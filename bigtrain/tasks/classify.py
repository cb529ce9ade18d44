"""Classification of images, texts and table rows, which differ in their input only."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.examples import Batch, Example
from bigtrain.tasks.base import SAMPLES, Evaluator, Rows, Task


class ClassificationEvaluator(Evaluator):
    """loss, accuracy, recall and F1.

    With two classes recall and F1 are those of the second (in alphabetical order: malignant,
    positive, yes …); with more they are means over the classes (macro).
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        from torchmetrics import Metric, MetricCollection
        from torchmetrics.classification import (
            BinaryF1Score,
            BinaryRecall,
            MulticlassAccuracy,
            MulticlassF1Score,
            MulticlassRecall,
        )

        super().__init__(task, device)
        num_classes = len(task.data.classes)
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro")
        }
        if num_classes == 2:
            metrics["recall"] = BinaryRecall()
            metrics["f1"] = BinaryF1Score()
        else:
            metrics["recall"] = MulticlassRecall(num_classes)
            metrics["f1"] = MulticlassF1Score(num_classes)
        self.collection = MetricCollection(metrics, compute_groups=False).to(device)
        self.wrong: Rows = []

    def add(self, logits: Tensor, labels: Tensor, batch: Batch) -> None:
        """`logits` [batch, classes], `labels` [batch]; keeps the first wrong answers."""
        predictions = logits.argmax(-1)
        self.collection.update(predictions, labels)
        room = SAMPLES - len(self.wrong)
        if room <= 0:
            return
        classes = self.task.data.classes
        wrong = (predictions != labels).nonzero().flatten()
        for index in wrong[:room].tolist():
            row = {
                "input": self.shown_input(batch, index),
                "label": classes[int(labels[index])],
                "predicted": classes[int(predictions[index])],
            }
            self.wrong.append(row)

    def shown_input(self, batch: Batch, index: int) -> Any:
        """An input for people: a text, or an image as uint8 [height, width(, channels)]."""
        if "pixel_values" in batch:
            return self._shown_image(batch["pixel_values"][index])
        if "input_ids" in batch:
            ids = batch["input_ids"][index]
            return self.task.data.tokenizer.decode(ids, skip_special_tokens=True)
        features = batch["features"][index].tolist()
        return str([round(value, 4) for value in features])

    def _shown_image(self, pixels: Tensor) -> NDArray[Any]:
        """Normalised [channels, height, width] → uint8 [height, width(, channels)]."""
        preprocessing = self.task.data.preprocessing
        mean = torch.tensor(preprocessing["image_mean"]).view(-1, 1, 1)
        std = torch.tensor(preprocessing["image_std"]).view(-1, 1, 1)
        pixels = pixels.float().cpu() * std + mean
        shown = (pixels.clamp(0, 1) * 255).byte()
        channels_last = shown.permute(1, 2, 0)
        return channels_last.squeeze(-1).numpy()

    def samples(self, model: Any, batch: Batch) -> Rows:
        """The first examples that were classified wrongly."""
        return self.wrong

    def metrics(self, loss: float) -> dict[str, float]:
        metrics = self.collection.compute()
        return {name: float(value) for name, value in metrics.items()}


class Classification(Task):
    """One label per example; cross entropy."""

    evaluator_class = ClassificationEvaluator

    def collate(self, examples: list[Example]) -> Batch:
        """Inputs by the names that transformers has for them, and labels [batch]."""
        if "text" not in examples[0]:
            return super().collate(examples)
        batch = self.pad(example["text"] for example in examples)
        batch["labels"] = torch.tensor([example["label"] for example in examples])
        return batch
