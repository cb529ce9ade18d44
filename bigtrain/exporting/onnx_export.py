"""ONNX from an exported folder, kept only if onnxruntime computes what torch does."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.errors import RequestError, TrainingFailed
from bigtrain.models.export import ONNX_MODEL as MODEL
from bigtrain.models.export import load_exported
from bigtrain.models.unpacked_rnn import without_packing
from bigtrain.models.weight_files import INDEX, weight_files
from bigtrain.runs.hashes import file_hash
from bigtrain.tasks.base import outputs

_TOLERANCE = 1e-4
# Batch and length that the graph is made with; and those that it is tried with.
_EXAMPLE = (3, 7)
_TRIALS = ((2, 5), (5, 6))


class _Positional(nn.Module):
    """The model with its inputs in order, and the logits alone as output."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        return outputs(self.model, **dict(zip(self.names, tensors, strict=True)))


def replace_by_onnx(folder: Path) -> dict[str, Any]:
    """Write model.onnx and delete the weights it was made of; returns what the check has found.

    Batch and, of texts, length can be any; inputs have the names of the batch's. Raises
    TrainingFailed if the model cannot be exported, or if onnxruntime's outputs are others.
    """
    _refuse_missing_packages()
    about = json.loads((folder / "bigtrain.json").read_text())
    model = load_exported(folder, about["task"]).eval()
    without_packing(model)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.use_cache = False
        model.set_attn_implementation("eager")  # type: ignore[operator]
    example = _random_batch(folder, about, model, *_EXAMPLE)
    positional = _Positional(model, list(example)).eval()
    try:
        _write(positional, example, folder / MODEL)
        trials = [_random_batch(folder, about, model, *size) for size in _TRIALS]
        differences = [_difference(positional, trial, folder / MODEL) for trial in trials]
    except Exception as problem:  # of torch's exporter, of onnxruntime
        cause = problem.__cause__ or problem
        reason = str(cause).strip().split("\n")[0] or type(cause).__name__
        raise TrainingFailed(
            f"{type(model).__name__} cannot be exported to ONNX: {reason}",
            "a model that torch.onnx.export and onnxruntime can take",
            "leave --format out",
        ) from None
    worst = float(torch.tensor(differences).max())  # NaN if one of them is
    if not worst <= _TOLERANCE:
        raise TrainingFailed(
            f"onnxruntime's outputs differ from torch's by up to {worst:.2g}",
            f"at most {_TOLERANCE:g}",
            "leave --format out",
        )
    for path in (*weight_files(folder), folder / INDEX):
        path.unlink(missing_ok=True)
    _note_in_card(folder, worst)
    return {"inputs": list(example), "largest_difference": worst}


def _refuse_missing_packages() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as problem:
        raise RequestError(
            f"--format onnx needs the package {problem.name}",
            "it installed beside bigtrain",
            "pip install 'bigtrain[onnx]'",
        ) from None


def _random_batch(
    folder: Path, about: dict[str, Any], model: nn.Module, batch: int, length: int
) -> dict[str, Tensor]:
    """Random inputs of the shapes and names of the task's batches, without labels."""
    spec = TASK_SPECS[about["task"]]
    arguments = json.loads((folder / "config.json").read_text()).get("args", {})
    generator = torch.Generator().manual_seed(batch)
    if spec.data == "image":
        return {"pixel_values": torch.randn(batch, *about["image"], generator=generator)}
    if spec.data == "table":
        return {"features": torch.randn(batch, arguments["in_features"], generator=generator)}
    vocab_size = arguments.get("vocab_size")
    if vocab_size is None:
        config: Any = model.config
        vocab_size = config.get_text_config().vocab_size

    def ids(places: int) -> Tensor:
        return torch.randint(vocab_size, (batch, places), generator=generator)

    inputs = {"input_ids": ids(length)}
    if spec.is_packed:
        return inputs
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, length // 2 :] = 0  # all but one text are shorter
    inputs["attention_mask"] = mask
    if spec.predicts == "text":
        inputs["decoder_input_ids"] = ids(length - 2)
    return inputs


def _write(model: nn.Module, example: dict[str, Tensor], path: Path) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    shapes: list[dict[int, Any]] = []
    for name in example:
        is_text = name.endswith(("_ids", "_mask"))
        shapes.append({0: dynamic, 1: dynamic} if is_text else {0: dynamic})
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            tuple(example.values()),
            dynamo=True,
            dynamic_shapes=(tuple(shapes),),
            input_names=list(example),
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    program.save(path)


def _difference(model: nn.Module, batch: dict[str, Tensor], path: Path) -> float:
    """The largest between onnxruntime's outputs and torch's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in batch.items()}
    found = torch.from_numpy(session.run(["logits"], feed)[0])
    with torch.inference_mode():
        expected = model(*batch.values())
    if found.shape != expected.shape:
        raise ValueError(f"its output has shape {list(found.shape)}, not {list(expected.shape)}")
    return float((found - expected).abs().max())


def _note_in_card(folder: Path, worst: float) -> None:
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write(
            f"\n## ONNX\n\n`{MODEL}` was made of the weights above, which are not here. Its BLAKE3"
            f" hash: `{file_hash(folder / MODEL)}`.\nonnxruntime's outputs differed from torch's by"
            f" at most {worst:.2g} on random batches of two sizes.\n"
        )
