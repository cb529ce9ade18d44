"""From the recipe's data section to a training and a held-out set: the way into this package.

`sources.py` and `builtin.py` find the records; `text.py`, `images.py` and `tables.py` make examples
of them; `order.py` says which example comes when, and `loader.py` makes micro-batches for a rank.
"""

from typing import Any

from bigtrain.config.recipe import Recipe
from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.data.examples import Part, PreparedData
from bigtrain.data.held_out import is_held_out
from bigtrain.data.images import prepare_images
from bigtrain.data.tables import prepare_table
from bigtrain.data.text import prepare_text
from bigtrain.errors import RequestError
from bigtrain.sources.lookup import open_source
from bigtrain.sources.records import Source


def prepare(recipe: Recipe, exported: dict[str, Any] | None = None) -> PreparedData:
    """Open, split and (for text) tokenise the data.

    Raises RequestError for data that cannot be trained on.

    `exported`: an export's bigtrain.json. Normalisation is then the one its model was trained with,
    and data of other classes is refused.
    """
    spec = TASK_SPECS[recipe.task]
    unknown = set(recipe.data.columns) - set(spec.fields)
    if unknown:
        raise RequestError(
            f"data.columns.{min(unknown)}: task {recipe.task} has no such field",
            " or ".join(spec.fields),
        )
    columns = recipe.data.columns
    evaluation = None
    if recipe.data.eval:
        evaluation = open_source("data.eval", recipe.data.eval, recipe.task, columns)
    if evaluation is not None and exported is not None and "table" in exported:
        # The export says how rows become features, so the training data need not be there.
        records: Any = evaluation.records()
        held_out = Part(records, range(len(records)), " of data.eval")
        prepared = prepare_table(recipe, Part(records, []), held_out, exported)
        _refuse_classes(recipe, prepared, exported)
        return prepared
    source = _open_training(recipe, exported)
    if spec.data == "text":
        prepared = prepare_text(recipe, source, evaluation)
    else:
        train, held_out = _split(recipe, source, evaluation)
        prepare_part = prepare_images if spec.data == "image" else prepare_table
        prepared = prepare_part(recipe, train, held_out, exported)
    _refuse_classes(recipe, prepared, exported)
    return prepared


def _open_training(recipe: Recipe, exported: dict[str, Any] | None) -> Source:
    data = recipe.data
    try:
        return open_source("data.train", data.train, recipe.task, data.columns)
    except RequestError as problem:
        if exported is None:
            raise
        advice = "data.eval=FILES" if "table" in exported else ""  # others need both
        raise RequestError(problem.found, "the data that the run was trained on", advice) from None


def _refuse_classes(
    recipe: Recipe, prepared: PreparedData, exported: dict[str, Any] | None
) -> None:
    """Raises RequestError for other classes than the model's, or for one only."""
    if exported is not None and prepared.classes != exported["classes"]:
        raise RequestError(
            f"the data has classes {prepared.classes}", f"those of the model: {exported['classes']}"
        )
    if TASK_SPECS[recipe.task].has_labels and len(prepared.classes) < 2:
        raise RequestError(
            f"data.train={recipe.data.train} has one class only ({prepared.classes[0]})",
            "two classes at least",
        )


def _split(recipe: Recipe, source: Source, evaluation: Source | None) -> tuple[Part, Part]:
    """The training part and the held-out one, of records that can be indexed."""
    records: Any = source.records()
    if evaluation is not None:
        eval_records: Any = evaluation.records()
        return (
            Part(records, range(len(records))),
            Part(eval_records, range(len(eval_records)), " of data.eval"),
        )
    train: list[int] = []
    held_out: list[int] = []
    for number in range(len(records)):
        # By number, without reading the record: it may be an image on a slow disk.
        is_out = is_held_out(str(number), recipe.data.eval_fraction)
        (held_out if is_out else train).append(number)
    return Part(records, train), Part(records, held_out)
