"""Rows of tables as examples."""

from dataclasses import asdict
from typing import Any

import numpy as np

from bigtrain.config.recipe import Recipe
from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.data.examples import ColumnDataset, Part, PreparedData
from bigtrain.data.held_out import refuse_empty, refuse_unreadable
from bigtrain.data.table_columns import (
    Column,
    describe_columns,
    feature_rows,
    input_names,
    is_true_or_false,
    mean_and_std,
    numbers_of,
    stored_mean_and_std,
    texts,
    typed,
    unusable_rows,
)


def prepare_table(
    recipe: Recipe, train: Part, held_out: Part, exported: dict[str, Any] | None
) -> PreparedData:
    """Both sets, columns encoded as the training set has them.

    Raises RequestError for columns and rows that cannot be used.
    """
    field = TASK_SPECS[recipe.task].fields[1]
    columns = _columns(train, recipe, exported or {})
    answer = columns[-1].name
    unreadable: list[str] = []
    train_rows = _usable_rows(train, columns, unreadable)
    eval_rows = _usable_rows(held_out, columns, unreadable)
    refuse_unreadable(unreadable, recipe)
    counts = {"eval": len(eval_rows)}
    if exported is None:
        counts = {"train": len(train_rows), **counts}
    refuse_empty(counts, recipe, unreadable)
    known: list[str] = []
    classes: list[str] = []
    if field == "label":
        known = exported["classes"] if exported else _true_and_false(train, answer)
        labels = {*texts(train_rows[answer], known), *texts(eval_rows[answer], known)}
        classes = sorted({*labels, *known})
    mean, std = stored_mean_and_std(exported) if exported else mean_and_std(train_rows, columns)
    categories = [column for column in columns if column.kind == "category"]
    notes = []

    def dataset(rows: Any) -> ColumnDataset:
        if classes:
            labels = texts(rows[answer], known)
            answers = np.asarray([classes.index(label) for label in labels], np.int64)
        else:
            answers = numbers_of(rows, columns, "target").flatten().astype(np.float32)
        features = feature_rows(rows, columns, mean, std)
        for column, count in zip(categories, (features.places < 0).sum(0), strict=True):
            if count:
                notes.append(f"{count:,} held-out values of {column.name} are new, not in training")
        return ColumnDataset({"features": features, field: answers})

    train_set = dataset(train_rows)
    eval_set = dataset(eval_rows)
    num_features = len(eval_set[0]["features"])
    return PreparedData(
        train_set,
        eval_set,
        tokens_per_sample=num_features // 64 + 1,
        classes=classes,
        features=num_features,
        cardinalities=[len(column.categories) for column in categories],
        columns={f"columns.{column.name}": column.fate for column in columns},
        preprocessing={
            "feature_mean": mean.tolist(),
            "feature_std": std.tolist(),
            "table": [asdict(column) for column in columns],
        },
        notes=notes,
        unreadable=unreadable,
        eval_rows=eval_rows[input_names(columns)] if exported else None,
    )


def _true_and_false(train: Part, answer: str) -> list[str]:
    """These two, where a csv has no other answers: in any way of writing they are the same."""
    if not train.records.attrs.get("is_text"):
        return []
    words = {label.capitalize() for label in texts(train.records[answer].dropna())}
    return sorted(words) if is_true_or_false(words) else []


def _columns(train: Part, recipe: Recipe, exported: dict[str, Any]) -> list[Column]:
    """The columns of the training part, or those of an export; the last is the answer."""
    if "table" in exported:
        return [Column(**column) for column in exported["table"]]
    kind: Any = TASK_SPECS[recipe.task].fields[1]
    answer = Column(str(recipe.data.columns.get(kind, kind)), kind, kind)
    records = train.records
    if records.attrs.get("is_text"):
        records = typed(records)  # by all rows of all files
    table = records.iloc[train.numbers]
    if exported:
        # Earlier versions wrote no names: all columns of numbers were inputs.
        inputs = table.drop(columns=answer.name).select_dtypes([np.signedinteger, np.floating])
        return [*(Column(name, "number", "number") for name in inputs), answer]
    chosen = recipe.data.columns.get("features", ())
    if isinstance(chosen, str):
        chosen = [chosen]
    return describe_columns(table, answer, chosen, recipe.data.missing == "refuse")


def _usable_rows(part: Part, columns: list[Column], unreadable: list[str]) -> Any:
    """The rows of a part that can be used; `unreadable` names the others."""
    table = part.records.iloc[part.numbers]
    wrong = unusable_rows(table, columns, f"data.{'eval' if part.origin else 'train'}")
    for row in sorted(wrong):
        unreadable.append(
            f"row {part.name(row)}: nothing, or not a finite number, in column {wrong[row]}"
        )
    return table.drop(table.index[list(wrong)])
