"""What `make bench` has measured: medians, the tables of benchmarks/README.md, and the picture."""

import html
import itertools
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
OURS = "bigtrain"  # the arm that others are compared with
BAR, GAP, LEFT, WIDTH = 18, 6, 230, 820  # of the picture, in pixels


class Cell(NamedTuple):
    """What one process (or a group of two ranks) trains."""

    workload: str
    ranks: int
    arm: str


@dataclass
class Measured:
    """Seconds per step in each round (without the first ones), and the mean losses."""

    cell: Cell
    rounds: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(second for steps in self.rounds for second in steps)

    @property
    def tenth(self) -> float:
        """The time that a tenth of all steps stay below: the machine as little disturbed."""
        return percentile([second for steps in self.rounds for second in steps], 0.1)


def percentile(values: Iterable[float], share: float) -> float:
    """The value that `share` of all are below, between two of them by a straight line."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def step_seconds(times: Sequence[float], warm: int) -> list[float]:
    """Seconds of each step from when steps ended, without the first `warm` steps."""
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return seconds[max(warm - 1, 0) :]


def speed_ratio(ours: Measured, other: Measured) -> float:
    """How many times as fast as `other` ours is: the median over rounds.

    Within a round both ran in the same minutes, so what slows the machine for longer cancels out.
    """
    ratios = []
    for own_steps, other_steps in zip(ours.rounds, other.rounds, strict=True):
        ratios.append(statistics.median(other_steps) / statistics.median(own_steps))
    return statistics.median(ratios)


def unequal_losses(measured: Iterable[Measured], tolerance: float) -> list[str]:
    """Arms whose mean loss differs from that of the first one of their workload."""
    first: dict[str, float] = {}
    problems = []
    for one in measured:
        reference = first.setdefault(one.cell.workload, one.losses[0])
        for loss in one.losses:
            if not abs(loss - reference) <= tolerance * reference:  # NaN is unequal too
                where = f"{one.cell.workload}, {one.cell.ranks} ranks, {one.cell.arm}"
                problems.append(f"{where}: mean loss {loss:.5f}, not {reference:.5f}")
    return problems


def by_cell(results: dict[str, Any]) -> dict[Cell, Measured]:
    """The cells of bench.json."""
    cells = {}
    for entry in results["cells"]:
        cell = Cell(entry["workload"], entry["ranks"], entry["arm"])
        cells[cell] = Measured(cell, entry["step_seconds"], entry["mean_losses"])
    return cells


def groups(cells: Iterable[Cell]) -> list[tuple[str, int]]:
    """Each workload and number of ranks, in their order."""
    return list(dict.fromkeys((cell.workload, cell.ranks) for cell in cells))


def table(results: dict[str, Any], workload: str, ranks: int) -> list[str]:
    """A row for each arm, in Markdown."""
    facts = results["workloads"][workload]
    lines = [
        f"| arm | {facts['unit']}/s | step, ms | tenth percentile, ms | bigtrain ÷ arm | loss |",
        "|---|---|---|---|---|---|",
    ]
    cells = by_cell(results)
    ours = cells.get(Cell(workload, ranks, OURS))
    for cell, one in cells.items():
        if (cell.workload, cell.ranks) != (workload, ranks):
            continue
        rate = facts["units_per_step"] / one.median
        ratio = f"{speed_ratio(ours, one):.2f}" if ours else ""
        times = f"{1e3 * one.median:.1f} | {1e3 * one.tenth:.1f}"
        loss = statistics.median(one.losses)
        title = results["arms"][cell.arm]
        lines.append(f"| {title} | {rate:,.0f} | {times} | {ratio} | {loss:.4f} |")
    return lines


def rates_table(machine: dict[str, Any]) -> list[str]:
    """What the machine can do, in Markdown."""
    lines = ["| this machine | |", "|---|---|"]
    for name, value in machine.items():
        shown = f"{value:,.1f}" if isinstance(value, float) else str(value)
        lines.append(f"| {name.replace('_per_s', '/s').replace('_', ' ')} | {shown} |")
    return lines


def checks_table(checks: dict[str, Any]) -> list[str]:
    """Measurements of one number each: what it is, what it should be, what it was."""
    lines = ["| what | goal | measured |", "|---|---|---|"]
    for name, check in checks.items():
        lines.append(f"| {name} | {check['goal']} | {check['measured']} |")
    return lines


def markdown(results: dict[str, Any]) -> str:
    """All tables."""
    lines = [f"`{results['command']}`, {results['when']}. {results['note']}".rstrip(), ""]
    lines += [*rates_table(results["machine"]), ""]
    for workload, ranks in groups(by_cell(results)):
        number = "one rank" if ranks == 1 else f"{ranks} ranks"
        lines += [f"### {results['workloads'][workload]['title']}, {number}", ""]
        lines += [*table(results, workload, ranks), ""]
    if results["checks"]:
        lines += ["### The loop, the loader, two ranks", "", *checks_table(results["checks"]), ""]
    return "\n".join(lines)


def replace_tables(page: Path, tables: str) -> None:
    """Put the tables between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    assert BEGIN in text and END in text, f"{page} has no place for the tables"
    between = re.escape(BEGIN) + ".*?" + re.escape(END)
    new = f"{BEGIN}\n\n{tables}\n{END}"
    page.write_text(re.sub(between, lambda _: new, text, flags=re.S), encoding="utf-8")


STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 } .other { fill: #9aa4af } .ours { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .other { fill: #6e7681 } .ours { fill: #4493f8 }
}
"""


def svg(results: dict[str, Any]) -> str:
    """A bar for each arm: units per second, in a panel for each workload and number of ranks."""
    parts: list[str] = []
    top = GAP
    for workload, ranks in groups(by_cell(results)):
        drawn, top = _panel(results, workload, ranks, top)
        parts += drawn
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _panel(results: dict[str, Any], workload: str, ranks: int, top: int) -> tuple[list[str], int]:
    """The elements of a panel that begins at `top`, and where it ends."""
    facts = results["workloads"][workload]
    number = "one rank" if ranks == 1 else f"{ranks} ranks"
    title = html.escape(f"{facts['title']}, {number}: {facts['unit']} per second")
    top += 2 * BAR
    parts = [f'<text class="title" x="{GAP}" y="{top - GAP}">{title}</text>']
    rates = {}
    for cell, one in by_cell(results).items():
        if (cell.workload, cell.ranks) == (workload, ranks):
            rates[cell.arm] = facts["units_per_step"] / one.median
    scale = (WIDTH - LEFT - 80) / max(rates.values())
    for arm, rate in rates.items():
        length = round(rate * scale)
        name = html.escape(results["arms"][arm])
        base = top + BAR - 5
        kind = "ours" if arm == OURS else "other"
        parts += [
            f'<text x="{LEFT - GAP}" y="{base}" text-anchor="end">{name}</text>',
            f'<rect class="{kind}" x="{LEFT}" y="{top}" width="{length}" height="{BAR}" rx="2"/>',
            f'<text x="{LEFT + length + GAP}" y="{base}">{rate:,.0f}</text>',
        ]
        top += BAR + GAP
    return parts, top + GAP
