"""Classification of images, texts and table rows: one class for all three, since only their input differs."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryRecall,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassRecall,
)

from bigtrain.data.examples import Example
from bigtrain.tasks.base import SAMPLES, Batch, Evaluator, Task


class ClassificationEvaluator(Evaluator):
    """loss, accuracy, recall and F1.

    With two classes recall and F1 are those of the second (in alphabetical order: malignant, positive, yes …);
    with more they are means over the classes (macro).
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        super().__init__(task, device)
        classes = len(task.data.classes)
        metrics: dict[str, Any] = {"accuracy": MulticlassAccuracy(classes, average="micro")}
        if classes == 2:
            metrics |= {"recall": BinaryRecall(), "f1": BinaryF1Score()}
        else:
            metrics |= {"recall": MulticlassRecall(classes), "f1": MulticlassF1Score(classes)}
        self.collection = MetricCollection(metrics, compute_groups=False).to(device)
        self.wrong: list[dict[str, Any]] = []

    def add(self, logits: Tensor, labels: Tensor, batch: Batch) -> None:
        found = logits.argmax(-1)
        self.collection.update(found, labels)
        if len(self.wrong) < SAMPLES:
            for index in (
                (found != labels).nonzero().flatten()[: SAMPLES - len(self.wrong)].tolist()
            ):
                said, true = (
                    self.task.data.classes[int(answer[index])] for answer in (found, labels)
                )
                self.wrong.append(
                    {"input": self._input(batch, index), "label": true, "predicted": said}
                )

    def _input(self, batch: Batch, index: int) -> Any:
        if "pixel_values" in batch:
            seen, shape = self.task.data.preprocessing, (-1, 1, 1)
            mean, std = (
                torch.tensor(seen[f"image_{name}"]).view(shape) for name in ("mean", "std")
            )
            pixels = batch["pixel_values"][index].float().cpu() * std + mean
            return (pixels.clamp(0, 1) * 255).byte().permute(1, 2, 0).squeeze(-1).numpy()
        if "input_ids" in batch:
            return self.task.data.tokenizer.decode(
                batch["input_ids"][index], skip_special_tokens=True
            )
        return str([round(value, 4) for value in batch["features"][index].tolist()])

    def samples(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        """The first examples that were classified wrongly."""
        return self.wrong

    def metrics(self, loss: float) -> dict[str, float]:
        return {name: float(value) for name, value in self.collection.compute().items()}


class Classification(Task):
    """One label per example; cross entropy."""

    evaluation = ClassificationEvaluator

    def collate(self, examples: list[Example]) -> Batch:
        """Inputs by the name transformers gives them, and labels [batch]."""
        if "text" not in examples[0]:
            return super().collate(examples)
        labels = torch.tensor([example["label"] for example in examples])
        return self.padded(example["text"] for example in examples) | {"labels": labels}
