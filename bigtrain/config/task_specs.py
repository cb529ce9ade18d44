"""What each task is, in one place: its data, what it predicts, its metrics.

A new task is an entry here and a class in `tasks/`. No torch: recipes are checked without it.
"""

from dataclasses import dataclass
from typing import Literal

TaskName = Literal[
    "causal_lm",
    "seq2seq",
    "image_classification",
    "text_classification",
    "tabular_classification",
    "regression",
]
MetricName = Literal[
    "loss",
    "perplexity",
    "bits_per_byte",
    "mse",
    "accuracy",
    "recall",
    "f1",
    "exact_match",
    "bleu",
    "r2",
]
LOWER_IS_BETTER: tuple[MetricName, ...] = ("loss", "perplexity", "bits_per_byte", "mse")

Data = Literal["text", "image", "table"]
Prediction = Literal["next_token", "text", "class", "number"]


@dataclass(frozen=True)
class TaskSpec:
    """One task, as recipes, data, models and tables of runs need to know it."""

    data: Data
    predicts: Prediction
    fields: tuple[str, ...]
    """What a record must have; the first is (or begins) the model's input."""
    metrics: tuple[MetricName, ...]
    """Of the held-out set, besides the loss."""
    auto_class: str | None
    """The Auto class of transformers that builds its models; None if transformers has none."""

    @property
    def is_language(self) -> bool:
        """Whether the model writes text, token by token."""
        return self.predicts in ("next_token", "text")

    @property
    def is_packed(self) -> bool:
        """Whether texts are joined, and cut into windows without padding."""
        return self.predicts == "next_token"

    @property
    def has_labels(self) -> bool:
        """Whether each record has one of a fixed set of classes."""
        return self.predicts == "class"

    @property
    def unit(self) -> str:
        """What a training loss is averaged over, and a rate counted in."""
        return "tokens" if self.is_language else "samples"


TASK_SPECS: dict[TaskName, TaskSpec] = {
    "causal_lm": TaskSpec(
        data="text",
        predicts="next_token",
        fields=("text",),
        metrics=("perplexity", "bits_per_byte"),
        auto_class="AutoModelForCausalLM",
    ),
    "seq2seq": TaskSpec(
        data="text",
        predicts="text",
        fields=("source", "target"),
        metrics=("perplexity", "exact_match", "bleu"),
        auto_class="AutoModelForSeq2SeqLM",
    ),
    "image_classification": TaskSpec(
        data="image",
        predicts="class",
        fields=("image", "label"),
        metrics=("accuracy", "recall", "f1"),
        auto_class="AutoModelForImageClassification",
    ),
    "text_classification": TaskSpec(
        data="text",
        predicts="class",
        fields=("text", "label"),
        metrics=("accuracy", "recall", "f1"),
        auto_class="AutoModelForSequenceClassification",
    ),
    "tabular_classification": TaskSpec(
        data="table",
        predicts="class",
        fields=("features", "label"),
        metrics=("accuracy", "recall", "f1"),
        auto_class=None,
    ),
    "regression": TaskSpec(
        data="table",
        predicts="number",
        fields=("features", "target"),
        metrics=("mse", "r2"),
        auto_class=None,
    ),
}


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of `metric` is the better one."""
    return metric in LOWER_IS_BETTER
