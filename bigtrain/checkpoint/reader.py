"""Find, verify and load a checkpoint of any engine on any number of ranks."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.format import MANIFEST, committed_checkpoints, verify_checkpoint
from bigtrain.checkpoint.shards import Shards
from bigtrain.checkpoint.state import TrainState
from bigtrain.engine.base import Engine
from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir


def newest_checkpoint(engine: Engine, run: RunDir) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, the same on every rank; and a line about each problem.

    One that does not verify is renamed, so that it does not count any more. A collective. Raises
    RequestError when root would load what others could have written.
    """
    newest: Path | None = None
    lines: list[str] = []
    warning = ""
    if engine.main:
        for path in reversed(committed_checkpoints(run)):
            problems = verify_checkpoint(path)
            if not problems:
                newest = path
                warning = _writable_by_others(path)
                break
            aside = path.with_name(f"broken-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            lines.append(f"{path.name} does not verify and is set aside: {problems[0]}")
    newest, lines, warning = engine.gather((newest, lines, warning))[0]
    if warning and os.geteuid() == 0:
        raise RequestError(
            warning,
            "a checkpoint of root's own, when root goes on from it",
            f"chown -R root {newest}; chmod -R o-w {newest}",
        )
    return newest, [*lines, warning] if warning else lines


def _writable_by_others(path: Path) -> str:
    """A line about a file of a checkpoint that somebody else may have written; empty: none."""
    for file in (path, *path.iterdir()):
        status = file.stat()
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o002:
            mode = f"{status.st_mode & 0o777:o}"
            return (
                f"{file} belongs to user {status.st_uid} and has mode {mode}: others may write it"
            )
    return ""


def load_checkpoint(engine: Engine, path: Path) -> tuple[TrainState, str]:
    """Restore engine and state from a checkpoint of any engine on any number of ranks.

    Returns the state, and what has changed since the checkpoint was written (empty: nothing). If
    the optimizer is another one, its state starts anew. Raises RequestError, before anything is
    changed, if the checkpoint is of another model.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    try:
        state = TrainState(**json.loads((path / "state.json").read_text()))
        shapes = manifest["shapes"]
        optimizer = manifest["optimizer"]
    except (TypeError, KeyError) as problem:
        raise RequestError(
            f"{path} is of another version of bigtrain ({problem})", "that version, or --fresh"
        ) from None
    _refuse_another_model(path, shapes, engine.shapes())
    facts = engine.facts()
    engine.restore(Shards(path, shapes), optimizer == facts["optimizer"])
    changes = [
        f"{key} {manifest[key]} → {value}" for key, value in facts.items() if manifest[key] != value
    ]
    return state, ", ".join(changes)


def _refuse_another_model(path: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises RequestError unless both have the same names with the same shapes."""
    for name in sorted(ours.keys() | saved.keys()):
        if saved.get(name) != ours.get(name):
            raise RequestError(
                f"{path}: {name} is {saved.get(name, 'absent')}, "
                f"and the model's {ours.get(name, 'absent')}",
                "a checkpoint of the same model",
                "the recipe as it was, or --fresh",
            )
