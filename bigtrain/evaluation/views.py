"""An evaluation on the terminal, and as one page."""

import base64
import io
import math
import sys
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.evaluation.evaluate import Evaluation
from bigtrain.evaluation.plots import Axes
from bigtrain.evaluation.predictions import Predictions
from bigtrain.evaluation.report_metrics import CONFIDENCE, RESAMPLES, Report, make_report
from bigtrain.evaluation.worst_examples import WorstExample, worst_examples
from bigtrain.runs.directory import asset

WORST_SHOWN = 24
_CLASSES_ON_TERMINAL = 12  # of a confusion matrix
_CLASSES_ON_PAGE = 30
_CONFUSIONS = 20  # listed where there are more classes
_DOTS = 2000
_BARS = 24
_PICTURE = 160  # pixels, the longer side of an example's
_INTERVAL = f"{CONFIDENCE:.0%} interval"


def show_report(report: Report) -> None:
    """Tables on the terminal: metrics, classes, and who is taken for whom."""
    from rich.console import Console
    from rich.markup import escape as escape_markup
    from rich.table import Column, Table

    screen = Console()
    table = Table("metric", _right("value"), _right(_INTERVAL), box=None)
    for name, value in report.metrics.items():
        table.add_row(name, _number(value), _interval(report, name))
    screen.print(table)
    screen.print(f"[dim]over {report.examples:,} held-out examples[/]", highlight=False)
    if not report.classes:
        return
    heads = [_right(name) for name in ("precision", "recall", "f1", "examples")]
    table = Table(Column("class", overflow="fold"), *heads, box=None)
    for row in report.per_class:
        shares = [f"{value:.4f}" for value in (row.precision, row.recall, row.f1)]
        table.add_row(escape_markup(row.name), *shares, f"{row.support:,}")
    screen.print("", table)
    if len(report.classes) > _CLASSES_ON_TERMINAL:
        return
    heads = [_right(escape_markup(name)) for name in report.classes]
    table = Table(Column("true / predicted", overflow="fold"), *heads, box=None)
    for name, counts in zip(report.classes, report.confusion, strict=True):
        cells = []
        for count in counts:
            cells.append(f"{count:,}" if count else "[dim]·[/]")
        table.add_row(escape_markup(name), *cells)
    screen.print("", table)


def report_evaluation(evaluation: Evaluation, page: Path | None) -> Report:
    """Everything that there is to say of an evaluation; writes it as a page too, if asked to."""
    predictions, task = evaluation.predictions, evaluation.task
    report = make_report(evaluation.metrics, predictions, task.data)
    worst = worst_examples(predictions, task, evaluation.evaluator, WORST_SHOWN)
    report = replace(report, worst=worst)
    if page is not None:
        title = f"{evaluation.run.name}, evaluated"
        page.write_text(html_page(title, report, predictions), encoding="utf-8")
        print(f"{page} written", file=sys.stderr)
    return report


def _right(head: str) -> Any:
    from rich.table import Column

    return Column(head, justify="right", overflow="fold")


def _number(value: float) -> str:
    return f"{value:.6g}"


def _interval(report: Report, metric: str) -> str:
    ends = report.intervals.get(metric)
    return f"{ends['low']:.4g} – {ends['high']:.4g}" if ends else ""


def html_page(title: str, report: Report, predictions: Predictions) -> str:
    """One HTML page with everything in it: no network, no other file."""
    parts = [_metrics_table(report), *_plots(report, predictions)]
    if report.classes:
        parts += [_class_table(report), _confusions(report)]
    parts.append(_worst_examples(report.worst))
    template = asset("templates", "evaluation.html").read_text(encoding="utf-8")
    page = template.replace("<!--TITLE-->", escape(title))
    return page.replace("<!--BODY-->", "\n".join(parts))


def _section(title: str, body: str, note: str = "", whole: bool = False) -> str:
    kind = ' class="whole"' if whole else ""
    paragraph = f"<p>{escape(note)}</p>" if note else ""
    return f"<section{kind}><h2>{escape(title)}</h2>{body}{paragraph}</section>"


