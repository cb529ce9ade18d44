"""Is this machine, or this allocation, fit for a run? Every rank examines itself; rank 0 compares.

The ranks meet at a store of the doctor's own: a run's rendezvous is one of the things it checks.
"""

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
import uuid
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import distributed
from torch.distributed.elastic.utils.store import barrier

from bigtrain.cluster.rendezvous import Rendezvous, find_rendezvous
from bigtrain.config.versions import installed_versions
from bigtrain.doctor.checks import RankReport, Row, check_ranks
from bigtrain.engine.runtime import cores_per_rank
from bigtrain.models.flops import product_rate
from bigtrain.runs.directory import RUNS, to_json
from bigtrain.supervision.watchdog import attempt
from bigtrain.tracking.wandb_sync import logged_in

_PATIENCE = timedelta(seconds=60)
_PORTS = 8  # that are tried, one after the other
_WRITE_SIZE = 64 << 20  # bytes of the file that measures how fast runs/ is written


def examine() -> list[dict[str, Any]]:
    """Make all checks on all ranks: check, found, ok, advice of each, on rank 0.

    Elsewhere an empty list, unless something kept this rank from reporting.
    """
    meeting = find_rendezvous()
    try:
        return [asdict(row) for row in _examine_all_ranks(meeting)]
    finally:
        if meeting.rank == 0:
            with contextlib.suppress(OSError):  # not empty, or it is not ours to remove
                RUNS.rmdir()


def _examine_all_ranks(meeting: Rendezvous) -> list[Row]:
    own = _examine_this_rank(meeting)
    try:
        reports = [own]
        if meeting.world_size > 1:
            reports = _exchange_reports(_meet(meeting), meeting, own)
    except RuntimeError as problem:
        reason = str(problem).splitlines()[0][:120]
        found = (
            f"rank {meeting.rank} on {socket.gethostname()} did not reach all others"
            f" at {meeting.address}: {reason}"
        )
        advice = "a firewall, a wrong MASTER_ADDR, or ranks that never started"
        return [Row("rendezvous", found, False, advice), *check_ranks([own])]
    return check_ranks(reports) if meeting.rank == 0 else []


def _examine_this_rank(meeting: Rendezvous) -> RankReport:
    """All of the report that needs no other rank."""
    cuda = torch.cuda.is_available()
    if cuda:
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        device_name = torch.cuda.get_device_name()
        free, total = torch.cuda.mem_get_info()
        rate = product_rate(torch.device("cuda"), torch.bfloat16)
    else:
        device_name = "cpu"
        free, total = psutil.virtual_memory().available, 0
        rate = product_rate(torch.device("cpu"), torch.float32)
    writing = _try_writing()
    shm = Path("/dev/shm")
    return RankReport(
        rank=meeting.rank,
        host=os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        versions=_versions(cuda),
        device=device_name,
        devices=torch.cuda.device_count(),
        cores=cores_per_rank(),
        memory=free,
        used=max(total - free, 0),
        blind=not cuda and Path("/dev/nvidiactl").exists(),
        shm=shutil.disk_usage(shm).free if shm.is_dir() else 0,
        disk=shutil.disk_usage(RUNS if RUNS.exists() else Path.cwd()).free,
        flops=rate,
        wandb=logged_in(),
        busy_port=_busy_port(meeting),
        unwritable=writing.problem,
        write=writing.bytes_per_second,
    )


def _versions(cuda: bool) -> dict[str, str]:
    """Of Python, the packages that matter, and CUDA's libraries where there is a device."""
    versions = {"python": sys.version.split()[0], **installed_versions()}
    if cuda:
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _busy_port(meeting: Rendezvous) -> int:
    """The rendezvous' port if something holds it; 0 if it is free, or another rank's to look at."""
    if meeting.rank != 0 or not meeting.port:
        return 0
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun itself holds it
        return 0
    return 0 if _is_free(meeting.port) else meeting.port


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError, OverflowError):  # in use, or no port at all
        socket.create_server(("", port)).close()
        return True
    return False


class Writing(NamedTuple):
    """How writing to runs/ went."""

    problem: str  # empty: none
    bytes_per_second: float  # fsync included


def _try_writing() -> Writing:
    try:
        RUNS.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=RUNS, prefix=".doctor-") as file:
            began = time.perf_counter()
            file.write(os.urandom(1 << 20) * (_WRITE_SIZE >> 20))
            file.flush()
            os.fsync(file.fileno())
            return Writing("", _WRITE_SIZE / (time.perf_counter() - began))
    except OSError as problem:
        return Writing(f"{RUNS}: {problem.strerror} on {socket.gethostname()}", 0.0)


