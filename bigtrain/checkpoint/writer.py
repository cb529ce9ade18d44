"""Committed checkpoints: complete and verified, or not there.

Everything is written under a temporary name. Each rank hashes and syncs the file that it writes;
when all have, rank 0 writes the manifest and renames the folder. The rename is the commit.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3
from torch import Tensor

from bigtrain.checkpoint.format import (
    MANIFEST,
    committed_checkpoints,
    seal,
    sync_and_hash,
    sync_folder,
    write_tensors,
)
from bigtrain.checkpoint.state import TrainState
from bigtrain.config.loader import to_yaml
from bigtrain.config.recipe import Recipe
from bigtrain.config.versions import installed_versions
from bigtrain.engine.base import Engine
from bigtrain.runs.directory import RunDir


@dataclass(frozen=True)
class SavedCheckpoint:
    """The outcome of a checkpoint; seconds."""

    step: int
    path: Path
    seconds: float  # from the snapshot to the commit
    blocked: float  # how much of that training had to wait
    writing: float = 0.0  # for writing, syncing and hashing, on the slowest rank
    problem: str = ""  # why it was not committed


class Written(NamedTuple):
    """The outcome of one rank's writer."""

    files: dict[str, Any]  # the manifest's entries by file name
    seconds: float
    problem: str = ""


class NotSavedError(Exception):
    """A checkpoint could not be written."""


