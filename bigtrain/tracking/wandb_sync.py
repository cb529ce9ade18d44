"""What W&B logged offline: read back, and uploaded."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import requests

from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir


def _segments(run: RunDir) -> list[Path]:
    """W&B's folders of a run, one per life, in their order."""
    return sorted(
        path
        for path in (run.path / "wandb").glob("*run-*-*")
        if path.is_dir() and not path.is_symlink()
    )


def _wandb(*arguments: str) -> subprocess.CompletedProcess[str]:
    """W&B's own command line."""
    return subprocess.run(
        [sys.executable, "-m", "wandb", *arguments], capture_output=True, text=True, check=False
    )


def logged_offline(run: RunDir) -> set[tuple[str, int]]:
    """(kind, step) of what earlier offline segments hold, as W&B's own reader finds it: a killed one may lack its end."""
    told = set()
    for file in (file for folder in _segments(run) for file in folder.glob("*.wandb")):
        for line in _wandb("leet", "inspect", "--json", str(file)).stdout.splitlines():
            with contextlib.suppress(ValueError):
                item = json.loads(line).get("history", {}).get("item", {})
                told |= {
                    (key.split("/")[0], item["step"])
                    for key in item
                    if "/" in key and "step" in item
                }
    return told


def sync(run: RunDir) -> str:
    """Upload what was logged offline, every segment once and in order, by W&B's own sync; what it said.

    Raises RequestError when there is nothing, or W&B refuses.
    """
    folders = [str(path) for path in _segments(run)]
    if not folders:
        raise RequestError(f"{run.path}/wandb holds nothing to sync", "a run with track.wandb on")
    # One id: then W&B appends the segments in order of their start, where it would overwrite (wandb#3841).
    done = _wandb(
        "sync",
        "--yes",
        "--include-online",
        "--id",
        (run.path / "wandb_id").read_text().strip(),
        *folders,
    )
    said = (done.stdout + done.stderr).strip()
    if done.returncode != 0 or "error" in said.lower():
        raise RequestError(
            f"wandb sync: {said[-500:]}", "W&B's server to answer", "the same command, later"
        )
    return said


def wandb_server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def logged_in() -> bool:
    """Whether W&B has a key for its server, in the environment or in netrc."""
    return (
        bool(os.environ.get("WANDB_API_KEY"))
        or requests.utils.get_netrc_auth(wandb_server()) is not None
    )
