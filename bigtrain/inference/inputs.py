"""The files that `predict` is given, as numbered inputs; and each input as an example of the task.

An input that cannot be used does not end the work: it becomes an `Unusable`, which says why.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigtrain.config.recipe import Columns
from bigtrain.config.task_specs import TASK_SPECS, TaskSpec
from bigtrain.data.examples import Example
from bigtrain.data.images import DECODING_ERRORS, pixels_of
from bigtrain.data.table_columns import (
    Column,
    feature_rows,
    find_column,
    stored_mean_and_std,
    unusable_rows,
)
from bigtrain.data.token_cache import encode, fit
from bigtrain.errors import RequestError
from bigtrain.sources.lookup import FORMATS, load_frame, load_table

About = dict[str, Any]  # an export's bigtrain.json


class Input(NamedTuple):
    """One input: where it is from, and what was found there."""

    file: str
    row: int | None  # counted from 0; None: the file is the input
    value: Any  # a text (as bytes or str), the columns of a row, or an image's path


@dataclass(frozen=True)
class Usable:
    """An input as the task collates it, with a placeholder for what is to be predicted."""

    example: Example
    length: int = 0  # tokens
    is_cut: bool = False
    unknown: tuple[str, ...] = ()  # columns whose value the training part did not have


@dataclass(frozen=True)
class Unusable:
    """An input that no prediction is made for."""

    reason: str


@dataclass(frozen=True)
class _Part:
    """The inputs of one file, or images."""

    files: Sequence[str]
    rows: Sequence[Any] | None  # None: the files themselves are the inputs
    read: Callable[[int, int], list[Any]]  # values from one row to another

    def __len__(self) -> int:
        return len(self.files if self.rows is None else self.rows)


class Inputs:
    """All inputs in order, by number."""

    def __init__(self, files: list[Path], parts: list[_Part], left_out: int = 0) -> None:
        self.files = files
        self.left_out = left_out  # files of the folders that are no images by their names
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> list[Input]:
        """Inputs `start` to `stop` (not included)."""
        found: list[Input] = []
        while start < min(stop, len(self)):
            number = bisect_right(self._ends, start)
            part = self._parts[number]
            before = self._ends[number] - len(part)
            last = min(stop, self._ends[number])
            found += _inputs_of(part, start - before, last - before)
            start = last
        return found


def _inputs_of(part: _Part, start: int, stop: int) -> list[Input]:
    inputs: list[Input] = []
    for row, value in enumerate(part.read(start, stop), start):
        if part.rows is None:
            inputs.append(Input(part.files[row], None, value))
        else:
            inputs.append(Input(part.files[0], row, value))
    return inputs


def find_inputs(
    paths: list[Path], spec: TaskSpec, columns: Columns, table: Sequence[Column] = ()
) -> Inputs:
    """The inputs in `paths`: files, or for images folders too.

    `columns`: field → the column that holds it; `table`: what a table must have. Raises
    RequestError for what is not there, and for files of the wrong kind.
    """
    for path in paths:
        if not path.exists():
            raise RequestError(f"there is no {path}", "files that exist")
    if spec.data == "image":
        inputs = _find_images(paths)
    else:
        inputs = _find_rows(paths, spec, columns, table)
    if not len(inputs):
        raise RequestError(
            f"nothing to predict in {', '.join(map(str, paths))}", "at least one input"
        )
    return inputs


def _find_images(paths: list[Path]) -> Inputs:
    """Named files as they are; of folders, at any depth, those whose names end as images' do."""
    from PIL import Image

    formats = Image.registered_extensions()
    suffixes = {suffix for suffix in formats if formats[suffix] in Image.OPEN}  # pdf: only written
    files: list[Path] = []
    left_out = 0
    for path in paths:
        if not path.is_dir():
            if path.suffix.lower() in {*FORMATS, ".txt"}:
                raise RequestError(f"{path} is no image", "images, or folders of them")
            files.append(path)
            continue
        inside = sorted(inner for inner in path.rglob("*") if inner.is_file())
        images = [inner for inner in inside if inner.suffix.lower() in suffixes]
        left_out += len(inside) - len(images)
        files += images
    names = [str(path) for path in files]
    shown = [_shown(path) for path in files]
    return Inputs(files, [_Part(shown, None, lambda start, stop: names[start:stop])], left_out)


