"""Promise 2: what a run survives. Each test makes one fault happen for real."""

import gzip
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import TESTS, bigtrain, on_ranks, start, start_ranks, wait_for
from safetensors.torch import load_file

from bigtrain.checkpoint.format import committed_checkpoints, seal, verify_checkpoint, write_tensors
from bigtrain.config.loader import flatten, load_recipe
from bigtrain.config.resume_policy import SAFE_TO_CHANGE
from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir
from bigtrain.runs.lock import Owner, _boot_id, release_ownership, take_ownership
from bigtrain.runs.metrics_file import read_metrics

STEPS = [
    "train.steps=12",
    "train.eval_every=12",
    "train.checkpoint_every=4",
    "track.wandb=off",
    "optim.schedule=constant",
]
CNN = ["digits-cnn", *STEPS]
MISFIT = [*CNN, "model.args={}", "model.dropout=null"]


def losses(folder: Path, name: str = "digits-cnn", key: str = "loss") -> dict[int, float]:
    """The curve: where a step was done twice, the later line counts."""
    return {
        line["step"]: line[key]
        for line in read_metrics(folder / "runs" / name / "metrics.jsonl", "train")
    }


def events(folder: Path, name: str = "digits-cnn") -> dict[str, dict[str, Any]]:
    return {
        line["event"]: line
        for line in read_metrics(folder / "runs" / name / "metrics.jsonl", "event")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with checkpoints at steps 8 and 12."""
    folder = tmp_path_factory.mktemp("whole")
    done = bigtrain("train", *CNN, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def copy_run(whole: Path, to: Path) -> RunDir:
    shutil.copytree(whole / "runs", to / "runs")
    return RunDir(to / "runs" / "digits-cnn")


def test_any_change_to_any_file_of_a_checkpoint_is_found(whole: Path, tmp_path: Path) -> None:
    """100 random mutations: a bit flipped, a file cut, a file removed."""
    source = committed_checkpoints(RunDir(whole / "runs" / "digits-cnn"))[-1]
    draw = random.Random(0)
    files = sorted(path.name for path in source.iterdir())
    for number in range(100):
        victim = tmp_path / f"step-{number:08d}"
        shutil.copytree(source, victim)
        name = draw.choice(files)
        content = bytearray((victim / name).read_bytes())
        kind = draw.choice(("flip", "cut", "remove"))
        if kind == "remove":
            (victim / name).unlink()
        elif kind == "cut":
            (victim / name).write_bytes(content[: draw.randrange(len(content))])
        else:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            (victim / name).write_bytes(content)
        problems = verify_checkpoint(victim)
        shutil.rmtree(victim)
        assert problems, (name, kind)


def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_used(
    whole: Path, tmp_path: Path
) -> None:
    run = copy_run(whole, tmp_path)
    shard = run.checkpoints / "step-00000012" / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    done = bigtrain("train", *CNN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming from step-00000008" in done.stdout
    assert "step-00000012 does not verify and is set aside" in done.stdout
    assert (run.checkpoints / "broken-step-00000012").is_dir()
    assert losses(tmp_path) == losses(whole)


class Canary:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path(self.path), "sang"))


def test_no_pickle_in_a_checkpoint_is_ever_run(whole: Path, tmp_path: Path) -> None:
    """A canary in every file in turn, with a manifest that vouches for it, as an attacker would
    write it.
    """
    from blake3 import blake3

    song = tmp_path / "song"
    for name in ("rank-00000.safetensors", "state.json", "manifest.json"):
        run = copy_run(whole, tmp_path / name)
        for path in committed_checkpoints(run):
            (path / name).write_bytes(pickle.dumps(Canary(song)))
            if name != "manifest.json":
                manifest = json.loads((path / "manifest.json").read_text())
                content = (path / name).read_bytes()
                manifest["files"][name] = {
                    "size": len(content),
                    "blake3": blake3(content).hexdigest(),
                }
                del manifest["seal"]
                (path / "manifest.json").write_text(json.dumps(manifest | {"seal": seal(manifest)}))
        bigtrain("train", *CNN, cwd=tmp_path / name)
        assert not song.exists(), name
    pickle.loads(pickle.dumps(Canary(song)))  # the canary does sing
    assert song.exists()


def test_no_pickle_in_pretrained_weights_or_the_token_cache_is_ever_run(tmp_path: Path) -> None:
    song, folder = tmp_path / "song", tmp_path / "pretrained"
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 400)
    recipe = [
        "tiny-lm",
        "data.train=text.txt",
        "data.tokenizer=bytes",
        "train.steps=1",
        "track.wandb=off",
    ]
    own = {"BIGTRAIN_CACHE": str(tmp_path / "cache")}
    assert bigtrain("train", *recipe, cwd=tmp_path, **own).returncode == 0
    folder.mkdir()
    (folder / "config.json").write_bytes(
        (tmp_path / "runs" / "tiny-lm" / "export" / "config.json").read_bytes()
    )
    for name in ("pytorch_model.bin", "model.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Canary(song)))
        done = bigtrain(
            "train", *recipe, "name=other", f"model.pretrained={folder}", cwd=tmp_path, **own
        )
        assert done.returncode == 2, done.stderr
        assert "model.pretrained" in done.stderr
    for file in [
        path
        for path in (tmp_path / "cache").rglob("*")
        if path.is_file() and path.suffix != ".lock"
    ]:
        content = file.read_bytes()
        file.write_bytes(pickle.dumps(Canary(song)))
        bigtrain("train", *recipe, "name=other", cwd=tmp_path, **own)
        file.write_bytes(content)
    assert not song.exists()


SAVE_AND_DIE = """
import os
from pathlib import Path
import bigtrain.checkpoint.format as f
import bigtrain.checkpoint.writer as w
from distributed_cases import build

count, last = 0, 0

def counted(inner):
    def call(*a, **k):
        global count
        count += 1
        if count == last:
            os._exit(9)
        return inner(*a, **k)
    return call

case = {"model": "cnn", "kind": "ddp", "precision": "fp32", "micro_batch": 4}
training, _ = build(case, Path("run"))
training.checkpoints.settings = training.recipe.train.model_copy(update={"keep_last": 1})

def save_three_times():
    global count
    calls = [(w, "write_tensors"), (f.os, "fsync"), (w.shutil, "rmtree")]
    calls += [(Path, "rename"), (Path, "write_text"), (Path, "mkdir")]
    for owner, name in calls:
        setattr(owner, name, counted(getattr(owner, name)))
    count = 0
    for step in (1, 2, 3):
        training.state.step = step
        training.checkpoints.begin(training.state)
        training.checkpoints.finish()
        Path(f"saved-{step}").open("w").close()

while True:  # the start is paid once; each child dies before one call more than the child before it
    last += 1
    child = os.fork()
    if child == 0:
        os.mkdir(str(last))
        os.chdir(str(last))
        save_three_times()
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print("calls", last - 1)
"""


def test_a_save_killed_at_any_write_fsync_or_rename_loses_nothing(tmp_path: Path) -> None:
    """Three saves that keep one, killed before each of their calls in turn; what was committed
    still verifies.
    """
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    program = [sys.executable, "-c", SAVE_AND_DIE]
    done = subprocess.run(
        program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    calls = int(done.stdout.split()[-1])
    assert calls > 30
    for number in range(1, calls + 1):
        folder = tmp_path / str(number)
        found = committed_checkpoints(RunDir(folder / "run"))
        assert all(verify_checkpoint(path) == [] for path in found), number
        saved = len(list(folder.glob("saved-*")))
        newest = int(found[-1].name[5:]) if found else 0
        assert newest >= saved, (
            f"call {number}: step {saved} was committed, and {newest} is the newest"
        )


def test_tensors_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    kinds = [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    ]
    tensors = {
        f"{kind}|ü|{shape}": torch.arange(6).to(kind).reshape(shape)
        for kind in kinds
        for shape in ((6,), (2, 3), (6, 1, 1))
    }
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0)}
    (tmp_path / "a.safetensors").write_bytes(b"longer than what is written over it" * 100)
    write_tensors(tensors, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@contextmanager
def small_disk(target: Path, size: str) -> Iterator[None]:
    """A file system of its own at `target`, too small for what is to be written there."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    target.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(target)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_a_full_disk_is_reported_and_training_goes_on(tmp_path: Path) -> None:
    """Checkpoints on a file system with room for one and a half of them; then a run on one with
    room for none.
    """
    target = tmp_path / "runs" / "digits-cnn" / "checkpoints"
    with small_disk(target, "1800k"):
        done = bigtrain("train", *CNN, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "bytes are free" in events(tmp_path)["checkpoint_failed"]["reason"]
        assert [
            verify_checkpoint(path) for path in committed_checkpoints(RunDir(target.parent))
        ] == [[]]
    with small_disk(tmp_path / "runs" / "tight", "1000k"):
        done = bigtrain("train", *CNN, "name=tight", "track.extra=[tensorboard]", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "No space left" in events(tmp_path, "tight")["checkpoint_failed"]["reason"]
        assert len(losses(tmp_path, "tight")) == 12, (
            "what the checkpoint took is there for the lines of metrics again"
        )
    with small_disk(tmp_path / "runs" / "less" / "tensorboard", "4k"):
        done = bigtrain(
            "train",
            "digits-mlp",
            *STEPS,
            "name=less",
            "track.extra=[tensorboard]",
            "train.steps=100",
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        said = (tmp_path / "runs" / "less" / "logs" / "rank-0.log").read_text()
        assert said.count("tensorboard has not taken all: [Errno 28] No space left on device") == 1
    assert len(losses(tmp_path, "less")) == 100


@pytest.mark.plain
def test_one_owner_at_a_time(whole: Path, tmp_path: Path) -> None:
    run = copy_run(whole, tmp_path)
    arguments = [
        *CNN,
        "train.steps=100000",
        "train.checkpoint_every=100000",
        "train.eval_every=100000",
    ]
    first = start("train", *arguments, cwd=tmp_path)
    try:
        wait_for(lambda: (run.path / "lock").exists() and len(losses(tmp_path)) > 14)
        recipe = run.recipe.read_text()
        second = bigtrain("train", *arguments, "track.tags=[x]", cwd=tmp_path)
        assert second.returncode == 2
        assert f"is being trained by process {first.pid}" in second.stderr
        assert run.recipe.read_text() == recipe, "the second start must write nothing"
    finally:
        first.signal(signal.SIGKILL)
        first.wait()
    assert (run.path / "lock").exists()
    assert bigtrain("train", *CNN, "train.steps=13", cwd=tmp_path).returncode == 0, (
        "a dead owner's lock is taken over"
    )
    assert not (run.path / "lock").exists()


def test_a_zombie_owns_nothing(tmp_path: Path) -> None:
    """A container without an init process keeps a killed owner as a zombie for ever."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    with subprocess.Popen(["sleep", "60"]) as child:
        process = psutil.Process(child.pid)
        owner = Owner(socket.gethostname(), child.pid, _boot_id(), process.create_time(), job=None)
        (run.path / "lock").write_text(json.dumps(asdict(owner)))
        with pytest.raises(RequestError, match="is being trained by"):
            take_ownership(run)
        child.send_signal(signal.SIGKILL)
        wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)
        take_ownership(run)
        release_ownership(run)


def test_a_changed_recipe_is_shown_and_must_be_allowed(whole: Path, tmp_path: Path) -> None:
    copy_run(whole, tmp_path)
    refused = bigtrain("train", *CNN, "optim.lr=1e-4", "train.eval_every=3", cwd=tmp_path)
    assert refused.returncode == 2
    assert "optim.lr: 0.003 → 0.0001" in refused.stderr
    assert "--allow-change optim.lr" in refused.stderr
    assert "eval_every" not in refused.stderr
    allowed = [
        *CNN,
        "optim.lr=1e-4",
        "train.eval_every=13",
        "train.steps=13",
        "--allow-change",
        "optim.lr",
    ]
    assert bigtrain("train", *allowed, cwd=tmp_path).returncode == 0
    assert events(tmp_path)["recipe_changed"]["optim.lr"] == "0.003 → 0.0001"


def test_files_stop_and_save(whole: Path, tmp_path: Path) -> None:
    run = copy_run(whole, tmp_path)
    (run.path / "SAVE").touch()
    (run.path / "STOP").touch()
    arguments = [*CNN, "train.steps=40", "train.checkpoint_every=40", "train.eval_every=40"]
    stopped = bigtrain("train", *arguments, cwd=tmp_path)
    assert stopped.returncode == 75
    assert "step-00000013" in [path.name for path in committed_checkpoints(run)]
    assert not (run.path / "STOP").exists(), "granted: the next start must not stop at once"


def test_checkpoints_that_anybody_could_have_written_are_refused_by_root(
    whole: Path, tmp_path: Path
) -> None:
    run = copy_run(whole, tmp_path)
    for path in committed_checkpoints(run):
        (path / "state.json").chmod(0o666)
    done = bigtrain("train", *CNN, "train.steps=13", cwd=tmp_path)
    if os.geteuid() == 0:
        assert done.returncode == 2
        assert "chmod -R o-w" in done.stderr
    else:
        assert done.returncode == 0
        assert "others may write it" in done.stdout


def test_the_best_checkpoint_is_kept_and_exported(tmp_path: Path) -> None:
    """A learning rate that warms up until it destroys: the best is in the middle."""
    rising = [
        "train.steps=12",
        "train.eval_every=1",
        "optim.warmup_steps=12",
        "optim.lr=1.0",
        "train.keep_best=loss",
    ]
    done = bigtrain("train", *CNN, *rising, "train.keep_last=1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary, run = json.loads(done.stdout), RunDir(tmp_path / "runs" / "digits-cnn")
    evaluations = {line["step"]: line["loss"] for line in read_metrics(run.metrics, "eval")}
    best = min(evaluations, key=evaluations.__getitem__)
    assert 0 < best < 12
    assert [path.name for path in committed_checkpoints(run)] == [
        f"step-{best:08d}",
        "step-00000012",
    ]
    assert summary["best_step"] == summary["exported_step"] == best
    weights = f"checkpoint step-{best:08d}, the best"
    assert f"those of {weights}" in (run.export / "README.md").read_text().replace("\n", " ")
    assert weights in json.loads((run.export / "bigtrain.json").read_text())["export"]
    assert summary["loss"] == pytest.approx(evaluations[best], rel=1e-6)
    found = json.loads(bigtrain("evaluate", "digits-cnn", "--json", cwd=tmp_path).stdout)
    assert found["loss"] == pytest.approx(evaluations[best], rel=1e-5)


def test_every_key_that_decides_a_step_needs_leave_to_change() -> None:
    """Whatever decides which weights a step makes of which samples must not change unseen; the rest
    may.
    """
    keys = flatten(load_recipe("digits-cnn").recipe.model_dump(mode="json"))
    guarded = {
        key for key in keys if not any(f"{key}.".startswith(f"{each}.") for each in SAFE_TO_CHANGE)
    }
    sections = ("seed", "task", "model", "data", "optim")
    deciding = {key for key in keys if key.split(".")[0] in sections} - {
        "data.workers",
        "data.max_unreadable",
    }
    assert guarded == deciding | {
        "engine.precision",
        "engine.global_batch",
        "engine.reduce_dtype",
        "train.distill",
        "train.label_smoothing",
    }


def test_a_proof_passes_and_fails_when_the_order_depends_on_the_rank(tmp_path: Path) -> None:
    done = bigtrain("prove", "digits-cnn", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["verdict"] == "PASS"
    assert result["rows"][0]["final weights"] == "same"
    assert all(row["sample ids"] == "same" for row in result["rows"])
    assert list((tmp_path / "runs").iterdir()) == [], "what proves nothing more is removed"
    # Python imports sitecustomize.py at its start: this one makes the order depend on the rank.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, bigtrain.data.loader as s\n"
        "inner = s.samples_at\n"
        "s.samples_at = lambda p, n, seed: inner(p, n, seed + int(os.environ.get('RANK', '0')))\n"
    )
    done = bigtrain("prove", "digits-cnn", "--json", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert rows[0]["sample ids"] == "same", "on as many ranks the order is wrong in the same way"
    assert rows[1]["sample ids"].startswith("DIFFERENT")


@pytest.mark.parametrize("model", ["rnn-lm", "tiny-lm"])
def test_a_proof_passes_for_language_models_under_zero3(model: str, tmp_path: Path) -> None:
    """Forward passes before a load leave weights gathered; those after it must not use them."""
    (tmp_path / "text.txt").write_text("def square(number):\n    return number * number\n" * 200)
    text = ["data.train=text.txt", "data.tokenizer=bytes", "data.seq_len=64"]
    engine = ["engine.precision=fp32", "engine.kind=zero3"]
    launcher = f"{sys.executable} {TESTS / 'fork_server.py'} {{ranks}}"
    options = ["--steps", "8", "--launcher", launcher, "--json"]
    done = bigtrain("prove", model, *text, *engine, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    again, half = json.loads(done.stdout)["rows"]
    assert again["losses"] == again["final weights"] == "same"
    assert half["sample ids"] == "same"


def test_a_proof_passes_for_batch_norm_in_bf16(tmp_path: Path) -> None:
    """Its running statistics do not depend on the cut into micro-batches, and stay fp32."""
    launcher = f"{sys.executable} {TESTS / 'fork_server.py'} {{ranks}}"
    recipe = ["digits-resnet", "engine.kind=zero2", "engine.precision=bf16"]
    done = bigtrain("prove", *recipe, "--steps", "8", "--launcher", launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_save_saves_and_goes_on(whole: Path, tmp_path: Path) -> None:
    run = copy_run(whole, tmp_path)
    (run.path / "SAVE").touch()
    arguments = [*CNN, "train.steps=15", "train.checkpoint_every=40", "train.keep_last=9"]
    assert bigtrain("train", *arguments, cwd=tmp_path).returncode == 0
    assert [path.name[-2:] for path in committed_checkpoints(run)] == ["08", "12", "13", "15"]
    assert not (run.path / "SAVE").exists()


def test_a_file_profile_writes_a_profile_and_changes_no_number(whole: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "digits-cnn")
    run.path.mkdir(parents=True)
    (run.path / "PROFILE").touch()
    done = bigtrain("train", *CNN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == losses(whole)
    assert not (run.path / "PROFILE").exists()
    assert "profiler_start" not in done.stderr, "a line that torch's library prints"
    said = events(tmp_path)["profile"]
    assert said["step"] == 3 and len(said["dearest"].split(", ")) == 3
    with gzip.open(tmp_path / said["path"]) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mkldnn_convolution" in names or "aten::convolution" in names
    text = (run.logs / "profile-step-00000001.txt").read_text()
    assert text.startswith("3 steps from step 1 on") and said["dearest"] in text


def test_steps_of_the_recipe_are_profiled_under_deepspeed_too(tmp_path: Path) -> None:
    """By rank 0 alone; the second profile is cut short by the evaluation at the end."""
    asked = ["engine.kind=zero2", "train.profile_steps=[2, 11]"]
    done = on_ranks(2, "train", *CNN, *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    logs = RunDir(tmp_path / "runs" / "digits-cnn").logs
    assert sorted(path.name for path in logs.glob("profile-*")) == [
        f"profile-step-000000{step}.{kind}" for step in ("02", "11") for kind in ("json.gz", "txt")
    ]
    assert (logs / "profile-step-00000011.txt").read_text().startswith("2 steps from step 11 on")


def test_a_profile_that_cannot_be_written_leaves_training_unharmed(
    whole: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "runs" / "digits-cnn")
    with small_disk(run.logs, "8k"):
        (run.path / "PROFILE").touch()
        done = bigtrain("train", *CNN, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not list(run.logs.glob("*profile*"))
    assert "No space left" in events(tmp_path)["profile_failed"]["reason"]
    assert not (run.path / "PROFILE").exists()
    assert losses(tmp_path) == losses(whole)


def test_what_training_waits_for_a_checkpoint_is_seen(whole: Path) -> None:
    saves = read_metrics(whole / "runs" / "digits-cnn" / "metrics.jsonl", "event")
    blocked = [event["blocked"] for event in saves if event["event"] == "checkpoint"]
    stalls = losses(whole, key="seconds_checkpoint")
    assert sum(stalls.values()) > 0.9 * blocked[0], "the first, committed when the second begins"
    assert stalls[5] > 100 * stalls[4], "the checkpoint of step 4 delays step 5"
    steps = losses(whole, key="seconds").values()
    assert sum(steps) > sum(losses(whole, key="seconds_forward").values())


def test_the_line_before_a_step_that_fails_is_written(tmp_path: Path) -> None:
    fails = [*MISFIT, "model.name=bad_models:FailsInStepThree"]
    done = bigtrain("train", *fails, cwd=tmp_path, PYTHONPATH=str(TESTS))
    assert done.returncode == 3, done.stderr
    assert list(losses(tmp_path)) == [1, 2]


@pytest.mark.parametrize("channels", ["[16, 32, 64]", "[64, 64, 128]"])
def test_another_models_checkpoint_is_refused_and_the_run_stays_usable(
    channels: str, whole: Path, tmp_path: Path
) -> None:
    run = copy_run(whole, tmp_path)
    before = run.recipe.read_bytes()
    change = [f"model.args={{channels: {channels}}}", "--allow-change", "model.args"]
    refused = bigtrain("train", *CNN, *change, cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert "step-00000012: " in refused.stderr and ", and the model's [" in refused.stderr
    assert run.recipe.read_bytes() == before
    assert bigtrain("train", *CNN, "train.steps=13", cwd=tmp_path).returncode == 0


def test_steps_behind_the_checkpoint_are_refused_on_all_ranks(whole: Path, tmp_path: Path) -> None:
    run = copy_run(whole, tmp_path)
    before = run.recipe.read_bytes(), run.metrics.read_bytes()
    refused = on_ranks(2, "train", *CNN, "train.steps=10", cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert "this run is at step 12, and train.steps=10 is behind it" in refused.stderr
    assert (run.recipe.read_bytes(), run.metrics.read_bytes()) == before
    again = bigtrain("train", *CNN, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "finished digits-cnn: 12 steps" in again.stdout


def test_another_optimizer_starts_anew_and_says_so(whole: Path, tmp_path: Path) -> None:
    copy_run(whole, tmp_path)
    change = ["optim.name=sgd", "optim.momentum=0.9", "train.steps=14", "--allow-change", "optim"]
    done = bigtrain("train", *CNN, *change, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "optimizer AdamW → SGD" in done.stdout
    assert (
        bigtrain(
            "train", *CNN, "train.steps=16", "--allow-change", "optim", cwd=tmp_path
        ).returncode
        == 0
    )


def test_a_metric_that_the_task_has_not_is_refused(tmp_path: Path) -> None:
    done = bigtrain("train", *CNN, "train.keep_best=r2", cwd=tmp_path)
    assert done.returncode == 2
    assert "has loss, accuracy, recall, f1" in done.stderr


@pytest.mark.plain
def test_a_stop_that_cannot_be_saved_does_not_end_with_75(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "digits-cnn" / "checkpoints"
    with small_disk(target, "100k"):
        (target.parent / "STOP").touch()
        done = bigtrain("train", *CNN, cwd=tmp_path)
        assert done.returncode == 3
        assert "its checkpoint was not written" in done.stderr


@pytest.mark.parametrize("log_every", [1, 7])
def test_numbers_that_stay_broken_end_the_run_with_3(log_every: int, tmp_path: Path) -> None:
    arguments = [
        "train",
        *CNN,
        "optim.lr=1e30",
        "optim.warmup_steps=0",
        "optim.clip_norm=0.0",
        "train.max_skipped_steps=3",
    ]
    done = bigtrain(*arguments, "train.steps=40", f"train.log_every={log_every}", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "3 steps in a row" in done.stderr
    assert "Traceback" not in done.stderr


def test_normalisation_over_the_micro_batch_is_said(tmp_path: Path) -> None:
    assert (
        bigtrain(
            "train", "digits-resnet", "train.steps=2", "track.wandb=off", cwd=tmp_path
        ).returncode
        == 0
    )
    assert "BatchNorm" in events(tmp_path, "digits-resnet")["normalisation"]["layers"]
    effective = json.loads((tmp_path / "runs" / "digits-resnet" / "effective.json").read_text())
    assert effective["normalisation"]["value"] == "depends on the micro-batch"


@pytest.mark.plain
def test_a_rank_killed_and_fewer_then_more_ranks_give_the_same_curve(
    whole: Path, tmp_path: Path
) -> None:
    """kill -9 of one of two ranks under ZeRO-2; on to the end on one process; then further on two
    under ZeRO-3.

    With dropout: micro-batches of eight samples are the same ones on one rank and on two.
    """
    steady = [*CNN, "engine.micro_batch=8"]
    straight = tmp_path / "straight"
    straight.mkdir()
    assert bigtrain("train", *steady, "train.steps=16", cwd=straight).returncode == 0
    metrics = tmp_path / "runs" / "digits-cnn" / "metrics.jsonl"
    ranks = start_ranks(
        2, "train", *steady, "engine.kind=zero2", "train.steps=100000", cwd=tmp_path
    )
    wait_for(lambda: metrics.exists() and b'"step": 9,' in metrics.read_bytes())
    ranks[1].signal(signal.SIGKILL)
    began = time.monotonic()
    assert ranks[0].wait(60).returncode == 76, (
        "a rank that lost its peer says so, and does not hang"
    )
    assert time.monotonic() - began < 30
    newest = int(committed_checkpoints(RunDir(metrics.parent))[-1].name[5:])
    one = bigtrain("train", *steady, f"train.steps={newest + 2}", "engine.kind=ddp", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    assert "engine zero2 → ddp, world_size 2 → 1" in one.stdout
    two = on_ranks(
        2, "train", *steady, f"train.steps={newest + 4}", "engine.kind=zero3", cwd=tmp_path
    )
    assert two.returncode == 0, two.stderr[-3000:]
    expected, digests = losses(straight), losses(straight, key="samples_digest")
    assert len(expected) == 16
    for step, loss in losses(tmp_path).items():
        if step in expected:
            assert loss == pytest.approx(expected[step], rel=1e-5), step
            assert losses(tmp_path, key="samples_digest")[step] == digests[step]


@pytest.mark.plain
def test_a_signal_to_one_rank_stops_all_at_one_step(whole: Path, tmp_path: Path) -> None:
    copy_run(whole, tmp_path)
    arguments = [
        *CNN,
        "train.steps=100000",
        "train.checkpoint_every=100000",
        "train.eval_every=100000",
    ]
    ranks = start_ranks(2, "train", *arguments, cwd=tmp_path)
    wait_for(lambda: len(losses(tmp_path)) > 14)
    ranks[1].signal(signal.SIGUSR1)
    assert [rank.wait(60).returncode for rank in ranks] == [75, 75]
    run = RunDir(tmp_path / "runs" / "digits-cnn")
    assert int(committed_checkpoints(run)[-1].name[5:]) == max(losses(tmp_path))
    assert verify_checkpoint(committed_checkpoints(run)[-1]) == []


def test_the_export_of_a_stopped_run_equals_the_straight_one(whole: Path, tmp_path: Path) -> None:
    """Dropout and augmentation on; stopped at step 8; the same bits at the end."""
    run = copy_run(whole, tmp_path)
    shutil.rmtree(run.checkpoints / "step-00000012")
    shutil.rmtree(run.export)
    assert bigtrain("train", *CNN, cwd=tmp_path).returncode == 0
    found, expected = (
        load_file(f / "runs" / "digits-cnn" / "export" / "model.safetensors")
        for f in (tmp_path, whole)
    )
    assert all((found[name] == expected[name]).all() for name in expected)


@pytest.mark.plain
def test_a_silent_rank_is_named_and_the_others_leave(tmp_path: Path) -> None:
    """SIGSTOP: it neither answers nor dies. Each rank in turn: rank 0 also serves the store where
    ranks meet.
    """
    for silent in (1, 0):
        recipe = [
            *CNN,
            "engine.kind=zero2",
            "train.steps=400",
            "train.hang_timeout=2",
            f"name=silent-{silent}",
        ]
        ranks = start_ranks(2, "train", *recipe, cwd=tmp_path, BIGTRAIN_FAULT=f"stop@{silent}:9")
        began = time.monotonic()
        end = ranks[1 - silent].wait(60)
        ranks[silent].signal(signal.SIGKILL)
        assert end.returncode == 76, end.stderr
        assert time.monotonic() - began < 45
        assert (
            f"rank {silent}"
            in end.stderr.split("leaving with 76")[1].split(
                "SILENT" if silent else "does not answer"
            )[0]
        )
        assert "in train_step" in end.stderr, "where it waits: Python's stack"
    said = events(tmp_path, "silent-1")["hang"]
    assert said["silent"] == [1]
    assert said["places"][0] == "step 9: meeting"
    again = on_ranks(2, "train", *recipe, "train.steps=12", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resuming from step-" in again.stdout


@pytest.mark.plain
def test_a_rank_that_is_stuck_before_the_collective_is_named(tmp_path: Path) -> None:
    """It lives and answers, but has not come as far as the others."""
    recipe = [*MISFIT, "model.name=bad_models:StuckOnRankOne", "train.hang_timeout=1"]
    ranks = start_ranks(2, "train", *recipe, cwd=tmp_path, PYTHONPATH=str(TESTS))
    ends = [rank.wait(60) for rank in ranks]
    assert [end.returncode for end in ends] == [76, 76]
    assert "in forward" in ends[1].stderr, "its own stack says where"
    assert "rank 1: step 3: forward  ← behind the others" in ends[0].stderr, ends[0].stderr


@pytest.mark.timed
def test_a_slow_rank_is_named(tmp_path: Path) -> None:
    recipe = [
        *MISFIT,
        "model.name=bad_models:SlowOnRankOne",
        "train.hang_timeout=4",
        "train.steps=120",
        "train.log_every=10",
    ]
    assert on_ranks(2, "train", *recipe, cwd=tmp_path, PYTHONPATH=str(TESTS)).returncode == 0
    slow = events(tmp_path)["straggler"]
    assert slow["rank"] == 1
    assert slow["seconds"] > 1.5 * slow["usual"]


def test_deepspeed_compiles_nothing(tmp_path: Path) -> None:
    """A compiler may be absent, and torch's lock around one is never freed after a kill."""
    arguments = [*CNN, "engine.kind=zero1", "train.steps=1", "train.eval_every=1"]
    folder = tmp_path / "extensions"
    environment = {"TORCH_EXTENSIONS_DIR": str(folder), "CXX": "/bin/false", "PATH": "/bin"}
    done = bigtrain("train", *arguments, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert not folder.exists()


def test_ranks_with_other_versions_are_refused_and_named(tmp_path: Path) -> None:
    other = tmp_path / "other" / "datasets-4.1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 4.1.0\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    first = start("train", *CNN, cwd=tmp_path, RANK="0", LOCAL_RANK="0", **common)
    second = start(
        "train",
        *CNN,
        cwd=tmp_path,
        RANK="1",
        LOCAL_RANK="1",
        PYTHONPATH=str(other.parent),
        **common,
    )
    ends = [first.wait(60), second.wait(60)]
    assert [end.returncode for end in ends] == [2, 2]
    assert "rank 1 has datasets 4.1.0, rank 0 datasets" in ends[0].stderr
    assert not (tmp_path / "runs").exists()


def test_small_mistakes_are_named(whole: Path, tmp_path: Path) -> None:
    run = copy_run(whole, tmp_path)
    wrong = bigtrain("train", *CNN, "optim.lr=1e-4", "--allow-change", "optim.lrr", cwd=tmp_path)
    assert (wrong.returncode, "try:      --allow-change optim.lr" in wrong.stderr) == (2, True), (
        wrong.stderr
    )
    wrong = bigtrain("train", *CNN, "train.steps=13", cwd=tmp_path, BIGTRAIN_GRACE_SECONDS="2m")
    assert (wrong.returncode, "BIGTRAIN_GRACE_SECONDS is '2m'" in wrong.stderr) == (2, True), (
        wrong.stderr
    )
    (tmp_path / "new").mkdir()
    assert (
        bigtrain("train", *CNN, cwd=tmp_path / "new", BIGTRAIN_GRACE_SECONDS="2m").returncode == 2
    )
    assert not list((tmp_path / "new").iterdir()), "nothing is written"
    newest = committed_checkpoints(run)[-1]
    newest.rename(tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    assert verify_checkpoint(newest) == ["it is a link to somewhere else"]
