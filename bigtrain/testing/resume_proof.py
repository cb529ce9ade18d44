"""The proof that a run resumes exactly, with real processes and a real kill on the user's machine.

The same recipe straight through, and again with one rank killed (SIGKILL, no warning) at a random
step of the second half. That run is resumed on as many ranks, and a copy of it on half of them.
Sample ids, learning rates, losses and final weights must be those of the first.
"""

import json
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from bigtrain.config.loader import LoadedRecipe
from bigtrain.errors import RequestError, TrainingFailed
from bigtrain.runs.directory import RUNS, RunDir
from bigtrain.runs.metrics_file import read_metrics

# On CUDA, attention's and convolutions' gradients are otherwise added up in any order.
_DETERMINISTIC = {"BIGTRAIN_DETERMINISTIC": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@dataclass(frozen=True)
class Tolerance:
    """What may differ on another number of ranks, which adds up in another order; relative."""

    losses: float
    weights: float  # more: each step multiplies what differs


EXACT = Tolerance(losses=0.0, weights=0.0)
# bf16 has eight bits: neighbours are 2^-7 apart, and a loss made of squares doubles an error.
TOLERANCE = {
    "fp32": Tolerance(losses=1e-5, weights=1e-3),
    "tf32": Tolerance(losses=5e-3, weights=2**-5),
    "bf16": Tolerance(losses=2**-7, weights=2**-5),
}
# A matrix whose values are smaller than this share of the model's largest counts as that large: one
# that begins at zero is little but rounding for some steps. Others begin at about this share of the
# ones in norms, so they are measured by their own size.
_MATRIX_FLOOR = 0.05
# Biases begin at zero, and Adam moves them by as much as everything else even where their gradient
# is nothing but rounding (that of attention's keys): after sixty sound steps in bf16 such a bias
# differs by more than its own size. So vectors count as large as the largest.
_VECTOR_FLOOR = 1.0


@dataclass(frozen=True)
class Comparison:
    """How a resumed run's values compare to those of the straight one."""

    text: str
    equal: bool  # within the tolerance


@dataclass(frozen=True)
class ProofRow:
    """A resumed run beside the straight one."""

    run: str
    from_step: int
    sample_ids: Comparison
    learning_rates: Comparison
    losses: Comparison
    final_weights: Comparison

    @property
    def exact(self) -> bool:
        """Whether all of it is what it should be."""
        compared = (self.sample_ids, self.learning_rates, self.losses, self.final_weights)
        return all(comparison.equal for comparison in compared)

    def printed(self) -> dict[str, str]:
        """The row as `bigtrain prove` prints it."""
        return {
            "run": self.run,
            "from step": str(self.from_step),
            "sample ids": self.sample_ids.text,
            "learning rates": self.learning_rates.text,
            "losses": self.losses.text,
            "final weights": self.final_weights.text,
        }


@dataclass(frozen=True)
class _Runner:
    """Trains the recipe as a user would. `launcher`: a command with {ranks} in it."""

    launcher: str
    arguments: list[str]

    def train(self, path: Path, ranks: int, fault: str = "") -> RunDir:
        """Train the run at `path` to its end, or to the fault.

        Raises TrainingFailed, with the end of what it printed, if it ends in another way.
        """
        launcher = shlex.split(self.launcher.format(ranks=ranks))
        program = ["-m", "bigtrain", "train", *self.arguments, f"name={path.name}"]
        command = [*launcher, *program]
        environment = os.environ | _DETERMINISTIC | {"BIGTRAIN_FAULT": fault}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        failed = done.returncode != 0
        if failed != bool(fault):
            raise TrainingFailed(
                f"{shlex.join(command)} ended with {done.returncode}\n{done.stderr[-2000:]}"
            )
        return RunDir(path)


def prove(
    loaded: LoadedRecipe, ref: str, overrides: list[str], ranks: int, steps: int, launcher: str
) -> dict[str, Any]:
    """Train straight through, kill, resume and compare: `rows` for a table, and `verdict`.

    The runs are removed, unless something differs. Raises RequestError where a run of that name
    is in the way, and TrainingFailed if a run ends otherwise than it should.
    """
    straight_path, resumed_path, half_path = _free_paths(f"{loaded.recipe.name}-prove")
    arguments = [
        ref,
        *overrides,
        f"train.steps={steps}",
        "train.epochs=null",
        "train.patience=null",
        f"train.eval_every={steps}",
        "train.log_every=1",
        f"train.checkpoint_every={steps // 4}",
        "track.wandb=off",
    ]
    straight = _Runner(launcher, arguments).train(straight_path, ranks)
    effective = json.loads(straight.effective.read_text())
    micro_batch = effective["engine.micro_batch"]["value"]
    precision = effective["engine.precision"]["value"]
    # The same micro-batches on any number of ranks; and so the same draws of dropout.
    fixed = [f"engine.micro_batch={micro_batch}", f"engine.precision={precision}"]
    runner = _Runner(launcher, [*arguments, *fixed])

    kill_at = random.randrange(steps // 2, steps) + 1
    _train_until_killed(runner, resumed_path, ranks, kill_at)
    if ranks > 1:
        shutil.copytree(resumed_path, half_path)
        (half_path / "lock").unlink(missing_ok=True)

    resumed = runner.train(resumed_path, ranks)
    title = f"killed in step {kill_at}, resumed on {ranks}"
    rows = [_compare(title, straight, resumed, EXACT)]
    if ranks > 1:
        half = runner.train(half_path, ranks // 2)
        title = f"the same, resumed on {ranks // 2}"
        rows.append(_compare(title, straight, half, TOLERANCE[precision]))
    if rows[0].from_step == 0:
        raise TrainingFailed(
            f"{resumed_path} was not resumed: it had no checkpoint when it was killed",
            "one",
            "more --steps",
        )
    exact = all(row.exact for row in rows)
    if exact:
        for path in (straight_path, resumed_path, half_path):
            shutil.rmtree(path, ignore_errors=True)
    return {
        "rows": [row.printed() for row in rows],
        "steps": steps,
        "ranks": ranks,
        "verdict": "PASS" if exact else "FAIL",
    }


def _free_paths(name: str) -> list[Path]:
    """Where the three runs go. Raises RequestError if one is there already."""
    paths = [RUNS / f"{name}-{leg}" for leg in ("straight", "resumed", "half")]
    existing = [str(path) for path in paths if path.exists()]
    if existing:
        raise RequestError(
            f"{', '.join(existing)}: left from an earlier proof",
            "nothing there",
            f"rm -r {' '.join(existing)}",
        )
    return paths


def _train_until_killed(runner: _Runner, path: Path, ranks: int, kill_at: int) -> None:
    """Train until the last rank is killed in step `kill_at`. Raises TrainingFailed otherwise."""
    killed = runner.train(path, ranks, fault=f"kill@{ranks - 1}:{kill_at}")
    reached = max((line["step"] for line in read_metrics(killed.metrics, "train")), default=0)
    # The line of a step is written in the next one, unless a checkpoint follows.
    if reached not in (kill_at - 2, kill_at - 1):
        raise TrainingFailed(
            f"{path} ended after step {reached}, not by the kill in step {kill_at}"
        )


def _resumed_at(run: RunDir) -> int:
    """The step of the first checkpoint that the run was resumed from; 0 if it never was."""
    for event in read_metrics(run.metrics, "event"):
        if event["event"] == "resumed":
            return int(event["step"])
    return 0


def _compare(title: str, straight: RunDir, resumed: RunDir, tolerance: Tolerance) -> ProofRow:
    return ProofRow(
        run=title,
        from_step=_resumed_at(resumed),
        sample_ids=_compare_curves("samples_digest", straight, resumed, 0.0),
        learning_rates=_compare_curves("lr", straight, resumed, 0.0),
        losses=_compare_curves("loss", straight, resumed, tolerance.losses),
        final_weights=_compare_weights(_weights(straight), _weights(resumed), tolerance.weights),
    )


def _compare_curves(metric: str, straight: RunDir, resumed: RunDir, tolerance: float) -> Comparison:
    return _compare_values(_curve(straight, metric), _curve(resumed, metric), tolerance)


def _curve(run: RunDir, metric: str) -> Any:
    """[steps] of a metric; where a step was done twice, the later line counts."""
    by_step = {line["step"]: line[metric] for line in read_metrics(run.metrics, "train")}
    return np.asarray([by_step[step] for step in sorted(by_step)], float)


def _weights(run: RunDir) -> dict[str, Tensor]:
    """The export's tensors by name."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(run.export.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def _compare_weights(
    expected: dict[str, Tensor], values: dict[str, Tensor], tolerance: float
) -> Comparison:
    """Compare tensor by tensor, relative to its own largest value or a floor; the worst counts."""
    expected_shapes = {name: tensor.shape for name, tensor in expected.items()}
    if expected_shapes != {name: tensor.shape for name, tensor in values.items()}:
        return Comparison("DIFFERENT: other tensors", False)
    magnitudes = {name: _largest(tensor) for name, tensor in expected.items()}
    weights = [size for name, size in magnitudes.items() if expected[name].is_floating_point()]
    largest = max(weights, default=0.0)
    worst, worst_name = 0.0, ""
    for name, tensor in expected.items():
        # As fp64: bf16 has no exact difference, and integers above 2^24 no fp32.
        before, after = tensor.double(), values[name].double()
        if torch.allclose(before, after, rtol=0.0, atol=0.0, equal_nan=True):
            continue
        floor = _MATRIX_FLOOR if tensor.ndim > 1 else _VECTOR_FLOOR
        scale = max(magnitudes[name], floor * largest, sys.float_info.min)
        difference = float((before - after).abs().max()) / scale
        # NaN is worse than any number.
        difference = math.inf if math.isnan(difference) else difference
        if difference > worst:
            worst, worst_name = difference, name
    if not worst_name:
        return Comparison("same", True)
    if worst <= tolerance:
        return Comparison(f"within {worst:.1e}", True)
    return Comparison(f"DIFFERENT by {worst:.1e} in {worst_name}", False)


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def _compare_values(expected: Any, values: Any, tolerance: float) -> Comparison:
    """Compare two arrays; the tolerance is relative to the largest expected value."""
    if expected.shape != values.shape:
        return Comparison(f"DIFFERENT: {len(expected)} and {len(values)} of them", False)
    if np.array_equal(expected, values, equal_nan=True):
        return Comparison("same", True)
    largest = max(float(np.abs(expected).max()), sys.float_info.min)
    difference = float(np.abs(expected - values).max() / largest)
    if difference <= tolerance:
        return Comparison(f"within {difference:.1e}", True)
    return Comparison(f"DIFFERENT by {difference:.1e}", False)
