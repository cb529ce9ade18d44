"""An exported model, ready to be used on this machine."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from bigtrain.config.loader import load_recipe
from bigtrain.config.task_specs import TaskName
from bigtrain.engine.runtime import Device, silence_libraries
from bigtrain.errors import RequestError
from bigtrain.models.export import load_exported


def read_about(folder: Path) -> dict[str, Any]:
    """What an export's bigtrain.json says of its task and of what its inputs go through.

    An export of an earlier version says less: the recipe beside it has the rest. Raises
    RequestError where there is none.
    """
    about: dict[str, Any] = json.loads((folder / "bigtrain.json").read_text())
    if "resize" in about:
        return about
    recipe_file = folder.parent / "recipe.yaml"
    if not recipe_file.is_file():
        raise RequestError(
            f"{folder} was exported by an earlier version, which did not write down how long a text"
            " or how large an image may be",
            "the run's own export, or one by this version",
            "bigtrain export RUN FOLDER",
        )
    data = load_recipe(str(recipe_file)).recipe.data
    return {"resize": data.image_size, "seq_len": data.seq_len, "columns": data.columns} | about


def load_placed(folder: Path, task: TaskName, device: Device) -> nn.Module:
    """An export's model for use on the device, libraries being silent."""
    silence_libraries()
    return placed(load_exported(folder, task).eval(), device)


def placed(model: nn.Module, device: Device) -> nn.Module:
    """The model on the device; its weights, not its buffers, in bf16 on a GPU that has it."""
    model = model.to(device.kind)
    if device.kind == "cuda" and device.bf16_is_fast:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model
