"""Shared by all tests: no network, a cache of their own, one thread per rank."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny; threads would only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.pop("WANDB_API_KEY", None)
TESTS = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A token cache that all tests of a session share and no other session sees."""
    os.environ["BIGTRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield


def torchrun(ranks: int, *arguments: str, cwd: Path, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """Run a program on `ranks` real processes with one thread each."""
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
        *arguments,
    ]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def bigtrain(*arguments: str, cwd: Path, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-m", "bigtrain", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=timeout, check=False
    )
