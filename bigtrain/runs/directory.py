"""Where a run's files are, and the files that come with bigtrain.

The run directory is the source of truth: everything a later command shows is read back from here.
"""

import json
import math
import os
from itertools import chain, count
from pathlib import Path
from typing import Any

from bigtrain.errors import RequestError

RUNS = Path("runs")


def asset(folder: str, name: str) -> Path:
    """A shipped file: beside the package in a checkout, inside it once installed."""
    here = Path(__file__).parent.parent
    for root in (here, here.parent):
        if (path := root / folder / name).is_file():
            return path
    raise FileNotFoundError(f"{folder}/{name} is missing from this installation of bigtrain")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader understands: a number that is not finite becomes null."""

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(clean(value), indent=indent)


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file or none of it: a reader sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class RunDir:
    """The files of one run below `runs/NAME`."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.recipe, self.effective = path / "recipe.yaml", path / "effective.json"
        self.metrics, self.summary = path / "metrics.jsonl", path / "summary.json"
        self.checkpoints, self.export, self.logs = (
            path / "checkpoints",
            path / "export",
            path / "logs",
        )

    def write_json(self, path: Path, value: Any) -> None:
        write_atomic(path, to_json(value, indent=2) + "\n")


def run_directory(name: str, fresh: bool = False) -> RunDir:
    """`runs/NAME`, or with `fresh` the first of NAME, NAME-2, NAME-3 … that does not exist."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(RunDir(RUNS / each) for each in names if not (fresh and (RUNS / each).exists()))


def find_run(ref: str, submitted: bool = False) -> RunDir:
    """The run that `ref` (a name below runs/, or a directory) stands for; with `submitted` one that is only queued counts.

    RequestError if there is none.
    """
    for path in (Path(ref), RUNS / ref):
        if (path / "recipe.yaml").is_file() or (submitted and (path / "jobs.jsonl").is_file()):
            return RunDir(path)
    known = sorted(path.parent.name for path in RUNS.glob("*/recipe.yaml"))
    raise RequestError(
        f"no run {ref!r}: no recipe.yaml in {ref} or {RUNS / ref}",
        f"one of: {', '.join(known)}"
        if known
        else "a run directory (there is none below runs/ yet)",
        "bigtrain train RECIPE",
    )
