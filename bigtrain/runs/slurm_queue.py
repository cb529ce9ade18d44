"""The state of our jobs in Slurm's queue."""

import shutil
import subprocess
from functools import cache


@cache
def queue() -> dict[str, str]:
    """Job → its state in the queue (PENDING, RUNNING …), by its own number and by ARRAY_TASK; nothing without Slurm."""
    if not shutil.which("squeue"):
        return {}
    command = ["squeue", "--noheader", "--array", "--format=%A %F %i %T", "--me"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except subprocess.TimeoutExpired:
        return {}
    rows = [line.split() for line in done.stdout.splitlines() if len(line.split()) == 4]
    # An array as a whole runs as long as one of its tasks does.
    whole = {
        array: state for _, array, _, state in sorted(rows, key=lambda row: row[3] == "RUNNING")
    }
    return whole | {job: state for own, _, task, state in rows for job in (own, task)}
