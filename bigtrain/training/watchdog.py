"""A watchdog in every rank: a hang ends within minutes, with the cause named, instead of burning hours.

Ranks tell each other how far they are through a client of their own at the store where they met: it answers when
collectives do not. Every rank passes the same places in the same order, so a count of them says who is behind.
"""

import contextlib
import faulthandler
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import psutil
import torch

from bigtrain.engine.base import Engine
from bigtrain.errors import LOST_PEERS
from bigtrain.runs.events import Event

Place = Literal[
    "data", "meeting", "forward", "backward", "update", "evaluation", "checkpoint", "end"
]
_SHORTEST, _STEPS = 600.0, 50  # `auto`: seconds, or as many of the last steps
_PATIENCE = 10  # times longer until the first step is done (building, compilation), for checkpoints and at the end
_SLOW = 1.5  # a straggler's forward passes, in medians over the ranks
_RECENT = 20  # steps
_MACHINES = 30.0  # seconds between two looks at how busy the machines are
_ANSWER = 5.0  # seconds that the store has to answer in


class Watchdog:
    """Ends this process with code 76 when it makes no progress, or when another rank says that nobody does."""

    def __init__(self, engine: Engine, timeout: float | Literal["auto"]) -> None:
        """`report(event, **details)`, once it is set, writes an event: on rank 0, while its main thread is stuck."""
        self.rank, self.ranks, self.timeout = engine.rank, engine.world_size, timeout
        self.report: Callable[..., None] = lambda event, **details: None
        self.step, self.place, self.passed, self.first = 0, "start", 0, True
        self.since, self.news = time.monotonic(), list[tuple[Event, dict[str, Any]]]()
        self._seconds, self._busy = deque[float](maxlen=_RECENT), deque[float](maxlen=_RECENT)
        self._posts, self._slow_before, self._named = 0, set[int](), set[int]()
        self._told = 0.0  # when of the machines last
        self._store = _second_client() if self.ranks > 1 else None
        self._asking: threading.Thread | None = None
        shortest = _SHORTEST if timeout == "auto" else timeout
        self.interval = min(max(shortest / 20, 0.1), 5.0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def at(self, place: Place) -> None:
        """The loop is about to do this; where it stands is known to the others a moment later."""
        self.place, self.since = place, time.monotonic()
        self.passed += 1

    def stepped(self, step: int, seconds: float, busy: float) -> None:
        """A step is over: it took `seconds`, of which this rank needed `busy` without waiting for others."""
        self.step, self.first = step, False
        self._seconds.append(seconds)
        self._busy.append(busy)

    def close(self) -> None:
        self._done.set()
        self._thread.join()

    @property
    def limit(self) -> float:
        """Seconds without progress that mean a hang."""
        usual = (
            max(_SHORTEST, _STEPS * _mean(self._seconds))
            if self.timeout == "auto"
            else self.timeout
        )
        return usual * (_PATIENCE if self.first or self.place in ("checkpoint", "end") else 1)

    def _watch(self) -> None:
        try:
            while not self._over_after(self.interval):
                self._post()
                if time.monotonic() - self.since > self.limit or self._ask(
                    lambda store: store.check(["alarm"])
                ):
                    self._end()
                if self.rank == 0 and self._posts % 4 == 0:
                    self._look_for_stragglers()
        except BaseException:  # a watchdog that has died would let the run hang
            traceback.print_exc()
            os._exit(LOST_PEERS)

    def _over_after(self, seconds: float) -> bool:
        """Whether the run ends within `seconds`; time that this process was suspended for does not count."""
        before = time.monotonic()
        over = self._done.wait(seconds)
        asleep = time.monotonic() - before - seconds
        if asleep > seconds + 1:
            self.since += asleep
        return over

    def _post(self) -> None:
        self._posts += 1
        where = {
            "posts": self._posts,
            "step": self.step + 1,
            "place": self.place,
            "passed": self.passed,
        }
        where["busy"] = _mean(self._busy) if len(self._busy) == _RECENT else 0.0
        speaks = self.ranks > 1 and os.environ.get("LOCAL_RANK", "0") == "0"
        # Within the question, which is given up in time: the driver of a broken GPU may never answer.
        self._ask(
            lambda store: store.set(
                f"{self.rank}", json.dumps(where | ({"machine": _machine()} if speaks else {}))
            )
        )

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """What the store answers; None where there is none, or where it does not answer soon.

        Asked in a thread of its own: some questions have no time limit, and rank 0, which serves the store, may be what hangs.
        """
        if self._store is None or (self._asking is not None and self._asking.is_alive()):
            return None
        self._asking, answers = attempt(lambda: question(self._store), _ANSWER)
        return answers[0] if answers else None

    def _positions(self) -> list[dict[str, Any]]:
        """Where each rank said last that it was: an empty dictionary for one that never did, nothing if the store is silent."""
        keys = [f"{rank}" for rank in range(self.ranks)]
        known = self._ask(lambda store: [key for key in keys if store.check([key])])
        texts = self._ask(lambda store: store.multi_get(known)) if known else None
        said = dict(zip(known, texts, strict=True)) if texts else {}
        return [json.loads(said.get(key, "{}")) for key in keys] if said else []

    def _end(self) -> None:
        """Stacks, who is silent and who is behind; then out, so that whoever started us can start us again."""
        silence = time.monotonic() - self.since
        last = threading.Timer(
            60, os._exit, [LOST_PEERS]
        )  # whatever of the following should hang too
        last.daemon = True
        last.start()
        self._ask(lambda store: store.set("alarm", f"{self.rank}"))
        with (
            tempfile.TemporaryFile() as stacks
        ):  # written at once, so that ranks do not mix their lines
            faulthandler.dump_traceback(file=stacks, all_threads=True)
            stacks.seek(0)
            head = (
                f"bigtrain (rank {self.rank}): no progress for {silence:.1f} s; Python's stacks:\n"
            )
            sys.stderr.write(head + stacks.read().decode(errors="replace"))
        before = self._positions()
        for _ in range(3):  # all have heard of the alarm by then, and said where they are
            time.sleep(self.interval)
            self._post()
        after = self._positions() or before  # rank 0, which serves the store, may have left already
        details = diagnose(before, after) | {
            "seconds": round(silence, 1),
            "here": f"step {self.step + 1}: {self.place}",
        }
        # Rank 0 serves the store: where it is silent, everyone says so.
        if self.rank == next(
            (rank for rank in range(len(after)) if rank not in details["silent"]), self.rank
        ):
            sys.stderr.write(f"bigtrain: {_verdict(details, self.ranks)}\n")
        sys.stderr.flush()
        if self.rank == 0:  # in a thread of its own: what hangs may be where events are written
            attempt(lambda: self.report("hang", **details), _ANSWER)
            time.sleep(2 * self.interval)  # the others have questions to the store
        os._exit(LOST_PEERS)

    def _look_for_stragglers(self) -> None:
        """Left in `news` for the loop: ranks that were slow now and the last time; and how busy each machine is."""
        positions = self._positions()
        machines = dict(position["machine"] for position in positions if "machine" in position)
        if (
            len(machines) > 1 and time.monotonic() - self._told > _MACHINES
        ):  # a single one is W&B's own to watch
            self._told = time.monotonic()
            self.news.append(("nodes", {"machines": machines}))
        busy = [position.get("busy", 0.0) for position in positions]
        if not busy or not all(busy):
            return
        usual = statistics.median_low(busy)
        slow = {
            rank for rank, seconds in enumerate(busy) if seconds > max(_SLOW * usual, usual + 0.001)
        }
        for rank in sorted((slow & self._slow_before) - self._named):
            self.news.append(("straggler", {"rank": rank, "seconds": busy[rank], "usual": usual}))
        self._named = (
            self._named | self._slow_before
        ) & slow  # named once, until it has been as fast as the others
        self._slow_before = slow


def attempt(act: Callable[[], Any], seconds: float) -> tuple[threading.Thread, list[Any]]:
    """Do in a thread what may fail, or take for ever, and wait so long for it: the thread, and what came of it, if anything."""
    results: list[Any] = []

    def do() -> None:
        with contextlib.suppress(OSError, RuntimeError):
            results.append(act())

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    thread.join(seconds)
    return thread, results


def _machine() -> tuple[str, dict[str, float]]:
    """This machine's name, and how much of it is in use, in percent."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    used = {"cpu": psutil.cpu_percent(), "memory": psutil.virtual_memory().percent}
    with contextlib.suppress(
        Exception
    ):  # without nvidia-ml-py torch cannot ask, and says so in many ways
        for device in range(torch.cuda.device_count()):
            # from the driver, and not from the device: a context on each would cost the other ranks memory
            memory = (
                100
                * torch.cuda.device_memory_used(device)
                / torch.cuda.get_device_properties(device).total_memory
            )
            used |= {
                f"gpu{device}_memory": memory,
                f"gpu{device}": float(torch.cuda.utilization(device)),
            }
    return name, used


def _mean(values: deque[float]) -> float:
    return (
        statistics.mean(copied) if (copied := list(values)) else 0.0
    )  # the loop appends meanwhile


def diagnose(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """From what the ranks said twice: who says nothing new, and who of the others has not come as far."""
    if not before or not after:
        return {"silent": [], "behind": [], "places": []}
    pairs = enumerate(zip(before, after, strict=True))
    silent = (
        []
        if before is after
        else [rank for rank, (old, new) in pairs if old.get("posts") == new.get("posts")]
    )
    passed = {rank: said.get("passed", 0) for rank, said in enumerate(after) if rank not in silent}
    behind = [rank for rank, places in passed.items() if places < max(passed.values())]
    return {
        "silent": silent,
        "behind": behind,
        "places": [f"step {p['step']}: {p['place']}" if p else "" for p in after],
    }


def _verdict(found: dict[str, Any], ranks: int) -> str:
    lines = [
        f"no progress for {found['seconds']} s; leaving with {LOST_PEERS}, and the same command goes on"
    ]
    if not found["places"]:
        lines.append(f"  this rank: {found['here']}")
        lines += ["  rank 0, where the ranks met, does not answer: stopped, dead or cut off"] * (
            ranks > 1
        )
    for rank, place in enumerate(found["places"]):
        if rank in found["silent"]:
            heard = f"last heard of at {place}" if place else "never heard of"
            lines.append(f"  rank {rank}: {heard}  ← SILENT: stopped, dead or cut off")
        else:
            lines.append(
                f"  rank {rank}: {place}{'  ← behind the others' if rank in found['behind'] else ''}"
            )
    return "\n".join(lines)


def _second_client() -> Any:
    """The store where the ranks met, through a connection that no collective uses; None for another kind of store."""
    store = torch.distributed.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if not isinstance(store, torch.distributed.TCPStore):
        return None
    wait = timedelta(seconds=_ANSWER)
    try:
        client = torch.distributed.TCPStore(
            store.host, store.port, None, False, wait, wait_for_workers=False
        )
    except RuntimeError:
        return None  # this rank then watches itself alone
    # torchrun keeps its store over restarts, and an alarm of the last life must not ring in this one.
    return torch.distributed.PrefixStore(
        f"watchdog {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client
    )
