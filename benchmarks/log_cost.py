"""What logging costs: `python benchmarks/log_cost.py` (one process, tiny-lm, below runs/ here; two
minutes).

Every step logs to metrics.jsonl, the terminal's lines, and W&B offline. The time spent in trackers
is taken in the run itself, and set against a step of 50 ms; beside it, the same run with a line at
its end alone.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

from bigtrain.config.loader import load_recipe
from bigtrain.runs.directory import RunDir
from bigtrain.runs.metrics_file import read_metrics
from bigtrain.tracking.base import TrackerGroup
from bigtrain.tracking.terminal import console
from bigtrain.training.run import run_recipe

STEPS, WARM = 200, 40
spent: list[float] = []  # seconds in trackers, by record
inner = TrackerGroup.log


def timed(self: TrackerGroup, record: dict[str, Any]) -> None:
    began = time.perf_counter()
    inner(self, record)
    if record["kind"] == "train":
        spent.append(time.perf_counter() - began)


def seconds_per_step(every: int) -> float:
    """Train; the mean over the steps after the first few (of lines: the median)."""
    name = f"logging-{every}-{int(time.time())}"
    settings = [
        f"name={name}",
        f"train.steps={STEPS}",
        f"train.eval_every={STEPS}",
        f"train.checkpoint_every={STEPS}",
    ]
    settings += [
        f"train.log_every={every}",
        "track.wandb=offline",
        f"data.eval={__file__}",
        "data.eval_fraction=0.001",
    ]
    run_recipe(load_recipe("tiny-lm", settings), console(as_json=True))
    lines = list(read_metrics(RunDir(Path("runs") / name).metrics, "train"))
    return statistics.median([line["seconds"] for line in lines[WARM:] or lines])


def main() -> None:
    """Two runs, and what a line costs."""
    TrackerGroup.log = timed  # type: ignore[method-assign]
    each = seconds_per_step(1)
    lines = sorted(spent[WARM:])
    alone = seconds_per_step(STEPS)
    mean = statistics.fmean(lines)
    print(json.dumps({
        "milliseconds per line": round(1e3 * mean, 3),
        "the slowest of a hundred": round(1e3 * lines[int(0.99 * len(lines))], 3),
        "share of a 50 ms step": f"{mean / 0.05:.2%}",
        "a step that logs (ms)": round(1e3 * each, 2),
        "a step of a run that logs at its end alone (ms)": round(1e3 * alone, 2),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
