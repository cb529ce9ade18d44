"""Examples, as a task collates them, and both sets of them with what they say of the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from bigtrain.data.table_columns import FeatureRows
from bigtrain.data.token_cache import Ragged
from bigtrain.sources.records import Record

Example = dict[str, Any]
Batch = dict[str, Tensor]
Shape = tuple[int, int, int]  # channels, height, width
_ELEMENTS_PER_TOKEN_ON_GPU = 3 * 224 * 224 * 256 // 16_384  # the plan's tokens per micro-batch


class Examples(Protocol):
    """A set of examples with random access."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Part:
    """Some records of a source, by their numbers in it: the training part or the held-out one."""

    records: Any
    """A sequence of them, or a table."""
    numbers: Sequence[int]
    origin: str = ""
    """Said of a record in errors, e.g. " of data.eval"; empty for data.train."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Record:
        record: Record = self.records[self.numbers[index]]
        return record

    def name(self, index: int) -> str:
        """Which record it is, for errors: its number in its source."""
        return f"{self.numbers[index]}{self.origin}"


@dataclass(frozen=True)
class PreparedData:
    """The training and the held-out set, and what they say of the model and of how to use it."""

    train: Examples
    eval: Examples
    tokens_per_sample: int
    """Tokens, or elements ÷ 64: what the micro-batch is chosen by on a CPU (see `cost_on`)."""
    seq_len: int | None = None
    """Tokens of a text sample (packed), or at most."""
    tokenizer: Any = None
    vocab_size: int | None = None
    classes: list[str] = field(default_factory=list)
    image: Shape | None = None
    features: int | None = None
    """Numbers that a row of a table becomes."""
    cardinalities: list[int] = field(default_factory=list)
    """How many of them stand for the values of each category: the last ones, block by block."""
    columns: dict[str, str] = field(default_factory=dict)
    """`columns.NAME` of a table → what became of the column."""
    eval_bytes: int | None = None
    """UTF-8 bytes of the held-out text, for bits per byte."""
    baselines: dict[str, float] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """What a user of the exported model must do to its inputs."""
    notes: list[str] = field(default_factory=list)
    """What the user should know before training."""
    unreadable: list[str] = field(default_factory=list)
    """Records that cannot be read and are left out."""
    eval_rows: Any = None
    """The inputs of `eval` as the table has them, where a trained model is evaluated."""

    def cost_on(self, device: str) -> int:
        """What a sample counts as, in tokens, where the micro-batch is chosen for `device`.

        A GPU gets 256 images of 3 × 224 × 224 at once, as NVIDIA's own recipe of ResNet-50 in mixed
        precision has it (DeepLearningExamples), and as many elements of other sizes. A CPU gets
        six: a GPU would be done with them before the host has launched what comes next.
        """
        if self.image is None or device != "cuda":
            return self.tokens_per_sample
        return max(1, math.prod(self.image) // _ELEMENTS_PER_TOKEN_ON_GPU)


@dataclass(frozen=True)
class ColumnDataset:
    """One column per field: token ids, features, class numbers or values."""

    fields: Mapping[str, Ragged | FeatureRows | NDArray[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: int) -> Example:
        return {name: column[index] for name, column in self.fields.items()}
