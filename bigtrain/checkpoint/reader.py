"""Find, verify and load a checkpoint of any engine on any number of ranks."""

import json
import os
import shutil
from pathlib import Path

from bigtrain.checkpoint.format import MANIFEST, Shards, committed_checkpoints, verify_checkpoint
from bigtrain.checkpoint.state import TrainState
from bigtrain.engine.base import Engine
from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir


def newest_checkpoint(engine: Engine, run: RunDir) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, the same on every rank, and a line about each that is not as it should be.

    Raises RequestError when root would load what anybody could have written.
    """
    found: Path | None = None
    lines: list[str] = []
    if engine.main:
        for path in reversed(committed_checkpoints(run)):
            if not (problems := verify_checkpoint(path)):
                found = path
                break
            aside = path.with_name(f"broken-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            lines.append(f"{path.name} does not verify and is set aside: {problems[0]}")
    found, lines, stranger = engine.gather((found, lines, _stranger(found) if found else ""))[0]
    if stranger and os.geteuid() == 0:
        fix = f"chown -R root {found}; chmod -R o-w {found}"
        raise RequestError(stranger, "a checkpoint of root's own, when root goes on from it", fix)
    return found, [*lines, *filter(None, [stranger])]


def _stranger(path: Path) -> str:
    """A file of a checkpoint that somebody else may have written; empty: none."""
    for file in (path, *path.iterdir()):
        found = file.stat()
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o002:
            return f"{file} belongs to user {found.st_uid} and has mode {found.st_mode & 0o777:o}: others may write it"
    return ""


def load_checkpoint(engine: Engine, path: Path) -> tuple[TrainState, str]:
    """Restore engine and state from a checkpoint of any engine on any number of ranks; and a line if it is another.

    Another optimizer starts anew. RequestError, before anything is changed, if it is of another model.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    try:
        state = TrainState(**json.loads((path / "state.json").read_text()))
        shapes, optimizer = manifest["shapes"], manifest["optimizer"]
    except (TypeError, KeyError) as problem:
        raise RequestError(
            f"{path} is of another version of bigtrain ({problem})", "that version, or --fresh"
        ) from None
    ours, facts = engine.shapes(), engine.facts()
    if other := sorted(
        name for name in ours.keys() | shapes.keys() if ours.get(name) != shapes.get(name)
    ):
        found = f"{path}: {other[0]} is {shapes.get(other[0], 'absent')}, and the model's {ours.get(other[0], 'absent')}"
        raise RequestError(
            found, "a checkpoint of the same model", "the recipe as it was, or --fresh"
        )
    engine.restore(Shards(path), optimizer == facts["optimizer"])
    moved = [
        f"{key} {manifest[key]} → {value}" for key, value in facts.items() if manifest[key] != value
    ]
    return state, ", ".join(moved)
