"""Hashes of files, read piece by piece: a file that is mapped whole counts as memory in use."""

import hashlib
from pathlib import Path

from blake3 import blake3


def file_hash(path: Path) -> str:
    """The file's BLAKE3 hash, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, blake3).hexdigest()


def text_hash(text: str) -> str:
    return blake3(text.encode()).hexdigest()
