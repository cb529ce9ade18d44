"""From a recipe to a batch script: as written down in tests/golden (`python tests/test_submit.py`
writes it anew).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import bigtrain, quickest

from bigtrain.cluster.slurm import render_script, submit
from bigtrain.config.loader import load_recipe
from bigtrain.errors import RecipeError, RequestError
from bigtrain.runs.directory import asset

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "one_node": [
        "slurm.gpus_per_node=2",
        "slurm.cpus_per_gpu=1",
        "slurm.time=2:00:00",
        "slurm.partition=gpu",
    ],
    "four_nodes": [
        "slurm.nodes=4",
        "slurm.partition=gpu",
        "slurm.account=lab",
        "slurm.qos=normal",
        "slurm.grace_seconds=600",
        "slurm.env=[WANDB_API_KEY, NCCL_SOCKET_IFNAME]",
    ],
    "array": ["slurm.gpus_per_node=0", "slurm.array=0-4%2", "optim.lr=1e-3"],
    "container": [
        "slurm.container=/images/train+v2.sqsh",
        "slurm.setup=my modules.sh",
        "slurm.partition=gpu",
    ],
}


def script(overrides: list[str]) -> str:
    return render_script(load_recipe("tiny-lm", overrides).recipe, "tiny-lm", overrides)


def head(text: str) -> str:
    """What is this recipe's own; the rest is slurm/train.sbatch's, below its check of arguments."""
    _, _, body = asset("slurm", "train.sbatch").read_text().partition("exit 2\nfi\n")
    assert body and text.endswith(body)
    return text.removesuffix(body)


@pytest.mark.parametrize("case", CASES)
def test_the_script_is_the_one_written_down(case: str) -> None:
    assert head(script(CASES[case])) == (GOLDEN / f"{case}.sbatch").read_text()


HOSTILE = [
    "$(touch x)",
    "`touch x`",
    "a'; touch x; '",
    'b"; touch x; "',
    "line\ntouch x\n#SBATCH --wrap=x",
    "${HOME}",
    "\\",
    "*",
]


def test_nothing_in_a_recipe_is_run_by_a_shell(tmp_path: Path) -> None:
    recipe = tmp_path / "$(touch x) 'y'.yaml"
    recipe.write_text(asset("recipes", "tiny-lm.yaml").read_text())
    values = [f"track.project={text!r}" for text in HOSTILE] + ["slurm.setup='$(touch x)'"]
    text = render_script(load_recipe(str(recipe), values).recipe, str(recipe), values)
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all("touch" not in line for line in directives)
    done = subprocess.run(
        ["bash", "-c", head(text) + "printf '%s\\0' \"$@\""],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\0")[:-1] == [str(recipe), *values]
    assert [path.name for path in tmp_path.iterdir()] == [recipe.name], "nothing ran"


@pytest.mark.parametrize(
    "key", ["partition", "account", "qos", "constraint", "dependency", "array", "time"]
)
@pytest.mark.parametrize("text", ["$(touch x)", 'a"b', "a\\n#SBATCH --wrap=touch", "a b"])
def test_what_sbatch_itself_reads_is_one_plain_word(key: str, text: str) -> None:
    asked = f'slurm.{key}="{text}"' if '"' not in text else f"slurm.{key}='{text}'"
    with pytest.raises(RecipeError, match=rf"slurm\.{key}: found"):
        load_recipe("tiny-lm", [asked])


@pytest.mark.timed
def test_a_dry_run_answers_at_once_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bigtrain", "submit", "tiny-lm", "--dry-run"]
    assert (
        quickest(
            lambda: subprocess.run(command, cwd=tmp_path, capture_output=True, check=True), 0.3
        )
        < 0.3
    )
    assert not list(tmp_path.iterdir())


def test_without_slurm_it_says_so(tmp_path: Path) -> None:
    done = bigtrain("submit", "tiny-lm", cwd=tmp_path, PATH="/nowhere")
    assert done.returncode == 2
    assert "no sbatch here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("problem", "fix"),
    [
        ("sbatch: error: Batch job submission failed: Invalid partition name", "other slurm.…"),
        ("sbatch: error: Unable to contact slurm controller (connect failure)", "sinfo"),
        ("sbatch: fatal: Could not establish a configuration source", "sinfo"),
    ],
)
def test_the_recipe_is_not_blamed_for_a_silent_cluster(
    problem: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\necho '{problem}' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError) as caught:
        submit(load_recipe("tiny-lm"), "tiny-lm", [])
    assert problem in str(caught.value) and f"try:      {fix}" in str(caught.value)


if __name__ == "__main__":
    for name, overrides in CASES.items():
        (GOLDEN / f"{name}.sbatch").write_text(head(script(overrides)))
