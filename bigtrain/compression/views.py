"""The table of `bigtrain compress`: in the terminal, as Markdown and as a page."""

import html
from string import Template

from bigtrain.compression.compress import Table
from bigtrain.runs.directory import asset

HEADS = (
    "model",
    "bytes",
    "÷ original's",
    "metric",
    "95% interval",
    "ms, batch 1",
    "time ÷ original's",
    "samples/s",
    "zeros",
)


def cells(table: Table) -> list[list[str]]:
    """The table's rows as texts, one for each of HEADS."""
    original = table.rows[0].bytes
    rows = []
    for row in table.rows:
        texts = [
            row.model,
            f"{row.bytes:,}",
            f"{row.bytes / original:.2f}",
            f"{row.value:.4f}",
            f"{row.low:.4f} to {row.high:.4f}",
            f"{row.latency_ms:.3g}",
            f"{row.relative_latency:.2f}",
            f"{row.samples_per_s:,.0f}",
            f"{row.sparsity:.1%}",
        ]
        rows.append(texts)
    return rows


def heads(table: Table) -> list[str]:
    """HEADS with the metric's name."""
    metric = table.rows[0].metric.replace("_", " ")
    return [metric if head == "metric" else head for head in HEADS]


def show(table: Table) -> None:
    """Print the table."""
    lines = [heads(table), *cells(table)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADS))]
    for line in lines:
        padded = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        padded[0] = line[0].ljust(widths[0])
        print("  ".join(padded))
    print(f"measured from the files in runs/{table.run}/compressed, on {table.device}")


def markdown(table: Table) -> str:
    """The table for a page of documentation."""
    lines = [heads(table), ["---"] * len(HEADS), *cells(table)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def html_page(table: Table) -> str:
    """One HTML page with everything in it: no network, no other file."""
    template = Template(asset("templates", "compress.html").read_text(encoding="utf-8"))
    body = "".join(_html_row("td", row) for row in cells(table))
    return template.substitute(
        run=html.escape(table.run),
        device=html.escape(table.device),
        head=_html_row("th", heads(table)),
        rows=body,
    )


def _html_row(tag: str, texts: list[str]) -> str:
    inner = "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
    return f"<tr>{inner}</tr>\n"
