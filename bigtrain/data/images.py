"""Images as examples: decoded, checked before training, normalised."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch.utils.data import Subset

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import Example, Part, PreparedData, Shape
from bigtrain.data.held_out import refuse_bad, refuse_empty
from bigtrain.errors import BadSampleError, RequestError

_IN_MEMORY = 256 << 20  # bytes of decoded images kept


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
    picture: Image.Image = (
        Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    )
    if size is not None and picture.size != (size, size):
        width, height = picture.size
        scale = size / min(width, height)
        picture = picture.resize(
            (max(size, round(width * scale)), max(size, round(height * scale))),
            Image.Resampling.BILINEAR,
        )
        left, top = (picture.width - size) // 2, (picture.height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    array = torch.from_numpy(np.asarray(picture, np.float32) / 255)
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1).contiguous()


def prepare_images(
    recipe: Recipe, train: Part, held: Part, trained: dict[str, Any] | None
) -> PreparedData:
    size = recipe.data.image_size
    shapes, classes, bad, (good, good_held) = _look_at_all((train, held), size)
    refuse_bad(bad, recipe)
    refuse_empty({"train": len(good), "eval": len(good_held)}, bad)
    if len(shapes) > 1:
        raise RequestError(
            f"images of {len(shapes)} shapes, {min(shapes)} to {max(shapes)}",
            "one size",
            "data.image_size=224",
        )
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
    sets = [
        Images(part, size, numbers, mean.view(-1, 1, 1), std.view(-1, 1, 1), small)
        for part in parts
    ]
    seen = {"image_mean": mean.tolist(), "image_std": std.tolist(), "image_size": [height, width]}
    cost = channels * height * width // 64 + 1
    return PreparedData(
        sets[0], sets[1], cost, classes=classes, image=shape, preprocessing=seen, bad=bad
    )


def _look_at_all(
    parts: tuple[Part, ...], size: int | None
) -> tuple[set[Shape], list[str], list[str], list[list[int]]]:
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
