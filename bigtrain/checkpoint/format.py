"""The files of a checkpoint: safetensors, a manifest with their hashes, and its seal."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from bigtrain.models.weight_files import safetensors_header, tensor_bytes
from bigtrain.runs.directory import RunDir

MANIFEST = "manifest.json"


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write what safetensors' save_file writes, but over a file that may be there already.

    And without save_file's copy of every tensor.
    """
    beginning, places = safetensors_header(tensors)
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(beginning)
        for name in places:
            file.write(tensor_bytes(tensors[name]))
        file.truncate()


def sync_and_hash(path: Path) -> dict[str, Any]:
    """Force a file to disk, and hash it at the same time: its entry in the manifest."""
    with path.open("rb") as file, ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, file.fileno())
        entry = {"size": path.stat().st_size, "blake3": blake3().update_mmap(path).hexdigest()}
        synced.result()
    return entry


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def committed_checkpoints(run: RunDir) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(path for path in run.checkpoints.glob("step-????????") if path.is_dir())


def seal(manifest: dict[str, Any]) -> str:
    """The manifest's own hash, by which a changed bit in it is detected too."""
    return blake3(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint: missing, changed, unreadable or unexpected files.

    An empty list means that nothing is.
    """
    if path.is_symlink():
        return ["it is a link to somewhere else"]
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        entries = manifest["files"]
        expected_seal = manifest.pop("seal")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return [f"{MANIFEST}: cannot be read ({type(problem).__name__})"]
    if expected_seal != seal(manifest):
        return [f"{MANIFEST}: content does not match its hash"]
    problems = []
    for file in path.iterdir():
        if file.name != MANIFEST and file.name not in entries:
            problems.append(f"{file.name}: not in the manifest")
    for name, entry in entries.items():
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
