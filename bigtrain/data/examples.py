"""Examples, and what a prepared data set says to the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray
from torch.utils.data import Subset

from bigtrain.data.records import Record
from bigtrain.data.token_cache import Ragged

Example = dict[str, Any]
Shape = tuple[int, int, int]  # channels, height, width
Part = Subset[Record]  # some of the records


class Examples(Protocol):
    """A set of examples with random access."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class PreparedData:
    """Both sets, and the facts that shape a model: vocabulary, classes, image shape, number of features."""

    train: Examples
    eval: Examples
    tokens_per_sample: int  # tokens (or elements ÷ 64) per sample, for the choice of a micro-batch
    tokenizer: Any = None
    vocab_size: int | None = None
    classes: list[str] = field(default_factory=list)
    image: Shape | None = None
    features: int | None = None
    eval_bytes: int | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(
        default_factory=dict
    )  # what export must tell users of the model
    notes: list[str] = field(default_factory=list)  # what the user should know before training
    bad: list[str] = field(default_factory=list)  # records that could not be read and are left out


@dataclass(frozen=True)
class ColumnDataset:
    """One column per field: token ids, features (standardised by the training set), class numbers or values."""

    fields: Mapping[str, Ragged | NDArray[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: int) -> Example:
        return {name: column[index] for name, column in self.fields.items()}
