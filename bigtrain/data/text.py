"""Token ids as examples: a packed text in windows, or one sequence per record."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.recipe import Recipe
from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.data.examples import ColumnDataset, Example, Examples, PreparedData
from bigtrain.data.held_out import refuse_unreadable
from bigtrain.data.token_cache import Ragged, TokenCache, open_cache
from bigtrain.errors import RequestError
from bigtrain.sources.records import Source


@dataclass(frozen=True)
class PackedTokens:
    """A text without padding, in windows of `length` tokens and the one before.

    The last window may be shorter. `first` comes before the text, so that every token of it is
    predicted exactly once.
    """

    flat: NDArray[np.uint16] | NDArray[np.uint32]
    length: int
    first: int  # the end-of-text token

    def __len__(self) -> int:
        return math.ceil(len(self.flat) / self.length)

    def __getitem__(self, index: int) -> Example:
        """`tokens` [length + 1] int64: all but the last are inputs, all but the first labels."""
        start = index * self.length
        stop = start + self.length
        if start == 0:
            tokens = np.concatenate([[self.first], self.flat[:stop].astype(np.int64)])
        else:
            tokens = self.flat[start - 1 : stop].astype(np.int64)
        return {"tokens": tokens}


def prepare_text(recipe: Recipe, source: Source, evaluation: Source | None) -> PreparedData:
    """Both sets as token ids, from the cache if this data was tokenised before."""
    cache = open_cache(recipe, source, evaluation)
    meta = cache.meta
    refuse_unreadable(meta["bad"], recipe)
    if TASK_SPECS[recipe.task].is_packed and "eval_bytes" not in meta:
        held_out = "data.eval" if recipe.data.eval else "the held-out part"
        raise RequestError(f"{held_out} is empty: its texts have no characters", "text in it")
    seq_len = recipe.data.seq_len
    notes = []
    if meta["cut"]:
        notes.append(f"{meta['cut']:,} texts were longer than data.seq_len={seq_len} and were cut")
    return PreparedData(
        _examples(cache, "train", recipe),
        _examples(cache, "eval", recipe),
        tokens_per_sample=seq_len,
        seq_len=seq_len,
        tokenizer=cache.tokenizer,
        vocab_size=meta["vocab_size"],
        classes=meta["classes"],
        eval_bytes=meta.get("eval_bytes"),
        baselines=meta.get("baselines", {}),
        notes=notes,
        unreadable=meta["bad"],
    )


def _examples(cache: TokenCache, part: str, recipe: Recipe) -> Examples:
    spec = TASK_SPECS[recipe.task]
    if spec.is_packed:
        flat = cache.field(part, spec.fields[0]).flat
        return PackedTokens(flat, recipe.data.seq_len, cache.tokenizer.eos_token_id)
    columns: dict[str, Ragged | NDArray[np.int64]] = {}
    for name in spec.fields:
        columns[name] = cache.labels(part) if name == "label" else cache.field(part, name)
    return ColumnDataset(columns)
