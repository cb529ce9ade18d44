"""`bigtrain compress`: a finished run's model pruned, quantized and distilled, and one table."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bigtrain.api import find_finished_run, load_model, train
from bigtrain.compression.measure import Bench, Row
from bigtrain.compression.quantize import (
    refuse_quantization,
    refuse_without_torchao,
    write_quantized,
)
from bigtrain.compression.request import Request
from bigtrain.config.loader import LoadedRecipe, load_recipe
from bigtrain.config.recipe import Recipe
from bigtrain.data.datasets import prepare
from bigtrain.errors import RequestError
from bigtrain.models.qat import train_quantization_aware
from bigtrain.models.quantized import Quantization
from bigtrain.models.teacher import load_teacher
from bigtrain.runs.directory import RunDir, write_atomic
from bigtrain.runs.hashes import text_hash, weights_hash

_SETTINGS = "compressed.json"  # in a variant's folder: how it was made


@dataclass(frozen=True)
class Table:
    """All models side by side."""

    run: str
    device: str
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Variant:
    """One model that is to be made: trained by a recipe, or quantized, or the one and the other."""

    name: str
    settings: dict[str, Any]  # with others it would be another model
    quantization: Quantization | None = None
    recipe: LoadedRecipe | None = None


def compress_run(run: RunDir, request: Request, quiet: bool = False) -> Table:
    """Make what is asked for of a finished run's model, in runs/NAME/compressed/.

    Measured is that, and all else that was made of this model before. What is there already with
    the same settings is kept, so that a compression that was stopped goes on. Raises
    RequestError, before anything is written, for what cannot be made.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RequestError(
            "compress was started on several ranks",
            "one process",
            "bigtrain compress …; bigtrain train … model.prune.amount=… fine-tunes on many",
        )
    exported = json.loads((run.export / "bigtrain.json").read_text())
    recipe = load_recipe(str(run.recipe), _with_export_data(run)).recipe
    prepared = prepare(recipe, exported)
    variants = _variants(run, recipe, request)
    folder = run.path / "compressed"
    for variant in variants:
        _refuse_other_settings(folder / variant.name, variant)
        if variant.recipe is not None and variant.recipe.recipe.train.distill is not None:
            student_data = prepare(variant.recipe.recipe)
            load_teacher(variant.recipe.recipe.train.distill, recipe.task, student_data)
    for variant in variants:
        if not (folder / variant.name).exists():
            _make(run, variant, folder / variant.name, quiet)
    bench = Bench(recipe, prepared, run.export)
    rows = [bench.measure("original", run.export)]
    names = [variant.name for variant in variants]
    names += _made_before(folder, names, weights_hash(run.export))
    rows += [bench.measure(name, folder / name) for name in names]
    table = Table(run.name, bench.device_name, rows)
    if variants:
        write_atomic(folder / "table.json", json.dumps(table.as_dict(), indent=2) + "\n")
    return table


def _made_before(folder: Path, asked_for: list[str], model: str) -> list[str]:
    """The other variants of the model whose weights have the hash `model`."""
    names = []
    for path in sorted(folder.glob(f"[!.]*/{_SETTINGS}")):
        name = path.parent.name
        if name not in asked_for and _made_with(path.parent).get("model") == model:
            names.append(name)
    return names


def _with_export_data(run: RunDir) -> list[str]:
    """Overrides with which the run's recipe starts from its own export."""
    overrides = [f"model.pretrained={_quoted(run.export)}"]
    if (run.export / "tokenizer.json").is_file():
        overrides.append(f"data.tokenizer={_quoted(run.export)}")
    return overrides


def _variants(run: RunDir, recipe: Recipe, request: Request) -> list[_Variant]:
    """What is to be made. Raises RequestError for what cannot be."""
    of_model = {"model": weights_hash(run.export)}
    variants = []
    for amount in request.prune:
        variants.append(_pruned(run, recipe, request, amount, of_model))
    if request.quantize:
        refuse_without_torchao()
        model = load_model(run.path)
        for kind in request.quantize:
            refuse_quantization(kind, model)
            variants.append(_Variant(kind, of_model, quantization=kind))
    for kind in request.qat:
        train_quantization_aware(load_model(run.path), kind)  # refuses what it cannot do
        name = f"{kind}-qat"
        loaded = _fine_tuned(run, recipe, request, name, f"model.qat={kind}")
        settings = of_model | {"qat": kind, "steps": loaded.recipe.train.steps}
        variants.append(_Variant(name, settings, quantization=kind, recipe=loaded))
    if request.student is not None:
        variants += _students(run, recipe, request.student, of_model)
    return variants