def _table(heads: list[str], rows: list[list[str]], kind: str = "") -> str:
    """`heads` are texts; `rows` are cells as `_cells` makes them."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    lines = [f"<tr>{head}</tr>"]
    for row in rows:
        cells = "".join(row)
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>'


def _cells(*texts: str) -> list[str]:
    return [f"<td>{escape(text)}</td>" for text in texts]


def _metrics_table(report: Report) -> str:
    rows = []
    for name, value in report.metrics.items():
        words = name.replace("_", " ")
        rows.append(_cells(words, _number(value), _interval(report, name)))
    note = (
        f"{report.examples:,} held-out examples; intervals by {RESAMPLES:,} resamples of them"
        " (bootstrap, percentiles)."
    )
    return _section("Metrics", _table(["", "value", _INTERVAL], rows), note)


def _class_table(report: Report) -> str:
    rows = []
    for row in report.per_class:
        shares = [f"{value:.4f}" for value in (row.precision, row.recall, row.f1)]
        rows.append(_cells(row.name, *shares, f"{row.support:,}"))
    return _section("Classes", _table(["", "precision", "recall", "F1", "examples"], rows))


def _confusions(report: Report) -> str:
    """A heat map; with many classes a list of the most frequent confusions."""
    classes = report.classes
    if len(classes) > _CLASSES_ON_PAGE:
        counts = np.asarray(report.confusion)
        np.fill_diagonal(counts, 0)
        rows = []
        for place in np.argsort(-counts, axis=None, kind="stable")[:_CONFUSIONS].tolist():
            true, predicted = divmod(place, len(classes))
            count = counts[true, predicted]
            if count:
                rows.append(_cells(classes[true], classes[predicted], f"{count:,}"))
        return _section("Most frequent confusions", _table(["true", "predicted", "examples"], rows))
    rows = []
    for name, counts_of_class in zip(classes, report.confusion, strict=True):
        total = max(1, sum(counts_of_class))
        cells = [_heat_cell(count, count / total) for count in counts_of_class]
        rows.append([*_cells(name), *cells])
    note = "Rows: true classes; columns: predicted ones. The colour is the share of the row."
    body = _table(["", *classes], rows, "matrix")
    return _section("Confusion matrix", body, note)


def _heat_cell(count: int, share: float) -> str:
    kind = "strong" if share > 0.5 else "some" if count else "none"
    style = f"background: rgba(47, 111, 222, {share:.3f})"
    return f'<td class="{kind}" style="{style}" title="{share:.1%}">{count:,}</td>'


def _plots(report: Report, predictions: Predictions) -> list[str]:
    """Pictures that the task has."""
    if not report.classes and len(predictions.exact):
        return _loss_plot(predictions)
    if not report.classes:
        return _values_plot(predictions)
    plots = []
    if report.roc is not None:
        axes = Axes((0, 1), (0, 1))
        axes.curve([(0, 0), (1, 1)], "even")
        x, y = report.roc.false_positive_rate, report.roc.true_positive_rate
        axes.curve(zip(x, y, strict=True))
        picture = axes.svg("false positive rate", "true positive rate")
        note = f"Area under the curve: {report.metrics['auc']:.4f}."
        plots.append(_section(f"ROC of “{report.classes[1]}”", picture, note))
    if report.calibration:
        plots.append(_calibration_plot(report))
    return plots


def _calibration_plot(report: Report) -> str:
    axes = Axes((0, 1), (0, 1))
    axes.curve([(0, 0), (1, 1)], "even")
    points = []
    for each in report.calibration:
        share = each.count / report.examples
        axes.bar(each.low, each.high, share, f"{each.count:,} examples", "back")
        points.append((each.probability, each.share))
    axes.curve(points)
    axes.dots(points, 3.5, "dot")
    what = "right predictions"
    if len(report.classes) == 2:
        what = f"“{report.classes[1]}”"
    note = (
        "On the dashed line, what the model says comes true as often as it says. Bars: share of"
        f" the examples. Calibration error: {report.metrics['calibration_error']:.4f}."
    )
    picture = axes.svg(f"probability of {what}, as predicted", "share that came true")
    return _section("Reliability", picture, note)


def _loss_plot(predictions: Predictions) -> list[str]:
    """How the loss is spread over the examples."""
    per_token = predictions.loss / np.maximum(predictions.targets, 1)
    per_token = per_token[np.isfinite(per_token)]
    if not len(per_token):
        return []
    counts, edges = np.histogram(per_token, bins=_BARS)
    axes = Axes((float(edges[0]), float(edges[-1])), (0, float(counts.max())))
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        axes.bar(float(low), float(high), float(count), f"{count:,} examples")
    picture = axes.svg("loss per target token (nats)", "examples")
    return [_section("Loss of each example", picture)]


def _values_plot(predictions: Predictions) -> list[str]:
    """Predicted values over true ones."""
    true, predicted = predictions.label, predictions.predicted
    if not np.isfinite(predicted).all():
        return []
    both = np.concatenate([true, predicted])
    low, high = float(both.min()), float(both.max())
    axes = Axes((low, high), (low, high))
    axes.curve([(low, low), (high, high)], "even")
    every = math.ceil(len(true) / _DOTS)
    points = zip(true[::every].tolist(), predicted[::every].tolist(), strict=True)
    axes.dots(points, 3, "faint")
    return [_section("Predicted and true values", axes.svg("true", "predicted"))]


def _worst_examples(worst: list[WorstExample]) -> str:
    figures = []
    has_pictures = any(isinstance(each.shown, np.ndarray) for each in worst)
    for each in worst:
        if isinstance(each.shown, str):
            body = f"<div>{escape(each.shown)}</div>"
        else:
            body = f'<img src="{_data_uri(each.shown)}" alt="example {each.example}">'
        figures.append(f"<figure>{body}<figcaption>{_caption(each)}</figcaption></figure>")
    card = "150px" if has_pictures else "300px"
    grid = f'<div class="worst" style="--card: {card}">{"".join(figures)}</div>'
    note = "The examples of the largest loss, the worst first; numbers count held-out examples."
    return _section("Worst examples", grid, note, whole=True)


def _caption(each: WorstExample) -> str:
    parts = [f"#{each.example}, loss {each.loss:.4g}"]
    if each.label is not None:
        label = escape(_shortly(each.label))
        predicted = escape(_shortly(each.predicted))
        parts.append(f"true <b>{label}</b>, predicted <b>{predicted}</b>")
    if each.probability is not None:
        parts[-1] += f" ({each.probability:.1%})"
    return "<br>".join(parts)


def _shortly(answer: str | float | None) -> str:
    return answer if isinstance(answer, str) else f"{answer:.5g}"


def _data_uri(pixels: NDArray[Any]) -> str:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((_PICTURE, _PICTURE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
