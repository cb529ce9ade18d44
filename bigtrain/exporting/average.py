"""The mean of a run's last checkpoints as a model of its own (Izmailov et al. 2018)."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bigtrain.checkpoint.format import committed_checkpoints
from bigtrain.config.loader import load_recipe
from bigtrain.data.datasets import prepare
from bigtrain.errors import BigtrainError, RequestError
from bigtrain.evaluation.evaluate import evaluate_run
from bigtrain.exporting.export import (
    Model,
    checkpoint_weights,
    choose_checkpoint,
    model_of,
    origin_of,
    read_state,
    refuse_used_folder,
)
from bigtrain.exporting.weights import MeanWeights
from bigtrain.models.build import build_model
from bigtrain.models.export import (
    Stored,
    WeightSource,
    names_in_source,
    whole_folder,
    write_card,
    write_export,
)
from bigtrain.models.model_card import ExportOrigin
from bigtrain.models.weight_files import Tensors
from bigtrain.runs.directory import RunDir
from bigtrain.tasks.base import model_inputs
from bigtrain.tasks.registry import TASKS

# What BatchNorm's statistics are computed over.
_SAMPLES = 2048
_BATCH = 64


def average_checkpoints(
    run: RunDir, out: Path, last: int, stored: Stored, sign: Callable[[Path], None]
) -> dict[str, Any]:
    """Write the mean of the `last` checkpoints' weights to `out`; returns metrics before and after.

    `sign` is called with the folder before it takes its name. Raises RequestError if there are
    fewer checkpoints, or if the training data that BatchNorm's statistics need cannot be opened.
    """
    refuse_used_folder(out)
    paths = _last_checkpoints(run, last)
    model = model_of(run)
    checkpoints = [checkpoint_weights(path, model) for path in paths]
    mean = MeanWeights(checkpoints)
    mean.buffers = _recomputed_statistics(mean, model)
    newest = origin_of(run, paths[-1])
    steps = [read_state(path).step for path in paths]
    origin = ExportOrigin(
        {"step": newest.results["step"], "samples": newest.results["samples"]},
        run,
        f"the mean of checkpoints {', '.join(str(step) for step in steps)}",
    )
    with whole_folder(out) as folder:
        hashes = write_export(mean, model.recipe, model.prepared, folder, origin, stored)
        result = {"steps": steps, **_evaluate_both(run, checkpoints[-1], model, newest, folder)}
        measured = origin._replace(results=origin.results | result["after"])
        write_card(folder, model.recipe, measured, hashes)
        sign(folder)
    return result


def _last_checkpoints(run: RunDir, last: int) -> list[Path]:
    committed = committed_checkpoints(run)
    settings = load_recipe(str(run.recipe)).recipe.train
    if settings.keep_best:
        # One that is older than these was kept because it is the best, not as one of the last.
        committed = committed[-settings.keep_last :]
    if len(committed) < last:
        names = ", ".join(path.name for path in committed) or "none"
        fewer = f"--last {len(committed)}; or " if len(committed) > 1 else ""
        raise RequestError(
            f"{run.path} has {len(committed)} checkpoints, not {last}: {names}",
            "as many as are to be averaged",
            f"{fewer}train.keep_last={last} in the recipe keeps that many",
        )
    return [choose_checkpoint(run, path.name.removeprefix("step-")) for path in committed[-last:]]


def _recomputed_statistics(mean: WeightSource, model: Model) -> Tensors:
    """BatchNorm's statistics of the averaged weights, over training data; empty without BatchNorm.

    The mean of the checkpoints' own would be that of other weights.
    """
    with torch.device("meta"):
        built = build_model(*model)
    if not any(_has_statistics(module) for module in built.modules()):
        return {}
    recipe = model.recipe
    try:
        prepared = prepare(recipe)
    except BigtrainError as problem:
        raise RequestError(
            f"BatchNorm's statistics must be computed anew over training data: {problem.found}",
            "the data of the recipe",
        ) from None
    module = build_model(recipe, prepared)
    weights: Tensors = {}
    for name, found in names_in_source(built, mean.names()).items():
        weights[name] = mean.read(found)
    module.load_state_dict(weights, strict=False)
    names = set()
    module.eval()  # without dropout
    for prefix, part in module.named_modules():
        if isinstance(part, _BatchNorm) and _has_statistics(part):
            part.reset_running_stats()
            part.momentum = None  # a plain mean over all batches
            part.train()
            names |= {f"{prefix}.{name}".lstrip(".") for name, _ in part.named_buffers()}
    task = TASKS[recipe.task](recipe.task, prepared)
    samples = min(_SAMPLES, len(prepared.train))
    spread = [number * len(prepared.train) // samples for number in range(samples)]
    with torch.inference_mode():
        for start in range(0, samples, _BATCH):
            indices = spread[start : start + _BATCH]
            batch = task.collate([prepared.train[index] for index in indices])
            module(**model_inputs(batch))
    return {name: tensor.clone() for name, tensor in module.named_buffers() if name in names}


def _has_statistics(module: Any) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats


def _evaluate_both(
    run: RunDir, newest: WeightSource, model: Model, origin: ExportOrigin, averaged: Path
) -> dict[str, Any]:
    """Held-out metrics `before` (the newest checkpoint's) and `after`; or why there are none."""
    with TemporaryDirectory(dir=averaged.parent, prefix=".newest-") as folder:
        write_export(newest, model.recipe, model.prepared, Path(folder), origin)
        try:
            before = _evaluate(run, Path(folder))
            after = _evaluate(run, averaged)
        except BigtrainError as problem:
            return {"before": {}, "after": {}, "not_evaluated": problem.found}
    return {"before": before, "after": after, "not_evaluated": ""}


def _evaluate(run: RunDir, folder: Path) -> dict[str, float]:
    """The metrics of an export of the run's model."""
    view = RunDir(run.path)
    view.export = folder
    return evaluate_run(view, []).metrics
