"""Token ids as examples: packed into windows, or one sequence each."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import ColumnDataset, Example, Examples, PreparedData
from bigtrain.data.held_out import refuse_bad
from bigtrain.data.records import FIELDS, Source
from bigtrain.data.token_cache import open_cache


@dataclass(frozen=True)
class PackedTokens:
    """A text packed without padding: windows of `length` tokens and the token after; the last may be shorter.

    A token of context stands before the first, so that every token of the text is predicted exactly once.
    """

    flat: NDArray[Any]
    length: int
    first: int  # the end-of-text token

    def __len__(self) -> int:
        return math.ceil(len(self.flat) / self.length)

    def __getitem__(self, index: int) -> Example:
        start = index * self.length
        ids = self.flat[max(start - 1, 0) : start + self.length].astype(np.int64)
        return {"tokens": ids if start else np.concatenate([[self.first], ids])}


def prepare_text(recipe: Recipe, source: Source, evaluation: Source | None) -> PreparedData:
    cache, length = open_cache(recipe, source, evaluation), recipe.data.seq_len
    refuse_bad(cache.meta["bad"], recipe)
    facts: dict[str, Any] = {key: cache.meta[key] for key in ("vocab_size", "classes", "bad")}
    sets: list[Examples] = []
    for part in ("train", "eval"):
        if recipe.task == "causal_lm":
            sets.append(
                PackedTokens(cache.field(part, "text").flat, length, cache.tokenizer.eos_token_id)
            )
        else:
            names = FIELDS[recipe.task]
            sets.append(
                ColumnDataset(
                    {
                        name: cache.labels(part) if name == "label" else cache.field(part, name)
                        for name in names
                    }
                )
            )
    if recipe.task == "causal_lm":
        facts |= {"eval_bytes": cache.meta["eval_bytes"], "baselines": cache.meta["baselines"]}
    if cut := cache.meta["cut"]:
        facts["notes"] = [f"{cut:,} texts were longer than data.seq_len={length} and were cut"]
    return PreparedData(sets[0], sets[1], length, cache.tokenizer, **facts)
