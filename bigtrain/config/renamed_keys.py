"""Keys of the recipe that had another name in earlier versions.

A user's recipe with an old key is refused, and the error names the new one. The files of runs made
before (recipe.yaml, effective.json) still have the old names; who reads them translates.
"""

# Old dotted key → new dotted key. Both are in the same section.
RENAMED_KEYS: dict[str, str] = {
    "track.also": "track.extra",
    "data.max_bad": "data.max_unreadable",
    "train.max_skips": "train.max_skipped_steps",
    "train.keep": "train.keep_last",
    "optim.smoothing": "optim.alpha",
}
