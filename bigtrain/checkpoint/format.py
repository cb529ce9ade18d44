"""The files of a checkpoint: safetensors, a manifest with their hashes, and its seal."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from bigtrain.runs.directory import RunDir

MANIFEST = "manifest.json"
# torch's name of a type → safetensors' one.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write what safetensors' save_file writes, but over a file that may be there already.

    And without save_file's copy of every tensor.
    """
    # Wide types first, so that each tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header = {}
    end = 0
    for name, tensor in ordered:
        start = end
        end = start + tensor.numel() * tensor.element_size()
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
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
