"""Tracking: one W&B run whatever interrupts it; no server delays training; no secret in a file."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import pytest
from conftest import bigtrain, on_ranks, start, start_ranks, wait_for
from PIL import Image
from rich.console import Console

from bigtrain.config.secrets import redact
from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir
from bigtrain.runs.events import EVENT_TEXTS, OLD_EVENT_NAMES, Event
from bigtrain.runs.metrics_file import read_metrics
from bigtrain.tracking import wandb_sync
from bigtrain.tracking.base import TrackerGroup, numbers_of
from bigtrain.tracking.terminal import Terminal
from bigtrain.tracking.wandb import _end_service

STEPS = ["train.steps=12", "train.eval_every=6", "train.checkpoint_every=4", "engine.kind=ddp"]
CNN = ["digits-cnn", *STEPS]
RUN = Path("runs") / "digits-cnn"
KEY = "0123456789abcdef0123456789abcdef01234567"  # of the form of W&B's


def wandb_entries(file: Path) -> list[dict[str, Any]]:
    """What a file of W&B's holds, as W&B's own reader shows it."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def wandb_lines(file: Path) -> list[dict[str, Any]]:
    """The lines that were logged to a file of W&B's."""
    return [entry.get("history", {}).get("item", {}) for entry in wandb_entries(file)]


def wandb_losses(run: Path) -> list[tuple[int, float]]:
    """(step, training loss) in all segments of a run, in their order."""
    losses = []
    for file in sorted(run.glob("wandb/*run-*/*.wandb")):
        for line in wandb_lines(file):
            if "train/loss" in line:
                losses.append((line["step"], line["train/loss"]))
    return losses


def test_a_run_killed_twice_is_one_run_in_wandb_with_each_step_once(tmp_path: Path) -> None:
    """Two ranks; rank 0, which talks to W&B, is killed too."""
    recipe = [*CNN, "track.wandb=offline"]
    for fault in ("kill@1:6", "kill@0:11"):
        ranks = start_ranks(2, "train", *recipe, cwd=tmp_path, BIGTRAIN_FAULT=fault)
        assert {rank.wait(60).returncode for rank in ranks} == {76, -signal.SIGKILL}
    done = on_ranks(2, "train", *recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = wandb_losses(tmp_path / RUN)
    expected = {
        line["step"]: line["loss"]
        for line in read_metrics(tmp_path / RUN / "metrics.jsonl", "train")
    }
    assert Counter(step for step, _ in losses) == dict.fromkeys(range(1, 13), 1)
    assert dict(losses) == expected
    files = (tmp_path / RUN).glob("wandb/*run-*/*.wandb")
    ids = {file.stem.removeprefix("run-") for file in files}
    assert ids == {(tmp_path / RUN / "wandb_id").read_text()}


@pytest.mark.timed
@pytest.mark.parametrize(
    "answers", [False, True], ids=["nobody there", "accepts and never answers"]
)
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
        bigtrain("recipes", cwd=tmp_path)  # so that what forks is there
        began = time.time()
        done = bigtrain("train", *CNN, cwd=tmp_path, **environment)
        ended = time.time()
    assert done.returncode == 0, done.stderr
    lines = list(read_metrics(tmp_path / RUN / "metrics.jsonl", "train"))
    assert lines[0]["time"] - began < 10
    assert ended - lines[-1]["time"] < 15
    assert "later: bigtrain sync digits-cnn" in done.stderr
    assert len(wandb_losses(tmp_path / RUN)) == 12, "all is there, to be synced"


@pytest.mark.parametrize(
    ("code", "printed", "refused"),
    [
        (0, "wandb:   runs/error-study/wandb/run.wandb", False),
        (0, "wandb: ERROR <no message>", True),
        (1, "Error: no such file", True),
        (1, "", True),
    ],
)
def test_what_wandb_sync_prints_of_a_path_is_no_error(
    code: int, printed: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "error-study")
    (run.path / "wandb" / "offline-run-1-a").mkdir(parents=True)
    (run.path / "wandb_id").write_text("a")
    done = subprocess.CompletedProcess(["wandb"], code, printed, "")
    monkeypatch.setattr(wandb_sync, "_run_wandb", lambda *_: done)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if refused:
        with pytest.raises(RequestError, match="wandb sync:"):
            wandb_sync.sync(run)
    else:
        assert wandb_sync.sync(run) == printed


def test_sync_without_a_key_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / RUN / "wandb" / "offline-run-1-a").mkdir(parents=True)
    (tmp_path / RUN / "recipe.yaml").touch()
    done = bigtrain("sync", "digits-cnn", cwd=tmp_path, NETRC="/nowhere", HOME=str(tmp_path))
    assert done.returncode == 2
    assert "wandb login" in done.stderr


