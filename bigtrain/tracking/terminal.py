"""Progress on the terminal."""

import math
import time
from collections import deque
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from bigtrain.runs.events import EVENT_TEXTS
from bigtrain.runs.metrics_file import Record
from bigtrain.tracking.base import Tracker

_WIDTH = 40  # columns of the panel's bar, and losses in its trend
_TIMES = ("seconds", "blocked", "writing", "load_seconds", "check_seconds")  # details of events
_BARS = "▁▂▃▄▅▆▇█"


class Terminal(Tracker):
    """A live panel on a terminal; elsewhere a plain line every few seconds.

    Evaluations and events are a line each. `every`: seconds between two plain lines.
    """

    def __init__(self, steps: int, unit: str, console: Console, every: float = 5.0) -> None:
        self.steps = steps
        self.unit = unit  # of the rate: tokens or samples
        self.console = console
        self.every = every
        self.printed = -math.inf  # when the last plain line was, by the monotonic clock
        self.first: Record | None = None  # training line of this process
        self.record: Record | None = None  # the newest training line
        self.saved = "none yet"  # where the newest checkpoint is
        self.skipped = 0
        self.trend = deque[float](maxlen=_WIDTH)  # the last finite losses
        self.live: Live | None = None
        if console.is_terminal and not console.quiet:
            self.live = Live(get_renderable=self._panel, console=console)
            self.live.start()

    def log(self, record: Record) -> None:
        if record["kind"] == "train":
            self._log_step(record)
            return
        if record.get("event") == "checkpoint":
            self.saved = f"step {record['step']:,}"
        if record.get("event") != "nodes":
            self.console.print(_describe(record), highlight=False, markup=False)

    def _log_step(self, record: Record) -> None:
        self.record = record
        self.first = self.first or record
        self.skipped += not record["applied"]
        if self.live is not None:
            if math.isfinite(record["loss"]):
                self.trend.append(record["loss"])
            return
        now = time.monotonic()
        if now - self.printed >= self.every or record["step"] == self.steps:
            self.printed = now
            self.console.print(self._plain_line(record), highlight=False, markup=False)

    def _plain_line(self, record: Record) -> str:
        digits = len(str(self.steps))
        parts = [
            f"step {record['step']:>{digits}}/{self.steps}",
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.2e}",
            self._speed(record),
        ]
        if not record["applied"]:
            parts.append("SKIPPED")
        return "  ".join(parts)

    def _speed(self, record: Record) -> str:
        rate = record[f"{self.unit}_per_s"]
        memory = record["peak_memory_bytes"] / 2**30
        return f"{rate:,.0f} {self.unit}/s  mfu {record['mfu']:.1%}  {memory:.1f} GiB"

    def _panel(self) -> RenderableType:
        """Drawn by rich's own thread, so that training never waits for a terminal."""
        record, first = self.record, self.first
        if record is None or first is None:
            return "waiting for the first step …"
        step = record["step"]
        # Evaluations and checkpoints are part of the time that is left.
        seconds = (record["time"] - first["time"]) / max(step - first["step"], 1)
        left = timedelta(seconds=round(seconds * (self.steps - step)))
        kept = f"checkpoint {self.saved}"
        if self.skipped:
            kept += f"  [red]SKIPPED {self.skipped}[/]"
        table = Table.grid(padding=(0, 2))
        table.add_row("step", f"{step:,} of {self.steps:,}  {step / self.steps:.0%}  {left} left")
        table.add_row("", ProgressBar(self.steps, step, width=_WIDTH))
        table.add_row("loss", f"{record['loss']:.4f}  {_trend_bars(list(self.trend))}")
        table.add_row("speed", self._speed(record))
        table.add_row("", f"lr {record['lr']:.2e}  gradient norm {record['grad_norm']:.3g}")
        table.add_row("kept", kept)
        return table

    def close(self, summary: Record) -> None:
        if self.live is not None:
            self.live.stop()


def _describe(record: Record) -> str:
    """One line about an evaluation or an event."""
    title = "evaluation"
    if record["kind"] == "event":
        title = EVENT_TEXTS.get(record["event"], str(record["event"]))
    parts = [f"step {record['step']}", title]
    for name, value in record.items():
        if name in ("kind", "step", "event", "time") or value is None:
            continue
        if name in _TIMES:
            label = name.removesuffix("seconds").replace("_", " ")
            parts.append(f"{label} {value:.3f} s".replace("  ", " ").strip())
        else:
            parts.append(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")
    return "  ".join(parts)


def _trend_bars(losses: list[float]) -> str:
    """A bar for each loss, between the lowest and the highest of them."""
    low = min(losses, default=0.0)
    high = max(losses, default=1.0)
    spread = max(high - low, 1e-12)
    return "".join(_BARS[int(7 * (loss - low) / spread)] for loss in losses)


def console(as_json: bool = False, quiet: bool = False) -> Console:
    """Where a person reads: standard output, or standard error when a program reads the other."""
    return Console(stderr=as_json, soft_wrap=True, quiet=quiet)
