"""How long a run trains: epochs, patience, a plateau's rate, and a batch that grows."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import bigtrain

from bigtrain.runs.metrics_file import read_metrics

# Linear regression in full batches; its momentum makes some evaluations worse than the one before.
DIABETES = ["diabetes", "name=run", "track.wandb=off", "train.eval_every=5"]
RUN = Path("runs") / "run"


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return list(read_metrics(folder / RUN / "metrics.jsonl", kind))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RUN / "summary.json").read_text())


def test_epochs_become_steps_and_the_origin_is_kept(tmp_path: Path) -> None:
    """1,439 images in batches of 32, then of 64: 10 × 32 + 40 × 64 = 2,880 is two epochs."""
    done = bigtrain(
        "train",
        "digits-cnn",
        "name=run",
        "track.wandb=off",
        "train.steps=null",
        "train.epochs=2",
        "engine.global_batch={0: 32, 10: 64}",
        "train.eval_every=60",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    effective = json.loads((tmp_path / RUN / "effective.json").read_text())
    origin = "plan (2 epochs of 1,439 samples)"
    assert effective["train.steps"] == {"value": 50, "origin": origin}
    assert summary(tmp_path)["samples"] == 2880
    status = json.loads(bigtrain("status", "run", "--json", cwd=tmp_path).stdout)
    assert (status[0]["state"], status[0]["steps"]) == ("finished", 50)


def test_patience_ends_a_run_as_finished_and_more_of_it_goes_on(tmp_path: Path) -> None:
    best = ["train.keep_best=mse", "train.patience=2"]
    done = bigtrain("train", *DIABETES, *best, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = {line["step"]: line["mse"] for line in lines(tmp_path, "eval")}
    ended = summary(tmp_path)
    assert ended["step"] < 500 and ended["status"] == "finished"
    best_step = min(losses, key=lambda step: losses[step])
    assert ended["step"] - best_step == 2 * 5, "two evaluations after the best one"
    assert ended["mse"] == losses[best_step], "the best checkpoint is what is exported"
    status = json.loads(bigtrain("status", "run", "--json", cwd=tmp_path).stdout)
    assert status[0]["state"] == "finished"

    again = bigtrain("train", *DIABETES, *best, cwd=tmp_path)
    assert again.returncode == 0 and summary(tmp_path)["step"] == ended["step"]
    longer = bigtrain("train", *DIABETES, best[0], "train.patience=4", cwd=tmp_path)
    assert longer.returncode == 0 and summary(tmp_path)["step"] > ended["step"]


def test_a_plateau_lowers_the_rate_and_a_resumed_run_has_the_same_curve(tmp_path: Path) -> None:
    plateau = ["optim.schedule=plateau", "optim.decay_patience=1", "train.checkpoint_every=10"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    assert bigtrain("train", *DIABETES, *plateau, "train.steps=60", cwd=straight).returncode == 0
    first = bigtrain("train", *DIABETES, *plateau, "train.steps=30", cwd=stopped)
    assert first.returncode == 0, first.stderr
    assert bigtrain("train", *DIABETES, *plateau, "train.steps=60", cwd=stopped).returncode == 0
    rates = {line["step"]: line["lr"] for line in lines(straight, "train")}
    decays = [line for line in lines(straight, "event") if line["event"] == "rate_decayed"]
    assert len(decays) > 1
    for number, decay in enumerate(decays[:-1], 1):
        assert decay["factor"] == 0.5**number
        assert rates[decay["step"] + 1] == rates[1] * 0.5**number
    for kind in ("train", "eval"):
        expected = [(line["step"], line["loss"]) for line in lines(straight, kind)]
        assert [(line["step"], line["loss"]) for line in lines(stopped, kind)] == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.epochs=3", "train.steps=10"], "train.steps=null leaves it to epochs"),
        (["engine.global_batch={5: 3}"], "expected the size from step 0 on"),
        (["engine.global_batch={0: 8, 4: 2, 2: 4}"], "in ascending order"),
        (['optim.groups={"*": {frozn: true}}'], "did you mean optim.groups.*.frozen?"),
        (['optim.groups={"*.wight": {frozen: true}}'], "no parameter is left for the pattern"),
        (['optim.groups={"*": {frozen: true}}'], "every parameter is frozen"),
    ],
)
def test_what_has_no_sense_is_refused(overrides: list[str], expected: str, tmp_path: Path) -> None:
    done = bigtrain("train", *DIABETES, *overrides, cwd=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_frozen_weights_that_have_changed_outside_of_the_run_are_refused(tmp_path: Path) -> None:
    short = ["track.wandb=off", "train.eval_every=4"]
    base = ["digits-mlp", "name=base", *short]
    assert bigtrain("train", *base, "train.steps=4", cwd=tmp_path).returncode == 0
    tuned = [
        "digits-mlp",
        "name=run",
        *short,
        "model.pretrained=runs/base/export",
        'optim.groups={"layers.0.*": {frozen: true}, "*.bias": {lr_scale: 2.0}}',
    ]
    assert bigtrain("train", *tuned, "train.steps=4", cwd=tmp_path).returncode == 0
    effective = json.loads((tmp_path / RUN / "effective.json").read_text())
    assert len(effective["model.pretrained.weights"]["value"]) == 64
    assert bigtrain("train", *tuned, "train.steps=6", cwd=tmp_path).returncode == 0

    groups = 'optim.groups={"*.bias": {lr_scale: 2.0}, "layers.0.*": {frozen: true}}'
    reordered = bigtrain("train", *tuned[:-1], groups, "train.steps=8", cwd=tmp_path)
    assert reordered.returncode == 2 and "optim.groups: ['layers.0.*'" in reordered.stderr
    assert bigtrain("train", *base, "train.steps=8", cwd=tmp_path).returncode == 0
    refused = bigtrain("train", *tuned, "train.steps=8", cwd=tmp_path)
    assert refused.returncode == 2
    assert "the weights of model.pretrained runs/base/export have changed" in refused.stderr
    exported = bigtrain("export", "run", "out", "--step", "last", cwd=tmp_path)
    assert exported.returncode == 2 and "have changed" in exported.stderr
