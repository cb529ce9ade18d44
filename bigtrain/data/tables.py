"""Rows of numeric columns as examples."""

import math
from typing import Any

import numpy as np

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import ColumnDataset, Part, PreparedData
from bigtrain.data.held_out import refuse_bad, refuse_empty
from bigtrain.data.records import FIELDS, Record
from bigtrain.errors import RequestError


def prepare_table(
    recipe: Recipe, train: Part, held: Part, trained: dict[str, Any] | None
) -> PreparedData:
    answer = FIELDS[recipe.task][1]
    good: list[list[Record]] = [[], []]
    bad: list[str] = []
    for part, kept in zip((train, held), good, strict=True):
        for index in range(len(part)):
            record = part[index]
            value = record[answer]
            unknown = value is None or (isinstance(value, float) and not math.isfinite(value))
            if unknown or not np.isfinite(record["features"]).all():
                bad.append(
                    f"row {part.indices[index]}: nothing, or not a finite number, in one of its columns"
                )
            else:
                kept.append(record)
    refuse_bad(bad, recipe)
    refuse_empty({"train": len(good[0]), "eval": len(good[1])}, bad)
    rows = [np.stack([record["features"] for record in part]) for part in good]
    answers = [[record[answer] for record in part] for part in good]
    classes: list[str] = []
    if answer == "label":
        classes = sorted({str(a) for part in answers for a in part})
        columns = [np.asarray([classes.index(str(a)) for a in part], np.int64) for part in answers]
    else:
        try:
            columns = [np.asarray(part, np.float32) for part in answers]
        except (TypeError, ValueError):
            raise RequestError(
                "regression target is not a number", "numbers in every row"
            ) from None
    mean, std = rows[0].mean(0), rows[0].std(0)
    std[std == 0] = 1
    if trained is not None:
        mean, std = (np.asarray(trained[f"feature_{name}"], np.float32) for name in ("mean", "std"))
    sets = [
        ColumnDataset({"features": (r - mean) / std, answer: column})
        for r, column in zip(rows, columns, strict=True)
    ]
    width, seen = rows[0].shape[1], {"feature_mean": mean.tolist(), "feature_std": std.tolist()}
    return PreparedData(
        sets[0],
        sets[1],
        width // 64 + 1,
        classes=classes,
        features=width,
        preprocessing=seen,
        bad=bad,
    )
