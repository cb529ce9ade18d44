"""The proof that a run resumes exactly, made with real processes and a real kill, on the user's own machine.

The same recipe straight through, and again with one rank killed (SIGKILL, no warning) at a random step of the second
half; that run is resumed on as many ranks, and a copy of it on half of them. Sample ids, learning rates, losses and
final weights must be those of the first.
"""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from bigtrain.config.loader import LoadedRecipe
from bigtrain.errors import RequestError, TrainingFailed
from bigtrain.runs.directory import RUNS, RunDir
from bigtrain.runs.metrics_file import read_metrics

TOLERANCE = {
    "fp32": 1e-5,
    "bf16": 5e-3,
}  # of losses, where another number of ranks adds up in another order


def _train(launcher: str, arguments: list[str], ranks: int, path: Path, fault: str = "") -> RunDir:
    """A run from where it stands to its end, or to the fault; `launcher` with {ranks} in it.

    Raises TrainingFailed with its last words.
    """
    command = [
        *shlex.split(launcher.format(ranks=ranks)),
        "-m",
        "bigtrain",
        "train",
        *arguments,
        f"name={path.name}",
    ]
    environment = os.environ | {"BIGTRAIN_FAULT": fault}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if bool(done.returncode) != bool(fault):
        raise TrainingFailed(
            f"{shlex.join(command)} ended with {done.returncode}\n{done.stderr[-2000:]}"
        )
    return RunDir(path)


def prove(
    loaded: LoadedRecipe, ref: str, overrides: list[str], ranks: int, steps: int, launcher: str
) -> dict[str, Any]:
    """Run the legs and compare; `rows` for a table, and `verdict`. The runs are removed, unless something differs.

    Raises RequestError where a run of that name is in the way.
    """
    name = f"{loaded.recipe.name}-prove"
    settings = [
        ref,
        *overrides,
        f"train.steps={steps}",
        f"train.eval_every={steps}",
        "train.log_every=1",
    ]
    settings += [f"train.checkpoint_every={steps // 4}", "track.wandb=off"]
    legs = [RUNS / f"{name}-{leg}" for leg in ("straight", "resumed", "half")]
    if there := [str(path) for path in legs if path.exists()]:
        raise RequestError(
            f"{', '.join(there)}: left from an earlier proof",
            "nothing there",
            f"rm -r {' '.join(there)}",
        )
    straight = _train(launcher, settings, ranks, legs[0])
    effective = json.loads(straight.effective.read_text())
    # The pieces of a global batch stay the same on any number of ranks; so do the draws of dropout.
    settings += [
        f"engine.{key}={effective[f'engine.{key}']['value']}"
        for key in ("micro_batch", "precision")
    ]
    kill_at = random.randrange(steps // 2, steps) + 1
    killed = _train(launcher, settings, ranks, legs[1], fault=f"kill@{ranks - 1}:{kill_at}")
    reached = max((line["step"] for line in read_metrics(killed.metrics, "train")), default=0)
    if reached != kill_at - 1:
        raise TrainingFailed(
            f"{legs[1]} ended after step {reached}, not by the kill in step {kill_at}"
        )
    runs = {f"killed in step {kill_at}, resumed on {ranks}": legs[1]}
    if ranks > 1:
        shutil.copytree(legs[1], legs[2])
        (legs[2] / "lock").unlink(missing_ok=True)
        runs[f"the same, resumed on {ranks // 2}"] = legs[2]
    rows = []
    for leg, path in runs.items():
        exact = path == legs[1]
        done = _train(launcher, settings, ranks if exact else ranks // 2, path)
        tolerance = 0.0 if exact else TOLERANCE[effective["engine.precision"]["value"]]
        rows.append(
            {"run": leg, "from step": _resumed_at(done), **_compare(straight, done, tolerance)}
        )
    if rows[0]["from step"] == "0":
        raise TrainingFailed(
            f"{legs[1]} was not resumed: it had no checkpoint when it was killed",
            "one",
            "more --steps",
        )
    good = all(
        value == "same" or value.startswith("within")
        for row in rows
        for value in list(row.values())[2:]
    )
    for path in legs if good else []:
        shutil.rmtree(path, ignore_errors=True)
    return {"rows": rows, "steps": steps, "ranks": ranks, "verdict": "PASS" if good else "FAIL"}


def _resumed_at(run: RunDir) -> str:
    return next(
        (
            str(line["step"])
            for line in read_metrics(run.metrics, "event")
            if line["event"] == "resumed"
        ),
        "0",
    )


def _compare(one: RunDir, other: RunDir, tolerance: float) -> dict[str, str]:
    """What differs between two runs, by the later line of every step."""
    curves = [
        {line["step"]: line for line in read_metrics(run.metrics, "train")} for run in (one, other)
    ]
    result = {}
    columns = {
        "sample ids": ("samples_digest", 0.0),
        "learning rates": ("lr", 0.0),
        "losses": ("loss", tolerance),
    }
    for title, (key, allowed) in columns.items():
        values = [
            np.asarray([curve[step][key] for step in sorted(curve)], float) for curve in curves
        ]
        result[title] = _verdict(values[0], values[1], allowed)
    weights = [_weights(run) for run in (one, other)]
    # Weights drift further apart than losses: each step multiplies what differs.
    result["final weights"] = _verdict(weights[0], weights[1], 100 * tolerance)
    return result


def _weights(run: RunDir) -> Any:
    """All of the export's, one after the other."""
    tensors = {
        n: t
        for file in sorted(run.export.glob("*.safetensors"))
        for n, t in load_file(file).items()
    }
    return np.concatenate(
        [tensors[name].float().numpy().ravel() for name in sorted(tensors)]
    )  # numpy has no bf16


def _verdict(one: Any, other: Any, allowed: float) -> str:
    if one.shape != other.shape:
        return f"DIFFERENT: {len(one)} and {len(other)} of them"
    if np.array_equal(one, other, equal_nan=True):
        return "same"
    difference = float(
        np.abs(one - other).max() / max(float(np.abs(one).max()), sys.float_info.min)
    )
    return f"within {difference:.1e}" if difference <= allowed else f"DIFFERENT by {difference:.1e}"
