"""What is known of each task without torch: its name, and which of its metrics are better when lower."""

from typing import Literal

TaskName = Literal[
    "causal_lm",
    "seq2seq",
    "image_classification",
    "text_classification",
    "tabular_classification",
    "regression",
]
LOWER_IS_BETTER = (
    "loss",
    "perplexity",
    "bits_per_byte",
    "mse",
)  # of the metrics; for the others higher is