def _pruned(
    run: RunDir, recipe: Recipe, request: Request, amount: float, of_model: dict[str, Any]
) -> _Variant:
    """The run's model without its smallest weights, fine-tuned by the run's own recipe."""
    name = f"prune-{amount:g}"
    if request.structure == "channels":
        name += "-channels"
    elif request.scope != "global":
        name += f"-{request.scope}"
    scope = "layer" if request.structure == "channels" else request.scope
    change = f"model.prune={{amount: {amount}, scope: {scope}, structure: {request.structure}}}"
    loaded = _fine_tuned(run, recipe, request, name, change)
    prune, steps = loaded.recipe.model.prune, loaded.recipe.train.steps
    settings = of_model | {"prune": prune and prune.model_dump(), "steps": steps}
    return _Variant(name, settings, recipe=loaded)


def _fine_tuned(
    run: RunDir, recipe: Recipe, request: Request, name: str, change: str
) -> LoadedRecipe:
    """The run's own recipe from its own model on, shorter, with one change: an override."""
    trained = json.loads(run.summary.read_text())["step"]
    steps = request.steps or max(1, trained // 3)
    warmup = recipe.optim.warmup_steps * steps // max(trained, 1)
    overrides = [
        f"name={run.name}-{name}",
        *_with_export_data(run),
        change,
        f"train.steps={steps}",
        "train.epochs=null",
        f"train.eval_every={steps}",
        f"optim.warmup_steps={warmup}",
    ]
    return load_recipe(str(run.recipe), overrides)


def _students(
    run: RunDir, recipe: Recipe, student: str, of_model: dict[str, Any]
) -> list[_Variant]:
    """The student that learns from the run's model, and the same student alone."""
    own = load_recipe(student).recipe
    if own.task != recipe.task:
        raise RequestError(
            f"{student} is for task {own.task}, and {run.name} for {recipe.task}",
            "a student that learns the same task",
        )
    for key in ("train", "eval", "eval_fraction"):
        of_student, of_run = getattr(own.data, key), getattr(recipe.data, key)
        if of_student != of_run:
            raise RequestError(
                f"{student} has data.{key} {of_student}, and {run.name} {of_run}",
                "the same, or the table would measure a model on examples that it was trained on",
                f"data: {{{key}: {of_run}}} in {student}",
            )
    taught_name, alone_name = f"distill-{own.name}", f"alone-{own.name}"
    taught = load_recipe(
        student,
        [f"name={run.name}-{taught_name}", f"train.distill.teacher={_quoted(run.path)}"],
    )
    alone = load_recipe(student, [f"name={run.name}-{alone_name}", "train.distill=null"])
    variants = []
    for name, loaded in ((taught_name, taught), (alone_name, alone)):
        settings = of_model | {"recipe": loaded.recipe.model_dump(mode="json")}
        variants.append(_Variant(name, settings, recipe=loaded))
    return variants


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)  # JSON is YAML


def _refuse_other_settings(folder: Path, variant: _Variant) -> None:
    """Raises RequestError if the variant is there, made in another way."""
    if not folder.exists():
        return
    if _made_with(folder) != json.loads(json.dumps(variant.settings)):
        raise RequestError(
            f"{folder} was made of another model, or with other settings",
            "the same, or no such folder: nothing is overwritten",
            f"mv {folder} {folder}-before",
        )


def _made_with(folder: Path) -> dict[str, Any]:
    """A variant's settings; empty if they cannot be read."""
    try:
        return dict(json.loads((folder / _SETTINGS).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _make(run: RunDir, variant: _Variant, folder: Path, quiet: bool) -> None:
    """Write one variant; its folder appears once it is complete."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(exist_ok=True)
    source = run
    if variant.recipe is not None:
        loaded = _named_by_settings(variant.recipe, variant.settings)
        train(loaded, quiet=quiet)
        source = find_finished_run(loaded.recipe.name)
    if variant.quantization is not None:
        write_quantized(source.export, load_model(source.path), variant.quantization, unfinished)
    else:
        shutil.copytree(source.export, unfinished)
    write_atomic(unfinished / _SETTINGS, json.dumps(variant.settings, indent=2) + "\n")
    unfinished.rename(folder)


def _named_by_settings(loaded: LoadedRecipe, settings: dict[str, Any]) -> LoadedRecipe:
    """The recipe under a name that another model, or other settings, would not have.

    A run of that name is then the same one, stopped, and is continued.
    """
    digest = text_hash(json.dumps(settings, sort_keys=True))[:8]
    recipe = loaded.recipe.model_copy(update={"name": f"{loaded.recipe.name}-{digest}"})
    return replace(loaded, recipe=recipe)
