"""Records as a source yields them, and the fields that each task needs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
