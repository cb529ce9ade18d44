"""Records as a source yields them, and the fields that each task needs."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
FIELDS: dict[str, tuple[str, ...]] = {
    "causal_lm": ("text",),
    "seq2seq": ("source", "target"),
    "text_classification": ("text", "label"),
    "image_classification": ("image", "label"),
    "tabular_classification": ("features", "label"),
    "regression": ("features", "target"),
}


@dataclass(frozen=True)
class Source:
    """`identity` changes whenever the records may have; `records` reads them."""

    identity: str
    records: Callable[[], Iterable[Record]]


def file_stamp(files: list[Path]) -> str:
    return json.dumps([[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files])
