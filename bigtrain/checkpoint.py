"""Committed checkpoints: complete and verified, or not there.

Everything is written under a temporary name. Each rank hashes and syncs the files it answers for; after a barrier
rank 0 writes the manifest and renames. The rename is the commit.
"""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blake3 import blake3
from safetensors import safe_open
from torch import Tensor

from bigtrain.engine import Engine
from bigtrain.errors import RequestError, TrainingFailed
from bigtrain.load import to_yaml
from bigtrain.recipe import Recipe
from bigtrain.rundir import RunDir

MANIFEST = "manifest.json"
_PACKAGES = ("torch", "deepspeed", "accelerate", "transformers")


@dataclass
class State:
    """Where a run stands; together with weights and optimizer it decides the next step."""

    step: int = 0  # optimizer steps done, the skipped ones included
    applied: int = 0  # those that changed the weights; the learning rate follows this one
    samples: int = 0  # the position in the stream of samples
    weight: int = 0  # target tokens or examples
    skips: int = 0  # steps in a row that were not applied
    rewinds: int = 0  # since the last checkpoint
    bad: list[str] = field(default_factory=list)  # samples that could not be read
    data_size: int = 0  # training samples there were
    recent: list[float] = field(default_factory=list)  # losses that a spike is measured against
    evaluated: int = 0  # the step of the last evaluation
    results: dict[str, float] = field(default_factory=dict)  # and what it found
    best: float | None = None  # of train.keep_best, turned so that lower is better
    best_step: int = 0
    best_metric: str | None = None
    wandb_id: str = ""


@dataclass(frozen=True)
class Saved:
    """What became of a checkpoint."""

    step: int
    path: Path
    seconds: float  # from the snapshot to the commit
    blocked: float  # how much of that training had to wait
    writing: float = 0.0  # how much of it went into writing, syncing and hashing, on the slowest rank
    problem: str = ""


class NotSavedError(Exception):
    """A checkpoint could not be written."""