def _shown(path: Path) -> str:
    """A path as text that can be written: bytes of it that are not UTF-8 as \\xff."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _find_rows(
    paths: list[Path], spec: TaskSpec, columns: Columns, table: Sequence[Column]
) -> Inputs:
    parts: list[_Part] = []
    for path in paths:
        if path.is_dir():
            raise RequestError(f"{path} is a folder", "files", f"{path / '*.jsonl'}")
        table_format = FORMATS.get(path.suffix.lower())
        if table_format is not None and spec.data == "table":
            parts.append(_rows(path, table_format, table))
        elif table_format is not None:
            parts.append(_table(path, table_format, spec, columns))
        elif spec.data == "text":
            parts.append(_lines(path))
        else:
            raise RequestError(f"{path} is no table", "csv, jsonl, json or parquet")
    return Inputs(paths, parts)


def _lines(path: Path) -> _Part:
    """A text file: each line is an input."""
    content = path.read_bytes()
    if b"\0" in content[:4096]:
        raise RequestError(
            f"{path} is no text", "text with one input per line, or jsonl, json, csv or parquet"
        )
    lines = content.split(b"\n")
    if not lines[-1]:  # after the last end of line
        lines.pop()
    rows = [line.removesuffix(b"\r") for line in lines]
    return _Part([_shown(path)], rows, lambda start, stop: rows[start:stop])


def _rows(path: Path, table_format: str, columns: Sequence[Column]) -> _Part:
    """The rows of a table that has the columns; what a csv has in them is text."""
    frame = load_frame("predict", table_format, [str(path)])
    for column in columns:
        find_column(frame, column.name, str(path))
    frame = frame[[column.name for column in columns]]
    return _Part(
        [_shown(path)], frame, lambda start, stop: frame.iloc[start:stop].to_dict("records")
    )


def _table(path: Path, table_format: str, spec: TaskSpec, columns: Columns) -> _Part:
    """The column of a table that the task reads."""
    if path.stat().st_size == 0:
        return _Part([_shown(path)], [], lambda _start, _stop: [])
    table = load_table("predict", table_format, str(path), data_files=[str(path)])
    field = spec.fields[0]
    column = str(columns.get(field, field))
    if column not in table.column_names:
        raise RequestError(
            f"{path} has no column {column}; it has: {', '.join(table.column_names)}",
            f"a column with each {field}",
            f"--column {field}=NAME_OF_A_COLUMN",
        )
    table = table.select_columns([column])
    return _Part([_shown(path)], table, lambda start, stop: table[start:stop][column])


Encoder = Callable[[list[Input]], list[Usable | Unusable]]


def make_encoder(about: About, tokenizer: Any) -> Encoder:
    """What makes examples of inputs, exactly as in the training that `about` tells of."""
    spec = TASK_SPECS[about["task"]]
    if spec.data == "text":
        return partial(_encode_texts, spec, tokenizer, about["seq_len"])
    if spec.data == "image":
        return partial(_encode_images, about)
    return partial(_encode_rows, about)


def table_columns(about: About) -> list[Column]:
    """The columns that a model of tables reads; none for other models.

    Raises RequestError for an export that does not name them.
    """
    if TASK_SPECS[about["task"]].data != "table":
        return []
    if "table" not in about:
        raise RequestError(
            "this model was exported by an earlier version, which did not write down its columns",
            "an export by this version",
            "bigtrain evaluate RUN data.eval=FILE",
        )
    columns = [Column(**column) for column in about["table"]]
    return [column for column in columns if column.kind in ("number", "category")]


def _encode_rows(about: About, inputs: list[Input]) -> list[Usable | Unusable]:
    """Rows of a table, each a dictionary of columns."""
    import pandas

    columns = table_columns(about)
    table = pandas.DataFrame([item.value for item in inputs], dtype=object)
    wrong = unusable_rows(table, columns, "predict")
    mean, std = stored_mean_and_std(about)
    rows = feature_rows(table.drop(index=list(wrong)), columns, mean, std)
    names = [column.name for column in columns if column.kind == "category"]
    answer = TASK_SPECS[about["task"]].fields[1]
    encoded: list[Usable | Unusable] = []
    number = 0
    for index in range(len(inputs)):
        if index in wrong:
            encoded.append(Unusable(f"nothing, or not a finite number, in column {wrong[index]}"))
            continue
        pairs = zip(names, rows.places[number], strict=True)
        unknown = tuple(name for name, place in pairs if place < 0)
        encoded.append(Usable({"features": rows[number], answer: 0}, unknown=unknown))
        number += 1
    return encoded


def _encode_texts(
    spec: TaskSpec, tokenizer: Any, seq_len: int, inputs: list[Input]
) -> list[Usable | Unusable]:
    """Texts cut to `seq_len` tokens."""
    encoded: list[Usable | Unusable] = []
    texts: list[str] = []
    for item in inputs:
        text = item.value
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as problem:
                encoded.append(Unusable(f"not UTF-8 text (byte {problem.start})"))
                continue
        if not isinstance(text, str):
            encoded.append(Unusable(f"{spec.fields[0]} is {type(text).__name__}, not text"))
            continue
        encoded.append(Usable({}))  # its tokens come below
        texts.append(text)
    token_ids = iter(encode(texts, tokenizer, spec) if texts else [])
    for number, found in enumerate(encoded):
        if isinstance(found, Usable):
            whole = next(token_ids)
            ids = fit(whole, tokenizer, spec, seq_len)
            encoded[number] = Usable(_text_example(spec, ids), len(ids), len(whole) > seq_len)
    return encoded


def _text_example(spec: TaskSpec, ids: list[int]) -> Example:
    answer = 0 if spec.has_labels else np.zeros(1, np.int64)
    return {spec.fields[0]: np.asarray(ids, np.int64), spec.fields[1]: answer}


def _encode_images(about: About, inputs: list[Input]) -> list[Usable | Unusable]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(partial(_encode_image, about), inputs))


def _encode_image(about: About, item: Input) -> Usable | Unusable:
    import torch
    from datasets import Image

    channels, height, width = about["image"]
    try:
        image = Image().decode_example({"path": item.value, "bytes": None})
        if channels == 1:
            if image.mode not in ("1", "L"):
                return Unusable(f"a picture in {image.mode}; the model reads grey ones")
            image = np.asarray(image.convert("L"))  # as training has it from arrays
        pixels = pixels_of(image, about["resize"])
    except DECODING_ERRORS as problem:
        return Unusable(f"does not decode: {problem}")
    if tuple(pixels.shape) != (channels, height, width):
        found = " × ".join(map(str, pixels.shape))
        return Unusable(f"an image of {found}; the model reads {channels} × {height} × {width}")
    mean = torch.tensor(about["image_mean"]).view(-1, 1, 1)
    std = torch.tensor(about["image_std"]).view(-1, 1, 1)
    return Usable({"image": (pixels - mean) / std, "label": 0})
