"""Rows of numeric columns as examples."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.recipe import Recipe
from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.data.examples import ColumnDataset, Part, PreparedData
from bigtrain.data.held_out import refuse_empty, refuse_unreadable
from bigtrain.errors import RequestError


@dataclass
class _Rows:
    """The complete rows of a part."""

    features: list[NDArray[np.float32]] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)  # labels or targets

    def __len__(self) -> int:
        return len(self.answers)


def prepare_table(
    recipe: Recipe, train: Part, held_out: Part, exported: dict[str, Any] | None
) -> PreparedData:
    """Both sets, features standardised by the training set.

    Raises RequestError for rows that cannot be used.
    """
    spec = TASK_SPECS[recipe.task]
    answer = spec.fields[1]
    unreadable: list[str] = []
    train_rows = _complete_rows(train, answer, unreadable)
    eval_rows = _complete_rows(held_out, answer, unreadable)
    refuse_unreadable(unreadable, recipe)
    refuse_empty({"train": len(train_rows), "eval": len(eval_rows)}, recipe, unreadable)
    classes: list[str] = []
    if spec.has_labels:
        classes = sorted({str(label) for label in train_rows.answers + eval_rows.answers})
    train_features = np.stack(train_rows.features)
    if exported is None:
        mean = train_features.mean(0)
        std = train_features.std(0)
        std[std == 0] = 1  # a constant column
    else:
        mean = np.asarray(exported["feature_mean"], np.float32)
        std = np.asarray(exported["feature_std"], np.float32)

    def dataset(rows: _Rows) -> ColumnDataset:
        features = (np.stack(rows.features) - mean) / std
        if spec.has_labels:
            labels = _class_numbers(rows.answers, classes)
            return ColumnDataset({"features": features, answer: labels})
        return ColumnDataset({"features": features, answer: _targets(rows.answers)})

    num_features = train_features.shape[1]
    return PreparedData(
        dataset(train_rows),
        dataset(eval_rows),
        tokens_per_sample=num_features // 64 + 1,
        classes=classes,
        features=num_features,
        preprocessing={"feature_mean": mean.tolist(), "feature_std": std.tolist()},
        unreadable=unreadable,
    )


def _complete_rows(part: Part, answer: str, unreadable: list[str]) -> _Rows:
    """The rows of finite numbers with an answer; the others are named in `unreadable`."""
    rows = _Rows()
    for index in range(len(part)):
        record = part[index]
        value = record[answer]
        is_finite = not isinstance(value, float) or math.isfinite(value)
        if value is None or not is_finite or not np.isfinite(record["features"]).all():
            unreadable.append(
                f"row {part.name(index)}: nothing, or not a finite number, in one of its columns"
            )
            continue
        rows.features.append(record["features"])
        rows.answers.append(value)
    return rows


def _class_numbers(labels: list[Any], classes: list[str]) -> NDArray[np.int64]:
    return np.asarray([classes.index(str(label)) for label in labels], np.int64)


def _targets(values: list[Any]) -> NDArray[np.float32]:
    try:
        return np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise RequestError("regression target is not a number", "numbers in every row") from None
