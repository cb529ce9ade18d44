"""One process per run: the file `lock` names its owner, and is taken over from a dead one."""

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir, write_atomic

# The kernel's lock (a FileLock) of each run that this process owns. The kernel drops it when the
# process ends, and it works across containers on one host, where process numbers say nothing.
_kernel_locks: dict[Path, Any] = {}


@dataclass(frozen=True)
class Owner:
    """The process that trains a run, as `lock` names it."""

    host: str
    pid: int
    boot: str  # of the host: process numbers are given anew after each boot
    started: float | None  # when the process began, in seconds since 1970
    job: str | None  # its Slurm job


def take_ownership(run: RunDir) -> None:
    """Write who trains this run into `runs/NAME/lock`; a dead owner's lock is taken over.

    Raises RequestError, and writes nothing, when the owner is alive, or may be so on another host.
    """
    from filelock import FileLock  # only here: an error about a recipe needs no lock

    this_process = Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        boot=_boot_id(),
        started=_start_time(os.getpid()),
        job=os.environ.get("SLURM_JOB_ID"),
    )
    kernel_lock = FileLock(run.path / ".lock.guard")
    with contextlib.suppress(TimeoutError):
        kernel_lock.acquire(timeout=0)
    owner = read_owner(run)
    if not kernel_lock.is_locked or not _may_take_over(owner, this_process):
        kernel_lock.release()
        raise _refusal(run, owner)
    write_atomic(run.path / "lock", json.dumps(asdict(this_process)))
    _kernel_locks[run.path] = kernel_lock


def release_ownership(run: RunDir) -> None:
    """Let another process train the run. Does nothing more where this process does not own it."""
    (run.path / "lock").unlink(missing_ok=True)
    kernel_lock = _kernel_locks.pop(run.path, None)
    if kernel_lock is not None:
        kernel_lock.release()


def read_owner(run: RunDir) -> Owner | None:
    """Who holds the run's lock; None if nobody does, or if the file is not readable."""
    try:
        fields = dict(json.loads((run.path / "lock").read_text()))
        pid = int(fields.get("pid") or 0)
    except (OSError, ValueError, TypeError):
        return None
    if not fields:
        return None
    return Owner(
        host=fields.get("host", ""),
        pid=pid,
        boot=fields.get("boot", ""),
        started=fields.get("started"),
        job=fields.get("job"),
    )


def is_alive(owner: Owner) -> bool | None:
    """Whether the owner still runs; None if it is on another host, whose processes are unknown."""
    if owner.host != socket.gethostname():
        return None
    started = _start_time(owner.pid)
    return started is not None and started == owner.started and owner.boot == _boot_id()


def _may_take_over(owner: Owner | None, this_process: Owner) -> bool:
    if owner is None:
        return True
    alive = is_alive(owner)
    if alive is None:
        # A job that was requeued on another host has its old number, and is alone with it.
        return bool(this_process.job) and owner.job == this_process.job
    return not alive or owner.pid == this_process.pid


def _refusal(run: RunDir, owner: Owner | None) -> RequestError:
    whose = "another process"
    if owner is not None:
        whose = f"process {owner.pid} on {owner.host}"
        if owner.job:
            whose += f", Slurm job {owner.job}"
    return RequestError(
        f"{run.path} is being trained by {whose}",
        "one process per run",
        f"wait for it, or use --fresh; if you know that it is dead: rm {run.path / 'lock'}",
    )


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _start_time(pid: int) -> float | None:
    """When a process began; None if there is none. A later one with the same number began later.

    A zombie is none: in a container without an init process a killed owner stays one for ever.
    """
    import psutil  # only here, as filelock above

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time())
    except psutil.Error:
        return None
