"""The training and the held-out set as random-access examples (dictionaries of arrays), one class per modality."""

import math
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from torch.utils.data import Subset

from bigtrain.data.sources import FIELDS, Record, Source, open_source
from bigtrain.data.tokens import Ragged, held_out, open_cache, refuse_empty
from bigtrain.errors import BadSampleError, RequestError
from bigtrain.recipe import Recipe

Example = dict[str, Any]
Part = Subset[Record]  # some of the records
Shape = tuple[int, int, int]  # channels, height, width
_IN_MEMORY = 256 << 20  # bytes of decoded images kept


class Examples(Protocol):
    """A set of examples with random access."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Corpus:
    """Both sets, and the facts that shape a model: vocabulary, classes, image shape, number of features."""

    train: Examples
    eval: Examples
    sample_cost: int  # tokens (or elements ÷ 64) per sample, for the choice of a micro-batch
    tokenizer: Any = None
    vocab_size: int | None = None
    classes: list[str] = field(default_factory=list)
    image: Shape | None = None
    features: int | None = None
    eval_bytes: int | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)  # what export must tell users of the model
    notes: list[str] = field(default_factory=list)  # what the user should know before training
    bad: list[str] = field(default_factory=list)  # records that could not be read and are left out


def prepare(recipe: Recipe, trained: dict[str, Any] | None = None) -> Corpus:
    """Open, split and (for text) tokenise the data. Raises RequestError for data that cannot be trained on.

    `trained`: what an export says of the data its model has seen; classes and normalisation are then taken from
    there, so that other data is shown to the model as it learnt to see.
    """
    if unknown := set(recipe.data.columns) - set(FIELDS[recipe.task]):
        raise RequestError(f"data.columns.{min(unknown)}: task {recipe.task} has no such field", " or ".join(FIELDS[recipe.task]))
    source = open_source(recipe.data.train, recipe.task, recipe.data)
    evaluation = open_source(recipe.data.eval, recipe.task, recipe.data) if recipe.data.eval else None
    kind = FIELDS[recipe.task][0]
    if kind in ("text", "source"):
        corpus = _text(recipe, source, evaluation)
    else:
        corpus = (_images if kind == "image" else _table)(recipe, *_split(recipe, source, evaluation), trained)
    if trained is not None and corpus.classes != trained["classes"]:
        raise RequestError(f"the data has classes {corpus.classes}", f"those of the model: {trained['classes']}")
    if "label" in FIELDS[recipe.task] and len(corpus.classes) < 2:
        raise RequestError(f"{recipe.data.train} has one class only ({corpus.classes[0]})", "two classes at least")
    return corpus


def _split(recipe: Recipe, source: Source, evaluation: Source | None) -> tuple[Part, Part]:
    everything: Any = source.records()
    if evaluation is not None:
        other: Any = evaluation.records()
        return Subset(everything, range(len(everything))), Subset(other, range(len(other)))
    # By number, without reading the record: a record may be an image on a slow disk.
    out = [held_out({}, index, "", recipe.data.eval_fraction) for index in range(len(everything))]
    return Subset(everything, [i for i, o in enumerate(out) if not o]), Subset(everything, [i for i, o in enumerate(out) if o])


@dataclass(frozen=True)
class Columns:
    """One column per field: token ids, features (standardised by the training set), class numbers or values."""

    fields: Mapping[str, Ragged | NDArray[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: int) -> Example:
        return {name: column[index] for name, column in self.fields.items()}


# Text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
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


def _text(recipe: Recipe, source: Source, evaluation: Source | None) -> Corpus:
    cache, length = open_cache(recipe, source, evaluation), recipe.data.seq_len
    refuse_bad(cache.meta["bad"], recipe)
    facts: dict[str, Any] = {key: cache.meta[key] for key in ("vocab_size", "classes", "bad")}
    sets: list[Examples] = []
    for part in ("train", "eval"):
        if recipe.task == "causal_lm":
            sets.append(Windows(cache.field(part, "text").flat, length, cache.tokenizer.eos_token_id))
        else:
            names = FIELDS[recipe.task]
            sets.append(Columns({name: cache.labels(part) if name == "label" else cache.field(part, name) for name in names}))
    if recipe.task == "causal_lm":
        facts |= {"eval_bytes": cache.meta["eval_bytes"], "baselines": cache.meta["baselines"]}
    if cut := cache.meta["cut"]:
        facts["notes"] = [f"{cut:,} texts were longer than data.seq_len={length} and were cut"]
    return Corpus(sets[0], sets[1], length, cache.tokenizer, **facts)


# Images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images as float32 tensors [channels, height, width], normalised by the training set's mean and deviation."""

    records: Part
    size: int | None
    numbers: dict[str, int]
    mean: torch.Tensor
    std: torch.Tensor
    remember: bool
    cache: dict[int, Example] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        if index in self.cache:
            return self.cache[index]
        pixels, label = _decode(self.records, self.size, index)
        example = {"image": (pixels - self.mean) / self.std, "label": self.numbers[label]}
        if self.remember:
            self.cache[index] = example
        return example


def _decode(records: Part, size: int | None, index: int) -> tuple[torch.Tensor, str]:
    """Pixels in 0 … 1 and the label's name. Raises BadSampleError for an image that does not decode."""
    try:
        record = records[index]
        return _pixels(record["image"], size), str(record["label"])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise BadSampleError(f"image {records.indices[index]} does not decode: {problem}") from None


