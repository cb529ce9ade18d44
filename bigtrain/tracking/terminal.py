"""Progress on the terminal."""

import math
import time
from collections import deque
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from bigtrain.runs.metrics_file import Record
from bigtrain.tracking.base import Tracker, line_of

_TREND = 40  # columns of the panel's bar, and losses of its trend


class Terminal(Tracker):
    """A live panel on a terminal; elsewhere a plain line every few seconds. Evaluations and events are a line each."""

    def __init__(self, steps: int, unit: str, console: Console, every: float = 5.0) -> None:
        self.steps, self.unit, self.console, self.every = steps, unit, console, every
        self.last, self.began = (
            -math.inf,
            (0, 0.0),
        )  # when a line was printed last; the first step seen, and when
        self.record: Record = {}
        self.saved, self.skipped = "none yet", 0
        self.trend = deque[float](maxlen=_TREND)
        self.live = (
            Live(get_renderable=self._panel, console=console)
            if console.is_terminal and not console.quiet
            else None
        )
        if self.live is not None:
            self.live.start()

    def log(self, record: Record) -> None:
        if record["kind"] != "train":
            self.saved = (
                f"step {record['step']:,}" if record.get("event") == "checkpoint" else self.saved
            )
            if record.get("event") != "nodes":
                self.console.print(line_of(record), highlight=False, markup=False)
            return
        self.record, self.skipped = record, self.skipped + (not record["applied"])
        self.began = self.began if self.began[0] else (record["step"], record["time"])
        if self.live is None and (
            time.monotonic() - self.last >= self.every or record["step"] == self.steps
        ):
            self.last = time.monotonic()
            text = (
                f"step {record['step']:>{len(str(self.steps))}}/{self.steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}"
                f"  {self._speed()}" + ("" if record["applied"] else "  SKIPPED")
            )
            self.console.print(text, highlight=False, markup=False)
        elif self.live is not None and math.isfinite(record["loss"]):
            self.trend.append(record["loss"])

    def _speed(self) -> str:
        found = self.record
        rate = f"{found[self.unit + '_per_s']:,.0f} {self.unit}/s"
        return f"{rate}  mfu {found['mfu']:.1%}  {found['peak_memory_bytes'] / 2**30:.1f} GiB"

    def _panel(self) -> RenderableType:
        """Drawn by rich's own thread, so that training never waits for a terminal."""
        found, (first, began) = self.record, self.began
        if not found:
            return "waiting for the first step …"
        pace = (found["time"] - began) / max(
            found["step"] - first, 1
        )  # evaluations and checkpoints included
        trend = list(self.trend)  # training goes on meanwhile
        low, high = min(trend, default=0.0), max(trend, default=1.0)
        bars = "".join(
            "▁▂▃▄▅▆▇█"[int(7 * (value - low) / max(high - low, 1e-12))] for value in trend
        )
        table = Table.grid(padding=(0, 2))
        left = timedelta(seconds=round(pace * (self.steps - found["step"])))
        table.add_row(
            "step",
            f"{found['step']:,} of {self.steps:,}  {found['step'] / self.steps:.0%}  {left} left",
        )
        table.add_row("", ProgressBar(self.steps, found["step"], width=_TREND))
        table.add_row("loss", f"{found['loss']:.4f}  {bars}")
        table.add_row("speed", self._speed())
        table.add_row("", f"lr {found['lr']:.2e}  gradient norm {found['grad_norm']:.3g}")
        table.add_row(
            "kept",
            f"checkpoint {self.saved}"
            + (f"  [red]SKIPPED {self.skipped}[/]" if self.skipped else ""),
        )
        return table

    def close(self, summary: Record) -> None:
        if self.live is not None:
            self.live.stop()


def console(as_json: bool = False, quiet: bool = False) -> Console:
    """Where a person reads: standard output, or standard error when a program reads the other."""
    return Console(stderr=as_json, soft_wrap=True, quiet=quiet)
