"""Records as a source yields them: one dictionary each, with the fields that the task needs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where records come from.

    Images can be indexed; texts are read one after another. A table is a pandas.DataFrame.
    """

    identity: str
    """Changes whenever the records may have changed; a cache is keyed by it."""
    records: Callable[[], Any]


def file_stamp(files: list[Path]) -> str:
    """Path, size and time of each file: what tells one version of the data from another."""
    stamps = []
    for path in files:
        status = path.stat()
        stamps.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return json.dumps(stamps)
