"""What the doctor makes of the ranks' reports: pure functions, so that a report may be made up."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bigtrain.engine.plan import CORES_PER_GPU
from bigtrain.runs.directory import RUNS

_MEMORY_NEEDED = 1 << 30  # bytes free on each device, or in main memory without one
_SHM_NEEDED = 1 << 30  # bytes free in /dev/shm
_DISK_NEEDED = 10 << 30  # bytes free where runs are written
_CLOCK_SKEW = 2.0  # seconds apart from rank 0
_SLOW_FRACTION = 0.7  # of the median matrix-multiply rate
_FOREIGN_MEMORY = 9  # a device of which more than one such part is in use is not ours alone


@dataclass
class RankReport:
    """What one rank found out about its machine and its device."""

    rank: int
    host: str
    versions: dict[str, str]
    device: str
    devices: int  # CUDA devices that torch sees on this machine
    memory: float  # bytes free
    used: float  # bytes of the device in use
    blind: bool  # there are NVIDIA devices, and torch sees none
    shm: float  # bytes free in /dev/shm
    disk: float  # bytes free for runs
    flops: float  # of matrix multiplication, per second
    wandb: bool  # logged in
    cores: int = 0  # of the processor, for this rank
    busy_port: int = 0  # the rendezvous' port, if something else holds it
    unwritable: str = ""  # why runs/ cannot be written
    write: float = 0.0  # bytes per second, into runs/
    # Only known where there are several ranks:
    shared: bool = True  # this rank sees rank 0's files in runs/
    clock: float = 0.0  # time.time() at a moment that all ranks share
    skew: float = 0.0  # seconds that its clock is ahead of rank 0's
    all_reduce: str = ""  # its latency and bandwidth, or why it fails
    all_reduce_works: bool = True


@dataclass
class Row:
    """A line of the doctor's table."""

    check: str
    found: str
    ok: bool
    advice: str = ""  # only where it is not ok


def check_ranks(reports: list[RankReport]) -> list[Row]:
    """All checks of all ranks' reports, in the order of ranks."""
    rows = _check_versions(reports)
    for check in CHECKS:
        row = check(reports)
        if row is not None:
            rows.append(row)
    return rows


def make_row(check: str, found: str, ok: bool, advice: str) -> Row:
    """A row that gives advice only where it is needed."""
    return Row(check, found, ok, "" if ok else advice)


def _row_of_problems(check: str, problems: dict[int, str], otherwise: str, advice: str) -> Row:
    """A row that is not ok if any rank has a problem; `otherwise`: what it says without any."""
    named = "; ".join(f"rank {rank}: {problem}" for rank, problem in problems.items())
    return make_row(check, named or otherwise, not problems, advice)


def _row_of_same(check: str, reports: list[RankReport], values: list[str], advice: str) -> Row:
    """A row that is not ok unless all ranks have the same value. `values`: by report."""
    usual = statistics.mode(values)
    others = {
        report.rank: f"{value} on {report.host}, not {usual}"
        for report, value in zip(reports, values, strict=True)
        if value != usual
    }
    return _row_of_problems(check, others, usual, advice + usual)


def _row_of_least(
    check: str, reports: list[RankReport], amounts: list[float], needed: int, advice: str
) -> Row:
    """A row about the rank that has the least of something. `amounts`: bytes, by report."""
    least = min(amounts)
    found = f"{least / 2**30:.1f} GiB"
    if len(reports) > 1:
        report = reports[amounts.index(least)]
        found += f" (rank {report.rank} on {report.host})"
    return make_row(check, found, least >= needed, f"at least {needed / 2**30:.0f} GiB: {advice}")


def _check_versions(reports: list[RankReport]) -> list[Row]:
    """A row per package that any rank has, in the order of the first report."""
    names: dict[str, None] = {}
    for report in reports:
        names.update(dict.fromkeys(report.versions))
    rows = []
    for name in names:
        versions = [report.versions.get(name, "missing") for report in reports]
        rows.append(_row_of_same(name, reports, versions, f"the same {name} everywhere: "))
    return rows


def _check_device(reports: list[RankReport]) -> Row:
    devices = [report.device for report in reports]
    advice = "the same for every rank (nvidia-smi on that node): "
    return _row_of_same("device", reports, devices, advice)


def _check_device_count(reports: list[RankReport]) -> Row:
    counts = [f"{report.devices}" for report in reports]
    return _row_of_same("devices per node", reports, counts, "all of them (nvidia-smi -L): ")


