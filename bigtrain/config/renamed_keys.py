"""Keys of the recipe that had another name before: old → new."""

RENAMED_KEYS = {
    "track.also": "track.extra",
    "data.max_bad": "data.max_unreadable",
    "train.max_skips": "train.max_skipped_steps",
    "train.keep": "train.keep_last",
    "optim.smoothing": "optim.alpha",
}
