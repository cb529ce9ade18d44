"""From the recipe's data section to a training and a held-out set."""

from typing import Any

from torch.utils.data import Subset

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import Part, PreparedData
from bigtrain.data.held_out import held_out
from bigtrain.data.images import prepare_images
from bigtrain.data.records import FIELDS, Source
from bigtrain.data.sources import open_source
from bigtrain.data.tables import prepare_table
from bigtrain.data.text import prepare_text
from bigtrain.errors import RequestError


def prepare(recipe: Recipe, trained: dict[str, Any] | None = None) -> PreparedData:
    """Open, split and (for text) tokenise the data. Raises RequestError for data that cannot be trained on.

    `trained`: what an export says of the data its model has seen; classes and normalisation are then taken from
    there, so that other data is shown to the model as it learnt to see.
    """
    if unknown := set(recipe.data.columns) - set(FIELDS[recipe.task]):
        raise RequestError(
            f"data.columns.{min(unknown)}: task {recipe.task} has no such field",
            " or ".join(FIELDS[recipe.task]),
        )
    source = open_source(recipe.data.train, recipe.task, recipe.data)
    evaluation = (
        open_source(recipe.data.eval, recipe.task, recipe.data) if recipe.data.eval else None
    )
    kind = FIELDS[recipe.task][0]
    if kind in ("text", "source"):
        prepared = prepare_text(recipe, source, evaluation)
    else:
        prepared = (prepare_images if kind == "image" else prepare_table)(
            recipe, *_split(recipe, source, evaluation), trained
        )
    if trained is not None and prepared.classes != trained["classes"]:
        raise RequestError(
            f"the data has classes {prepared.classes}", f"those of the model: {trained['classes']}"
        )
    if "label" in FIELDS[recipe.task] and len(prepared.classes) < 2:
        raise RequestError(
            f"{recipe.data.train} has one class only ({prepared.classes[0]})",
            "two classes at least",
        )
    return prepared


def _split(recipe: Recipe, source: Source, evaluation: Source | None) -> tuple[Part, Part]:
    everything: Any = source.records()
    if evaluation is not None:
        other: Any = evaluation.records()
        return Subset(everything, range(len(everything))), Subset(other, range(len(other)))
    # By number, without reading the record: a record may be an image on a slow disk.
    out = [held_out({}, index, "", recipe.data.eval_fraction) for index in range(len(everything))]
    return Subset(everything, [i for i, o in enumerate(out) if not o]), Subset(
        everything, [i for i, o in enumerate(out) if o]
    )