def _check_cores(reports: list[RankReport]) -> Row | None:
    """None where there are no GPUs to keep busy."""
    fewest = min(report.cores for report in reports)
    if not reports[0].devices:
        return None
    advice = "slurm.cpus_per_gpu=8: Python, autograd, NCCL, checkpoints and data workers share them"
    return make_row("cores per rank", f"{fewest}", fewest >= CORES_PER_GPU, advice)


def _check_memory(reports: list[RankReport]) -> Row:
    free = [report.memory for report in reports]
    advice = "end what else uses the device (nvidia-smi)"
    return _row_of_least("memory free", reports, free, _MEMORY_NEEDED, advice)


def _check_shm(reports: list[RankReport]) -> Row:
    free = [report.shm for report in reports]
    advice = "rm what is left there; containers: --shm-size=8g; or data.workers=0"
    return _row_of_least("/dev/shm free", reports, free, _SHM_NEEDED, advice)


def _check_disk(reports: list[RankReport]) -> Row:
    free = [report.disk for report in reports]
    advice = "another disk for runs/, or fewer checkpoints (train.keep_last)"
    return _row_of_least("disk free", reports, free, _DISK_NEEDED, advice)


def _check_run_directory(reports: list[RankReport]) -> Row:
    problems = {}
    for report in reports:
        if report.unwritable:
            problems[report.rank] = report.unwritable
        elif not report.shared:
            problems[report.rank] = "sees another runs/"
    slowest = min(report.write for report in reports) / 2**20
    return _row_of_problems(
        "run directory",
        problems,
        f"{RUNS}/ is written at {slowest:,.0f} MiB/s or more",
        "start where every node may write to the same runs/",
    )


def _check_clocks(reports: list[RankReport]) -> Row:
    skews = {
        report.rank: f"{report.skew:+.1f} s" for report in reports if abs(report.skew) > _CLOCK_SKEW
    }
    advice = "chronyc makestep (as root) on that node"
    return _row_of_problems("clocks", skews, f"within {_CLOCK_SKEW} s", advice)


def _check_port(reports: list[RankReport]) -> Row:
    busy = {report.rank: f"{report.busy_port} is in use" for report in reports if report.busy_port}
    advice = "another MASTER_PORT, or end what holds it: ss -ltnp"
    return _row_of_problems("port", busy, "free", advice)


def _check_all_reduce(reports: list[RankReport]) -> Row | None:
    """None for a rank alone."""
    first = reports[0]
    if not first.all_reduce:
        return None
    advice = "NCCL_DEBUG=INFO says which network is tried"
    return make_row("all-reduce", first.all_reduce, first.all_reduce_works, advice)


def _check_device_is_ours(reports: list[RankReport]) -> Row:
    problems = {
        report.rank: f"{report.used / 2**30:.0f} GiB of the device are in use"
        for report in reports
        if report.used > report.memory / _FOREIGN_MEMORY
    }
    advice = "end what else uses it (nvidia-smi)"
    return _row_of_problems("device is ours", problems, "nobody else's memory on it", advice)


def _check_cuda(reports: list[RankReport]) -> Row:
    problems = {
        report.rank: f"{report.host} has NVIDIA devices, and torch sees none"
        for report in reports
        if report.blind
    }
    advice = "a CUDA build of torch, and a driver that fits: nvidia-smi"
    return _row_of_problems("CUDA", problems, "as it should be", advice)


def _check_matrix_multiply(reports: list[RankReport]) -> Row:
    usual = statistics.median_high(report.flops for report in reports)
    slow = {
        report.rank: f"{report.flops / 1e12:.2f} TFLOP/s, where {usual / 1e12:.2f} are usual"
        for report in reports
        if report.flops < _SLOW_FRACTION * usual
    }
    return _row_of_problems(
        "matrix multiply",
        slow,
        f"{usual / 1e12:.2f} TFLOP/s per rank",
        "leave that node out: sbatch --exclude",
    )


def _check_wandb(reports: list[RankReport]) -> Row:
    """For information: without a key, runs are uploaded later."""
    if reports[0].wandb:
        return Row("W&B", "logged in", True)
    return Row("W&B", "no key: runs are logged offline (wandb login)", True)


# After the versions, a row each; in the order of the table.
CHECKS: list[Callable[[list[RankReport]], Row | None]] = [
    _check_device,
    _check_device_count,
    _check_cores,
    _check_memory,
    _check_shm,
    _check_disk,
    _check_run_directory,
    _check_clocks,
    _check_port,
    _check_all_reduce,
    _check_device_is_ours,
    _check_cuda,
    _check_matrix_multiply,
    _check_wandb,
]
