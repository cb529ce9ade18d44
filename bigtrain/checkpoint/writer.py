"""Committed checkpoints: complete and verified, or not there.

Everything is written under a temporary name. Each rank hashes and syncs the files it answers for; after a barrier
rank 0 writes the manifest and renames. The rename is the commit.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
from bigtrain.engine.base import Engine
from bigtrain.runs.directory import RunDir

PACKAGES = ("torch", "deepspeed", "accelerate", "transformers")


@dataclass(frozen=True)
class SavedCheckpoint:
    """What became of a checkpoint."""

    step: int
    path: Path
    seconds: float  # from the snapshot to the commit
    blocked: float  # how much of that training had to wait
    writing: float = (
        0.0  # how much of it went into writing, syncing and hashing, on the slowest rank
    )
    problem: str = ""


class NotSavedError(Exception):
    """A checkpoint could not be written."""


class CheckpointWriter:
    """Writes a run's checkpoints: from a snapshot, by a thread of each rank, committed by all ranks together.

    One is under way at most. What fails on one rank fails on all, and leaves the checkpoints before it alone.
    """

    def __init__(self, engine: Engine, run: RunDir, recipe: Recipe, state: TrainState) -> None:
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

    def begin(self, state: TrainState) -> list[SavedCheckpoint]:
        """Copy everything to the host and start writing; returns what became of the one before. A collective."""
        before = self.finish()
        if (
            self.state.step == state.step > 0
        ):  # after a rewind: it is there, and must not be lost while written anew
            return before
        self.began = time.perf_counter()
        state.rewinds = 0
        self.state = replace(
            state, recent=list(state.recent), results=dict(state.results), bad=list(state.bad)
        )
        self.engine.sync_buffers()
        tensors = self.engine.snapshot()
        try:
            self._together(lambda: self._prepare() if self.engine.main else None)
        except NotSavedError as problem:
            return [
                *before,
                SavedCheckpoint(state.step, self.final, 0.0, 0.0, problem=str(problem)),
            ]
        path = self.building / f"rank-{self.engine.rank:05d}.safetensors"
        self.writer = threading.Thread(target=self._write, args=(path, tensors), daemon=True)
        self.writer.start()
        self.blocked = time.perf_counter() - self.began
        return before

    def written(self) -> bool:
        """Whether this rank's part of the checkpoint under way is on disk (or has failed)."""
        return self.writer is not None and not self.writer.is_alive()

    def finish(self) -> list[SavedCheckpoint]:
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
        return [
            SavedCheckpoint(
                self.state.step,
                self.final,
                now - self.began,
                self.blocked + now - waited,
                writing,
                problem,
            )
        ]

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        began = time.perf_counter()
        try:
            write_tensors(tensors, path)
            self.outcome = (({path.name: sync_and_hash(path)}, time.perf_counter() - began), "")
        except Exception as problem:  # whatever it is, the other ranks must hear of it
            self.outcome = (None, str(problem) or type(problem).__name__)

    def _together(self, act: Callable[[], Any], failed: str = "") -> list[Any]:
        """What `act` returns on every rank; NotSavedError on every rank if the disk failed one of them."""
        value = None
        try:
            value = None if failed else act()
        except OSError as problem:
            failed = str(problem)
        outcomes = self.engine.gather(
            (value, f"rank {self.engine.rank}: {failed}" if failed else "")
        )
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
        newest = committed_checkpoints(self.run)[-1:]
        needed = sum(file.stat().st_size for path in newest for file in path.iterdir())
        free = shutil.disk_usage(self.building).free + sum(
            file.stat().st_size for file in self.building.iterdir()
        )
        if free < needed:
            raise OSError(
                f"{free:,} bytes are free in {self.run.checkpoints}, and the last checkpoint took {needed:,}"
            )

    def _commit(self, files: dict[str, Any]) -> None:
        engine, building = self.engine, self.building
        state_path = building / "state.json"
        state_path.write_text(json.dumps(asdict(self.state)))
        manifest = {
            "files": files | {state_path.name: sync_and_hash(state_path)},
            **engine.facts(),
            "offload": engine.plan.offload,
            "shapes": engine.shapes(),
            "recipe": self.recipe_hash,
            "versions": {name: version(name) for name in PACKAGES},
        }
        path = building / MANIFEST
        path.write_text(json.dumps(manifest | {"seal": seal(manifest)}, indent=1))
        sync_and_hash(path)
        sync_folder(building)
        if self.final.exists():  # written again after a resume from an older one
            shutil.rmtree(self.final)
        building.rename(self.final)
        sync_folder(self.run.checkpoints)
        with contextlib.suppress(
            OSError
        ):  # what is committed stays so, whatever becomes of the old ones
            self._prune()

    def _prune(self) -> None:
        """Delete all but the newest `keep` and the best: only now that a newer one is committed."""
        for path in committed_checkpoints(self.run)[: -self.settings.keep_last]:
            if not (self.settings.keep_best and path.name == f"step-{self.state.best_step:08d}"):
                # A name that does not count first: killed in the middle, it must not look like a broken checkpoint.
                shutil.rmtree(self.spare, ignore_errors=True)
                path.rename(self.spare)
