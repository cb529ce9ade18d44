"""Where the time of the steps went: the parts of a line of metrics, and their shares.

A line has, for each of PARTS, `seconds_PART`: a mean per step, on rank 0. Lines of versions before
0.2 have none of them. `communication` is the sums of numbers over ranks that each step makes, and
the wait for the slowest rank in them. The sums of gradients are in `backward` as far as they do not
overlap with it (ddp), or in `backward` and `optimizer` (DeepSpeed).
"""

import numpy as np

from bigtrain.runs.metrics_file import Columns

# They add up to the line's `seconds`.
STEP_PARTS = (
    "data",
    "forward",
    "backward",
    "communication",
    "optimizer",
    "logging",
    "other",
)
# What training waits for a checkpoint comes on top.
PARTS = (*STEP_PARTS, "checkpoint")


def column_of(part: str) -> str:
    """The key of a part in a line of metrics."""
    return f"seconds_{part}"


def shares(lines: Columns) -> dict[str, float]:
    """Part → its share of the time of these lines; empty where no line says where it went.

    Lines are weighted with the steps that they stand for.
    """
    steps = np.diff(lines["step"], prepend=0)
    if len(steps) > 1:
        steps[0] = np.median(steps[1:])  # `lines` may begin in the middle of a run
    steps = np.maximum(steps, 1)  # a step that was repeated after a kill
    totals = {}
    for part in PARTS:
        totals[part] = float(np.nansum(lines[column_of(part)] * steps))
    total = sum(totals.values())
    if total <= 0:
        return {}
    return {part: seconds / total for part, seconds in totals.items()}


def in_words(shares_of_run: dict[str, float]) -> str:
    """The shares as a line for a person, the largest first; those below half a percent left out."""
    ordered = sorted(shares_of_run.items(), key=lambda item: -item[1])
    return ", ".join(f"{part} {share:.0%}" for part, share in ordered if share >= 0.005)
