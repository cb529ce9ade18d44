"""safetensors files of a model, written tensor by tensor: never more than a layer in memory.

Weights beyond `max_bytes` are cut into several files under transformers' names, with its index.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from bigtrain.errors import TrainingFailed
from bigtrain.runs.hashes import file_hash

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# torch's name of a type → safetensors' one.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
Tensors = dict[str, Tensor]


def safetensors_header(
    tensors: Tensors, metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file of these tensors (meta ones too), and where each begins, in order.

    Wide types come first, so that each tensor is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    places: dict[str, int] = {}
    end = 0
    for name, tensor in ordered:
        start = end
        end = start + tensor.numel() * tensor.element_size()
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        places[name] = start
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    beginning = len(text).to_bytes(8, "little") + text
    return beginning, {name: len(beginning) + start for name, start in places.items()}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """What a file holds of the tensor, without a copy where it is contiguous already."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class _OutputFile(NamedTuple):
    name: str
    tensors: Tensors  # without memory


def write_weight_files(
    folder: Path,
    layers: list[Tensors],
    read_layer: Callable[[int], Tensors],
    max_bytes: int,
) -> dict[str, str]:
    """Write what `read_layer(i)` returns for each of `layers`; returns each file's BLAKE3 hash.

    `layers` hold tensors on the meta device, by name. Raises TrainingFailed for a tensor of another
    shape or type than they say.
    """
    files = _cut(layers, max_bytes)
    written = 0
    waiting: Tensors = {}
    layer = _layers_in_order(layers, read_layer)
    for file in files:
        beginning, places = safetensors_header(file.tensors, {"format": "pt"})
        with (folder / file.name).open("wb") as output:
            output.write(beginning)
            while places:
                for name in [name for name in waiting if name in places]:
                    _write_tensor(output, name, places.pop(name), waiting.pop(name), file.tensors)
                if places:
                    waiting |= next(layer)
        written += sum(tensor.nbytes for tensor in file.tensors.values())
    if len(files) > 1:
        _write_index(folder, files, written)
    return {file.name: file_hash(folder / file.name) for file in files}


def _layers_in_order(
    layers: list[Tensors], read_layer: Callable[[int], Tensors]
) -> Iterator[Tensors]:
    for number in range(len(layers)):
        yield read_layer(number)


def _write_tensor(
    output: BinaryIO, name: str, place: int, tensor: Tensor, expected: Tensors
) -> None:
    planned = expected[name]
    if tensor.shape != planned.shape or tensor.dtype != planned.dtype:
        raise TrainingFailed(
            f"{name} is {tensor.dtype} {list(tensor.shape)}",
            f"{planned.dtype} {list(planned.shape)}, as the recipe's model has it",
        )
    output.seek(place)
    output.write(tensor_bytes(tensor))


def _cut(layers: list[Tensors], max_bytes: int) -> list[_OutputFile]:
    """Which tensor is in which file: in the model's order, none of them cut."""
    parts: list[Tensors] = [{}]
    size = 0
    for layer in layers:
        for name, tensor in layer.items():
            if parts[-1] and size + tensor.nbytes > max_bytes:
                parts.append({})
                size = 0
            parts[-1][name] = tensor
            size += tensor.nbytes
    if len(parts) == 1:
        return [_OutputFile(WEIGHTS, parts[0])]
    files = []
    for number, tensors in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        files.append(_OutputFile(name, tensors))
    return files


def _write_index(folder: Path, files: list[_OutputFile], total_size: int) -> None:
    weight_map = {}
    for file in files:
        for name in file.tensors:
            weight_map[name] = file.name
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def weight_files(folder: Path) -> list[Path]:
    """The files with an export's weights, in order; empty if there are none."""
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    except FileNotFoundError:
        single = folder / WEIGHTS
        return [single] if single.is_file() else []
    return [folder / name for name in sorted(set(weight_map.values()))]
