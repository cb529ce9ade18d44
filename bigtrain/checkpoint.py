"""Committed checkpoints: complete and verified, or not there.

Everything is written under a temporary name. Each rank hashes and syncs the files it answers for; after a barrier
rank 0 writes the manifest and renames. The rename is the commit.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigtrain.engine import Engine
from bigtrain.errors import RequestError
from bigtrain.rundir import RunDir

MANIFEST = "manifest.json"
_PACKAGES = ("torch", "deepspeed", "accelerate", "transformers")


@dataclass
class State:
    """Where a run stands; together with the engine's shards it decides the next step."""

    step: int = 0  # optimizer steps done, the skipped ones included
    applied: int = 0  # those that changed the weights; the learning rate follows this one
    samples: int = 0
    weight: int = 0  # target tokens or examples
    skips: int = 0  # steps in a row that were not applied


def save(engine: Engine, run: RunDir, state: State, keep: int) -> Path:
    """Write and commit a checkpoint; then delete the oldest beyond `keep`. A collective.

    Raises NotSavedError on every rank when one could not write: the checkpoints before it are untouched.
    """
    final = run.checkpoints / f"step-{state.step:08d}"
    building = run.checkpoints / f".{final.name}.tmp"
    engine.sync_buffers()
    tensors = engine.snapshot()
    _together(engine, lambda: _prepare(run, building) if engine.main else None)
    entries = _together(engine, lambda: _write_shard(building / f"rank-{engine.rank:05d}.safetensors", tensors))
    files = {name: entry for part in entries for name, entry in part.items()}
    _together(engine, lambda: _commit(engine, building, final, files, state) if engine.main else None)
    if engine.main:
        _prune(run, keep)
    return final


class NotSavedError(Exception):
    """A checkpoint could not be written."""


def _together(engine: Engine, act: Callable[[], Any]) -> list[Any]:
    """What `act` returns on every rank; NotSavedError on every rank if the disk failed one of them."""
    try:
        outcome: tuple[Any, str | None] = (act(), None)
    except (OSError, SafetensorError) as problem:
        outcome = (None, f"rank {engine.rank}: {problem}")
    outcomes = engine.gather(outcome)
    if failed := [text for _, text in outcomes if text]:
        raise NotSavedError("; ".join(failed))
    return [value for value, _ in outcomes]


def _prepare(run: RunDir, building: Path) -> None:
    """An empty folder to write in, and the space for it: as much as the last checkpoint took."""
    for left_over in run.checkpoints.glob(".step-*.tmp"):
        shutil.rmtree(left_over)
    building.mkdir(parents=True)
    newest = committed(run)[-1:]
    needed = sum(file.stat().st_size for path in newest for file in path.iterdir())
    free = shutil.disk_usage(building).free
    if free < needed:
        raise OSError(f"{free:,} bytes are free in {run.checkpoints}, and the last checkpoint took {needed:,}")


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    save_file(tensors, path)
    return {path.name: _settle(path)}


