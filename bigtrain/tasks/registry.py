"""What the model learns: from the recipe's `task` to the class that knows how to judge it.

A task says how to collate examples, what a batch counts (target tokens, images, rows), the **sum**
of the loss in fp32, and the metrics. The loop divides by the count of the whole global batch; that
is why no loss depends on ranks or micro-batches.
"""

from bigtrain.config.task_specs import TaskName
from bigtrain.tasks.base import Evaluator, Task
from bigtrain.tasks.classify import Classification
from bigtrain.tasks.language import CausalLM, Seq2Seq
from bigtrain.tasks.regress import Regression

TASKS: dict[TaskName, type[Task]] = {
    "causal_lm": CausalLM,
    "seq2seq": Seq2Seq,
    "image_classification": Classification,
    "text_classification": Classification,
    "tabular_classification": Classification,
    "regression": Regression,
}
__all__ = ["TASKS", "Evaluator", "Task"]
