"""The file that predictions are appended to, block by block, and that goes on after any end.

Beside FILE, FILE.part.json says what the predictions are of and how much of FILE is known to be
good. When FILE is complete it is called FILE.about.json, so both together say what was done.
"""

import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from bigtrain.errors import RequestError
from bigtrain.runs.directory import write_atomic

Row = dict[str, Any]
_NAMED = 5  # unusable inputs, in messages


def row_writer(suffix: str, classes: list[str]) -> tuple[str, Callable[[Row], str]]:
    """What comes before the rows, and a row as text: csv for that suffix, else jsonl.

    In a csv each class has a column of its own, called `p(CLASS)`.
    """
    if suffix != ".csv":
        return "", lambda row: json.dumps(row, ensure_ascii=False) + "\n"
    columns = ["file", "row", "prediction", "cut", "unknown", "error"]
    probabilities = [f"p({name})" for name in classes]

    def to_csv(row: Row) -> str:
        values = [row.get(column) for column in columns]
        known = row.get("probabilities", {})
        return _csv_line(values + [known.get(name) for name in classes])

    return _csv_line(columns + probabilities), to_csv


def _csv_line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


class PredictionFile:
    """FILE and what is known of it. As a context it holds FILE against other processes."""

    def __init__(self, path: Path, made_from: dict[str, Any], num_inputs: int) -> None:
        """`made_from`: what decides the content, as JSON has it."""
        self.path = path
        self.made_from = made_from
        self.num_inputs = num_inputs
        self.part = path.with_name(path.name + ".part.json")
        self.about = path.with_name(path.name + ".about.json")
        self.rows = 0  # that are written
        self.unusable: list[str] = []  # the first of them, by name
        self.num_unusable = 0
        self.num_unknown = 0  # rows of a table with values that are new to the model
        self._size = 0  # bytes that are written
        self._hash = blake3()
        self._file: BinaryIO | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every input has its row."""
        return self.rows == self.num_inputs

    def __enter__(self) -> "PredictionFile":
        """Open FILE where it was left.

        Raises RequestError for a file that is not of these inputs and this model, or that another
        process writes.
        """
        known = self._read_state()
        if known is None and self.path.exists():
            raise RequestError(
                f"{self.path} exists already, and is not an unfinished file of predictions",
                "a file that does not exist yet",
                "another --out",
            )
        if known is not None and known["made_from"] != self.made_from:
            raise RequestError(
                f"{self.path} was made by another command: {_difference(known, self.made_from)}",
                "the same model, files and options",
                f"another --out, or remove {self.path}",
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if known is None:
            self._save_state(self.part)
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"another process is writing {self.path}", "one process for each file"
            ) from None
        if known is not None:
            # Anew: the other process may have gone on until it let go.
            self._continue(self._read_state() or known)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, text: str, rows: Sequence[Row]) -> None:
        """Add a block's text, and note that it is there once it is on disk."""
        assert self._file is not None
        content = text.encode()
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._hash.update(content)
        self._size += len(content)
        self.rows += len(rows)
        for row in rows:
            self.num_unknown += "unknown" in row
            if "error" in row:
                self.num_unusable += 1
                if len(self.unusable) < _NAMED:
                    self.unusable.append(f"{name_of(row)}: {row['error']}")
        self._save_state(self.part)

    def complete(self) -> None:
        """Note that nothing is to come."""
        self._save_state(self.about)
        self.part.unlink(missing_ok=True)

    def _read_state(self) -> dict[str, Any] | None:
        for path in (self.part, self.about):
            if path.is_file() and self.path.is_file():
                state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                return state
        return None

    def _save_state(self, path: Path) -> None:
        state = {
            "made_from": self.made_from,
            "rows": self.rows,
            "unusable": self.num_unusable,
            "unusable_first": self.unusable,
            "unknown": self.num_unknown,
            "bytes": self._size,
            "blake3": self._hash.hexdigest(),
        }
        write_atomic(path, json.dumps(state, indent=2) + "\n")

    def _continue(self, known: dict[str, Any]) -> None:
        """Go to the end of what is known to be good, and cut off what is beyond."""
        assert self._file is not None
        content = self._file.read(known["bytes"])
        if blake3(content).hexdigest() != known["blake3"]:
            raise RequestError(
                f"{self.path} has been changed since it was written",
                "the file as it was",
                f"another --out, or remove {self.path}",
            )
        self._file.truncate(known["bytes"])
        self._hash.update(content)
        self._size = known["bytes"]
        self.rows = known["rows"]
        self.unusable = known["unusable_first"]
        self.num_unusable = known["unusable"]
        self.num_unknown = known["unknown"]


def name_of(row: Row) -> str:
    """An input, in messages."""
    return row["file"] if row["row"] is None else f"{row['file']} row {row['row']}"


def _difference(known: dict[str, Any], made_from: dict[str, Any]) -> str:
    names = [name for name in made_from if known["made_from"].get(name) != made_from[name]]
    return f"{', '.join(names)} differ" if len(names) > 1 else f"{', '.join(names)} differs"
