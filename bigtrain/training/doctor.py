"""Is this machine, or this allocation, fit for a run? Every rank examines itself; rank 0 compares them."""

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import distributed
from torch.distributed.elastic.utils.store import barrier

from bigtrain.config.versions import installed_versions
from bigtrain.engine.flops import product_rate
from bigtrain.runs.directory import RUNS, to_json
from bigtrain.tracking.wandb_sync import logged_in
from bigtrain.training.watchdog import attempt

_SHM, _DISK, _SKEW = 1 << 30, 10 << 30, 2.0  # bytes free, bytes free, seconds apart
_SLOW = 0.7  # of the median matrix-multiply rate
_PATIENCE = timedelta(seconds=60)
Report = dict[str, Any]
Row = dict[str, Any]  # check, found, ok, advice


def examine() -> list[Row]:
    """All checks on all ranks: rows for a table on rank 0 (elsewhere only if something kept this rank from reporting)."""
    rank, ranks, address, port = _whereabouts()
    try:
        own = _this_rank(rank, port)
        reports = (
            [own] if ranks == 1 else _exchange(_meet(rank, ranks, address, port), rank, ranks, own)
        )
        return compare(reports) if rank == 0 else []
    except RuntimeError as problem:
        reason = str(problem).splitlines()[0][:120]
        found = (
            f"rank {rank} on {socket.gethostname()} did not reach all others at {address}: {reason}"
        )
        advice = "a firewall, a wrong MASTER_ADDR, or ranks that never started"
        return [_row("rendezvous", found, False, advice), *compare([own])]
    finally:
        if rank == 0:
            with contextlib.suppress(OSError):  # not empty, or it is not ours to remove
                RUNS.rmdir()


def compare(reports: list[Report]) -> list[Row]:
    """What the ranks found, side by side. A pure function, so that a rank may be made up."""
    first = reports[0]
    names = dict.fromkeys(name for report in reports for name in report["versions"])
    rows = [
        _same(
            reports,
            [r["versions"].get(n, "missing") for r in reports],
            n,
            f"the same {n} everywhere: ",
        )
        for n in names
    ]
    rows += [
        _same(
            reports,
            [r["device"] for r in reports],
            "device",
            "the same for every rank (nvidia-smi on that node): ",
        ),
        _same(
            reports,
            [f"{r['devices']}" for r in reports],
            "devices per node",
            "all of them (nvidia-smi -L): ",
        ),
        _least(
            reports, "memory free", "memory", 1 << 30, "end what else uses the device (nvidia-smi)"
        ),
        _least(
            reports,
            "/dev/shm free",
            "shm",
            _SHM,
            "rm what is left there; containers: --shm-size=8g; or data.workers=0",
        ),
        _least(
            reports,
            "disk free",
            "disk",
            _DISK,
            "another disk for runs/, or fewer checkpoints (train.keep_last)",
        ),
    ]
    shut = {
        r["rank"]: r["unwritable"] or "sees another runs/"
        for r in reports
        if r["unwritable"] or not r.get("shared", True)
    }
    advice = "start where every node may write to the same runs/"
    slowest = min(r["write"] for r in reports) / 2**20
    rows.append(
        _unless(
            shut, "run directory", f"{RUNS}/ is written at {slowest:,.0f} MiB/s or more", advice
        )
    )
    skews = {r["rank"]: f"{r['skew']:+.1f} s" for r in reports if abs(r.get("skew", 0.0)) > _SKEW}
    rows.append(
        _unless(skews, "clocks", f"within {_SKEW} s", "chronyc makestep (as root) on that node")
    )
    busy = {r["rank"]: f"{r['busy_port']} is in use" for r in reports if r["busy_port"]}
    rows.append(
        _unless(busy, "port", "free", "another MASTER_PORT, or end what holds it: ss -ltnp")
    )
    if "all_reduce" in first:
        found, works = first["all_reduce"]
        rows.append(_row("all-reduce", found, works, "NCCL_DEBUG=INFO says which network is tried"))
    taken = {
        r["rank"]: f"{r['used'] / 2**30:.0f} GiB of the device are in use"
        for r in reports
        if r["used"] > r["memory"] / 9
    }
    rows.append(
        _unless(
            taken,
            "device is ours",
            "nobody else's memory on it",
            "end what else uses it (nvidia-smi)",
        )
    )
    blind = {
        r["rank"]: f"{r['host']} has NVIDIA devices, and torch sees none"
        for r in reports
        if r["blind"]
    }
    rows.append(
        _unless(
            blind,
            "CUDA",
            "as it should be",
            "a CUDA build of torch, and a driver that fits: nvidia-smi",
        )
    )
    rates = {r["rank"]: r["flops"] / 1e12 for r in reports}
    usual = statistics.median_high(rates.values())
    slow = {
        rank: f"{rate:.2f} TFLOP/s, where {usual:.2f} are usual"
        for rank, rate in rates.items()
        if rate < _SLOW * usual
    }
    rows.append(
        _unless(
            slow,
            "matrix multiply",
            f"{usual:.2f} TFLOP/s per rank",
            "leave that node out: sbatch --exclude",
        )
    )
    said = "logged in" if first["wandb"] else "no key: runs are logged offline (wandb login)"
    return [*rows, _row("W&B", said, True)]


