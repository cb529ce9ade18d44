"""Shared by all tests: no network, a cache of their own, one thread per rank."""

import atexit
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny; threads would only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)
TESTS = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """GPUs are for the tests that ask for them: others start two ranks, which NCCL would refuse."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A token cache that all tests of a session share and no other session sees."""
    base = tmp_path_factory.getbasetemp()  # of one worker, where there are several
    os.environ["BIGTRAIN_CACHE"] = str(
        (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    )
    yield


def torchrun(
    ranks: int, *arguments: str, cwd: Path, timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    """Run a program on `ranks` real processes with one thread each."""
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
    ]
    return subprocess.run(
        [*command, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@cache
def _server() -> Any:
    """The process that forks (fork_server.py), started when first needed."""
    command = [sys.executable, str(TESTS / "fork_server.py")]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    atexit.register(lambda: (server.stdin and server.stdin.close(), server.wait(10)))
    os.environ["FORK_SERVER"] = f"/proc/{server.pid}/fd/0"
    return server


class Started:
    """A bigtrain command line that runs: its process id, and then its exit code and output."""

    def __init__(self, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str]) -> None:
        self.files = Path(tempfile.mkdtemp(prefix="started-"))
        server = _server()  # first: it puts its own address into the environment
        asked = {
            "arguments": arguments,
            "cwd": str(cwd),
            "environment": os.environ | environment,
            "files": str(self.files),
        }
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        wait_for((self.files / "pid").exists)
        self.pid = int((self.files / "pid").read_text())

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        try:
            wait_for((self.files / "code").exists, timeout)
        except AssertionError:
            self.signal(signal.SIGKILL)
            raise
        out, err = ((self.files / name).read_text(errors="replace") for name in ("out", "err"))
        code = int((self.files / "code").read_text())
        shutil.rmtree(self.files)
        return subprocess.CompletedProcess(["bigtrain"], code, out, err)


class StartedPlainly:
    """The same through a process of its own, which imports everything itself (make faults)."""

    def __init__(self, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bigtrain", *arguments],
            cwd=cwd,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return subprocess.CompletedProcess(["bigtrain"], self.process.returncode, out, err)


def start(*arguments: str, cwd: Path, **environment: str) -> Started | StartedPlainly:
    """Start the command line as a user would."""
    if os.environ.get("BIGTRAIN_PLAIN_PROCESSES"):
        return StartedPlainly(arguments, cwd, environment)
    return Started(arguments, cwd, environment)


def start_ranks(
    count: int,
    *arguments: str,
    cwd: Path,
    each: Sequence[dict[str, str]] = ({},) * 9,
    **environment: str,
) -> list[Started | StartedPlainly]:
    """Start it on several ranks, with the environment that torchrun sets (and what is `each` one's
    own), and nobody who watches over them.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
    } | environment
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | each[rank] for rank in range(count)]
    return [start(*arguments, cwd=cwd, **common, **mine) for mine in own]


def bigtrain(
    *arguments: str, cwd: Path, timeout: int = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return start(*arguments, cwd=cwd, **environment).wait(timeout)


def on_ranks(
    count: int, *arguments: str, cwd: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run it on several ranks; what the first of them says."""
    ends = [started.wait() for started in start_ranks(count, *arguments, cwd=cwd, **environment)]
    assert len({end.returncode for end in ends}) == 1, [
        (end.returncode, end.stderr[-2000:]) for end in ends
    ]
    return ends[0]


def quickest(act: Callable[[], Any], limit: float, tries: int = 40) -> float:
    """Seconds that `act` takes at best; tried again while that is above the limit, because a
    machine has busy neighbours.
    """
    best = math.inf
    for _ in range(tries):
        began = time.perf_counter()
        act()
        best = min(best, time.perf_counter() - began)
        if best < limit:
            break
    return best


def wait_for(true: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)
