"""Run every command of docs/course.md in order, and write under each what it printed and how long
it took; also course.json, and the picture of the optimizers.

python benchmarks/course.py [SECTION …]     some sections only, by words of their headings
"""

import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from math import ceil, floor, log10
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "course.md"
RESULTS = ROOT / "benchmarks" / "course.json"
PICTURE = ROOT / "docs" / "images" / "optimizers.svg"
WORK = ROOT / "build" / "course"  # where the runs are; kept for the sections that are run alone
MARK, END = "<!-- figure: course.py -->", "<!-- end of figure -->"
BLOCK = re.compile(rf"```bash\n(.*?)```\n(\n{MARK}\n(?:.*?{END}\n)?)?", flags=re.S)
TABLE = re.compile(r"(<!-- table: course.py -->\n).*?(<!-- end of table -->)", flags=re.S)
LONGEST = 30  # lines that are shown as they are
METRICS = ("bits_per_byte", "accuracy", "mse", "r2", "exact_match", "bleu")


class Block(NamedTuple):
    """The commands between two fences."""

    section: str
    text: str  # between the fences
    commands: list[str]
    start: int  # place in the page
    end: int  # with the figure below it


class Outcome(NamedTuple):
    """What a command came to."""

    section: str
    command: str
    figure: str  # of one run, in words; else what it printed
    rows: list[dict[str, Any]]  # of a sweep
    seconds: float


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of commands, in order; a backslash continues a line, # begins a comment."""
    for match in BLOCK.finditer(page):
        headings = re.findall(r"^## (.*)$", page[: match.start()], flags=re.M)
        lines = match[1].replace("\\\n", " ").splitlines()
        commands = [line.partition("  #")[0].strip() for line in lines]
        kept = [line for line in commands if line and not line.startswith("#")]
        section = headings[-1] if headings else ""
        yield Block(section, match[1], kept, match.start(), match.end())


def main() -> None:
    """Run, and write the page anew after each block."""
    asked = [word.lower() for word in sys.argv[1:]]
    if not asked:
        shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    for name in ("examples",):
        if not (WORK / name).exists():
            (WORK / name).symlink_to(ROOT / name)
    known: dict[str, Any] = {}
    if asked and RESULTS.is_file():
        known = {entry["command"]: entry for entry in json.loads(RESULTS.read_text())}
    for number, block in enumerate(list(blocks(PAGE.read_text(encoding="utf-8")))):
        is_asked = not block.section or any(word in block.section.lower() for word in asked)
        if asked and not is_asked:
            continue
        outcomes = [run(block.section, command) for command in block.commands]
        known |= {outcome.command: outcome._asdict() for outcome in outcomes}
        write_figure(number, outcomes)
        RESULTS.write_text(json.dumps(list(known.values()), indent=1) + "\n")
    order = [c for block in blocks(PAGE.read_text(encoding="utf-8")) for c in block.commands]
    rows = [known[command] for command in order if command in known]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    table = whole_table(rows)
    PAGE.write_text(TABLE.sub(lambda m: f"{m[1]}\n{table}\n{m[2]}", page), encoding="utf-8")
    if any((WORK / "runs").glob("optimizers-*")):
        PICTURE.write_text(picture(WORK / "runs"), encoding="utf-8")


