"""What a model needs to know of its data, kept apart from the data.

A run writes it when it starts, so that its checkpoints can be exported where the data is not.
"""

import json
import shutil
from typing import Any

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import PreparedData
from bigtrain.data.tokenizer import load_tokenizer
from bigtrain.runs.directory import RunDir

_FILE = "model_inputs.json"
_TOKENIZER = "tokenizer_config.json"  # every tokenizer has it


def describe_inputs(recipe: Recipe, prepared: PreparedData) -> dict[str, Any]:
    """What a user of the model must know: an export's bigtrain.json."""
    return {
        "task": recipe.task,
        "classes": prepared.classes,
        "image": prepared.image,
        "resize": recipe.data.image_size,
        "seq_len": prepared.seq_len,
        "columns": recipe.data.columns,
        **prepared.preprocessing,
    }


def write_model_inputs(recipe: Recipe, prepared: PreparedData, run: RunDir) -> None:
    """Write runs/NAME/model_inputs, or replace it as a whole."""
    temporary = run.path / f".{run.model_inputs.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    if prepared.tokenizer is not None:
        prepared.tokenizer.save_pretrained(temporary)
    image = prepared.image
    inputs = {
        "vocab_size": prepared.vocab_size,
        "seq_len": prepared.seq_len,
        "features": prepared.features,
        "cardinalities": prepared.cardinalities,
        "classes": prepared.classes,
        "image": None if image is None else list(image),
        "preprocessing": prepared.preprocessing,
    }
    (temporary / _FILE).write_text(json.dumps(inputs, indent=2) + "\n")
    shutil.rmtree(run.model_inputs, ignore_errors=True)
    temporary.rename(run.model_inputs)


def read_model_inputs(run: RunDir) -> PreparedData | None:
    """What `write_model_inputs` wrote, without examples; None for a run of an earlier version."""
    folder = run.model_inputs
    try:
        inputs = json.loads((folder / _FILE).read_text())
    except FileNotFoundError:
        return None
    if inputs["image"] is not None:
        channels, height, width = inputs["image"]
        inputs["image"] = (channels, height, width)
    tokenizer = load_tokenizer(str(folder)) if (folder / _TOKENIZER).is_file() else None
    return PreparedData(train=[], eval=[], tokens_per_sample=0, tokenizer=tokenizer, **inputs)
