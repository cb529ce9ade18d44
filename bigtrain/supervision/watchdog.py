"""A watchdog in every rank: a hang ends within minutes, with its cause named.

Ranks tell each other how far they are through the store where they met, each over a connection of
its own: the store answers when collectives do not. All ranks enter the same phases in the same
order, so a count of them says which rank is behind.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch

from bigtrain.engine.base import Engine
from bigtrain.engine.launcher import is_first_on_machine
from bigtrain.errors import LOST_PEERS
from bigtrain.runs.events import Event
from bigtrain.tracking.base import TrackerGroup

Phase = Literal[
    "data",
    "numbers",
    "meeting",
    "forward",
    "backward",
    "logging",
    "update",
    "evaluation",
    "checkpoint",
    "profile",
    "end",
]
# hang_timeout "auto": so many seconds, or as long as so many of the last steps if that is more.
_AUTO_SECONDS = 600.0
_AUTO_STEPS = 50
# Times longer until the first step is done (building, compilation), for a rank's checkpoints and
# profiles, and at the end.
_SLOW_PHASE_FACTOR = 10
_RECENT_STEPS = 20  # that a rank's mean times are taken over
_STRAGGLER_FACTOR = 1.5  # a straggler's time on its own, in medians over the ranks
_MACHINES_EVERY = 30.0  # seconds between two events about how busy the machines are
_LEFT_ALONE_AFTER = 10.0  # seconds after SIGTERM without progress, while a rank is silent
_STORE_TIMEOUT = 5.0  # seconds that the store has to answer in
_EXIT_TIMEOUT = 60.0  # seconds after which the process ends even if its last report hangs


@dataclass
class RankPosition:
    """What a rank last wrote to the store; all zero for a rank that has written nothing."""

    posts: int = 0  # times that it has written
    step: int = 0  # that it is in, from 1 on
    phase: str = ""
    heartbeats: int = 0  # phases that it has entered
    busy: float = 0.0  # mean seconds per step without waiting for others; 0 until they are known
    machine: str = ""  # its name, from the first rank on it
    usage: dict[str, float] = field(default_factory=dict)  # of the machine, in percent

    def __str__(self) -> str:
        return f"step {self.step}: {self.phase}" if self.posts else ""


@dataclass
class Diagnosis:
    """Which ranks are at fault in a hang; all empty where the store is silent."""

    silent: list[int]  # they have written nothing new: stopped, dead or cut off
    behind: list[int]  # they have not come as far as the others
    places: list[str]  # by rank, "step 9: forward"; empty for one that has never written


class PendingEvent(NamedTuple):
    """An event that the loop is to log."""

    name: Event
    details: dict[str, Any]


class Attempt(NamedTuple):
    """What `attempt` started, and what came of it."""

    thread: threading.Thread
    results: list[Any]  # one; none if it failed or is not done


class Look(NamedTuple):
    """How far this rank and all ranks were at a moment."""

    time: float  # time.monotonic()
    heartbeats: int  # of this rank
    positions: list[RankPosition]  # empty if the store was silent


class Watchdog:
    """Ends this process with code 76 if it, or another rank, makes no progress for too long."""

    def __init__(self, engine: Engine, timeout: float | Literal["auto"]) -> None:
        """`timeout`: seconds without progress that mean a hang, or "auto"."""
        self.rank = engine.rank
        self.world_size = engine.world_size
        self.timeout = timeout
        # The last finished step, and what the loop has been doing since.
        self.step = 0
        self.phase = "start"
        self.heartbeats = 0  # phases entered
        self.last_progress = time.monotonic()  # when the phase was entered
        self.first_step_done = False
        # Found by the watchdog's thread, for the loop to log.
        self.pending_events: deque[PendingEvent] = deque()
        self._tracker = TrackerGroup()
        self._logs: Path | None = None
        # Seconds of the last steps, and those in which this rank did not wait for others.
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._busy_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._posts = 0  # times that this rank has written to the store
        self._slow_before: set[int] = set()  # ranks that were slow the last time
        self._named: set[int] = set()  # slow ranks that an event has named
        self._machines_reported = 0.0  # when
        self._store = _second_client() if self.world_size > 1 else None
        self._question: threading.Thread | None = None  # the last one that the store was asked
        shortest = _AUTO_SECONDS if timeout == "auto" else timeout
        self.interval = min(max(shortest / 20, 0.1), 5.0)  # seconds between two looks
        self._term = _TermSignal()
        self._asked_to_end: Look | None = None  # since SIGTERM, the last look
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def report_to(self, tracker: TrackerGroup, step: int, logs: Path) -> None:
        """From now on an event of a hang goes to `tracker`, and what NCCL was doing into `logs`.

        `step` is the last finished one.
        """
        self._tracker = tracker
        self._logs = logs
        self.step = step

    def enter(self, phase: Phase) -> None:
        """The loop begins `phase`; the other ranks know of it a moment later."""
        self.phase = phase
        self.last_progress = time.monotonic()
        self.heartbeats += 1

    def step_done(self, step: int, seconds: float) -> None:
        """A step took `seconds` of the host."""
        self.step = step
        self.first_step_done = True
        self._step_seconds.append(seconds)

    def was_busy(self, seconds: float) -> None:
        """So long this rank worked in the last finished step without waiting for others."""
        self._busy_seconds.append(seconds)

    def close(self) -> None:
        """Stop watching."""
        self._done.set()
        self._thread.join()
        self._term.close()

    @property
    def limit(self) -> float:
        """Seconds without progress that mean a hang."""
        if self.timeout == "auto":
            seconds = max(_AUTO_SECONDS, _AUTO_STEPS * _mean(self._step_seconds))
        else:
            seconds = self.timeout
        if not self.first_step_done or self.phase in ("checkpoint", "profile", "end"):
            seconds *= _SLOW_PHASE_FACTOR
        return seconds

    def _watch(self) -> None:
        try:
            while not self._over_after(self.interval):
                self._post()
                hangs = time.monotonic() - self.last_progress > self.limit
                if hangs or self._ask(lambda store: store.check(["alarm"])):
                    self._end()
                if self._term.received():
                    self._asked_to_end = self._look()
                if self._is_left_alone():
                    self._end()
                if self.rank == 0 and self._posts % 4 == 0:
                    self._look_at_all_ranks()
        except BaseException:  # a watchdog that has died would let the run hang
            traceback.print_exc()
            os._exit(LOST_PEERS)

    def _is_left_alone(self) -> bool:
        """Whether this rank, asked to end, waits in vain for another one that is gone.

        Its main thread may be inside a collective for ever, where Python cannot obey the signal.
        """
        before = self._asked_to_end
        if before is None or time.monotonic() - before.time < _LEFT_ALONE_AFTER:
            return False
        self._asked_to_end = after = self._look()
        if self.world_size == 1 or before.heartbeats != after.heartbeats:
            return False
        return not after.positions or bool(diagnose(before.positions, after.positions).silent)

    def _look(self) -> Look:
        return Look(time.monotonic(), self.heartbeats, self._positions())

    def _over_after(self, seconds: float) -> bool:
        """Wait; whether the run has ended within `seconds`.

        Time for which this process was suspended does not count as a lack of progress.
        """
        before = time.monotonic()
        over = self._done.wait(seconds)
        suspended = time.monotonic() - before - seconds
        if suspended > seconds + 1:
            self.last_progress += suspended
        return over

    def _post(self) -> None:
        """Write this rank's position to the store."""
        self._posts += 1
        position = RankPosition(self._posts, self.step + 1, self.phase, self.heartbeats)
        if len(self._busy_seconds) == _RECENT_STEPS:
            position.busy = _mean(self._busy_seconds)
        speaks_for_machine = is_first_on_machine(os.environ)

        def write(store: Any) -> None:
            if self.world_size > 1 and speaks_for_machine:
                # Here, where waiting has a limit: the driver of a broken GPU may never answer.
                position.machine, position.usage = _machine_usage()
            store.set(f"{self.rank}", json.dumps(asdict(position)))

        self._ask(write)

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """What the store answers; None where there is none, or it does not answer in time.

        Asked in a thread of its own: some questions have no time limit, and rank 0, which serves
        the store, may be what hangs.
        """
        if self._store is None:
            return None
        if self._question is not None and self._question.is_alive():
            return None
        asked = attempt(lambda: question(self._store), _STORE_TIMEOUT)
        self._question = asked.thread
        return asked.results[0] if asked.results else None

    def _positions(self) -> list[RankPosition]:
        """Each rank's last position; an empty list if the store is silent."""
        keys = [f"{rank}" for rank in range(self.world_size)]
        known = self._ask(lambda store: [key for key in keys if store.check([key])])
        if not known:
            return []
        texts = self._ask(lambda store: store.multi_get(known))
        if not texts:
            return []
        written = dict(zip(known, texts, strict=True))
        return [RankPosition(**json.loads(written.get(key, "{}"))) for key in keys]

    def _end(self) -> None:
        """Print stacks and a diagnosis; then exit, so that the launcher can start the run again."""
        silence = time.monotonic() - self.last_progress
        # Whatever of the following should hang too.
        last_resort = threading.Timer(_EXIT_TIMEOUT, os._exit, [LOST_PEERS])
        last_resort.daemon = True
        last_resort.start()
        self._ask(lambda store: store.set("alarm", f"{self.rank}"))
        self._print_stacks(silence)
        attempt(self._write_collectives, _STORE_TIMEOUT)
        before = self._positions()
        # All have heard of the alarm by then, and written where they are.
        for _ in range(3):
            time.sleep(self.interval)
            self._post()
        after = self._positions()
        diagnosis = diagnose(before, after)
        details = {
            **asdict(diagnosis),
            "seconds": round(silence, 1),
            "here": f"step {self.step + 1}: {self.phase}",
        }
        # The first rank that is not silent prints it. If the store is silent, all do.
        ranks = range(len(after or before))
        speaker = next((rank for rank in ranks if rank not in diagnosis.silent), self.rank)
        if self.rank == speaker:
            text = _describe(diagnosis, details["seconds"], details["here"], self.world_size)
            sys.stderr.write(f"bigtrain: {text}\n")
        sys.stderr.flush()
        if self.rank == 0:
            # In a thread of its own: what hangs may be where events are written.
            attempt(lambda: self._tracker.event(self.step, "hang", **details), _STORE_TIMEOUT)
            time.sleep(2 * self.interval)  # the others still ask the store
        os._exit(LOST_PEERS)

    def _print_stacks(self, silence: float) -> None:
        """The stacks of all threads, written at once so that ranks do not mix their lines."""
        title = f"bigtrain (rank {self.rank}): no progress for {silence:.1f} s; Python's stacks:\n"
        with tempfile.TemporaryFile() as stacks:
            faulthandler.dump_traceback(file=stacks, all_threads=True)
            stacks.seek(0)
            sys.stderr.write(title + stacks.read().decode(errors="replace"))

    def _write_collectives(self) -> None:
        """NCCL's last collectives (torch's Flight Recorder), where torch has NCCL.

        By itself torch writes them at NCCL's own time limit, long after this process has gone.
        """
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
        if dump is not None and self._logs is not None:
            self._logs.mkdir(exist_ok=True)
            (self._logs / f"collectives-rank{self.rank}.pickle").write_bytes(dump())

    def _look_at_all_ranks(self) -> None:
        """Leave events for the loop: how busy each machine is, and which ranks are slow."""
        positions = self._positions()
        machines = {position.machine: position.usage for position in positions if position.machine}
        # A single machine is W&B's own to watch.
        if len(machines) > 1 and time.monotonic() - self._machines_reported > _MACHINES_EVERY:
            self._machines_reported = time.monotonic()
            self.pending_events.append(PendingEvent("nodes", {"machines": machines}))
        busy = [position.busy for position in positions]
        if busy and all(busy):
            self._name_stragglers(busy)

    def _name_stragglers(self, busy: list[float]) -> None:
        """An event for each rank that is slow now, was slow the last time, and is not named yet."""
        slow = stragglers(busy)
        for rank in sorted((slow & self._slow_before) - self._named):
            details = {"rank": rank, "seconds": busy[rank], "usual": statistics.median_low(busy)}
            self.pending_events.append(PendingEvent("straggler", details))
        # A rank is named once, until it has been as fast as the others again.
        self._named = (self._named | self._slow_before) & slow
        self._slow_before = slow