def test_tensorboard_and_trackio_have_the_same_lines_and_drop_what_a_kill_undid(
    tmp_path: Path,
) -> None:
    """Killed in step 10, resumed from 8: each step once in TensorBoard, as its own reader shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = [*CNN, "track.wandb=off", "track.extra=[tensorboard, trackio]"]
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    killed = bigtrain("train", *recipe, cwd=tmp_path, BIGTRAIN_FAULT="kill@0:10", **environment)
    assert killed.returncode == -signal.SIGKILL
    done = bigtrain("train", *recipe, "--json", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 12, "and nothing else on standard output"
    expected = {
        line["step"]: line["loss"]
        for line in read_metrics(tmp_path / RUN / "metrics.jsonl", "train")
    }
    events = EventAccumulator(str(tmp_path / RUN / "tensorboard"))
    events.Reload()
    losses = {scalar.step: scalar.value for scalar in events.Scalars("train/loss")}
    assert losses == pytest.approx(expected)
    assert [scalar.step for scalar in events.Scalars("eval/accuracy")] == [6, 12]
    with sqlite3.connect(tmp_path / "trackio" / "bigtrain.db") as database:
        rows = database.execute("select step, metrics from metrics").fetchall()
    lines = [(step, json.loads(values)) for step, values in rows]
    losses = {step: line["train/loss"] for step, line in lines if "train/loss" in line}
    assert losses == pytest.approx({step: expected[step] for step in losses})
    assert {11, 12} <= losses.keys(), "it sends every half second; a kill costs what was not sent"


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "inner = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'trackio' else inner(n, *a)\n"
    )
    command = [sys.executable, "-m", "bigtrain", "train", "digits-cnn", "track.extra=[trackio]"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "track.extra has trackio, which is not installed" in done.stderr
    assert "pip install 'bigtrain[trackio]'" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("recipe", "column"),
    [
        ("digits-cnn", "predicted"),
        ("tiny-lm", "written"),
        ("dates-seq2seq", "written"),
        ("breast-cancer", "predicted"),
    ],
)
def test_wandb_has_a_table_of_samples_at_each_evaluation(
    recipe: str, column: str, tmp_path: Path
) -> None:
    short = [
        "train.steps=4",
        "train.eval_every=2",
        "train.checkpoint_every=4",
        "track.wandb=offline",
        "engine.precision=fp32",
    ]
    if recipe == "dates-seq2seq":
        short.append("data.eval_fraction=0.002")  # at the end targets are written too
    done = on_ranks(2, "train", recipe, *short, "engine.kind=zero3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tables = [
        json.loads(path.read_text()) for path in (tmp_path / "runs" / recipe).rglob("*.table.json")
    ]
    assert len(tables) == 2
    for table in tables:
        assert column in table["columns"]
        assert 0 < len(table["data"]) <= 8
    if recipe == "digits-cnn":
        staged = (tmp_path / "runs" / recipe / "wandb" / "artifacts").rglob("*")
        pictures = [
            path for path in staged if path.is_file() and path.read_bytes().startswith(b"\x89PNG")
        ]
        assert len(pictures) > 8
        assert all(np.ptp(np.asarray(Image.open(path))) > 200 for path in pictures), (
            "from black to white, as digits are"
        )


def test_every_machine_is_seen_in_wandb(tmp_path: Path) -> None:
    """Two ranks that take themselves to be on two machines."""
    recipe = [
        *CNN,
        "track.wandb=offline",
        "train.steps=400",
        "train.checkpoint_every=400",
        "train.hang_timeout=8",
    ]
    ranks = start_ranks(
        2,
        "train",
        *recipe,
        cwd=tmp_path,
        each=[{"SLURMD_NODENAME": f"n{rank}", "LOCAL_RANK": "0"} for rank in (1, 2)],
    )
    assert [rank.wait().returncode for rank in ranks] == [0, 0]
    seen = [
        line["machines"]
        for line in read_metrics(tmp_path / RUN / "metrics.jsonl", "event")
        if line["event"] == "nodes"
    ]
    assert seen and all(set(machines) == {"n1", "n2"} for machines in seen)
    (file,) = (tmp_path / RUN).glob("wandb/*run-*/*.wandb")
    loads = [line["nodes/n2/cpu"] for line in wandb_lines(file) if "nodes/n2/cpu" in line]
    assert loads == [machines["n2"]["cpu"] for machines in seen]


def test_warnings_of_libraries_are_kept_and_those_of_the_user_shown(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import logging, warnings\nfrom bigtrain.models.cnn import CNN\n\n\n"
        "class Mine(CNN):\n"
        "    def forward(self, pixel_values):\n"
        "        warnings.warn('mine: look here')\n"
        "        text = \"logging.getLogger('DeepSpeed').warning('deepspeed: of no use to you')\"\n"
        "        exec(compile(text, '/x/site-packages/deepspeed/engine.py', 'exec'))\n"
        "        return super().forward(pixel_values)\n"
    )
    done = on_ranks(
        2, "train", *CNN, "model.name=mine:Mine", "track.wandb=off", "--quiet", cwd=tmp_path
    )
    assert done.returncode == 0
    assert done.stderr.count("UserWarning: mine") == 2, (
        "by the trial before anything is written, and once in training"
    )
    assert "of no use" not in done.stdout + done.stderr
    assert "step" not in done.stdout.replace("12 steps", ""), "quiet: the result alone"
    for rank in (0, 1):
        kept = (tmp_path / RUN / "logs" / f"rank-{rank}.log").read_text()
        assert "mine: look here" in kept
        assert "of no use to you" in kept


def test_a_terminal_shows_a_live_panel(tmp_path: Path) -> None:
    """A real one: a pseudo-terminal."""
    main, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [
        sys.executable,
        "-m",
        "bigtrain",
        "train",
        *CNN,
        "track.wandb=off",
        "train.steps=150",
        "train.eval_every=75",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdin=ours,
        stdout=ours,
        stderr=ours,
        env=os.environ | {"TERM": "xterm-256color"},
    )
    os.close(ours)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while part := os.read(main, 65536):
            shown += part
    os.close(main)
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    for expected in (
        "150 of 150  100%",
        " left",
        "samples/s  mfu",
        "checkpoint step",
        "gradient norm",
        "evaluation  loss",
        "█",
    ):
        assert expected in text, text[-3000:]


def test_a_step_that_was_done_twice_is_logged_once(tmp_path: Path) -> None:
    """Killed twice before W&B is switched on.

    metrics.jsonl has step 9 twice, and W&B once, as it was done last.
    """
    recipe = [
        "digits-mlp",
        "train.steps=16",
        "train.eval_every=16",
        "train.checkpoint_every=4",
        "train.async_save=false",
    ]
    for step in (11, 14):
        done = bigtrain(
            "train", *recipe, "track.wandb=off", cwd=tmp_path, BIGTRAIN_FAULT=f"kill@0:{step}"
        )
        assert done.returncode == -signal.SIGKILL
    assert bigtrain("train", *recipe, "track.wandb=offline", cwd=tmp_path).returncode == 0
    losses = wandb_losses(tmp_path / "runs" / "digits-mlp")
    assert [step for step, _ in losses] == list(range(1, 17))


def test_a_secret_that_an_error_or_a_warning_names_is_redacted(tmp_path: Path) -> None:
    (tmp_path / "leaky.py").write_text(
        "import logging, os, warnings\nfrom bigtrain.models.cnn import CNN\n\n\n"
        "class Leaky(CNN):\n    calls = 0\n\n"
        "    def forward(self, pixel_values):\n"
        "        Leaky.calls += 1\n"
        "        if Leaky.calls > 3:\n"
        "            warnings.warn('the key is ' + os.environ['MY_TOKEN'])\n"
        "            logging.getLogger(__name__).warning('more than it has room for', 'here')\n"
        "            try:\n"
        "                raise RuntimeError('no access with ' + os.environ['MY_TOKEN'])\n"
        "            except RuntimeError:\n"
        "                logging.getLogger(__name__).warning('a traceback', exc_info=True)\n"
        "                raise\n"
        "        return super().forward(pixel_values)\n"
    )
    canary = CANARIES["of this environment"]
    done = bigtrain(
        "train",
        *CNN,
        "model.name=leaky:Leaky",
        "track.wandb=offline",
        cwd=tmp_path,
        MY_TOKEN=canary,
    )
    assert done.returncode == 3
    assert "no access with [redacted]" in (tmp_path / RUN / "metrics.jsonl").read_text()
    log = (tmp_path / RUN / "logs" / "rank-0.log").read_text()
    assert "the key is [redacted]" in log and "RuntimeError: no access with [redacted]" in log
    assert canary not in done.stdout + done.stderr
    assert not [
        path
        for path in (tmp_path / RUN).rglob("*")
        if path.is_file() and canary.encode() in path.read_bytes()
    ]


def test_a_service_that_hangs_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """W&B's own process is stopped (SIGSTOP) in the middle of a run."""
    run = start(
        "train",
        *CNN,
        "track.wandb=offline",
        "train.steps=600",
        "train.eval_every=600",
        cwd=tmp_path,
    )
    metrics = tmp_path / RUN / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 20)
    services = [
        child for child in psutil.Process(run.pid).children() if child.name().startswith("wandb")
    ]
    assert services
    for service in services:
        service.send_signal(signal.SIGSTOP)
    done = run.wait(120)
    ended = time.time()
    assert done.returncode == 0, done.stderr
    lines = list(read_metrics(metrics, "train"))
    assert len(lines) == 600
    assert ended - lines[-1]["time"] < 30
    assert "later: bigtrain sync digits-cnn" in done.stderr
    assert not any(
        psutil.pid_exists(service.pid) and service.status() == psutil.STATUS_STOPPED
        for service in services
    )


