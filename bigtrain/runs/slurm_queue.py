"""The state of our jobs in Slurm's queue."""

import shutil
import subprocess
from functools import cache
from typing import NamedTuple


class _Row(NamedTuple):
    """A line of squeue."""

    job: str  # its own number
    array: str  # the number of the array that it is part of; its own number if of none
    task: str  # ARRAY_INDEX; its own number if it is part of none
    state: str  # PENDING, RUNNING …


@cache
def queue() -> dict[str, str]:
    """Job → its state in the queue (PENDING, RUNNING …); empty without Slurm, or if it is silent.

    A job is known by its own number and by ARRAY_INDEX; a whole array by its number.
    """
    if not shutil.which("squeue"):
        return {}
    command = ["squeue", "--noheader", "--array", "--format=%A %F %i %T", "--me"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except subprocess.TimeoutExpired:
        return {}
    fields = [line.split() for line in done.stdout.splitlines()]
    rows = [_Row(*values) for values in fields if len(values) == 4]
    states: dict[str, str] = {}
    for row in rows:
        if states.get(row.array) != "RUNNING":  # an array runs as long as one of its jobs does
            states[row.array] = row.state
    for row in rows:
        states[row.job] = row.state
        states[row.task] = row.state
    return states
