"""examples/: each runs as its README says, only shorter."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
SHORT = ["train.steps=4", "train.eval_every=2", "track.wandb=off"]


def run(command: list[str], cwd: Path) -> str:
    """What the command prints."""
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_class_of_ones_own_trains(tmp_path: Path) -> None:
    folder = shutil.copytree(EXAMPLES / "own_model", tmp_path / "own_model")
    assert "finished own-model: 4 steps" in run(
        ["bigtrain", "train", "recipe.yaml", *SHORT], folder
    )


def test_two_variants_are_trained_and_compared(tmp_path: Path) -> None:
    shown = run([sys.executable, str(EXAMPLES / "compare_two.py"), *SHORT], tmp_path)
    assert "small: 2,410 parameters" in shown and "large: 85,002 parameters" in shown
    table = (tmp_path / "losses.csv").read_text().splitlines()
    assert table[0] == "step,small,large" and len(table) == 5
    plots = {path.name for path in tmp_path.iterdir()} & {"losses.png", "compare.html"}
    assert len(plots) == 1, "by matplotlib, or as a page"


@pytest.mark.parametrize("more", [[], ["train.steps=7"]])
def test_the_array_has_six_runs(more: list[str], tmp_path: Path) -> None:
    lines = run([str(EXAMPLES / "sweep_array.sh"), "--dry-run", *more], tmp_path).splitlines()
    assert len(lines) == 6 and all(" ".join(more) in line for line in lines)