def test_a_killed_service_does_not_choose_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """teardown() raises SystemExit(-9) if the kill reaches the service after its last message."""
    monkeypatch.setattr("wandb.teardown", lambda: sys.exit(-9))
    _end_service()


@pytest.mark.parametrize(("steps", "code"), [("train.steps=4", 0), ("optim.lr=1e30", 1)])
def test_wandb_knows_how_a_run_ended(steps: str, code: int, tmp_path: Path) -> None:
    """A failed one is not shown as finished."""
    done = bigtrain(
        "train",
        *CNN,
        "track.wandb=offline",
        "train.max_skipped_steps=2",
        "optim.clip_norm=0.0",
        steps,
        cwd=tmp_path,
    )
    assert done.returncode == (3 if code else 0)
    (file,) = (tmp_path / RUN).glob("wandb/*run-*/*.wandb")
    exits = [entry["exit"] for entry in wandb_entries(file) if "exit" in entry]
    assert [values.get("exit_code", 0) for values in exits] == [code]


def test_a_number_of_tokens_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN_TOKENS", "10000000000")
    monkeypatch.setenv("API_TOKENS", "one-of-mine,another")
    monkeypatch.setenv("A_PASSWORD", "1234567890")
    assert (
        redact("10000000000 with one-of-mine,another or 1234567890")
        == "10000000000 with [redacted] or [redacted]"
    )


