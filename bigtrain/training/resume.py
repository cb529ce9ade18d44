"""Where a start begins: at the newest checkpoint that verifies, or at step 0."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.checkpoint.format import committed_checkpoints
from bigtrain.checkpoint.reader import Restored, load_checkpoint, newest_checkpoint
from bigtrain.checkpoint.state import TrainState
from bigtrain.config.loader import load_recipe
from bigtrain.config.recipe import Recipe
from bigtrain.config.resume_policy import diff_recipes
from bigtrain.engine.base import Engine
from bigtrain.errors import RequestError, TrainingFailed
from bigtrain.models.teacher import teacher_folder
from bigtrain.runs.directory import RunDir, run_directory
from bigtrain.runs.hashes import weights_hash
from bigtrain.runs.metrics_file import read_metrics
from bigtrain.training.settings import Settings, with_origin

_FRUITLESS_STARTS = 3  # from one step, of a job that Slurm restarts, until it must fail


@dataclass
class ResumePoint:
    """Where a start begins."""

    state: TrainState
    checkpoint: Path | None  # None: at step 0
    rejected: list[str]  # a line about each checkpoint that is not as it should be
    restored: Restored | None  # what was loaded; None: nothing


def recipe_changes(recipe: Recipe, fresh: bool, allow_change: Sequence[str]) -> dict[str, str]:
    """How the recipe differs from that of the run that it resumes, by key: "old → new".

    Raises RequestError for a change that is neither harmless nor allowed.
    """
    run = run_directory(recipe.name)
    if fresh or not run.recipe.is_file() or not committed_checkpoints(run):
        return {}
    begun = load_recipe(str(run.recipe)).recipe
    changes = diff_recipes(begun, recipe, list(allow_change))
    refuse_other_weights(recipe, run, allow_change)
    return changes


def outside_weights(recipe: Recipe) -> Settings:
    """The hashes of weights outside of the run that all its steps depend on; a run keeps them.

    A teacher's, and those that pruning's zeros or frozen parameters are taken from at every start.
    """
    folders: dict[str, Path] = {}
    if recipe.train.distill is not None:
        folders["train.distill"] = teacher_folder(recipe.train.distill.teacher)
    is_partly_frozen = any(group.frozen for group in recipe.optim.groups.values())
    pretrained = Path(recipe.model.pretrained or "")
    if recipe.model.pretrained and (recipe.model.prune or is_partly_frozen):
        folders["model.pretrained"] = pretrained
    hashes = {}
    for key, folder in folders.items():
        if folder.is_dir():  # no hub id
            hashes[f"{key}.weights"] = weights_hash(folder)
    return with_origin("outside of the run", hashes)


def refuse_other_weights(recipe: Recipe, run: RunDir, allow_change: Sequence[str] = ()) -> None:
    """Raises RequestError if weights that the run depends on have changed since it began."""
    began_with = run.settings()
    for key, setting in outside_weights(recipe).items():
        source = key.removesuffix(".weights")
        is_allowed = any(f"{source}.".startswith(f"{name}.") for name in allow_change)
        whose = f"model.pretrained {recipe.model.pretrained}"
        if source == "train.distill" and recipe.train.distill is not None:
            whose = f"the teacher {recipe.train.distill.teacher}"
        known = began_with.get(key, setting["value"])  # a run of an earlier version has no hash
        if known != setting["value"] and not is_allowed:
            raise RequestError(
                f"the weights of {whose} have changed since this run began",
                "the weights that it began with, which are a part of its model",
                f"put them back; or train with --allow-change {source}, or --fresh",
            )


def load_resume_point(engine: Engine, run: RunDir, train_samples: int) -> ResumePoint:
    """Load the newest checkpoint that verifies, if there is one. A collective.

    Raises RequestError, on all ranks, if the run began with another number of training samples, or
    is beyond the plan's last step already.
    """
    checkpoint, rejected = newest_checkpoint(engine, run)
    if checkpoint is None:
        return ResumePoint(TrainState(data_size=train_samples), None, rejected, None)
    restored = load_checkpoint(engine, checkpoint)
    state = restored.state
    if state.data_size != train_samples:
        raise RequestError(
            f"there are {train_samples:,} training samples, and there were {state.data_size:,}"
            " when this run began",
            "the same data, or its order is another",
            "the data as it was, or --fresh",
        )
    steps = engine.plan.steps
    if steps < state.step:
        raise RequestError(
            f"this run is at step {state.step}, and train.steps={steps} is behind it",
            f"train.steps of at least {state.step}",
            f"train.steps={state.step}, or --fresh",
        )
    return ResumePoint(state, checkpoint, rejected, restored)


def refuse_fruitless_restarts(engine: Engine, run: RunDir, step: int) -> None:
    """Raises TrainingFailed if Slurm has restarted the job from this step again and again.

    It would do so for ever. A collective.
    """
    fruitless = engine.main and _restarts_were_fruitless(run, step)
    if engine.gather(fruitless)[0]:
        raise TrainingFailed(
            f"Slurm has started {run.path} {_FRUITLESS_STARTS} times at step {step},"
            " and no checkpoint came of it",
            "at least one checkpoint between two restarts",
            "the job's output says why it ends; or a smaller train.checkpoint_every",
        )


def _restarts_were_fruitless(run: RunDir, step: int) -> bool:
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if restarts < _FRUITLESS_STARTS:
        return False
    events = read_metrics(run.metrics, "event")
    starts = [event["step"] for event in events if event["event"] == "started"]
    return starts[-_FRUITLESS_STARTS:] == [step] * _FRUITLESS_STARTS