def _row(check: str, found: str, ok: bool, advice: str = "") -> Row:
    return {"check": check, "found": found, "ok": ok, "advice": "" if ok else advice}


def _unless(wrong: dict[int, str], check: str, otherwise: str, advice: str) -> Row:
    """A row that is red when any rank has something wrong."""
    named = "; ".join(f"rank {rank}: {what}" for rank, what in wrong.items())
    return _row(check, named or otherwise, not wrong, advice)


def _same(reports: list[Report], values: list[str], check: str, advice: str) -> Row:
    usual = statistics.mode(values)
    others = {
        r["rank"]: f"{v} on {r['host']}, not {usual}"
        for r, v in zip(reports, values, strict=True)
        if v != usual
    }
    return _unless(others, check, usual, advice + usual)


def _least(reports: list[Report], check: str, name: str, wanted: int, advice: str) -> Row:
    least = min(reports, key=lambda r: float(r[name]))
    found = f"{least[name] / 2**30:.1f} GiB" + (
        f" (rank {least['rank']} on {least['host']})" if len(reports) > 1 else ""
    )
    return _row(check, found, least[name] >= wanted, f"at least {wanted / 2**30:.0f} GiB: {advice}")


def _whereabouts() -> tuple[int, int, str, int]:
    """(rank, ranks, address, port) from torchrun's variables, else from Slurm's."""
    env = os.environ
    port = int(env.get("MASTER_PORT", 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), env.get("MASTER_ADDR", "127.0.0.1"), port
    if (
        "SLURM_STEP_NODELIST" not in env or env.get("SLURM_NTASKS", "1") == "1"
    ):  # a batch script itself is no step
        return 0, 1, "127.0.0.1", port
    address = env.get("MASTER_ADDR") or _first_address(env["SLURM_STEP_NODELIST"])
    return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), address, port


def _first_address(nodes: str) -> str:
    """The address of the first of Slurm's nodes, whose name need not be a host's; without scontrol where srun was called."""
    if not shutil.which("scontrol"):
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    ask = lambda *words: (
        subprocess.run(
            ["scontrol", "show", *words], capture_output=True, text=True, check=False
        ).stdout
    )  # noqa: E731
    name = (ask("hostnames", nodes).split() or [nodes])[0]
    return next(
        (
            word.partition("=")[2]
            for word in ask("node", name).split()
            if word.startswith("NodeAddr=")
        ),
        name,
    )


def _this_rank(rank: int, port: int) -> Report:
    cuda = torch.cuda.is_available()
    if cuda:
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        torch.cuda.set_device(local % torch.cuda.device_count())
    report: Report = {"rank": rank, "host": os.environ.get("SLURMD_NODENAME", socket.gethostname())}
    report["versions"] = {"python": sys.version.split()[0]} | installed_versions()
    report["versions"] |= (
        {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        if cuda
        else {}
    )
    report |= {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": torch.cuda.device_count(),
    }
    report["blind"] = not cuda and Path("/dev/nvidiactl").exists()
    free, total = torch.cuda.mem_get_info() if cuda else (psutil.virtual_memory().available, 0)
    report |= {"memory": free, "used": max(total - free, 0)}
    report["shm"] = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    agents = (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    )  # then torchrun itself holds the port
    report["busy_port"] = port if rank == 0 and port and not agents and not _is_free(port) else 0
    report["wandb"] = logged_in()
    report["flops"] = product_rate(
        torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    )
    report["disk"] = shutil.disk_usage(RUNS if RUNS.exists() else Path.cwd()).free
    return report | _try_writing()


def _is_free(port: int) -> bool:
    with contextlib.suppress(OSError, OverflowError):  # in use, or no port at all
        socket.create_server(("", port)).close()
        return True
    return False


def _try_writing(size: int = 64 << 20) -> Report:
    """Write speed in bytes per second, fsync included; or why nothing can be written."""
    try:
        RUNS.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=RUNS, prefix=".doctor-") as file:
            began = time.perf_counter()
            file.write(os.urandom(1 << 20) * (size >> 20))
            file.flush()
            os.fsync(file.fileno())
            return {"unwritable": "", "write": size / (time.perf_counter() - began)}
    except OSError as problem:
        return {"unwritable": f"{RUNS}: {problem.strerror} on {socket.gethostname()}", "write": 0.0}