class Checkpoints:
    """Writes a run's checkpoints: from a snapshot, by a thread of each rank, committed by all ranks together.

    One is under way at most. What fails on one rank fails on all, and leaves the checkpoints before it alone.
    """

    def __init__(self, engine: Engine, run: RunDir, recipe: Recipe, state: State) -> None:
        """`state`: where the run stands, at step 0 or as its last checkpoint has it."""
        self.engine, self.run, self.settings = engine, run, recipe.train
        # The last one deleted. The next is written over its files, whose blocks and pages in memory are at hand: here
        # five times faster than new files, and no more space than writing takes anyway.
        self.spare = run.checkpoints / ".spare"
        self.recipe_hash = blake3(to_yaml(recipe).encode()).hexdigest()
        self.writer: threading.Thread | None = None
        self.state = replace(state)
        self.outcome: tuple[Any, str] = (None, "")
        self.began = self.blocked = 0.0

    @property
    def final(self) -> Path:
        return self.run.checkpoints / f"step-{self.state.step:08d}"

    @property
    def building(self) -> Path:
        return self.run.checkpoints / f".{self.final.name}.tmp"

    def close(self) -> None:
        """Nothing more will be written."""
        if self.engine.main:
            shutil.rmtree(self.spare, ignore_errors=True)

    def begin(self, state: State) -> list[Saved]:
        """Copy everything to the host and start writing; returns what became of the one before. A collective."""
        before = self.finish()
        if self.state.step == state.step > 0:  # after a rewind: it is there, and must not be lost while written anew
            return before
        self.began = time.perf_counter()
        state.rewinds = 0
        self.state = replace(state, recent=list(state.recent), results=dict(state.results), bad=list(state.bad))
        self.engine.sync_buffers()
        tensors = self.engine.snapshot()
        try:
            self._together(lambda: self._prepare() if self.engine.main else None)
        except NotSavedError as problem:
            return [*before, Saved(state.step, self.final, 0.0, 0.0, problem=str(problem))]
        path = self.building / f"rank-{self.engine.rank:05d}.safetensors"
        self.writer = threading.Thread(target=self._write, args=(path, tensors), daemon=True)
        self.writer.start()
        self.blocked = time.perf_counter() - self.began
        return before

    def written(self) -> bool:
        """Whether this rank's part of the checkpoint under way is on disk (or has failed)."""
        return self.writer is not None and not self.writer.is_alive()

    def finish(self) -> list[Saved]:
        """Wait for the checkpoint under way, if any, and commit it; then delete the oldest. A collective."""
        if self.writer is None:
            return []
        waited = time.perf_counter()
        self.writer.join()
        self.writer = None
        problem, writing = "", 0.0
        try:
            parts = self._together(lambda: self.outcome[0], self.outcome[1])
            files = {name: entry for part, _ in parts for name, entry in part.items()}
            writing = max(seconds for _, seconds in parts)
            self._together(lambda: self._commit(files) if self.engine.main else None)
        except NotSavedError as failure:
            problem = str(failure)
            if self.engine.main:  # the disk may be full: metrics.jsonl needs what this took
                shutil.rmtree(self.building, ignore_errors=True)
        now = time.perf_counter()
        return [Saved(self.state.step, self.final, now - self.began, self.blocked + now - waited, writing, problem)]

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        began = time.perf_counter()
        try:
            write_tensors(tensors, path)
            self.outcome = (({path.name: _settle(path)}, time.perf_counter() - began), "")
        except Exception as problem:  # whatever it is, the other ranks must hear of it
            self.outcome = (None, str(problem) or type(problem).__name__)

    def _together(self, act: Callable[[], Any], failed: str = "") -> list[Any]:
        """What `act` returns on every rank; NotSavedError on every rank if the disk failed one of them."""
        value = None
        try:
            value = None if failed else act()
        except OSError as problem:
            failed = str(problem)
        outcomes = self.engine.gather((value, f"rank {self.engine.rank}: {failed}" if failed else ""))
        if problems := [text for _, text in outcomes if text]:
            raise NotSavedError("; ".join(problems))
        return [value for value, _ in outcomes]

    def _prepare(self) -> None:
        """A folder to write in, and the space for it: as much as the last checkpoint took."""
        for left_over in self.run.checkpoints.glob(".step-*.tmp"):
            shutil.rmtree(left_over)
        shards = {f"rank-{rank:05d}.safetensors" for rank in range(self.engine.world_size)}
        if self.spare.is_dir():
            for file in self.spare.iterdir():
                if file.name not in shards:
                    file.unlink()
            self.spare.rename(self.building)
        self.building.mkdir(parents=True, exist_ok=True)
        newest = committed(self.run)[-1:]
        needed = sum(file.stat().st_size for path in newest for file in path.iterdir())
        free = shutil.disk_usage(self.building).free + sum(file.stat().st_size for file in self.building.iterdir())
        if free < needed:
            raise OSError(f"{free:,} bytes are free in {self.run.checkpoints}, and the last checkpoint took {needed:,}")

    def _commit(self, files: dict[str, Any]) -> None:
        engine, building = self.engine, self.building
        state_path = building / "state.json"
        state_path.write_text(json.dumps(asdict(self.state)))
        manifest = {
            "files": files | {state_path.name: _settle(state_path)},
            **engine.facts(),
            "offload": engine.plan.offload,
            "shapes": engine.shapes(),
            "recipe": self.recipe_hash,
            "versions": {name: version(name) for name in _PACKAGES},
        }
        path = building / MANIFEST
        path.write_text(json.dumps(manifest | {"seal": seal(manifest)}, indent=1))
        _settle(path)
        _sync_folder(building)
        if self.final.exists():  # written again after a resume from an older one
            shutil.rmtree(self.final)
        building.rename(self.final)
        _sync_folder(self.run.checkpoints)
        with contextlib.suppress(OSError):  # what is committed stays so, whatever becomes of the old ones
            self._prune()

    def _prune(self) -> None:
        """Delete all but the newest `keep` and the best: only now that a newer one is committed."""
        for path in committed(self.run)[: -self.settings.keep]:
            if not (self.settings.keep_best and path.name == f"step-{self.state.best_step:08d}"):
                # A name that does not count first: killed in the middle, it must not look like a broken checkpoint.
                shutil.rmtree(self.spare, ignore_errors=True)
                path.rename(self.spare)


