"""Where a run's files are, and the files that come with bigtrain.

The run directory is the source of truth: everything a later command shows is read back from here.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.errors import RequestError

RUNS = Path("runs")


def asset(folder: str, name: str) -> Path:
    """A shipped file: beside the package in a checkout, inside it once installed."""
    here = Path(__file__).parent
    for root in (here, here.parent):
        if (path := root / folder / name).is_file():
            return path
    raise FileNotFoundError(f"{folder}/{name} is missing from this installation of bigtrain")


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file or none of it: a reader sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@dataclass(frozen=True)
class RunDir:
    """The files of one run below `runs/NAME`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def effective(self) -> Path:
        return self.path / "effective.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def write_json(self, path: Path, value: Any) -> None:
        write_atomic(path, json.dumps(value, indent=2) + "\n")


def run_directory(name: str, fresh: bool = False) -> RunDir:
    """`runs/NAME`, or with `fresh` the first of NAME, NAME-2, NAME-3 … that does not exist."""
    path = RUNS / name
    number = 2
    while fresh and path.exists():
        path = RUNS / f"{name}-{number}"
        number += 1
    return RunDir(path)


def find_run(ref: str) -> RunDir:
    """The run that `ref` (a name below runs/, or a directory) stands for; RequestError if there is none."""
    for path in (Path(ref), RUNS / ref):
        if (path / "recipe.yaml").is_file():
            return RunDir(path)
    known = sorted(path.parent.name for path in RUNS.glob("*/recipe.yaml"))
    raise RequestError(
        f"no run {ref!r}: no recipe.yaml in {ref} or {RUNS / ref}",
        f"one of: {', '.join(known)}" if known else "a run directory (there is none below runs/ yet)",
        "bigtrain train RECIPE",
    )


def read_metrics(path: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, of one kind or all; a last line cut short by a crash is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and (kind is None or record.get("kind") == kind):
                yield record
