"""Sweeps: which runs there are, and how they are trained here; the Slurm array is tested on a real
Slurm.
"""

import json
import signal
from pathlib import Path

import pytest
from conftest import bigtrain, start, wait_for
from ruamel.yaml import YAML

from bigtrain.cluster.sweep import expand, parse, wandb_file
from bigtrain.config.loader import load_recipe
from bigtrain.errors import RecipeError, RequestError
from bigtrain.runs.directory import RunDir
from bigtrain.runs.metrics_file import read_metrics

SHORT = ["train.steps=8", "train.eval_every=8", "track.wandb=off"]


def test_a_grid_is_every_combination_with_a_name_of_its_own() -> None:
    runs = expand("digits-mlp", parse(["optim.lr=1e-4,3e-4", "seed=0..2", "train.steps=5"], None))
    assert len({run.name for run in runs}) == 6
    assert runs[0].name == "digits-mlp-lr0.0001-seed0"
    assert runs[0].overrides == [
        "name=digits-mlp-lr0.0001-seed0",
        'track.group="digits-mlp"',
        "optim.lr=0.0001",
        "seed=0",
        "train.steps=5",
    ]


def test_a_draw_is_within_its_ranges_and_the_same_each_time() -> None:
    axes = parse(["optim.lr=1e-5..1e-3", "optim.betas=[0.9,0.95],[0.9,0.99]"], 60)
    drawn = expand("digits-mlp", axes, 60)
    assert drawn == expand("digits-mlp", axes, 60), "the same ones each time"
    runs = [run.overrides for run in drawn]
    rates = [float(run[2].partition("=")[2]) for run in runs]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert sum(rate < 1e-4 for rate in rates) in range(15, 46), "evenly in the logarithm"
    assert {run[3] for run in runs} == {"optim.betas=[0.9, 0.95]", "optim.betas=[0.9, 0.99]"}


@pytest.mark.parametrize(
    ("settings", "problem", "said"),
    [
        (["seed=1"], RequestError, "no setting has more than one value"),
        (["optim.lr=1e-5..1e-3"], RequestError, "--random"),
        (["optim.lr=[1"], RequestError, "not a list"),
        (["seed=4..0"], RequestError, "not an ascending range"),
        (["seed="], RequestError, "no setting has more than one value"),
        (["track.notes=hf_" + "Canary9" * 5, "seed=0..1"], RecipeError, "looks like a secret"),
        (["optim.lrr=1,2"], RecipeError, "did you mean optim.lr?"),
        (["engine.kind=ddp,zero9"], RecipeError, "zero9"),
    ],
)
def test_what_is_no_sweep_is_explained_before_anything_runs(
    settings: list[str], problem: type[Exception], said: str
) -> None:
    with pytest.raises(problem, match=said):
        expand("digits-mlp", parse(settings, None))


def test_runs_are_trained_one_after_another_and_compared(tmp_path: Path) -> None:
    """One of them cannot be trained: the others are, and it is named."""
    done = bigtrain("sweep", "digits-mlp", "model.name=none:None,mlp", *SHORT, cwd=tmp_path)
    assert done.returncode == 3
    assert "1 of 2 runs failed: digits-mlp-namenone-None" in done.stderr
    run = RunDir(tmp_path / "runs" / "digits-mlp-namemlp")
    assert len(list(read_metrics(run.metrics, "train"))) == 8
    assert run.name in done.stdout, "compared"


def test_a_signal_stops_the_run_and_the_sweep_and_both_go_on(tmp_path: Path) -> None:
    command = [
        "sweep",
        "digits-mlp",
        "seed=0..1",
        "train.steps=150",
        "train.eval_every=150",
        "track.wandb=off",
    ]
    process = start(*command, cwd=tmp_path)
    metrics = [RunDir(tmp_path / "runs" / f"digits-mlp-seed{seed}").metrics for seed in (0, 1)]
    wait_for(lambda: metrics[0].exists() and metrics[0].read_bytes().count(b"\n") > 5)
    process.signal(signal.SIGTERM)
    assert process.wait().returncode == 75
    assert not metrics[1].exists()
    assert bigtrain(*command, cwd=tmp_path).returncode == 0
    for path in metrics:
        assert [line["step"] for line in read_metrics(path, "train")] == list(range(1, 151))


def test_the_file_for_wandbs_agents_holds_the_same_runs(tmp_path: Path) -> None:
    done = bigtrain(
        "sweep",
        "digits-mlp",
        "optim.lr=1e-5..1e-3",
        "seed=0..3",
        "--random",
        "9",
        "--wandb",
        cwd=tmp_path,
    )
    file = YAML(typ="safe").load(done.stdout)
    assert (file["method"], file["run_cap"]) == ("random", 9)
    assert file["parameters"]["seed"] == {"values": [0, 1, 2, 3]}
    assert file["parameters"]["optim.lr"] == {
        "distribution": "log_uniform_values",
        "min": 1e-5,
        "max": 1e-3,
    }
    assert file["command"][-4:] == ["train", "digits-mlp", "--fresh", "${args_no_hyphens}"]


def test_a_range_among_values_is_not_for_wandb() -> None:
    axes = parse(["optim.lr=1,1e-5..1e-3"], 5)
    assert len(expand("digits-mlp", axes, 5)) == 5
    with pytest.raises(RequestError, match=r"optim\.lr has a range and other values"):
        wandb_file("digits-mlp", axes, 5)


def test_odd_values_reach_the_runs_as_they_are() -> None:
    first, _ = expand(
        "digits-mlp", parse(["track.notes='2024-01-01 🚀'", "track.group='7'", "seed=0..1"], None)
    )
    recipe = load_recipe("digits-mlp", first.overrides).recipe
    assert (recipe.track.notes, recipe.track.group) == ("2024-01-01 🚀", "7")
    assert parse(["track.notes=1.2.3..4,x"], None) == {"track.notes": ["1.2.3..4", "x"]}


def test_a_launcher_that_is_none_is_named(tmp_path: Path) -> None:
    done = bigtrain("sweep", "digits-mlp", "seed=0..1", "--launcher", "nosuchprogram", cwd=tmp_path)
    assert done.returncode == 2
    assert "--launcher nosuchprogram" in done.stderr


def test_a_dry_run_prints_what_the_slurm_array_would_read(tmp_path: Path) -> None:
    done = bigtrain(
        "sweep", "digits-mlp", "track.tags=[a b],[c]", "seed=0..1", "--dry-run", cwd=tmp_path
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("bigtrain train digits-mlp name=") for line in lines)
    assert json.loads(lines[0].split("track.tags=")[1].split("'")[0]) == ["a b"]
    assert not (tmp_path / "runs").exists()
