"""A run that version 0.1.0 began is finished by the version at hand, with the same losses.

assets/run_0_1_0/digits-small was trained on two ranks with ZeRO-2 and killed by SIGKILL before step
53; its newest checkpoint is of step 40. Its recipe has every key that 0.1.0 knew, under its name
of then. undisturbed.json has the losses of the same run without the kill.
"""

import json
import shutil
from pathlib import Path

from conftest import TESTS, on_ranks
from machine import is_like
from pytest import approx

OLD = TESTS / "assets" / "run_0_1_0"


def finish(folder: Path, *overrides: str) -> dict[int, float]:
    """Resume a copy of the old run in `folder` from its own recipe; step → loss of the new steps."""
    run = folder / "runs" / "digits-small"
    shutil.copytree(OLD / "digits-small", run)
    before = len((run / "metrics.jsonl").read_text().splitlines())
    done = on_ranks(2, "train", "runs/digits-small/recipe.yaml", *overrides, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines[before:] if line["kind"] == "train"}


def undisturbed() -> dict[int, float]:
    losses = json.loads((OLD / "undisturbed.json").read_text())["losses"]
    return {int(step): loss for step, loss in losses.items() if int(step) > 40}


def test_an_old_run_is_finished_as_if_it_had_never_been_killed(tmp_path: Path) -> None:
    made_on = json.loads((OLD / "undisturbed.json").read_text())["made on"]
    losses = finish(tmp_path)
    assert losses == (undisturbed() if is_like(made_on) else approx(undisturbed(), rel=1e-5))


def test_an_old_run_is_finished_by_another_engine(tmp_path: Path) -> None:
    assert finish(tmp_path, "engine.kind=zero3") == approx(undisturbed(), rel=1e-5)
