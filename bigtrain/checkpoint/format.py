"""The files of a checkpoint: safetensors, a manifest with their hashes, and its seal."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import safe_open
from torch import Tensor

from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir

MANIFEST = "manifest.json"
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
}
_DTYPES |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """What safetensors' save_file writes, over a file that may be there; and without its copy of every tensor."""
    ordered = sorted(
        tensors.items(), key=lambda item: -item[1].element_size()
    )  # so that each is aligned
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


def sync_and_hash(path: Path) -> dict[str, Any]:
    """Force a file to disk; its size and hash, taken meanwhile."""
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
    """The manifest's own hash: a changed bit in it is found too."""
    return blake3(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verify_checkpoint(path: Path) -> list[str]:
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
    problems = [
        f"{file.name}: not in the manifest"
        for file in path.iterdir()
        if file.name not in {*files, MANIFEST}
    ]
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


class Shards:
    """All ranks' files of a checkpoint, read as whole parameters: any part of any of them, wherever it was written.

    safetensors only: a checkpoint holds no code, and none is run.
    """

    def __init__(self, path: Path) -> None:
        # parameter → key → the pieces, as (where it starts, or None for a number that is no part of it; file, name in it)
        self.pieces: dict[str, dict[str, list[tuple[int | None, Any, str]]]] = {}
        for file in (
            safe_open(each, framework="pt") for each in sorted(path.glob("rank-*.safetensors"))
        ):
            for name in file.keys():  # noqa: SIM118
                parameter, key, start = name.split("|")
                place = None if start == "scalar" else int(start)
                self.pieces.setdefault(parameter, {}).setdefault(key, []).append(
                    (place, file, name)
                )

    def scalar(self, parameter: str, key: str) -> Tensor | None:
        """What there is once; None for what lies in pieces."""
        place, file, name = self.pieces[parameter][key][0]
        return file.get_tensor(name) if place is None else None

    def read(self, parameter: str, key: str, start: int, into: Tensor) -> None:
        """Fill `into` with the elements from `start` on. RequestError if the checkpoint does not cover them."""
        covered = 0
        for place, file, name in self.pieces[parameter][key]:
            piece = file.get_slice(name)
            first, last = (
                max(start, place or 0),
                min(start + into.numel(), (place or 0) + piece.get_shape()[0]),
            )
            if first < last:
                into[first - start : last - start].copy_(
                    piece[first - (place or 0) : last - (place or 0)]
                )
                covered += last - first
        if covered != into.numel():
            raise RequestError(
                f"the checkpoint's {parameter} has another size", "a checkpoint of the same model"
            )
