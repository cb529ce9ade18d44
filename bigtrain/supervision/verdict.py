"""What a run leaves for slurm/train.sbatch: srun only knows the highest exit code of all ranks."""

import contextlib
import os
from pathlib import Path


def write_verdict(text: str) -> None:
    """Write `text` to the file that BIGTRAIN_VERDICT names, if the batch script has set it.

    `started`: training began; the script counts starts in a row that did not get so far. An exit
    code: it must not be requeued.
    """
    path = os.environ.get("BIGTRAIN_VERDICT")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(text)
