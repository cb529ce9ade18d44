"""Images as examples: decoded, checked before training, normalised."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import Example, Part, PreparedData, Shape
from bigtrain.data.held_out import refuse_empty, refuse_unreadable
from bigtrain.errors import BadSampleError, RequestError

_IN_MEMORY = 256 << 20  # bytes of decoded images kept
_STATISTICS_SAMPLE = 2000  # images, about, that mean and deviation are taken of
_MANY = 5000  # images that are worth a progress bar
DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageDataset:
    """Images as float32 tensors [channels, height, width], normalised, with their class numbers."""

    part: Part
    size: int | None
    class_numbers: dict[str, int]
    mean: Tensor
    """[channels, 1, 1], of the training set; so is `std`."""
    std: Tensor
    keep_in_memory: bool
    cache: dict[int, Example] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Example:
        if index in self.cache:
            return self.cache[index]
        pixels, label = _decode(self.part, self.size, index)
        normalised = (pixels - self.mean) / self.std
        example = {"image": normalised, "label": self.class_numbers[label]}
        if self.keep_in_memory:
            self.cache[index] = example
        return example


@dataclass
class _Survey:
    """What a look at every image has shown."""

    shapes: set[Shape] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)


def prepare_images(
    recipe: Recipe, train: Part, held_out: Part, exported: dict[str, Any] | None
) -> PreparedData:
    """Both sets, every image decoded once.

    Raises RequestError for images that cannot be trained on.
    """
    size = recipe.data.image_size
    survey = _Survey()
    readable = _look_at_all(train, size, survey)
    readable_held_out = _look_at_all(held_out, size, survey)
    unreadable = sorted(survey.unreadable)
    refuse_unreadable(unreadable, recipe)
    counts = {"train": len(readable), "eval": len(readable_held_out)}
    refuse_empty(counts, recipe, unreadable)
    shape = _only_shape(survey.shapes)
    if exported is None:
        mean, std = _mean_and_deviation(train, size, readable)
    else:
        mean = torch.tensor(exported["image_mean"])
        std = torch.tensor(exported["image_std"])
    # An unreadable training image keeps its number and is left out when its turn comes: if the
    # others moved up, a resumed run would see other samples. A held-out one is left out here.
    num_images = len(train) + len(held_out)
    held_out_numbers = [held_out.numbers[index] for index in readable_held_out]
    held_out = Part(held_out.records, held_out_numbers, held_out.origin)
    elements = shape[0] * shape[1] * shape[2]
    num_bytes = num_images * elements * 4
    classes = sorted(survey.labels)

    def dataset(part: Part) -> ImageDataset:
        return ImageDataset(
            part,
            size,
            {name: number for number, name in enumerate(classes)},
            mean.view(-1, 1, 1),
            std.view(-1, 1, 1),
            keep_in_memory=num_bytes <= _IN_MEMORY,
        )

    return PreparedData(
        dataset(train),
        dataset(held_out),
        tokens_per_sample=elements // 64 + 1,
        classes=classes,
        image=shape,
        preprocessing={
            "image_mean": mean.tolist(),
            "image_std": std.tolist(),
            "image_size": [shape[1], shape[2]],
        },
        unreadable=unreadable,
    )


def _look_at_all(part: Part, size: int | None, survey: _Survey) -> list[int]:
    """Decode every image once before training: a broken one shows now, not in the third hour.

    Adds to `survey`; returns the indices of the images that can be read.
    """

    def is_readable(index: int) -> bool:
        try:
            pixels, label = _decode(part, size, index)
        except BadSampleError as problem:
            survey.unreadable.append(problem.found)
            return False
        survey.shapes.add(cast(Shape, tuple(pixels.shape)))
        survey.labels.add(label)
        return True

    show_progress = sys.stderr.isatty() and len(part) >= _MANY
    with ThreadPoolExecutor() as pool:
        results = track(
            pool.map(is_readable, range(len(part))),
            "checking images",
            total=len(part),
            transient=True,
            disable=not show_progress,
        )
        return [index for index, readable in enumerate(results) if readable]


def _only_shape(shapes: set[Shape]) -> Shape:
    if len(shapes) > 1:
        raise RequestError(
            f"images of {len(shapes)} shapes, {min(shapes)} to {max(shapes)}",
            "one size",
            "data.image_size=224",
        )
    return next(iter(shapes))


def _mean_and_deviation(
    train: Part, size: int | None, readable: list[int]
) -> tuple[Tensor, Tensor]:
    """Per channel [channels], over about two thousand of the training images."""
    every = max(1, len(readable) // _STATISTICS_SAMPLE)
    sample = torch.stack([_decode(train, size, index)[0] for index in readable[::every]])
    mean = sample.mean((0, 2, 3))
    std = sample.std((0, 2, 3)).clamp_min(1e-3)
    return mean, std


def _decode(part: Part, size: int | None, index: int) -> tuple[Tensor, str]:
    """Pixels in 0 … 1 [channels, height, width], and the label.

    Raises BadSampleError for an image that does not decode.
    """
    try:
        record = part[index]
        return pixels_of(record["image"], size), str(record["label"])
    except DECODING_ERRORS as problem:
        raise BadSampleError(f"image {part.name(index)} does not decode: {problem}") from None


def pixels_of(image: Any, size: int | None) -> Tensor:
    """Scaled to 0 … 1; with `size`, the shorter side is resized to it and the middle cut out.

    An array is taken as grey; a file is read as colour, because some files of a set may be grey.
    """
    if isinstance(image, np.ndarray):
        picture = Image.fromarray(image)
    else:
        picture = image.convert("RGB")
    if size is not None and picture.size != (size, size):
        picture = _resized(picture, size)
    pixels = torch.from_numpy(np.asarray(picture, np.float32) / 255)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _resized(picture: Image.Image, size: int) -> Image.Image:
    scale = size / min(picture.size)
    width = max(size, round(picture.width * scale))
    height = max(size, round(picture.height * scale))
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left = (width - size) // 2
    top = (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
