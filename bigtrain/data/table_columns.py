"""The columns of a table: what each holds, which are inputs, and how they become features.

A table is a pandas.DataFrame, one row per sample, with the column of what is to be learnt.
"""

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bigtrain.errors import RequestError

_FAR = 1000  # deviations from zero
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
Gaps = Literal["refused", "filled", "flagged"]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Column:
    """What a column holds in the training part, and what becomes of it."""

    name: str
    kind: Literal["number", "category", "label", "target", "left out"]
    fate: str
    """For the user: the kind in words, or why it is left out."""
    gaps: Gaps = "refused"
    """What becomes of a missing value.

    filled: the median, or no category. flagged, where the training part misses some: the median
    and a feature that says so, or a category of their own.
    """
    median: float = 0.0
    categories: Sequence[str] = ()
    """In alphabetical order; the empty one stands for missing values."""
    is_precise: bool = False
    """float64 until standardised: values far from zero for their deviation, as seconds since 1970.

    float32 would round them first.
    """


def describe_columns(
    table: Any, answer: Column, chosen: Collection[str], refuse_gaps: bool
) -> list[Column]:
    """The columns of the training part, `answer` among them.

    `chosen`: the inputs; empty: whatever can be one. Raises RequestError if nothing can, or for a
    chosen one that cannot.
    """
    find_column(table, answer.name, f"data.columns.{answer.kind}")
    inputs = table.drop(columns=answer.name)
    for name in chosen:
        find_column(inputs, name, "data.columns.features")
    columns = [_describe(inputs[name], chosen, refuse_gaps) for name in inputs]
    useless = []
    for column in columns:
        if column.kind == "left out" and (column.name in chosen or not chosen):
            useless.append(f"{column.name} ({column.fate})")
    if (useless and chosen) or len(useless) == len(columns):
        raise RequestError(
            f"no input can be made of {'; '.join(useless) or 'a table of one column'}",
            f"numbers, text, or true and false in columns besides {answer.name}",
            "data.columns.features=[NAME, …] takes any text",
        )
    return [*columns, answer]


def _describe(values: Any, chosen: Collection[str], refuse_gaps: bool) -> Column:
    name = values.name
    if chosen and name not in chosen:
        return Column(name, "left out", "left out: not chosen")
    present = values.dropna().infer_objects()
    gaps: Gaps = "refused"
    if not refuse_gaps:
        gaps = "flagged" if values.hasnans else "filled"
    if present.dtype.kind in "iuf" and len(present):
        median = float(present.median())
        deviation = float(present.std(ddof=0))
        is_precise = 0 < _FAR * deviation < abs(float(present.mean()))
        fate = f"number; missing: the median {median:g}, and a flag"
        fate = fate if gaps == "flagged" else "number"
        return Column(name, "number", fate, gaps, median, is_precise=is_precise)
    others = {type(value) for value in present if not isinstance(value, str | bool)}
    categories = sorted(set(texts(present)))
    if gaps == "flagged" and "" in categories:
        categories.remove("")  # an empty text is a missing one
    why = ""
    if not categories:
        why = "no values"
    elif others:
        kind = others.pop()
        why = "dates" if hasattr(kind, "year") else f"{kind.__name__} values"
    elif chosen:
        pass  # as it is
    elif len(categories) == 1 and gaps != "flagged":
        why = "the same in every row"
    elif all(_DATE.match(text) for text in categories):
        why = "dates"
    elif 2 * len(categories) > len(present):
        why = f"text, {len(categories):,} different in {len(present):,} rows"
    if why:
        return Column(name, "left out", f"left out: {why}")
    fate = f"category of {len(categories)} values"
    if gaps == "flagged":
        fate += ", and one for missing"
        categories.insert(0, "")
    return Column(name, "category", fate, gaps, categories=categories)


def input_names(columns: Sequence[Column]) -> list[str]:
    """The columns that features are made of."""
    names: list[str] = []
    for column in columns:
        if column.kind in ("number", "category"):
            names.append(column.name)
    return names


