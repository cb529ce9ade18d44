"""Hashes of files, read piece by piece: a file that is mapped whole counts as memory in use."""

import hashlib
from pathlib import Path
from typing import Any

from blake3 import blake3


def file_hash(path: Path) -> str:
    """The file's BLAKE3 hash, in hexadecimal digits."""
    new_hash: Any = blake3  # whose type hashlib's does not know
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_hash).hexdigest()


def text_hash(text: str) -> str:
    return blake3(text.encode()).hexdigest()


def weights_hash(folder: Path) -> str:
    """Of the weights in a folder (safetensors), whatever else is in it."""
    digest = blake3()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update_mmap(path)
    return digest.hexdigest()
