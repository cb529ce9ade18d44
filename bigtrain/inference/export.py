"""Copy a finished run's model to where it is wanted."""

import shutil
from pathlib import Path

from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir


def copy_export(run: RunDir, out: Path) -> None:
    """Copy the exported model to `out`. Raises RequestError if `out` exists."""
    if out.exists():
        raise RequestError(f"{out} exists already", "a folder that does not exist yet")
    shutil.copytree(run.export, out)