CANARIES = {"of its form": "hf_" + "Canary9" * 5, "of this environment": "an-odd-canary-of-mine"}


@pytest.mark.parametrize("canary", CANARIES.values(), ids=CANARIES)
@pytest.mark.parametrize("place", ["recipe", "key", "override", "path", "data path"])
def test_a_secret_in_a_request_is_refused_and_never_shown(
    canary: str, place: str, tmp_path: Path
) -> None:
    shipped = (
        Path(__file__).parent.parent / "bigtrain" / "recipes" / "digits-cnn.yaml"
    ).read_text()
    recipe = tmp_path / (f"{canary}.yaml" if place == "path" else "mine.yaml")
    more = {"recipe": f"track: {{notes: 'see {canary}'}}\n", "key": f"{canary}: 1\n"}.get(place, "")
    recipe.write_text(shipped + more)
    overrides = {
        "override": [f"track.project={canary}"],
        "data path": [f"data.train=/data/{canary}/a.txt"],
    }.get(place, [])
    for command in (["train"], ["submit", "--dry-run"]):
        done = bigtrain(
            *command,
            recipe.name,
            *overrides,
            cwd=tmp_path,
            MY_API_KEY=CANARIES["of this environment"],
        )
        assert done.returncode == 2
        assert "looks like a secret" in done.stderr
        assert canary not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [recipe.name], "nothing was written"


