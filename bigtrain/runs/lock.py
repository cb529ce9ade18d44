"""One process per run: a lock that names its owner, and is taken over from a dead one."""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir, write_atomic

_guards: dict[Path, Any] = {}  # of the runs that this process owns: a FileLock each


def take_ownership(run: RunDir) -> None:
    """Write who runs this run into `runs/NAME/lock`; a dead owner's lock is taken over.

    Raises RequestError, and writes nothing, when the owner lives, or may live on another host.
    """
    from filelock import (
        FileLock,  # here, as psutil below: an error about a recipe is said a tenth sooner
    )

    lock = run.path / "lock"
    me = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _boot_id(),
        "started": _started(os.getpid()),
    }
    me["job"] = os.environ.get("SLURM_JOB_ID")
    guard = FileLock(
        run.path / ".lock.guard"
    )  # the kernel's, while we live: sees through containers on one host
    with contextlib.suppress(TimeoutError):
        guard.acquire(timeout=0)
    holder, alive = owner(run)
    # Ours: held by this process already, or on another host by a requeued job, which has its number and is alone with it.
    ours = holder.get("pid") == me["pid"] if alive else me["job"] and holder.get("job") == me["job"]
    if not guard.is_locked or (alive is not False and not ours):
        guard.release()
        raise RequestError(
            f"{run.path} is being trained by process {holder.get('pid')} on {holder.get('host')}"
            + (f", Slurm job {holder['job']}" if holder.get("job") else ""),
            "one process per run",
            f"wait for it, --fresh, or if you know that it is dead: rm {lock}",
        )
    write_atomic(lock, json.dumps(me))
    _guards[run.path] = guard


def owner(run: RunDir) -> tuple[dict[str, Any], bool | None]:
    """Who holds the run's lock, and whether it lives: None when it is on another host, which cannot be seen from here."""
    try:
        holder = dict(json.loads((run.path / "lock").read_text()))
    except (OSError, ValueError, TypeError):
        return {}, False
    if holder.get("host") != socket.gethostname():
        return holder, None if holder else False
    alive = _started(int(holder.get("pid") or 0)) == holder.get("started") is not None
    return holder, alive and holder.get("boot") == _boot_id()


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _started(pid: int) -> float | None:
    """When a process began; None if there is none. A number that was given to another process begins later."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def release_ownership(run: RunDir) -> None:
    (run.path / "lock").unlink(missing_ok=True)
    if guard := _guards.pop(run.path, None):
        guard.release()