def _meet(meeting: Rendezvous) -> distributed.TCPStore:
    """A store on the first free port of rank 0's machine; the others try the ports in turn.

    Raises RuntimeError if there is none in time.
    """
    # The word by which the ranks of this doctor know each other's store from a stranger's.
    job, job_step = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_STEP_ID", "")
    word = f"doctor {job}.{job_step}"
    ports = range(meeting.port, meeting.port + _PORTS)
    deadline = time.monotonic() + _PATIENCE.total_seconds()
    if meeting.rank == 0:
        free_port = next(filter(_is_free, ports), 0)
        if not free_port:
            raise RuntimeError(f"ports {ports[0]} to {ports[-1]} are all in use")
        store = _open_store(meeting, free_port, is_server=True)
        store.set("word", word)
        return store
    while time.monotonic() < deadline:
        for port in ports:
            found = _store_at(meeting, port, word)
            if found is not None:
                return found
        time.sleep(0.5)
    raise RuntimeError(
        f"nobody answered on ports {ports[0]} to {ports[-1]} in {_PATIENCE.total_seconds():.0f} s"
    )


def _open_store(meeting: Rendezvous, port: int, is_server: bool) -> distributed.TCPStore:
    return distributed.TCPStore(
        meeting.address, port, meeting.world_size, is_server, _PATIENCE, wait_for_workers=False
    )


def _store_at(meeting: Rendezvous, port: int, word: str) -> distributed.TCPStore | None:
    """Rank 0's store, if it is the one that answers on this port.

    Tried in a thread: torch waits for ever for a stranger that is silent.
    """

    def connect() -> distributed.TCPStore | None:
        socket.create_connection((meeting.address, port), timeout=2).close()
        store = _open_store(meeting, port, is_server=False)
        return store if store.get("word") == word.encode() else None

    results = attempt(connect, 4).results
    return results[0] if results else None


def _exchange_reports(
    store: distributed.TCPStore, meeting: Rendezvous, own: RankReport
) -> list[RankReport]:
    """The reports of all ranks on rank 0, an empty list elsewhere.

    All look for one rank's file, and read their clocks at one moment.
    """
    marker = RUNS / f".doctor-shared-{uuid.uuid4().hex[:8]}"
    if meeting.rank == 0:
        with contextlib.suppress(OSError):
            marker.touch()
        # Where rank 0 cannot write a file, nobody need see it.
        store.set("marker", "." if own.unwritable else str(marker))
    own.shared = Path(store.get("marker").decode()).exists()
    barrier(store, meeting.world_size, "here", _PATIENCE.total_seconds(), meeting.rank)
    own.clock = time.time()
    try:
        own.all_reduce = _time_all_reduce(store, meeting)
    except RuntimeError as problem:
        own.all_reduce = str(problem).splitlines()[0][:200]
        own.all_reduce_works = False
    store.set(f"report {meeting.rank}", to_json(asdict(own)))
    if meeting.rank != 0:
        return []
    texts = store.multi_get([f"report {rank}" for rank in range(meeting.world_size)])
    reports = [RankReport(**json.loads(text)) for text in texts]
    with contextlib.suppress(OSError):
        marker.unlink()
    for report in reports:
        report.skew = report.clock - reports[0].clock
    return reports


def _time_all_reduce(store: distributed.TCPStore, meeting: Rendezvous) -> str:
    """The time for one number, and the bus bandwidth for many. Raises RuntimeError if it fails.

    Bus bandwidth: 2 (n - 1) / n of the bytes over n ranks, as NCCL's tests define it.
    """
    device, backend, many = "cpu", "gloo", 4 << 20
    if torch.cuda.is_available():
        device, backend, many = "cuda", "nccl", 64 << 20
    ranks = meeting.world_size
    # Otherwise NCCL's own thread aborts the process when a collective takes too long.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore("group", store),
        rank=meeting.rank,
        world_size=ranks,
        timeout=_PATIENCE,
    )
    latency = _seconds_per_all_reduce(torch.ones(1, device=device), times=20)
    seconds = _seconds_per_all_reduce(torch.ones(many, device=device), times=5)
    distributed.destroy_process_group()
    bandwidth = many * 4 * 2 * (ranks - 1) / ranks / seconds / 2**30
    return f"{latency * 1e6:,.0f} µs for one number, {bandwidth:.2f} GiB/s"


def _seconds_per_all_reduce(data: torch.Tensor, times: int) -> float:
    distributed.all_reduce(data)
    began = time.perf_counter()
    for _ in range(times):
        distributed.all_reduce(data)
    _ = float(data[0])  # waits for the device
    return (time.perf_counter() - began) / times
