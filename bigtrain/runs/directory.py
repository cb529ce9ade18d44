"""Where a run's files are, and the files that come with bigtrain.

The run directory is the source of truth: everything a later command shows is read back from here.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from bigtrain.config.renamed_keys import RENAMED_KEYS
from bigtrain.errors import RequestError

RUNS = Path("runs")


def asset(folder: str, name: str) -> Path:
    """A file that comes with bigtrain: beside the package in a checkout, else inside it."""
    package = Path(__file__).parent.parent
    for root in (package, package.parent):
        path = root / folder / name
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder}/{name} is missing from this installation of bigtrain")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader understands: a number that is not finite becomes null."""

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [clean(inner) for inner in item]
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
        self.path = path
        self.name = path.name
        self.recipe = path / "recipe.yaml"
        self.effective = path / "effective.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.model_inputs = path / "model_inputs"
        self.export = path / "export"
        self.logs = path / "logs"

    def settings(self) -> dict[str, Any]:
        """Setting → the value in force, from effective.json; empty where that cannot be read.

        Keys that had another name in an earlier version have their new one.
        """
        settings = {}
        try:
            for key, setting in json.loads(self.effective.read_text()).items():
                settings[RENAMED_KEYS.get(key, key)] = setting["value"]
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return {}
        return settings

    def write_json(self, path: Path, value: Any) -> None:
        write_atomic(path, to_json(value, indent=2) + "\n")


def run_directory(name: str, fresh: bool = False) -> RunDir:
    """`runs/NAME`, or with `fresh` the first of NAME, NAME-2, NAME-3 … that does not exist."""
    path = RUNS / name
    number = 1
    while fresh and path.exists():
        number += 1
        path = RUNS / f"{name}-{number}"
    return RunDir(path)


def find_run(reference: str, submitted: bool = False) -> RunDir:
    """The run of that name below runs/, or in that directory.

    `submitted`: one that has only been queued counts too.
    Raises RequestError if there is none.
    """
    for path in (Path(reference), RUNS / reference):
        if (path / "recipe.yaml").is_file() or (submitted and (path / "jobs.jsonl").is_file()):
            return RunDir(path)
    known = sorted(path.parent.name for path in RUNS.glob("*/recipe.yaml"))
    expected = "a run directory (there is none below runs/ yet)"
    if known:
        expected = f"one of: {', '.join(known)}"
    raise RequestError(
        f"no run {reference!r}: no recipe.yaml in {reference} or {RUNS / reference}",
        expected,
        "bigtrain train RECIPE",
    )
