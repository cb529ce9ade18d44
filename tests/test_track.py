"""Tracking: one W&B run whatever ends it on the way, no server that can hold training up, and no secret in any file."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import bigtrain, on_ranks, start_ranks

from bigtrain.rundir import read_metrics

STEPS = ["train.steps=12", "train.eval_every=6", "train.checkpoint_every=4", "engine.kind=ddp"]
CNN = ["digits-cnn", *STEPS]
RUN = Path("runs") / "digits-cnn"
KEY = "0123456789abcdef0123456789abcdef01234567"  # of the form of W&B's


def told(run: Path) -> tuple[list[tuple[int, float]], set[str]]:
    """(step, training loss) of every segment, as W&B's own reader has them; the ids of the segments."""
    found, ids = [], set()
    for file in sorted(run.glob("wandb/*run-*/*.wandb")):
        ids.add(file.stem.removeprefix("run-"))
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        items = [json.loads(line).get("history", {}).get("item", {}) for line in shown.splitlines()]
        found += [(item["step"], item["train/loss"]) for item in items if "train/loss" in item]
    return found, ids


def test_a_run_killed_twice_is_one_run_in_wandb_with_each_step_once(tmp_path: Path) -> None:
    """Two ranks; rank 0, which talks to W&B, is killed too."""
    recipe = [*CNN, "track.wandb=offline"]
    for fault in ("kill@1:6", "kill@0:11"):
        ranks = start_ranks(2, "train", *recipe, cwd=tmp_path, BIGTRAIN_FAULT=fault)
        assert {rank.wait(60).returncode for rank in ranks} == {76, -signal.SIGKILL}
    done = on_ranks(2, "train", *recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, ids = told(tmp_path / RUN)
    expected = {line["step"]: line["loss"] for line in read_metrics(tmp_path / RUN / "metrics.jsonl", "train")}
    assert Counter(step for step, _ in found) == dict.fromkeys(range(1, 13), 1)
    assert dict(found) == expected
    assert ids == {(tmp_path / RUN / "wandb_id").read_text()}


@pytest.mark.parametrize("answers", [False, True], ids=["nobody there", "accepts and never answers"])
def test_a_server_that_does_not_answer_costs_seconds(answers: bool, tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen(64)
        environment = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "WANDB_API_KEY": KEY,
            "WANDB_MODE": "online",
        }
        began = time.time()
        done = bigtrain("train", *CNN, cwd=tmp_path, **environment)
        ended = time.time()
    assert done.returncode == 0, done.stderr
    lines = list(read_metrics(tmp_path / RUN / "metrics.jsonl", "train"))
    assert lines[0]["time"] - began < 10
    assert ended - lines[-1]["time"] < 15
    assert "later: bigtrain sync digits-cnn" in done.stderr
    assert len(told(tmp_path / RUN)[0]) == 12, "all is there, to be synced"


CANARIES = {"of its form": "hf_" + "Canary9" * 5, "of this environment": "an-odd-canary-of-mine"}


@pytest.mark.parametrize("canary", CANARIES.values(), ids=CANARIES)
@pytest.mark.parametrize("place", ["recipe", "key", "override", "path", "data path"])
def test_a_secret_in_a_request_is_refused_and_never_shown(canary: str, place: str, tmp_path: Path) -> None:
    shipped = (Path(__file__).parent.parent / "bigtrain" / "recipes" / "digits-cnn.yaml").read_text()
    recipe = tmp_path / (f"{canary}.yaml" if place == "path" else "mine.yaml")
    more = {"recipe": f"track: {{notes: 'see {canary}'}}\n", "key": f"{canary}: 1\n"}.get(place, "")
    recipe.write_text(shipped + more)
    overrides = {"override": [f"track.project={canary}"], "data path": [f"data.train=/data/{canary}/a.txt"]}.get(place, [])
    for command in (["train"], ["submit", "--dry-run"]):
        done = bigtrain(*command, recipe.name, *overrides, cwd=tmp_path, MY_API_KEY=CANARIES["of this environment"])
        assert done.returncode == 2
        assert "looks like a secret" in done.stderr
        assert canary not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [recipe.name], "nothing was written"


def test_a_secret_of_the_environment_is_in_no_output(tmp_path: Path) -> None:
    """Trained, tracked, stopped by an error too, submitted and shown: every file of it."""
    secrets = {"WANDB_API_KEY": KEY, "HF_TOKEN": CANARIES["of its form"], "MY_SECRET": CANARIES["of this environment"]}
    said = ""
    commands = [["train", *CNN, "track.wandb=offline"], ["train", *CNN, "name=other", "model.name=none:None"]]
    commands += [["submit", "digits-cnn", "--dry-run", "slurm.env=[WANDB_API_KEY]"], ["status"], ["evaluate", "digits-cnn"]]
    for command in commands:
        done = bigtrain(*command, cwd=tmp_path, **secrets)
        said += done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for secret in secrets.values():
        assert secret not in said
        assert not [path for path in files if secret.encode() in path.read_bytes()]