def run(section: str, command: str) -> Outcome:
    """Run one command in WORK; of one that fails the figure is its exit code."""
    forget(command)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "WANDB_MODE": "offline"}
    print(f"$ {command}", flush=True)
    before = set((WORK / "runs").glob("*"))
    began = time.monotonic()
    done = subprocess.run(
        command,
        shell=True,
        executable="/bin/bash",
        cwd=WORK,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - began
    new = sorted(set((WORK / "runs").glob("*")) - before, key=lambda path: path.stat().st_mtime)
    rows = [measured(path) for path in new if (path / "summary.json").is_file()]
    figure = done.stdout.rstrip()
    if figure.count("\n") >= LONGEST:
        figure = ""
    if done.returncode:
        figure = f"failed with {done.returncode}"
    if len(rows) == 1:
        figure = words(rows.pop())
    print(f"  {figure} ({seconds:.0f} s)", flush=True)
    return Outcome(section, command, figure, folded(rows), round(seconds, 1))


def forget(command: str) -> None:
    """Remove what the command is to make anew: its run or runs, or an export's folder."""
    words_of_command = shlex.split(command)
    if words_of_command[:2] not in (["bigtrain", "train"], ["bigtrain", "sweep"]):
        return
    name = words_of_command[2]
    for word in words_of_command[3:]:
        if word.startswith("name="):
            name = word.partition("=")[2]
    pattern = f"{name}-*" if words_of_command[1] == "sweep" else name
    for folder in (WORK / "runs").glob(pattern):
        shutil.rmtree(folder)


def measured(folder: Path) -> dict[str, Any]:
    """The held-out metrics of a run."""
    summary = json.loads((folder / "summary.json").read_text())
    found = {metric: summary[metric] for metric in METRICS if metric in summary}
    return {"run": folder.name, **found, "loss": summary["loss"]}


def folded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that differ in the seed alone as one row: the mean of each metric, and half of the range
    between the least and the greatest (`±`).
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(re.sub(r"-seed\d+$", "", row["run"]), []).append(row)
    result = []
    for name, members in groups.items():
        row = {"run": name}
        for metric in members[0]:
            if metric != "run":
                values = [member[metric] for member in members]
                row[metric] = statistics.mean(values)
                if len(values) > 1:
                    row[f"{metric} ±"] = (max(values) - min(values)) / 2
        result.append(row)
    return result


def words(row: dict[str, Any]) -> str:
    """`accuracy 0.9765, f1 0.9764`"""
    shown = [f"{name} {value:.4g}" for name, value in row.items() if name in METRICS]
    return ", ".join(shown)


def write_figure(number: int, outcomes: list[Outcome]) -> None:
    """Put the results of the block with this number below it."""
    page = PAGE.read_text(encoding="utf-8")
    block = list(blocks(page))[number]
    lines = [f"```bash\n{block.text}```", "", MARK]
    for outcome in outcomes:
        if outcome.rows:
            lines += ["", *table_of(outcome.rows)]
        if "\n" in outcome.figure and not outcome.rows:
            lines += ["", "```", outcome.figure, "```"]
        label = f"`{short(outcome.command)}`: " if len(outcomes) > 1 else ""
        is_shown = bool(outcome.rows) or "\n" in outcome.figure or not outcome.figure
        figure = "" if is_shown else f"{outcome.figure}, "
        lines += ["", f"{label}{figure}{outcome.seconds:.0f} s"]
    lines += [END, ""]
    PAGE.write_text(page[: block.start] + "\n".join(lines) + page[block.end :], encoding="utf-8")


def short(command: str) -> str:
    """A command's first words, up to its settings."""
    first = re.split(r" (?:--|\S*=|')", command)[0]
    if first.startswith("bigtrain sweep") and "'" not in command:
        return " ".join(command.split()[:4])
    name = re.search(r" name=(\S+)", command)
    return f"{first} … name={name[1]}" if name else first


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    """The runs of a sweep in Markdown."""
    metrics = [name for name in rows[0] if name != "run" and not name.endswith("±")]
    lines = ["| run | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for row in rows:
        cells = []
        for name in metrics:
            spread = row.get(f"{name} ±")
            cells.append(f"{row[name]:.4f}" + ("" if spread is None else f" ± {spread:.4f}"))
        lines.append(f"| `{row['run']}` | " + " | ".join(cells) + " |")
    return lines


def whole_table(entries: list[dict[str, Any]]) -> str:
    """Every command with its figure and seconds."""
    lines = ["| section | command | figure | seconds |", "|---|---|---|---|"]
    for entry in entries:
        figure = entry["figure"]
        if entry["rows"]:
            figure = "; ".join(
                f"{short_name(row)} {words(row)}, loss {row['loss']:.4g}" for row in entry["rows"]
            )
        elif "\n" in figure:
            figure = "above"
        cells = [
            entry["section"],
            f"`{short(entry['command'])}`",
            figure,
            f"{entry['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def short_name(row: dict[str, Any]) -> str:
    """A run of a sweep without its recipe."""
    return str(row["run"]).partition("-")[2].replace("optim-name-", "")


COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#cf222e", "#9a6700")
WIDTH, HEIGHT, LEFT, BOTTOM = 800, 360, 60, 40  # of the picture, in pixels
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } path { fill: none; stroke-width: 2 }
.axis { stroke: #8c959f; stroke-width: 1 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }
"""


def picture(runs: Path) -> str:
    """The training loss of each optimizer (mean of ten steps, logarithmic) over the steps."""
    curves = {}
    for folder in sorted(runs.glob("optimizers-*")):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        means = [statistics.mean(losses[i : i + 10]) for i in range(0, len(losses), 10)]
        words_of_name = folder.name.partition("name-")[2].replace("-True", "").split("-")
        curves[" ".join(word for word in words_of_name if word != "lr")] = means
    values = [log10(value) for curve in curves.values() for value in curve]
    low, high = floor(min(values)), ceil(max(values))
    inner = WIDTH - LEFT - 270
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}">'
    parts = [head, f"<style>{STYLE}</style>"]
    for power in range(low, high + 1):
        y = 20 + (high - power) / (high - low) * (HEIGHT - BOTTOM - 20)
        parts.append(f'<path class="axis" d="M{LEFT} {y:.1f} h{inner}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
        )
    for number, (name, curve) in enumerate(curves.items()):
        points = []
        for place, value in enumerate(curve):
            x = LEFT + place / max(len(curve) - 1, 1) * inner
            y = 20 + (high - log10(value)) / (high - low) * (HEIGHT - BOTTOM - 20)
            points.append(f"{x:.1f} {y:.1f}")
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<path stroke="{colour}" d="M{" L".join(points)}"/>')
        top = 30 + 24 * number
        parts.append(f'<path stroke="{colour}" d="M{WIDTH - 255} {top} h20"/>')
        parts.append(f'<text x="{WIDTH - 228}" y="{top + 4}">{name}</text>')
    steps = 10 * max(len(curve) for curve in curves.values())
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 14}">training loss over {steps} steps</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
