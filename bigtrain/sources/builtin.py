"""The built-in data sets: from Python's own library, from scikit-learn, or made by a rule."""

import ast
import datetime
import importlib.util
import os
import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.config.task_specs import TASK_SPECS, TaskName
from bigtrain.sources.records import Record, Source, file_stamp

_NOT_LIBRARY = {"site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class BuiltIn:
    """A set that comes with bigtrain: for which tasks, and how it is opened for one of them."""

    tasks: tuple[TaskName, ...]
    open: Callable[[TaskName], Source]


def _python_stdlib(task: TaskName) -> Source:
    """The interpreter's own library, without its tests and without tables written as code.

    Whole files for a language model; for a classifier functions, labelled with their package.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - _NOT_LIBRARY  # where os.walk goes next
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort()
    read = _library_functions if TASK_SPECS[task].has_labels else _library_files
    identity = f"python-stdlib 1 {task} {sys.version} {file_stamp(files)}"
    return Source(identity, partial(read, root, files))


def _library_files(root: Path, files: list[Path]) -> Iterable[Record]:
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        yield {"text": text, "group": path.relative_to(root).as_posix()}


def _library_functions(root: Path, files: list[Path]) -> list[Record]:
    """Functions of at least four lines, of the ten packages that have the largest number."""
    functions: list[Record] = []
    for document in _library_files(root, files):
        package, _, rest = document["group"].partition("/")
        if not rest:
            continue
        for node in ast.walk(ast.parse(document["text"])):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (node.end_lineno or 0) - node.lineno >= 3:
                text = ast.get_source_segment(document["text"], node) or ""
                functions.append({"text": text, "label": package, "group": document["group"]})
    counts = Counter(function["label"] for function in functions)
    largest = {package for package, _ in counts.most_common(10)}
    return [function for function in functions if function["label"] in largest]


def _scikit_learn_table(name: str, header_lines: int = 0) -> NDArray[np.float64]:
    """A file of scikit-learn's, read without the package, whose import takes most of a second.

    The last column is the answer.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None, "it is a dependency"
    folder = Path(package.origin).parent
    path = folder / "datasets" / "data" / name
    return np.loadtxt(path, delimiter=",", skiprows=header_lines)


def _digits() -> list[Record]:
    """8 × 8 images of handwritten digits, grey."""
    records = []
    for row in _scikit_learn_table("digits.csv.gz"):
        image = row[:-1].reshape(8, 8)
        grey = (image * (255 / 16)).round().astype(np.uint8)
        label = str(int(row[-1]))
        records.append({"image": grey, "label": label})
    return records


_OF_CELLS = (
    "radius texture perimeter area smoothness compactness concavity concave_points symmetry"
    " fractal_dimension"
)


def _breast_cancer() -> Any:
    """Measurements of tumours, as a table.

    The label is the name, so that "malignant" comes second in the alphabet: the class whose recall
    a doctor asks for.
    """
    import pandas

    rows = _scikit_learn_table("breast_cancer.csv", header_lines=1)
    labels = np.where(rows[:, -1] == 0, "malignant", "benign")
    names: list[str] = []
    for statistic in ("mean_{}", "{}_error", "worst_{}"):
        names += map(statistic.format, _OF_CELLS.split())
    return pandas.DataFrame(rows[:, :-1], columns=names).assign(label=labels)


def _diabetes() -> Any:
    """Measurements of patients; the target is the disease's progression in a year."""
    from sklearn.datasets import load_diabetes

    return load_diabetes(as_frame=True).frame


_ORDINAL_SUFFIXES = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}


def _written_dates(count: int = 24_000, seed: int = 1) -> list[Record]:
    """Dates from 1900 to 2099 in ten ways of writing, no text twice; the target is ISO 8601."""
    draw = random.Random(seed)
    first = datetime.date(1900, 1, 1).toordinal()
    num_days = datetime.date(2099, 12, 31).toordinal() - first + 1
    iso_dates: dict[str, str] = {}  # by the date as written
    while len(iso_dates) < count:
        date = datetime.date.fromordinal(first + draw.randrange(num_days))
        iso_dates[draw.choice(_ways_to_write(date))] = date.isoformat()
    return [{"source": text, "target": iso} for text, iso in iso_dates.items()]


def _ways_to_write(date: datetime.date) -> list[str]:
    """Day before month when both are numbers and separated by dots or dashes.

    Two-digit years are after an apostrophe and mean 1970 to 2069, as POSIX has it.
    """
    nth = f"{date.day}{_ORDINAL_SUFFIXES.get(date.day, 'th')}"
    ways = [
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
        ways.append(f"{nth} {date:%b} '{date:%y}")
    return ways


def _fixed(name: str, read: Callable[[], Any]) -> Callable[[TaskName], Source]:
    """The way to open a set that is the same on every machine and for every task."""

    def open_it(_task: TaskName) -> Source:
        return Source(f"{name} 1", read)

    return open_it


BUILT_IN = {
    "python-stdlib": BuiltIn(("causal_lm", "text_classification"), _python_stdlib),
    "digits": BuiltIn(("image_classification",), _fixed("digits", _digits)),
    "breast-cancer": BuiltIn(("tabular_classification",), _fixed("breast-cancer", _breast_cancer)),
    "diabetes": BuiltIn(("regression",), _fixed("diabetes", _diabetes)),
    "dates": BuiltIn(("seq2seq",), _fixed("dates", _written_dates)),
}
