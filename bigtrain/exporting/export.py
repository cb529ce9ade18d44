"""A run's model as others load it: of its end, or of any committed checkpoint.

Without a GPU and without ranks. A tensor is read, cast and written at a time.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigtrain.checkpoint.format import committed_checkpoints, verify_checkpoint
from bigtrain.checkpoint.state import TrainState
from bigtrain.config.loader import load_recipe
from bigtrain.config.recipe import Recipe
from bigtrain.data.datasets import prepare
from bigtrain.data.examples import PreparedData
from bigtrain.errors import RequestError
from bigtrain.exporting.weights import CheckpointWeights, ExportedWeights
from bigtrain.models.build import build_model
from bigtrain.models.export import AS_TRAINED, Stored, damaged_weight_files, write_export
from bigtrain.models.model_card import ExportOrigin, end_of_run
from bigtrain.models.model_inputs import read_model_inputs
from bigtrain.runs.directory import RunDir
from bigtrain.training.parameter_groups import make_groups
from bigtrain.training.resume import refuse_other_weights


class Model(NamedTuple):
    """What a run trains, but for its weights."""

    recipe: Recipe
    prepared: PreparedData
    """Without examples, unless the run is of an earlier version."""


def write_model(run: RunDir, folder: Path, step: str | None, stored: Stored) -> dict[str, Any]:
    """Write the run's model to `folder`, which is empty; returns where its weights are from.

    `step`: a number, `best` or `last`; None for the model that a finished run has exported, and
    for the last checkpoint of another run. Raises RequestError for a checkpoint that is not there
    or does not verify and for a damaged export, TrainingFailed for a checkpoint that is not of the
    recipe's model.
    """
    summary = _summary_of_end(run)
    if step is None and summary is not None:
        _refuse_damaged(run)
        origin = end_of_run(summary, run)
        if stored == AS_TRAINED:
            shutil.copytree(run.export, folder, dirs_exist_ok=True)
        else:
            exported = ExportedWeights(run.export)
            write_export(exported, *model_of(run), folder, origin, stored)
        return {"weights": origin.weights, "step": summary.get("exported_step", summary["step"])}
    model = model_of(run)
    checkpoint = choose_checkpoint(run, step or "last")
    weights = checkpoint_weights(checkpoint, model)
    origin = origin_of(run, checkpoint)
    write_export(weights, model.recipe, model.prepared, folder, origin, stored)
    return {"weights": origin.weights, "step": origin.results["step"]}


def _summary_of_end(run: RunDir) -> dict[str, Any] | None:
    """The summary of a finished run; None if there is none, or if it has gone on since."""
    if not (run.export / "bigtrain.json").is_file() or not run.summary.is_file():
        return None
    summary: dict[str, Any] = json.loads(run.summary.read_text())
    committed = committed_checkpoints(run)
    has_gone_on = committed and read_state(committed[-1]).step > summary["step"]
    return None if has_gone_on else summary


def _refuse_damaged(run: RunDir) -> None:
    damaged = damaged_weight_files(run.export)
    if damaged:
        raise RequestError(
            f"{run.export}: {', '.join(damaged)} is not as it was written",
            "the weights whose hashes the export has recorded",
            f"bigtrain export {run.name} OUT --step last",
        )


def refuse_used_folder(out: Path) -> None:
    """Raises RequestError unless `out` is new or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} exists already", "a folder that does not exist yet")


def model_of(run: RunDir) -> Model:
    """From the run's directory alone; runs of earlier versions need their data."""
    recipe = load_recipe(str(run.recipe)).recipe
    return Model(recipe, read_model_inputs(run) or prepare(recipe))


def checkpoint_weights(path: Path, model: Model) -> CheckpointWeights:
    """With the starting values of parameters that the model does not train."""
    refuse_other_weights(model.recipe, RunDir(path.parent.parent))
    weights = CheckpointWeights(path)
    with torch.device("meta"):
        built = build_model(*model)
    make_groups(built, model.recipe.optim, _whole_shape)  # freezes what the recipe says
    untrained = []
    for name, parameter in built.named_parameters():
        if not parameter.requires_grad and name not in weights.shapes:
            untrained.append(name)
    if untrained:
        start = build_model(*model).state_dict()
        weights.frozen = {name: start[name] for name in untrained}
    return weights


def _whole_shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.shape)


def choose_checkpoint(run: RunDir, step: str) -> Path:
    """The checkpoint of a step, of the `best` or of the `last`.

    Raises RequestError if there is none, and for one that does not verify.
    """
    committed = committed_checkpoints(run)
    if not committed:
        raise RequestError(
            f"{run.path} has no finished checkpoint yet",
            "a run that has written one",
            f"bigtrain status {run.name}",
        )
    path = committed[-1]
    if step == "best":
        path = _best(run, path)
    elif step != "last":
        path = run.checkpoints / f"step-{step:0>8}"
    steps = ", ".join(f"{int(each.name.removeprefix('step-'))}" for each in committed)
    if path not in committed:
        raise RequestError(
            f"{run.path} has no checkpoint {step}",
            f"one of its steps ({steps}), best or last",
            "train.keep_last in the recipe keeps more of them",
        )
    problems = verify_checkpoint(path)
    if problems:
        raise RequestError(
            f"{path} does not verify: {problems[0]}",
            "files as they were written",
            f"--step with another of {steps}",
        )
    return path


def _best(run: RunDir, newest: Path) -> Path:
    best_step = read_state(newest).best_step
    path = run.checkpoints / f"step-{best_step:08d}"
    if not path.is_dir():
        of_step = f" (step {best_step})" if best_step else ""
        raise RequestError(
            f"{run.path} has not kept a best checkpoint{of_step}",
            "a recipe with train.keep_best",
            "--step last",
        )
    return path


def read_state(checkpoint: Path) -> TrainState:
    return TrainState(**json.loads((checkpoint / "state.json").read_text()))


def origin_of(run: RunDir, checkpoint: Path) -> ExportOrigin:
    """For the model card: where the run stood, and what it had measured last."""
    state = asdict(read_state(checkpoint))
    results = {"step": state["step"], "samples": state["samples"], **state["results"]}
    evaluated = state["evaluated"] if state["evaluated"] != state["step"] else None
    return ExportOrigin(results, run, f"checkpoint {checkpoint.name}", evaluated)