def _settle(path: Path) -> dict[str, Any]:
    """Force a file to disk; its size and hash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "blake3": blake3().update_mmap(path).hexdigest()}


def _commit(engine: Engine, building: Path, final: Path, files: dict[str, Any], state: State) -> None:
    state_path = building / "state.json"
    state_path.write_text(json.dumps(asdict(state)))
    manifest = {
        "files": files | {state_path.name: _settle(state_path)},
        "world_size": engine.world_size,
        "engine": engine.plan.kind,
        "offload": engine.plan.offload,
        "precision": engine.plan.precision,
        "versions": {name: version(name) for name in _PACKAGES},
    }
    path = building / MANIFEST
    path.write_text(json.dumps(manifest, indent=1))
    _settle(path)
    for folder in {building, *(path for path in building.rglob("*") if path.is_dir())}:
        _sync_folder(folder)
    if final.exists():  # written again after a resume from an older one
        shutil.rmtree(final)
    building.rename(final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def committed(run: RunDir) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(path for path in run.checkpoints.glob("step-????????") if path.is_dir())


def _prune(run: RunDir, keep: int) -> None:
    for path in committed(run)[:-keep]:
        # A name that does not count first: killed in the middle, it must not look like a broken checkpoint.
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp")))


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint: missing, changed, unreadable or unexpected files. Empty: nothing."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return [f"{MANIFEST}: cannot be read ({type(problem).__name__})"]
    problems = [f"{file.name}: not in the manifest" for file in path.iterdir() if file.name not in {*files, MANIFEST}]
    for name, entry in files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            problems.append(f"{name}: lies outside the checkpoint")
        elif not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != entry["size"]:
            problems.append(f"{name}: {file.stat().st_size:,} bytes instead of {entry['size']:,}")
        elif blake3().update_mmap(file).hexdigest() != entry["blake3"]:
            problems.append(f"{name}: content does not match its hash")
    return problems


def newest(engine: Engine, run: RunDir) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, the same on every rank, and a line about each newer one that does not."""
    found: tuple[Path | None, list[str]] = (None, [])
    if engine.main:
        broken: list[str] = []
        for path in reversed(committed(run)):
            if problems := verify(path):
                aside = path.with_name(f"broken-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                broken.append(f"{path.name} does not verify and is set aside: {problems[0]}")
                continue
            found = (path, broken)
            break
        else:
            found = (None, broken)
    result: tuple[Path | None, list[str]] = engine.gather(found)[0]
    return result


def load(engine: Engine, path: Path) -> tuple[State, str]:
    """Restore engine and state from a checkpoint of any engine on any number of ranks; and a line if it is another.

    RequestError if it is of another model.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    engine.restore(_Shards(path))
    asked = {"engine": engine.plan.kind, "world_size": engine.world_size, "precision": engine.plan.precision}
    moved = [f"{key} {manifest[key]} → {value}" for key, value in asked.items() if manifest[key] != value]
    return State(**json.loads((path / "state.json").read_text())), ", ".join(moved)


class _Shards:
    """All ranks' files of a checkpoint, read as whole parameters: any part of any of them, wherever it was written.

    safetensors only: a checkpoint holds no code, and none is run.
    """

    def __init__(self, path: Path) -> None:
        self.files = [safe_open(file, framework="pt") for file in sorted(path.glob("rank-*.safetensors"))]
        # parameter → key → the pieces, as (start or None for a scalar, file, name in it)
        self.pieces: dict[str, dict[str, list[tuple[int | None, Any, str]]]] = {}
        for file in self.files:
            for name in file.keys():  # noqa: SIM118
                parameter, key, start = name.split("|")
                place = None if start == "scalar" else int(start)
                self.pieces.setdefault(parameter, {}).setdefault(key, []).append((place, file, name))

    def keys_of(self, parameter: str) -> list[str]:
        return list(self.pieces.get(parameter, {}))

    def is_scalar(self, parameter: str, key: str) -> bool:
        return self.pieces[parameter][key][0][0] is None

    def scalar(self, parameter: str, key: str) -> Tensor:
        _, file, name = self.pieces[parameter][key][0]
        found: Tensor = file.get_tensor(name)
        return found

    def read(self, parameter: str, key: str, start: int, into: Tensor) -> None:
        """Fill `into` with the elements from `start` on. RequestError if the checkpoint does not cover them."""
        covered = 0
        for place, file, name in self.pieces[parameter][key]:
            piece = file.get_slice(name)
            first, last = max(start, place or 0), min(start + into.numel(), (place or 0) + piece.get_shape()[0])
            if first < last:
                into[first - start : last - start].copy_(piece[first - (place or 0) : last - (place or 0)])
                covered += last - first
        if covered != into.numel():
            raise RequestError(f"the checkpoint's {parameter} has another size", "a checkpoint of the same model")