class CheckpointWriter:
    """Writes a run's checkpoints from snapshots: a thread of each rank writes, all ranks commit.

    At most one is being written. What fails on one rank fails on all, and does not touch the
    checkpoints that are there.
    """

    def __init__(self, engine: Engine, run: RunDir, recipe: Recipe, state: TrainState) -> None:
        """`state` is that of the run's last checkpoint, or of step 0."""
        self.engine = engine
        self.run = run
        self.settings = recipe.train
        self.recipe_hash = blake3(to_yaml(recipe).encode()).hexdigest()
        # The checkpoint deleted last. The next one is written over its files, whose blocks on disk
        # and pages in memory are there: five times faster than new files, as measured, and no more
        # space than writing takes anyway.
        self.spare = run.checkpoints / ".spare"
        # Of the checkpoint begun last:
        self.state = deepcopy(state)
        self.thread: threading.Thread | None = None  # this rank's writer, until it is committed
        self.outcome = Written({}, 0.0)
        self.began = 0.0
        self.blocked = 0.0

    @property
    def final(self) -> Path:
        """Where the checkpoint begun last is, once it is committed."""
        return self.run.checkpoints / f"step-{self.state.step:08d}"

    @property
    def building(self) -> Path:
        """Where it is written."""
        return self.run.checkpoints / f".{self.final.name}.tmp"

    def close(self) -> None:
        """No checkpoint will be written any more."""
        if self.engine.main:
            shutil.rmtree(self.spare, ignore_errors=True)

    def has(self, step: int) -> bool:
        """Whether the checkpoint begun last is that of `step`, as it is after a rewind."""
        return self.state.step == step > 0

    def begin(self, state: TrainState) -> list[SavedCheckpoint]:
        """Copy everything to the host and start to write it. A collective.

        Returns the outcome of the checkpoint before, and of this one if it failed at once. One that
        is there already is not written anew: it could be lost meanwhile.
        """
        outcomes = self.finish()
        if self.has(state.step):
            return outcomes
        self.began = time.perf_counter()
        self.state = deepcopy(state)
        self.engine.sync_buffers()
        tensors = self.engine.snapshot()
        try:
            self._on_main(self._prepare)
        except NotSavedError as problem:
            failed = SavedCheckpoint(state.step, self.final, 0.0, 0.0, problem=str(problem))
            return [*outcomes, failed]
        path = self.building / f"rank-{self.engine.rank:05d}.safetensors"
        self.thread = threading.Thread(target=self._write, args=(path, tensors), daemon=True)
        self.thread.start()
        self.blocked = time.perf_counter() - self.began
        return outcomes

    def written(self) -> bool:
        """Whether this rank's file of the checkpoint begun last is on disk, or has failed."""
        return self.thread is not None and not self.thread.is_alive()

    def finish(self) -> list[SavedCheckpoint]:
        """Wait for the checkpoint that is being written, if any, and commit it. A collective.

        Returns its outcome, if there is one. Once it is committed, the oldest is deleted.
        """
        if self.thread is None:
            return []
        wait_began = time.perf_counter()
        self.thread.join()
        self.thread = None
        problem = ""
        writing = 0.0
        try:
            parts = self._gather(self.outcome, self.outcome.problem)
            writing = max(part.seconds for part in parts)
            files: dict[str, Any] = {}
            for part in parts:
                files |= part.files
            self._on_main(partial(self._commit, files))
        except NotSavedError as failure:
            problem = str(failure)
            if self.engine.main:
                # The disk may be full, and metrics.jsonl needs the space that this took.
                shutil.rmtree(self.building, ignore_errors=True)
        now = time.perf_counter()
        blocked = self.blocked + now - wait_began
        return [
            SavedCheckpoint(
                self.state.step, self.final, now - self.began, blocked, writing, problem
            )
        ]

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write this rank's file; runs in a thread."""
        began = time.perf_counter()
        try:
            write_tensors(tensors, path)
            files = {path.name: sync_and_hash(path)}
            self.outcome = Written(files, time.perf_counter() - began)
        except Exception as problem:  # whatever it is, the other ranks must learn of it
            self.outcome = Written({}, 0.0, str(problem) or type(problem).__name__)

    def _on_main(self, act: Callable[[], None]) -> None:
        """Call `act` on rank 0. NotSavedError on every rank if the disk fails it. A collective."""
        problem = ""
        if self.engine.main:
            try:
                act()
            except OSError as error:
                problem = str(error)
        self._gather(None, problem)

    def _gather(self, value: Any, problem: str) -> list[Any]:
        """`value` of every rank. NotSavedError on every rank if one has a problem. A collective."""
        problem = f"rank {self.engine.rank}: {problem}" if problem else ""
        outcomes = self.engine.gather((value, problem))
        problems = [text for _, text in outcomes if text]
        if problems:
            raise NotSavedError("; ".join(problems))
        return [value for value, _ in outcomes]

    def _prepare(self) -> None:
        """A folder to write in, and the space for it: as much as the last checkpoint took."""
        for left_over in self.run.checkpoints.glob(".step-*.tmp"):
            shutil.rmtree(left_over)
        if self.spare.is_dir():
            reusable = {f"rank-{rank:05d}.safetensors" for rank in range(self.engine.world_size)}
            for file in self.spare.iterdir():
                if file.name not in reusable:
                    file.unlink()
            self.spare.rename(self.building)
        self.building.mkdir(parents=True, exist_ok=True)
        needed = 0
        for path in committed_checkpoints(self.run)[-1:]:
            needed += _size_of_files(path)
        free = shutil.disk_usage(self.building).free + _size_of_files(self.building)
        if free < needed:
            raise OSError(
                f"{free:,} bytes are free in {self.run.checkpoints}, "
                f"and the last checkpoint took {needed:,}"
            )

    def _commit(self, files: dict[str, Any]) -> None:
        """Write the state and the manifest, and rename; `files`: the ranks' entries in it."""
        state_path = self.building / "state.json"
        state_path.write_text(json.dumps(asdict(self.state)))
        manifest = {
            "files": files | {state_path.name: sync_and_hash(state_path)},
            **self.engine.facts(),
            "offload": self.engine.plan.offload,
            "shapes": self.engine.shapes(),
            "recipe": self.recipe_hash,
            "versions": installed_versions(),
        }
        manifest_path = self.building / MANIFEST
        manifest_path.write_text(json.dumps(manifest | {"seal": seal(manifest)}, indent=1))
        sync_and_hash(manifest_path)
        sync_folder(self.building)
        if self.final.exists():  # written again after a resume from an older one
            shutil.rmtree(self.final)
        self.building.rename(self.final)
        sync_folder(self.run.checkpoints)
        # This one is committed, even if the old ones cannot be deleted.
        with contextlib.suppress(OSError):
            self._prune()

    def _prune(self) -> None:
        """Delete all but the newest `train.keep_last` and the best; keep the last one's files."""
        best = f"step-{self.state.best_step:08d}"
        for path in committed_checkpoints(self.run)[: -self.settings.keep_last]:
            if self.settings.keep_best and path.name == best:
                continue
            shutil.rmtree(self.spare, ignore_errors=True)
            # Renamed first: if this process dies in the middle of deleting, what is left must not
            # look like a broken checkpoint.
            path.rename(self.spare)


def _size_of_files(folder: Path) -> int:
    """Bytes."""
    return sum(file.stat().st_size for file in folder.iterdir())
