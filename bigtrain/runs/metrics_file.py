"""metrics.jsonl: its writer and its readers, side by side."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bigtrain.runs.directory import RunDir, to_json

_OTHER = b'{"kind": "e'  # how a line of metrics.jsonl begins that is an event or an evaluation


def read_metrics(path: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, of one kind or all; a last line cut short by a crash is left out."""
    start = f'{{"kind": "{kind}"' if kind else "{"
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from records(line for line in file if line.startswith(start))


def records(lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    """The lines that are a JSON object each; others are left out."""
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                yield record


def read_columns(path: Path, names: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The training lines as numpy arrays of one length (name → float64 or int64), and the other lines as records.

    Absent and null become NaN (0 in int64). Lines that are not whole are left out. A hundred thousand lines take a
    fifth of a second: training lines go to pyarrow in one piece, which the few others are cut out of.
    """
    data = path.read_bytes() if path.is_file() else b""
    first, *rest = (b"\n" + data).split(b"\n" + _OTHER)
    parted = [
        piece.partition(b"\n") for piece in rest
    ]  # the rest of such a line, and the training lines after it
    others = records(_OTHER + line for line, _, _ in parted)
    return _columns(b"\n".join([first, *(lines for _, _, lines in parted)]), names), list(others)


def _columns(lines: bytes, names: dict[str, str]) -> dict[str, Any]:
    import numpy as np
    import pyarrow as pa
    from pyarrow import json as arrow

    schema = pa.schema(
        [(name, pa.float64() if of == "float64" else pa.int64()) for name, of in names.items()]
    )
    options = arrow.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        table = (
            arrow.read_json(pa.BufferReader(lines), parse_options=options)
            if lines.strip()
            else schema.empty_table()
        )
    except (
        pa.ArrowInvalid
    ):  # a line that is not whole, or not text, or none of ours: leave such lines out
        whole = [
            line
            for line in lines.split(b"\n")
            if line.startswith(b'{"kind": "train"') and list(records([line]))
        ]
        if len(joined := b"\n".join(whole)) >= len(lines.strip()):
            raise
        return _columns(joined, names)
    filled = {
        name: table[name].fill_null(float("nan") if of == "float64" else 0)
        for name, of in names.items()
    }
    return {name: np.asarray(column) for name, column in filled.items()}


Record = dict[str, Any]


class MetricsFile:
    """metrics.jsonl: append-only, one JSON object a line, on disk after every line."""

    def __init__(self, run: RunDir) -> None:
        self.file = run.metrics.open("a", encoding="utf-8")
        if self.file.tell() and not run.metrics.read_bytes().endswith(b"\n"):
            self.file.write("\n")  # the last run died in the middle of a line

    def log(self, record: Record) -> None:
        self.file.write(to_json(record) + "\n")
        self.file.flush()

    def samples(self, step: int, rows: list[Record]) -> None:
        """Tables of examples have no place among numbers."""

    def close(self, summary: Record) -> None:
        self.file.close()
