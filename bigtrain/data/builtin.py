"""The built-in data sets: made from Python's own library, scikit-learn's bundled sets, or from a rule."""

import ast
import datetime
import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.data.records import Record, Source, file_stamp

_NOT_LIBRARY = {"site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}


def _python_stdlib(task: str) -> Source:
    """The interpreter's own library, without tests and without tables that are data in the shape of code."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _NOT_LIBRARY & set(path.relative_to(root).parts)
    ]

    def documents() -> Iterable[Record]:
        for path in files:
            yield {
                "text": path.read_text(encoding="utf-8", errors="replace"),
                "group": path.relative_to(root).as_posix(),
            }

    read = documents if task == "causal_lm" else lambda: _library_functions(documents())
    return Source(f"python-stdlib 1 {task} {sys.version} {file_stamp(files)}", read)


def _library_functions(documents: Iterable[Record]) -> list[Record]:
    """Functions of at least four lines, labelled with their package, for the ten packages that have most of them."""
    functions: list[Record] = []
    for document in documents:
        package, _, rest = document["group"].partition("/")
        if not rest:
            continue
        for node in ast.walk(ast.parse(document["text"])):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and (node.end_lineno or 0) - node.lineno >= 3
            ):
                text = ast.get_source_segment(document["text"], node) or ""
                functions.append({"text": text, "label": package, "group": document["group"]})
    largest = {name for name, _ in Counter(f["label"] for f in functions).most_common(10)}
    return [function for function in functions if function["label"] in largest]


def _sklearn(name: str, record: Callable[[Any, int], Record]) -> Callable[[str], Source]:
    """One of scikit-learn's bundled sets; `record` makes one of it and a row number."""

    def read() -> Iterable[Record]:
        import sklearn.datasets

        table = getattr(sklearn.datasets, f"load_{name.replace('-', '_')}")()
        return [record(table, row) for row in range(len(table.target))]

    return lambda _: Source(f"{name} 1", read)


def _digit(table: Any, row: int) -> Record:
    return {
        "image": (table.images[row] * (255 / 16)).round().astype(np.uint8),
        "label": str(table.target[row]),
    }


def _tumour(table: Any, row: int) -> Record:
    # by name, so that "malignant" comes second in the alphabet: the class whose recall a doctor asks for
    return {
        "features": table.data[row].astype(np.float32),
        "label": str(table.target_names[table.target[row]]),
    }


def _patient(table: Any, row: int) -> Record:
    return {"features": table.data[row].astype(np.float32), "target": float(table.target[row])}


_SUFFIX = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}


def _written_dates(count: int = 24_000, seed: int = 1) -> list[Record]:
    """Dates from 1900 to 2099 in ten ways of writing them, no text twice.

    Day before month when both are numbers and separated by dots or dashes; two-digit years are after an
    apostrophe and mean 1970 to 2069, as POSIX has it.
    """
    draw = random.Random(seed)
    first = datetime.date(1900, 1, 1).toordinal()
    days = datetime.date(2099, 12, 31).toordinal() - first + 1
    found: dict[str, str] = {}
    while len(found) < count:
        date = datetime.date.fromordinal(first + draw.randrange(days))
        nth = f"{date.day}{_SUFFIX.get(date.day, 'th')}"
        forms = [
            f"{date.day} {date:%B} {date.year}",
            f"{date:%B} {nth}, {date.year}",
            f"{date:%a} {date.day} {date:%b} {date.year}",
            f"{date.year}/{date.month}/{date.day}",
            f"{date.day}.{date.month}.{date.year}",
            f"the {nth} of {date:%B}, {date.year}",
            f"{date:%d}-{date:%b}-{date.year}",
            f"{date:%b} {date.day}, {date.year}",
            f"{date:%A}, {date:%B} {date.day} {date.year}",
        ]
        if 1970 <= date.year <= 2069:
            forms.append(f"{nth} {date:%b} '{date:%y}")
        found[draw.choice(forms)] = date.isoformat()
    return [{"source": text, "target": iso} for text, iso in found.items()]


BUILT_IN: dict[str, tuple[tuple[str, ...], Callable[[str], Source]]] = {
    "python-stdlib": (("causal_lm", "text_classification"), _python_stdlib),
    "digits": (("image_classification",), _sklearn("digits", _digit)),
    "breast-cancer": (("tabular_classification",), _sklearn("breast-cancer", _tumour)),
    "diabetes": (("regression",), _sklearn("diabetes", _patient)),
    "dates": (("seq2seq",), lambda _: Source("dates 1", _written_dates)),
}