def find_column(table: Any, name: str, place: str) -> Any:
    """A column of the table. Raises RequestError, beginning with `place`, if there is none."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table.columns, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise RequestError(f"{place}: no column {name!r}{hint}", f"one of: {', '.join(table.columns)}")


def typed(table: Any) -> Any:
    """A csv's columns of text with the type that all values of a column have: numbers, or text.

    A csv may have true and false in several ways of writing; here they are True and False.
    """
    import pandas

    columns: dict[str, Any] = {}
    for name in table:
        values = table[name]
        numbers = pandas.to_numeric(values, errors="coerce")
        if numbers.isna().equals(values.isna()):
            columns[name] = numbers
            continue
        capitalized = values.str.capitalize()
        if is_true_or_false(capitalized.dropna().unique()):
            values = capitalized
        columns[name] = values
    return pandas.DataFrame(columns)


def is_true_or_false(known: Collection[str]) -> bool:
    """Whether there are known values, and no others than these two."""
    others = set(known) - {"", "True", "False"}
    return len(known) > 0 and not others


def texts(values: Any, known: Collection[str] = ()) -> list[str]:
    """A column as text: empty where a value is missing.

    Where all `known` ones are True and False, TRUE and true are True.
    """
    found = values.astype(object).where(values.notna(), "").map(str)
    if is_true_or_false(known):
        found = found.str.capitalize()
    return list(found)


def unusable_rows(table: Any, columns: Sequence[Column], place: str) -> dict[int, str]:
    """The rows that cannot be used, each with a column that is why.

    Raises RequestError, beginning with `place`, for a table without one of the columns.
    """
    import pandas

    found: dict[int, str] = {}
    for column in columns:
        if column.kind == "left out":
            continue
        values = find_column(table, column.name, place)
        is_wrong = values.isna() & (column.gaps == "refused")
        if column.kind in ("number", "target"):
            numbers = pandas.to_numeric(values, errors="coerce")
            is_wrong |= np.isinf(numbers) | (numbers.isna() & values.notna())
        for row in np.flatnonzero(is_wrong).tolist():
            found.setdefault(row, column.name)
    return found


def numbers_of(table: Any, columns: Sequence[Column], kind: str) -> Numbers:
    """[rows, columns of the kind], missing ones filled."""
    import pandas

    picked = [column for column in columns if column.kind == kind]
    filled = [pandas.to_numeric(table[column.name]).fillna(column.median) for column in picked]
    return np.asarray(filled, np.float64).reshape(len(picked), len(table)).T.copy()


def _are_precise(columns: Sequence[Column]) -> NDArray[np.bool_]:
    numbers = [column for column in columns if column.kind == "number"]
    return np.asarray([column.is_precise for column in numbers], bool)


def mean_and_std(table: Any, columns: Sequence[Column]) -> tuple[Numbers, Numbers]:
    """Of each column of numbers; the deviation of a constant one is 1."""
    numbers = numbers_of(table, columns, "number")
    rounded = numbers.astype(np.float32)
    precise = _are_precise(columns)
    mean = np.where(precise, numbers.mean(0), rounded.mean(0))
    std = np.where(precise, numbers.std(0), rounded.std(0))
    std[std == 0] = 1
    return mean, std


def stored_mean_and_std(exported: dict[str, Any]) -> tuple[Numbers, Numbers]:
    """Those that an export's bigtrain.json has."""
    mean = np.asarray(exported["feature_mean"], np.float64)
    std = np.asarray(exported["feature_std"], np.float64)
    return mean, std


def _standardised(
    table: Any, columns: Sequence[Column], mean: Numbers, std: Numbers
) -> NDArray[np.float32]:
    numbers = numbers_of(table, columns, "number")
    rounded = numbers.astype(np.float32)
    narrow = rounded - mean.astype(np.float32)
    narrow /= std.astype(np.float32)
    wide = (numbers - mean) / std
    precise = _are_precise(columns)
    return np.where(precise, wide.astype(np.float32), narrow)


@dataclass(frozen=True)
class FeatureRows:
    """Rows of features; the zeros and ones of categories are made when a row is asked for.

    A row is: the numbers, standardised; for each one that the training part misses somewhere,
    whether it is missing here; and for each category a block of zeros with a 1 at the place of the
    row's value, or without for a value that the training part does not have.
    """

    numbers: NDArray[np.float32]
    """[rows, numbers and flags]"""
    places: NDArray[np.int64]
    """[rows, categories]: where each has its 1 in all blocks together; -1: nowhere."""
    width: int
    """Of all blocks together."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        one_hot = np.zeros(self.width + 1, np.float32)
        one_hot[self.places[index]] = 1  # -1 is the last place, which is cut off
        return np.concatenate([self.numbers[index], one_hot[:-1]])


def feature_rows(table: Any, columns: Sequence[Column], mean: Numbers, std: Numbers) -> FeatureRows:
    """The features of rows that can be used.

    `mean` and `std` [numbers] are of the training part.
    """
    import pandas

    flagged = [column for column in columns if (column.kind, column.gaps) == ("number", "flagged")]
    flags = [table[column.name].isna() for column in flagged]
    numbers = _standardised(table, columns, mean, std)
    places = [np.zeros((len(table), 0), np.int64)]
    width = 0
    for column in columns:
        if column.kind == "category":
            values = texts(table[column.name], column.categories)
            place = pandas.Index(column.categories).get_indexer(values)
            places.append(np.where(place < 0, -1, place + width))
            width += len(column.categories)
    numbers = np.column_stack([numbers, *flags]).astype(np.float32)
    return FeatureRows(numbers, np.column_stack(places), width)
