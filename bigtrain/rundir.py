"""Where a run's files are, and the files that come with bigtrain.

The run directory is the source of truth: everything a later command shows is read back from here.
"""

import contextlib
import json
import math
import os
import socket
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

from bigtrain.errors import RequestError

RUNS = Path("runs")
_OTHER = b'{"kind": "e'  # how a line of metrics.jsonl begins that is an event or an evaluation
_guards: dict[Path, Any] = {}  # of the runs that this process owns: a FileLock each


def asset(folder: str, name: str) -> Path:
    """A shipped file: beside the package in a checkout, inside it once installed."""
    here = Path(__file__).parent
    for root in (here, here.parent):
        if (path := root / folder / name).is_file():
            return path
    raise FileNotFoundError(f"{folder}/{name} is missing from this installation of bigtrain")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader understands: a number that is not finite becomes null."""

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(clean(value), indent=indent)


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file or none of it: a reader sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class RunDir:
    """The files of one run below `runs/NAME`."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.recipe, self.effective = path / "recipe.yaml", path / "effective.json"
        self.metrics, self.summary = path / "metrics.jsonl", path / "summary.json"
        self.checkpoints, self.export, self.logs = path / "checkpoints", path / "export", path / "logs"

    def write_json(self, path: Path, value: Any) -> None:
        write_atomic(path, to_json(value, indent=2) + "\n")


def take_ownership(run: RunDir) -> None:
    """Write who runs this run into `runs/NAME/lock`; a dead owner's lock is taken over.

    Raises RequestError, and writes nothing, when the owner lives, or may live on another host.
    """
    from filelock import FileLock  # here, as psutil below: an error about a recipe is said a tenth sooner

    lock = run.path / "lock"
    me = {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot_id(), "started": _started(os.getpid())}
    me["job"] = os.environ.get("SLURM_JOB_ID")
    guard = FileLock(run.path / ".lock.guard")  # the kernel's, while we live: sees through containers on one host
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


def run_directory(name: str, fresh: bool = False) -> RunDir:
    """`runs/NAME`, or with `fresh` the first of NAME, NAME-2, NAME-3 … that does not exist."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(RunDir(RUNS / each) for each in names if not (fresh and (RUNS / each).exists()))


def find_run(ref: str, submitted: bool = False) -> RunDir:
    """The run that `ref` (a name below runs/, or a directory) stands for; with `submitted` one that is only queued counts.

    RequestError if there is none.
    """
    for path in (Path(ref), RUNS / ref):
        if (path / "recipe.yaml").is_file() or (submitted and (path / "jobs.jsonl").is_file()):
            return RunDir(path)
    known = sorted(path.parent.name for path in RUNS.glob("*/recipe.yaml"))
    raise RequestError(
        f"no run {ref!r}: no recipe.yaml in {ref} or {RUNS / ref}",
        f"one of: {', '.join(known)}" if known else "a run directory (there is none below runs/ yet)",
        "bigtrain train RECIPE",
    )


def read_metrics(path: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, of one kind or all; a last line cut short by a crash is left out."""
    start = f'{{"kind": "{kind}"' if kind else "{"
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from records(line for line in file if line.startswith(start))


def records(lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    """The lines that are a JSON object each; others are left out."""
    for line in lines:
        with contextlib.suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                yield record


def read_columns(path: Path, names: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The training lines as numpy arrays of one length (name → float64 or int64), and the other lines as records.

    Absent and null become NaN (0 in int64). Lines that are not whole are left out. A hundred thousand lines take a
    fifth of a second: training lines go to pyarrow in one piece, which the few others are cut out of.
    """
    data = path.read_bytes() if path.is_file() else b""
    first, *rest = (b"\n" + data).split(b"\n" + _OTHER)
    parted = [piece.partition(b"\n") for piece in rest]  # the rest of such a line, and the training lines after it
    others = records(_OTHER + line for line, _, _ in parted)
    return _columns(b"\n".join([first, *(lines for _, _, lines in parted)]), names), list(others)


def _columns(lines: bytes, names: dict[str, str]) -> dict[str, Any]:
    import numpy as np
    import pyarrow as pa
    from pyarrow import json as arrow

    schema = pa.schema([(name, pa.float64() if of == "float64" else pa.int64()) for name, of in names.items()])
    options = arrow.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        table = arrow.read_json(pa.BufferReader(lines), parse_options=options) if lines.strip() else schema.empty_table()
    except pa.ArrowInvalid:  # a line that is not whole, or not text, or none of ours: leave such lines out
        whole = [line for line in lines.split(b"\n") if line.startswith(b'{"kind": "train"') and list(records([line]))]
        if len(joined := b"\n".join(whole)) >= len(lines.strip()):
            raise
        return _columns(joined, names)
    filled = {name: table[name].fill_null(float("nan") if of == "float64" else 0) for name, of in names.items()}
    return {name: np.asarray(column) for name, column in filled.items()}