class _TermSignal:
    """Whether SIGTERM has come, known even while the main thread runs none of Python's code."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._former = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)

    def received(self) -> bool:
        """True once for each time that it came."""
        with contextlib.suppress(BlockingIOError):
            return signal.SIGTERM in self._read.recv(4096)
        return False

    def close(self) -> None:
        signal.set_wakeup_fd(self._former)
        self._read.close()
        self._write.close()


def attempt(act: Callable[[], Any], seconds: float) -> Attempt:
    """Do in a thread what may fail or never end, and wait at most `seconds` for it."""
    results: list[Any] = []

    def do() -> None:
        with contextlib.suppress(OSError, RuntimeError):
            results.append(act())

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    thread.join(seconds)
    return Attempt(thread, results)


def diagnose(before: list[RankPosition], after: list[RankPosition]) -> Diagnosis:
    """Judge two looks at the positions of all ranks.

    Without a second look (rank 0, which serves the store, may have left) no rank counts as silent.
    """
    if not before:
        return Diagnosis([], [], [])
    silent: list[int] = []
    if after:
        pairs = zip(before, after, strict=True)
        silent = [rank for rank, (old, new) in enumerate(pairs) if old.posts == new.posts]
    newest = after or before
    heard = {
        rank: position.heartbeats for rank, position in enumerate(newest) if rank not in silent
    }
    furthest = max(heard.values(), default=0)
    behind = [rank for rank, heartbeats in heard.items() if heartbeats < furthest]
    return Diagnosis(silent, behind, [str(position) for position in newest])


def stragglers(busy: list[float]) -> set[int]:
    """Ranks that need much longer than the median. `busy`: by rank, seconds per step."""
    usual = statistics.median_low(busy)
    limit = max(_STRAGGLER_FACTOR * usual, usual + 0.001)
    return {rank for rank, seconds in enumerate(busy) if seconds > limit}


def _describe(diagnosis: Diagnosis, seconds: float, here: str, world_size: int) -> str:
    """The diagnosis for a person: a line per rank."""
    lines = [
        f"no progress for {seconds} s; leaving with {LOST_PEERS}; the same command resumes the run"
    ]
    if not diagnosis.places:
        lines.append(f"  this rank: {here}")
        if world_size > 1:
            lines.append("  rank 0, where the ranks met, does not answer: stopped, dead or cut off")
    for rank, place in enumerate(diagnosis.places):
        if rank in diagnosis.silent:
            last_seen = f"last seen at {place}" if place else "never seen"
            lines.append(f"  rank {rank}: {last_seen}  ← SILENT: stopped, dead or cut off")
        elif rank in diagnosis.behind:
            lines.append(f"  rank {rank}: {place}  ← behind the others")
        else:
            lines.append(f"  rank {rank}: {place}")
    return "\n".join(lines)


def _machine_usage() -> tuple[str, dict[str, float]]:
    """This machine's name, and how much of it is in use, in percent."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    usage = {"cpu": psutil.cpu_percent(), "memory": psutil.virtual_memory().percent}
    # Without nvidia-ml-py torch cannot ask, and says so in many ways.
    with contextlib.suppress(Exception):
        for device in range(torch.cuda.device_count()):
            # From the driver: a CUDA context on each device would cost the other ranks memory.
            used = torch.cuda.device_memory_used(device)
            total = torch.cuda.get_device_properties(device).total_memory
            utilization = float(torch.cuda.utilization(device))
            usage[f"gpu{device}_memory"] = 100 * used / total
            usage[f"gpu{device}"] = utilization
    return name, usage


def _mean(values: deque[float]) -> float:
    """The mean; 0 of nothing."""
    copied = list(values)  # the loop appends meanwhile
    return statistics.mean(copied) if copied else 0.0


def _second_client() -> Any:
    """A connection to the store where the ranks met that no collective uses.

    None if that is another kind of store than torch's TCPStore, or does not answer: this rank then
    watches itself alone.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if not isinstance(store, torch.distributed.TCPStore):
        return None
    wait = timedelta(seconds=_STORE_TIMEOUT)
    try:
        client = torch.distributed.TCPStore(
            store.host, store.port, None, False, wait, wait_for_workers=False
        )
    except RuntimeError:
        return None
    # torchrun keeps its store over restarts: an alarm from before must not ring again.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return torch.distributed.PrefixStore(f"watchdog {restarts}", client)
