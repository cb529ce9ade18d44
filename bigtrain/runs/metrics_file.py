"""metrics.jsonl: its one writer and its readers, side by side.

The writer puts `kind` first: every line begins with `{"kind": "KIND"`. So readers can pass over the
kinds that they do not want without parsing them. A line that begins in another way (another program
wrote it) is parsed, and counts just the same.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.runs.directory import RunDir, to_json
from bigtrain.runs.events import OLD_EVENT_NAMES

Record = dict[str, Any]
Columns = dict[str, NDArray[Any]]

_KIND_FIRST = b'{"kind": "'
_OTHER_THAN_TRAIN = re.compile(rb'\n(?!\{"kind": "train")[^\n]+')


class MetricsFile:
    """The writer: append-only, one JSON object per line, handed to the system after every line."""

    def __init__(self, run: RunDir) -> None:
        self.file = run.metrics.open("a", encoding="utf-8")
        if self.file.tell() and _last_byte(run.metrics) != b"\n":
            self.file.write("\n")  # the process before this one was killed in the middle of a line

    def log(self, record: Record) -> None:
        self.file.write(_to_line(record) + "\n")
        self.file.flush()

    def samples(self, step: int, rows: list[Record]) -> None:
        """Tables of examples are not written here."""

    def close(self, summary: Record) -> None:
        self.file.close()


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def _to_line(record: Record) -> str:
    return to_json({"kind": record["kind"], **record})


def _parse_line(line: bytes) -> Record | None:
    """The record of a line, with events under today's names; None if it is no whole JSON object."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    if record.get("event") in OLD_EVENT_NAMES:
        record["event"] = OLD_EVENT_NAMES[record["event"]]
    return record


def read_metrics(path: Path, kind: str | None = None) -> Iterator[Record]:
    """The lines of one kind, or all; one that is not whole (cut short by a crash) is left out."""
    if not path.is_file():
        return
    wanted = f'{{"kind": "{kind}"'.encode()
    with path.open("rb") as file:
        for line in file:
            if kind and line.startswith(_KIND_FIRST) and not line.startswith(wanted):
                continue
            record = _parse_line(line)
            if record is not None and kind in (None, record.get("kind")):
                yield record


def read_columns(path: Path, types: dict[str, str]) -> tuple[Columns, list[Record]]:
    """The training lines as arrays of one length, and the lines of other kinds as records.

    `types`: the keys to read, each with "float64" or "int64"; what is absent or null becomes NaN,
    or 0 in int64. Lines that are not a whole JSON object are left out.
    Raises ValueError where a value is not of its type.

    A hundred thousand lines take a fifth of a second: pyarrow parses the training lines together.
    """
    others: list[Record] = []

    def keep_if_training(match: re.Match[bytes]) -> bytes:
        record = _parse_line(match[0])
        if record is None:
            return b""
        if record.get("kind") == "train":
            return b"\n" + _to_line(record).encode()
        others.append(record)
        return b""

    data = path.read_bytes() if path.is_file() else b""
    training = _OTHER_THAN_TRAIN.sub(keep_if_training, b"\n" + data)
    return _parse_columns(training, types), others


def _parse_columns(lines: bytes, types: dict[str, str]) -> Columns:
    import pyarrow as pa
    from pyarrow import json as arrow

    arrow_types = {"float64": pa.float64(), "int64": pa.int64()}
    schema = pa.schema([(name, arrow_types[types[name]]) for name in types])
    options = arrow.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")

    def parse(text: bytes) -> Any:
        if not text.strip():
            return schema.empty_table()
        return arrow.read_json(pa.BufferReader(text), parse_options=options)

    try:
        table = parse(lines)
    except pa.ArrowInvalid:  # a line that is not whole, or not text, or has NaN for a number
        records = [_parse_line(line) for line in lines.split(b"\n")]
        whole = [_to_line(record).encode() for record in records if record is not None]
        table = parse(b"\n".join(whole))
    columns = {}
    for name, type_name in types.items():
        missing = np.nan if type_name == "float64" else 0
        columns[name] = np.asarray(table[name].fill_null(missing))
    return columns
