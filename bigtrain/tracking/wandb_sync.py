"""What W&B logged offline: read back, and uploaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir

_ERROR_LINES = ("wandb: ERROR", "Error:")  # how lines of W&B's command line about errors begin


def _segments(run: RunDir) -> list[Path]:
    """W&B's folders of a run, in order: each process that trained the run has written one."""
    folders = sorted((run.path / "wandb").glob("*run-*-*"))
    return [folder for folder in folders if folder.is_dir() and not folder.is_symlink()]


def _run_wandb(*arguments: str) -> subprocess.CompletedProcess[str]:
    """W&B's own command line."""
    command = [sys.executable, "-m", "wandb", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def logged_offline(run: RunDir) -> set[tuple[str, int]]:
    """(kind, step) of every line in the run's offline segments, as W&B's own reader finds them.

    The segment of a process that was killed may lack its end.
    """
    logged: set[tuple[str, int]] = set()
    for folder in _segments(run):
        for file in folder.glob("*.wandb"):
            for line in _run_wandb("leet", "inspect", "--json", str(file)).stdout.splitlines():
                logged |= _kinds_and_step(line)
    return logged


def _kinds_and_step(line: str) -> set[tuple[str, int]]:
    """(kind, step) of what one line of W&B's reader is about: names in it are `KIND/METRIC`."""
    try:
        values = json.loads(line).get("history", {}).get("item", {})
    except ValueError:
        return set()
    if "step" not in values:
        return set()
    return {(name.split("/")[0], values["step"]) for name in values if "/" in name}


def sync(run: RunDir) -> str:
    """Upload what was logged offline, every segment once and in order; returns W&B's output.

    Raises RequestError when there is nothing, W&B has no key, or it refuses.
    """
    folders = [str(path) for path in _segments(run)]
    if not folders:
        raise RequestError(f"{run.path}/wandb holds nothing to sync", "a run with track.wandb on")
    if not logged_in():
        raise RequestError(f"W&B has no key for {wandb_server()}", "a key", "wandb login")
    # With one id for all, W&B appends the segments in order of their start; without, a later one
    # overwrites an earlier one (wandb#3841).
    run_id = (run.path / "wandb_id").read_text().strip()
    done = _run_wandb("sync", "--yes", "--include-online", "--id", run_id, *folders)
    output = (done.stdout + done.stderr).strip()
    # It ends with 0 also where its server has refused a run.
    errors = [line for line in output.splitlines() if line.startswith(_ERROR_LINES)]
    if done.returncode != 0 or errors:
        raise RequestError(
            f"wandb sync: {output[-500:]}",
            "W&B's server to answer",
            "the same command, later",
        )
    return output


def wandb_server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def logged_in() -> bool:
    """Whether W&B has a key for its server, in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import requests  # a tenth of a second that a run without a key to look for need not pay

    return requests.utils.get_netrc_auth(wandb_server()) is not None