_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
_DTYPES |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """What safetensors' save_file writes, over a file that may be there; and without its copy of every tensor."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each is aligned
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.truncate()


def _settle(path: Path) -> dict[str, Any]:
    """Force a file to disk; its size and hash, taken meanwhile."""
    with path.open("rb") as file, ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, file.fileno())
        entry = {"size": path.stat().st_size, "blake3": blake3().update_mmap(path).hexdigest()}
        synced.result()
    return entry


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def committed(run: RunDir) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(path for path in run.checkpoints.glob("step-????????") if path.is_dir())


def seal(manifest: dict[str, Any]) -> str:
    """The manifest's own hash: a changed bit in it is found too."""
    return blake3(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint: missing, changed, unreadable or unexpected files. Empty: nothing."""
    if path.is_symlink():
        return ["it is a link to somewhere else"]
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, sealed = manifest["files"], manifest.pop("seal")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return [f"{MANIFEST}: cannot be read ({type(problem).__name__})"]
    if sealed != seal(manifest):
        return [f"{MANIFEST}: content does not match its hash"]
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
    """The newest checkpoint that verifies, the same on every rank, and a line about each that is not as it should be.

    Raises RequestError when root would load what anybody could have written.
    """
    found: Path | None = None
    lines: list[str] = []
    if engine.main:
        for path in reversed(committed(run)):
            if not (problems := verify(path)):
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


class Restored(NamedTuple):
    """What a load has brought back."""

    state: State
    moved: str  # how this engine differs from the one that wrote the checkpoint; empty: in nothing
    load_seconds: float
    check_seconds: float  # of comparing the weights in use with the checkpoint, after the load


def load(engine: Engine, path: Path) -> Restored:
    """Restore engine and state from a checkpoint of any engine on any number of ranks. A collective.

    Another optimizer starts anew. RequestError, before anything is changed, if it is of another model. TrainingFailed
    on every rank if the next forward pass of any would read other weights than the checkpoint's.
    """
    began = time.perf_counter()
    manifest = json.loads((path / MANIFEST).read_text())
    try:
        state = State(**json.loads((path / "state.json").read_text()))
        shapes, optimizer = manifest["shapes"], manifest["optimizer"]
    except (TypeError, KeyError) as problem:
        raise RequestError(f"{path} is of another version of bigtrain ({problem})", "that version, or --fresh") from None
    ours, facts = engine.shapes(), engine.facts()
    if other := sorted(name for name in ours.keys() | shapes.keys() if ours.get(name) != shapes.get(name)):
        found = f"{path}: {other[0]} is {shapes.get(other[0], 'absent')}, and the model's {ours.get(other[0], 'absent')}"
        raise RequestError(found, "a checkpoint of the same model", "the recipe as it was, or --fresh")
    shards = Shards(path)
    engine.restore(shards, optimizer == facts["optimizer"])
    loaded = time.perf_counter()
    _refuse_other_weights(engine, shards, path)
    moved = [f"{key} {manifest[key]} → {value}" for key, value in facts.items() if manifest[key] != value]
    return Restored(state, ", ".join(moved), loaded - began, time.perf_counter() - loaded)


def _refuse_other_weights(engine: Engine, shards: "Shards", path: Path) -> None:
    """Compare a few of the weights that forward passes use with the checkpoint's, on every rank. A collective.

    An engine may keep copies of the weights that a load does not reach (ZeRO-3 has done so): training would go on from
    a mixture of old and new weights, and no number would look wrong at once. Raises TrainingFailed.
    """
    different = ""
    for sample in engine.weights_in_use():
        saved = torch.empty(sample.values.shape)
        shards.read(sample.name, "weight", sample.start, saved)
        used_hash = _hash(sample.values)
        saved_hash = _hash(saved.to(sample.values.dtype))
        if used_hash != saved_hash:
            stop = sample.start + len(saved)
            different = (
                f"{sample.name}[{sample.start}:{stop}] on rank {engine.rank}: "
                f"a forward pass would use {used_hash}, and {path} has {saved_hash}"
            )
            break
    problems = [text for text in engine.gather(different) if text]
    if problems:
        expected = "the checkpoint's weights (the values are BLAKE3 hashes)"
        raise TrainingFailed(problems[0], expected, "another engine.kind, e.g. engine.kind=ddp")


def _hash(values: Tensor) -> str:
    return blake3(values.view(torch.uint8).numpy().data).hexdigest(8)


class Shards:
    """All ranks' files of a checkpoint, read as whole parameters: any part of any of them, wherever it was written.

    safetensors only: a checkpoint holds no code, and none is run.
    """

    def __init__(self, path: Path) -> None:
        # parameter → key → the pieces, as (where it starts, or None for a number that is no part of it; file, name in it)
        self.pieces: dict[str, dict[str, list[tuple[int | None, Any, str]]]] = {}
        for file in (safe_open(each, framework="pt") for each in sorted(path.glob("rank-*.safetensors"))):
            for name in file.keys():  # noqa: SIM118
                parameter, key, start = name.split("|")
                place = None if start == "scalar" else int(start)
                self.pieces.setdefault(parameter, {}).setdefault(key, []).append((place, file, name))

    def scalar(self, parameter: str, key: str) -> Tensor | None:
        """What there is once; None for what lies in pieces."""
        place, file, name = self.pieces[parameter][key][0]
        return file.get_tensor(name) if place is None else None

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