def test_a_secret_of_the_environment_is_in_no_output(tmp_path: Path) -> None:
    """Trained, tracked, stopped by an error too, submitted and shown: every file of it."""
    secrets = {
        "WANDB_API_KEY": KEY,
        "HF_TOKEN": CANARIES["of its form"],
        "MY_SECRET": CANARIES["of this environment"],
    }
    output = ""
    commands = [
        ["train", *CNN, "track.wandb=offline"],
        ["train", *CNN, "name=other", "model.name=none:None"],
    ]
    commands += [
        ["submit", "digits-cnn", "--dry-run", "slurm.env=[WANDB_API_KEY]"],
        ["status"],
        ["evaluate", "digits-cnn"],
    ]
    for command in commands:
        done = bigtrain(*command, cwd=tmp_path, **secrets)
        output += done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for secret in secrets.values():
        assert secret not in output
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_where_a_step_went_is_a_group_of_its_own() -> None:
    record = {"kind": "train", "step": 3, "loss": 2.0, "seconds": 0.5, "seconds_data": 0.1}
    expected = {"train/loss": 2.0, "train/seconds": 0.5, "seconds/data": 0.1}
    assert numbers_of(record) == expected


def test_every_event_has_a_text_and_the_terminal_shows_it() -> None:
    assert set(EVENT_TEXTS) == set(get_args(Event))
    assert set(OLD_EVENT_NAMES.values()) <= set(EVENT_TEXTS)
    shown = io.StringIO()
    terminal = Terminal(steps=9, unit="tokens", console=Console(file=shown, width=200))
    tracker = TrackerGroup(terminal)
    for event in EVENT_TEXTS:
        tracker.event(3, event, machines={}, reason="so it is")
    lines = shown.getvalue().splitlines()
    texts = [text for event, text in EVENT_TEXTS.items() if event != "nodes"]
    assert [line.split("  ")[:2] for line in lines] == [["step 3", text] for text in texts]
    assert all(line.endswith("reason so it is") for line in lines)
    assert terminal.saved == "step 3"


def test_a_terminal_shows_times_with_their_unit_and_nothing_that_is_none() -> None:
    shown = io.StringIO()
    terminal = Terminal(steps=9, unit="tokens", console=Console(file=shown, width=200))
    tracker = TrackerGroup(terminal)
    tracker.event(0, "started", ranks=1, job=None)
    tracker.event(3, "resumed", seconds=0.5, load_seconds=0.25, check_seconds=12.0)
    assert shown.getvalue().splitlines() == [
        "step 0  started  ranks 1",
        "step 3  resumed  0.500 s  load 0.250 s  check 12.000 s",
    ]


def test_a_tracker_gets_the_time_and_the_caller_keeps_its_record() -> None:
    shown = io.StringIO()
    terminal = Terminal(steps=9, unit="tokens", console=Console(file=shown, width=200))
    record = {"kind": "train", "step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "applied": True}
    record |= {"tokens_per_s": 10.0, "mfu": 0.5, "peak_memory_bytes": 2**30}
    before = dict(record)
    TrackerGroup(terminal).log(record)
    assert record == before
    assert terminal.record is not None and terminal.record["time"] == pytest.approx(
        time.time(), abs=60
    )
    assert (
        shown.getvalue() == "step 1/9  loss 2.0000  lr 1.00e-01  10 tokens/s  mfu 50.0%  1.0 GiB\n"
    )
