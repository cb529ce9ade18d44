"""Find, verify and load a checkpoint of any engine on any number of ranks."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blake3 import blake3
from torch import Tensor

from bigtrain.checkpoint.format import MANIFEST, committed_checkpoints, verify_checkpoint
from bigtrain.checkpoint.shards import Shards
from bigtrain.checkpoint.state import TrainState
from bigtrain.engine.base import Engine
from bigtrain.engine.fragments import WEIGHT
from bigtrain.errors import RequestError, TrainingFailed
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
            "a checkpoint of root's own, when root resumes from it",
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


class Restored(NamedTuple):
    """What a load has brought back."""

    state: TrainState
    moved: str  # how this engine differs from the one that wrote the checkpoint; empty: not at all
    load_seconds: float
    check_seconds: float  # for comparing the weights in use with the checkpoint, after the load


def load_checkpoint(engine: Engine, path: Path) -> Restored:
    """Restore engine and state from a checkpoint of any engine on any number of ranks.

    If the optimizer is another one, its state starts anew. A collective. Raises RequestError,
    before anything is changed, if the checkpoint is of another model; TrainingFailed, on every
    rank, if the next forward pass of any rank would read other weights than the checkpoint's.
    """
    began = time.perf_counter()
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
    shards = Shards(path, shapes)
    engine.restore(shards, optimizer == facts["optimizer"])
    engine.sum(0.0)  # wait for all ranks: the comparison's seconds are its own
    loaded = time.perf_counter()
    _refuse_other_weights(engine, shards, path)
    checked = time.perf_counter()
    changes = []
    for key, value in facts.items():
        saved = manifest.get(key, value)  # a manifest of an earlier version may lack it
        if saved != value:
            changes.append(f"{key} {saved} → {value}")
    return Restored(state, ", ".join(changes), loaded - began, checked - loaded)


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


def _refuse_other_weights(engine: Engine, shards: Shards, path: Path) -> None:
    """Raises TrainingFailed, on every rank, if forward passes would use other weights.

    A few elements of the weights in use are compared with the checkpoint's. A collective.
    """
    difference = ""
    for sample in engine.weights_in_use():
        # As exact as the checkpoint: at least fp32, and more where the model has fp64 layers.
        dtype = torch.promote_types(torch.float32, sample.values.dtype)
        saved = torch.empty(sample.piece.shape, dtype=dtype)
        shards.read(sample.name, WEIGHT, sample.piece, saved)
        used_hash = _hash(sample.values)
        saved_hash = _hash(saved.to(sample.values.dtype))
        if used_hash != saved_hash:
            start = sample.piece.offsets[0]
            stop = start + sample.piece.shape[0]
            difference = (
                f"{sample.name}[{start}:{stop}] on rank {engine.rank}: "
                f"a forward pass would use {used_hash}, and {path} has {saved_hash}"
            )
            break
    # A sum is cheaper than to gather texts.
    if engine.sum(bool(difference)) > 0:
        differences = [text for text in engine.gather(difference) if text]
        other_kind = "" if engine.plan.kind == "ddp" else "engine.kind=ddp"
        raise TrainingFailed(
            differences[0],
            "the checkpoint's weights (the values are BLAKE3 hashes)",
            other_kind,
        )


def _hash(values: Tensor) -> str:
    return blake3(values.view(torch.uint8).numpy().data).hexdigest(8)