def _meet(rank: int, ranks: int, address: str, port: int) -> distributed.TCPStore:
    """A store on the first port from `port` on that is free on rank 0's machine; the others try them in turn."""
    word = f"bigtrain doctor {os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_STEP_ID', '')}"
    deadline = time.monotonic() + _PATIENCE.total_seconds()
    candidates = range(port, port + 8)
    if rank == 0:
        free = next(filter(_is_free, candidates), 0)
        if not free:
            raise RuntimeError(f"ports {candidates[0]} to {candidates[-1]} are all in use")
        store = distributed.TCPStore(address, free, ranks, True, _PATIENCE, wait_for_workers=False)
        store.set("word", word)
        return store
    while time.monotonic() < deadline:
        for candidate in candidates:
            if (found := _store_at(address, candidate, ranks, word)) is not None:
                return found
        time.sleep(0.5)
    raise RuntimeError(
        f"nobody answered on ports {candidates[0]} to {candidates[-1]} in {_PATIENCE.total_seconds():.0f} s"
    )


def _store_at(address: str, port: int, ranks: int, word: str) -> distributed.TCPStore | None:
    """Rank 0's store, if it is the one that answers there. In a thread: torch waits for ever for a stranger that is silent."""

    def connect() -> distributed.TCPStore | None:
        socket.create_connection((address, port), timeout=2).close()
        store = distributed.TCPStore(address, port, ranks, False, _PATIENCE, wait_for_workers=False)
        return store if store.get("word") == word.encode() else None

    _, found = attempt(connect, 4)
    return found[0] if found else None


def _exchange(store: distributed.TCPStore, rank: int, ranks: int, own: Report) -> list[Report]:
    """Every rank's report; clocks are read at one moment, and one rank's file is looked for by all."""
    marker = RUNS / f".doctor-shared-{uuid.uuid4().hex[:8]}"
    if rank == 0:
        with contextlib.suppress(OSError):
            marker.touch()
        store.set(
            "marker", "." if own["unwritable"] else str(marker)
        )  # where there is none, nobody need see it
    own["shared"] = Path(store.get("marker").decode()).exists()
    barrier(store, ranks, "here", _PATIENCE.total_seconds(), rank)
    own["clock"] = time.time()
    own["all_reduce"] = _all_reduce(store, rank, ranks)
    store.set(f"report {rank}", to_json(own))
    if rank != 0:
        return []
    reports = [json.loads(text) for text in store.multi_get([f"report {r}" for r in range(ranks)])]
    with contextlib.suppress(OSError):
        marker.unlink()
    return [report | {"skew": report["clock"] - reports[0]["clock"]} for report in reports]


def _all_reduce(store: distributed.TCPStore, rank: int, ranks: int) -> tuple[str, bool]:
    """What one number takes, and many (bus bandwidth: 2(n-1)/n of the bytes, as NCCL's tests define it); whether it works."""
    device, backend, many = (
        ("cuda", "nccl", 64 << 20) if torch.cuda.is_available() else ("cpu", "gloo", 4 << 20)
    )
    try:
        group = distributed.PrefixStore("group", store)
        distributed.init_process_group(
            backend, store=group, rank=rank, world_size=ranks, timeout=_PATIENCE
        )
        seconds = []
        for size, times in ((1, 20), (many, 5)):
            data = torch.ones(size, device=device)
            distributed.all_reduce(data)
            began = time.perf_counter()
            for _ in range(times):
                distributed.all_reduce(data)
            _ = float(data[0])  # waits
            seconds.append((time.perf_counter() - began) / times)
        distributed.destroy_process_group()
        rate = many * 4 * 2 * (ranks - 1) / ranks / seconds[1] / 2**30
        return f"{seconds[0] * 1e6:,.0f} µs for one number, {rate:.2f} GiB/s", True
    except RuntimeError as problem:
        return str(problem).splitlines()[0][:200], False
