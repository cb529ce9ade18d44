"""A comparison of runs as a page, as CSV, and on the terminal."""

import csv
import io
import json
import math
import sys
from typing import Any

import numpy as np

from bigtrain.runs.compare import Comparison, values_by_key
from bigtrain.runs.curves import all_curves
from bigtrain.runs.directory import asset

_RUNS_PER_TABLE = 5  # beside each other on a terminal


def html_page(comparison: Comparison, axis: str) -> str:
    """One HTML page with everything in it: no network, no other file.

    `axis`: what the curves are drawn over until the reader chooses: a key of AXES.
    """
    curves = [each.as_dict() for each in all_curves(comparison.runs)]
    data = _to_plain(comparison.as_dict() | {"curves": curves, "by": axis})
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("</", "<\\/").replace("<!--", "<\\!--")  # no name of a run ends the script
    template = asset("templates", "compare.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/ null", text)


def _to_plain(value: Any) -> Any:
    """As JSON has it: numbers that are not finite become null, others keep six digits."""
    if isinstance(value, dict):
        return {str(key): _to_plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_to_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def to_csv(rows: list[dict[str, Any]]) -> str:
    """The results, one run per line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(values_by_key(rows)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def show(comparison: Comparison) -> None:
    """Two tables on the terminal with a column for each run: settings that differ, and results."""
    from rich.console import Console

    screen = Console()
    columns = values_by_key(comparison.results)
    names = columns.pop("run")
    title = "settings that differ" if comparison.settings else "no setting differs"
    _show_table(screen, title, names, comparison.settings)
    _show_table(screen, "results", names, columns)
    for problem in comparison.problems:
        print(f"note: {problem}", file=sys.stderr)


def _show_table(screen: Any, title: str, names: list[str], rows: dict[str, list[Any]]) -> None:
    """`rows`: key → its value in each run. Many runs make several tables, one below the other."""
    from rich.markup import escape
    from rich.table import Column, Table
    from rich.text import Text

    for first in range(0, len(names), _RUNS_PER_TABLE):
        shown = slice(first, first + _RUNS_PER_TABLE)
        # Folded, not cut: the ends of their names are what tells the runs of a sweep apart.
        heads = [Column(escape(name), overflow="fold") for name in names[shown]]
        table = Table(title, *heads, box=None)
        for key, values in rows.items():
            table.add_row(key, *[Text(_short(value)) for value in values[shown]])
        screen.print(table, "")


def _short(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if type(value) is int:  # a bool is an int too
        return f"{value:,}"
    return str(value)