def _pixels(image: Any, size: int | None) -> torch.Tensor:
    """Resize the shorter side to `size`, cut the middle, scale to 0 … 1.

    Arrays are grey; files are read as colour, so that grey ones may stand among them.
    """
    picture: Image.Image = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    if size is not None and picture.size != (size, size):
        width, height = picture.size
        scale = size / min(width, height)
        picture = picture.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BILINEAR)
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    array = torch.from_numpy(np.asarray(picture, np.float32) / 255)
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1).contiguous()


def _images(recipe: Recipe, train: Part, held: Part, trained: dict[str, Any] | None) -> Corpus:
    size = recipe.data.image_size
    shapes, classes, bad, (good, good_held) = _look_at_all((train, held), size)
    refuse_bad(bad, recipe)
    refuse_empty({"train": len(good), "eval": len(good_held)}, bad)
    if len(shapes) > 1:
        raise RequestError(f"images of {len(shapes)} shapes, {min(shapes)} to {max(shapes)}", "one size", "data.image_size=224")
    channels, height, width = shape = shapes.pop()
    sample = torch.stack([_decode(train, size, i)[0] for i in good[:: max(1, len(good) // 2000)]])
    mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3)
    if trained is not None:
        mean, std = torch.tensor(trained["image_mean"]), torch.tensor(trained["image_std"])
    small = (len(train) + len(held)) * channels * height * width * 4 <= _IN_MEMORY
    # A bad image for training keeps its number, and is left out when its turn comes: were the others to move up, a
    # resumed run would see other samples.
    parts = (train, Subset(held.dataset, [held.indices[index] for index in good_held]))
    numbers = {name: number for number, name in enumerate(classes)}
    sets = [Images(part, size, numbers, mean.view(-1, 1, 1), std.view(-1, 1, 1), small) for part in parts]
    seen = {"image_mean": mean.tolist(), "image_std": std.tolist(), "image_size": [height, width]}
    cost = channels * height * width // 64 + 1
    return Corpus(sets[0], sets[1], cost, classes=classes, image=shape, preprocessing=seen, bad=bad)


def refuse_bad(bad: list[str], recipe: Recipe) -> None:
    """Raises RequestError for more bad records than the recipe allows."""
    if len(bad) > recipe.data.max_bad:
        more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
        raise RequestError(f"{bad[0]}{more}", "data that can be read", f"mend it, or data.max_bad={len(bad)} to leave it out")


def _look_at_all(parts: tuple[Part, ...], size: int | None) -> tuple[set[Shape], list[str], list[str], list[list[int]]]:
    """Decode every image once before training: a broken one is found now, not in the third hour.

    Shapes, classes, the bad images, and the numbers of the good ones in each part.
    """
    shapes: set[Shape] = set()
    labels: set[str] = set()
    bad: list[str] = []
    good: list[list[int]] = []

    def look(part: Part, index: int) -> int | None:
        try:
            pixels, label = _decode(part, size, index)
        except BadSampleError as problem:
            bad.append(problem.found)
            return None
        shapes.add(tuple(pixels.shape))  # type: ignore[arg-type]
        labels.add(label)
        return index

    with ThreadPoolExecutor() as pool:
        for part in parts:
            found = pool.map(partial(look, part), range(len(part)))
            quiet = not sys.stderr.isatty() or len(part) < 5000
            seen = track(found, "checking images", total=len(part), transient=True, disable=quiet)
            good.append([index for index in seen if index is not None])
    return shapes, sorted(labels), sorted(bad), good


# Tables -----------------------------------------------------------------------------------------------------------


def _table(recipe: Recipe, train: Part, held: Part, trained: dict[str, Any] | None) -> Corpus:
    answer = FIELDS[recipe.task][1]
    good: list[list[Record]] = [[], []]
    bad: list[str] = []
    for part, kept in zip((train, held), good, strict=True):
        for index in range(len(part)):
            record = part[index]
            value = record[answer]
            unknown = value is None or (isinstance(value, float) and not math.isfinite(value))
            if unknown or not np.isfinite(record["features"]).all():
                bad.append(f"row {part.indices[index]}: nothing, or not a finite number, in one of its columns")
            else:
                kept.append(record)
    refuse_bad(bad, recipe)
    refuse_empty({"train": len(good[0]), "eval": len(good[1])}, bad)
    rows = [np.stack([record["features"] for record in part]) for part in good]
    answers = [[record[answer] for record in part] for part in good]
    classes: list[str] = []
    if answer == "label":
        classes = sorted({str(a) for part in answers for a in part})
        columns = [np.asarray([classes.index(str(a)) for a in part], np.int64) for part in answers]
    else:
        try:
            columns = [np.asarray(part, np.float32) for part in answers]
        except (TypeError, ValueError):
            raise RequestError("regression target is not a number", "numbers in every row") from None
    mean, std = rows[0].mean(0), rows[0].std(0)
    std[std == 0] = 1
    if trained is not None:
        mean, std = (np.asarray(trained[f"feature_{name}"], np.float32) for name in ("mean", "std"))
    sets = [Columns({"features": (r - mean) / std, answer: column}) for r, column in zip(rows, columns, strict=True)]
    width, seen = rows[0].shape[1], {"feature_mean": mean.tolist(), "feature_std": std.tolist()}
    return Corpus(sets[0], sets[1], width // 64 + 1, classes=classes, features=width, preprocessing=seen, bad=bad)
