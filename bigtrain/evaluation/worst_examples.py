"""The examples that a model did worst on, as a person can look at them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.evaluation.predictions import Predictions
from bigtrain.tasks.base import Evaluator, Task
from bigtrain.tasks.classify import ClassificationEvaluator

_SHOWN_CHARACTERS = 600


@dataclass(frozen=True)
class WorstExample:
    """One example, and what the model made of it; None where the task has no such thing."""

    example: int
    """Its number in the held-out set, from 0."""
    loss: float
    """Per target token, image or row."""
    label: str | float | None
    predicted: str | float | None
    probability: float | None
    """Of the predicted class."""
    shown: str | NDArray[Any]
    """Its input: a text, or an image as uint8 [height, width(, channels)]."""


def worst_examples(
    predictions: Predictions, task: Task, evaluator: Evaluator, count: int
) -> list[WorstExample]:
    """The `count` examples of the largest loss, the worst first."""
    per_target = predictions.loss / np.maximum(predictions.targets, 1)
    badness = np.where(np.isnan(per_target), np.inf, per_target)  # no number is worst of all
    order = np.argsort(-badness, kind="stable")[:count]
    return [
        WorstExample(
            example=index,
            loss=float(per_target[index]),
            label=_answer(predictions.label, index, task.data.classes),
            predicted=_answer(predictions.predicted, index, task.data.classes),
            probability=float(predictions.probability[index]) if task.data.classes else None,
            shown=_shown(task, evaluator, index),
        )
        for index in order.tolist()
    ]


def _answer(answers: NDArray[Any], index: int, classes: list[str]) -> str | float | None:
    if not len(answers):
        return None
    return classes[int(answers[index])] if classes else float(answers[index])


def _shown(task: Task, evaluator: Evaluator, index: int) -> str | NDArray[Any]:
    """The example's input for people."""
    example, prepared = task.data.eval[index], task.data
    if prepared.eval_rows is not None:
        return _row(prepared.eval_rows.iloc[index])
    if isinstance(evaluator, ClassificationEvaluator):
        shown: str | NDArray[Any] = evaluator.shown_input(task.collate([example]), 0)
        return shown[:_SHOWN_CHARACTERS] if isinstance(shown, str) else shown
    texts = [
        prepared.tokenizer.decode(example[name], skip_special_tokens=True)
        for name in ("tokens", "source", "target")
        if name in example
    ]
    return " → ".join(text[:_SHOWN_CHARACTERS] for text in texts)


def _row(values: Any) -> str:
    """A row as the table has it; nothing after the sign where a value is missing."""
    shown = values.astype(object).where(values.notna(), "")
    parts: list[str] = []
    for name, value in shown.items():
        text = f"{value:.6g}" if isinstance(value, float) else f"{value}"
        parts.append(f"{name}={text}")
    return ", ".join(parts)
