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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from blake3 import blake3

from bigtrain.errors import RequestError
from bigtrain.runs.directory import write_atomic

Row = dict[str, Any]
_CHUNK = 1 << 24  # bytes that are hashed at once
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


@dataclass
class State:
    """What FILE.part.json says."""

    made_from: dict[str, Any]  # what decides the content
    rows: int = 0  # that are written and on disk
    unusable: int = 0
    unusable_first: list[str] = field(default_factory=list)
    unknown: int = 0  # rows of a table with categories that are new to the model
    size: int = 0  # bytes
    blake3: str = ""  # of these bytes


class PredictionFile:
    """FILE and what is known of it. As a context it holds FILE against other processes."""

    def __init__(self, path: Path, made_from: dict[str, Any]) -> None:
        """`made_from`: what decides the content, as JSON has it."""
        self.path = path
        self.state = State(made_from)
        self.part = path.with_name(path.name + ".part.json")
        self.about = path.with_name(path.name + ".about.json")
        self._hash = blake3()
        self._file: BinaryIO

    def __enter__(self) -> "PredictionFile":
        """Open FILE where it was left.

        Raises RequestError for a file that is not of these inputs and this model, or that another
        process writes.
        """
        known = self._read_state()
        if known is None:
            if self.path.exists():
                raise RequestError(
                    f"{self.path} exists already, and is not an unfinished file of predictions",
                    "a file that does not exist yet",
                    "another --out",
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._save_state(self.part)
            self.path.touch()
        elif known.made_from != self.state.made_from:
            names = [
                name
                for name, value in self.state.made_from.items()
                if known.made_from.get(name) != value
            ]
            self._refuse(f"was made from something else: not the same {', '.join(names)}")
        self._file = self.path.open("r+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._continue()
        except BlockingIOError:
            self._file.close()
            self._refuse("is being written by another process")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, text: str, rows: Sequence[Row]) -> None:
        """Add a block's text, and note that it is there once it is on disk."""
        content = text.encode()
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._hash.update(content)
        self.state.size += len(content)
        self.state.rows += len(rows)
        note_results(self.state, rows)
        self._save_state(self.part)

    def complete(self) -> None:
        """Note that nothing is to come."""
        self._save_state(self.about)
        self.part.unlink(missing_ok=True)

    def _read_state(self) -> State | None:
        for path in (self.part, self.about):
            if path.is_file() and self.path.is_file():
                return State(**json.loads(path.read_text(encoding="utf-8")))
        return None

    def _save_state(self, path: Path) -> None:
        self.state.blake3 = self._hash.hexdigest()
        write_atomic(path, json.dumps(asdict(self.state), indent=2) + "\n")

    def _continue(self) -> None:
        """Go to the end of what is known to be good, and cut off what an interrupted write left."""
        self.state = self._read_state() or self.state
        for start in range(0, self.state.size, _CHUNK):
            self._hash.update(self._file.read(min(_CHUNK, self.state.size - start)))
        beyond = self.path.stat().st_size > self.state.size
        is_finished = not self.part.exists()
        if self._hash.hexdigest() != self.state.blake3 or (beyond and is_finished):
            self._file.close()
            self._refuse("has been changed since it was written")
        self._file.truncate(self.state.size)

    def _refuse(self, problem: str) -> NoReturn:
        raise RequestError(
            f"{self.path} {problem}",
            "the file that the same command has left",
            f"another --out, or remove {self.path}",
        )


def note_results(state: State, rows: Sequence[Row]) -> None:
    """Count the rows that have an `error`, and name the first; and those with new categories."""
    for row in rows:
        state.unknown += "unknown" in row
        if "error" not in row:
            continue
        state.unusable += 1
        if len(state.unusable_first) < _NAMED:
            place = "" if row["row"] is None else f" row {row['row']}"
            state.unusable_first.append(f"{row['file']}{place}: {row['error']}")
