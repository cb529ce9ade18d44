"""Where records come from: a built-in set, files, a folder of images, the hub.

Each record is a dictionary with the fields that the task needs (config/task_specs.py); `group`, if
it is there, names what the held-out split must not tear apart (a file, say).
"""

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bigtrain.config.recipe import Columns, ParallelText
from bigtrain.config.task_specs import TASK_SPECS, TaskName
from bigtrain.errors import RequestError
from bigtrain.sources.builtin import BUILT_IN
from bigtrain.sources.parallel_text import open_parallel_text
from bigtrain.sources.records import Record, Source, file_stamp

# Kinds of errors without an answer of the hub, by name: which HTTP library the hub's client uses
# depends on its version.
_NO_CONNECTION = {"TransportError", "ConnectionError"}
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class _Request:
    """A key of the recipe and its value, the task that it must serve, the columns by field."""

    key: str  # data.train or data.eval
    name: str
    task: TaskName
    columns: Columns

    @property
    def setting(self) -> str:
        return f"{self.key}={self.name}"

    @property
    def built_in(self) -> list[str]:
        """The built-in sets for the task."""
        return [name for name, other in BUILT_IN.items() if self.task in other.tasks]

    def column(self, field: str) -> str:
        return str(self.columns.get(field, field))


def open_source(
    key: Literal["data.train", "data.eval"],
    name: str | ParallelText,
    task: TaskName,
    columns: Columns,
) -> Source:
    """The source that `name`, the value of `key`, stands for.

    Raises RequestError if there is none, or if it does not serve the task.
    """
    if isinstance(name, ParallelText):
        return open_parallel_text(key, name)
    request = _Request(key, name, task, columns)
    if name in BUILT_IN:
        return _from_built_in(request)
    folder = Path(name)
    pattern = name
    if folder.is_dir():
        if TASK_SPECS[task].data == "image":
            return _from_image_folder(request, folder)
        pattern = str(folder / "**" / "*")
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in paths if path.is_file()]
    if files:
        return _from_files(request, files)
    if _looks_like_files(pattern):
        raise RequestError(
            f"{key}: no file matches {pattern!r}",
            "files, a folder, or a source",
            f"{key}={' | '.join(request.built_in)}",
        )
    return _from_hub(request)


def _looks_like_files(name: str) -> bool:
    has_wildcard = any(sign in name for sign in "*?[")
    return has_wildcard or name.startswith((".", "/", "~")) or Path(name).suffix != ""


def _from_built_in(request: _Request) -> Source:
    built_in = BUILT_IN[request.name]
    if request.task not in built_in.tasks:
        raise RequestError(
            f"{request.setting} does not serve task {request.task}",
            f"task {' or '.join(built_in.tasks)}",
            f"{request.key}={' | '.join(request.built_in)}" if request.built_in else "",
        )
    return built_in.open(request.task)


def _from_image_folder(request: _Request, folder: Path) -> Source:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Source(
        f"imagefolder {file_stamp(files)}",
        partial(_read_table, request, "imagefolder", str(folder), data_dir=str(folder)),
    )


def _from_files(request: _Request, files: list[Path]) -> Source:
    formats = {FORMATS.get(path.suffix.lower(), "text") for path in files}
    if len(formats) > 1:
        suffixes = sorted({path.suffix or path.name for path in files})
        raise RequestError(
            f"{request.key}: files of several kinds: {', '.join(suffixes)}",
            "one kind per glob",
            f"{request.key}='folder/*.jsonl'",
        )
    file_format = formats.pop()
    if file_format != "text":
        names = [str(path) for path in files]
        read = partial(_read_table, request, file_format, names[0], data_files=names)
        if TASK_SPECS[request.task].data == "table":
            read = partial(load_frame, request.key, file_format, names)
        return Source(f"{file_format} {file_stamp(files)}", read)
    if not TASK_SPECS[request.task].is_packed:
        raise RequestError(
            f"{request.key}: plain text files have no fields for task {request.task}",
            "jsonl, csv or parquet; for seq2seq also {source: FILES, target: FILES}",
            f"{request.key}='*.jsonl'",
        )
    return Source(file_stamp(files), partial(_read_texts, request.key, files))


def _read_texts(key: str, files: list[Path]) -> Iterable[Record]:
    root = os.path.commonpath([path.resolve().parent for path in files])
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as problem:
            raise RequestError(
                f"{key}: {path}: not UTF-8 text (byte {problem.start})",
                "text, jsonl, csv or parquet",
            ) from None
        name = os.path.relpath(path.resolve(), root)
        parts = [text]
        if len(files) == 1:  # else there would be nothing to hold out
            parts = _whole_lines(text, max(1, len(text) // 100))
        for number, part in enumerate(parts):
            yield {"text": part, "group": f"{name} {number}"}


def _whole_lines(text: str, least: int) -> list[str]:
    """`text` in parts of whole lines, each of at least `least` characters but for the last."""
    parts = [""]
    for line in text.splitlines(keepends=True):
        if len(parts[-1]) >= least:
            parts.append("")
        parts[-1] += line
    return parts


def _read_table(request: _Request, builder: str, shown_name: str, **place: Any) -> Any:
    """Records from what the `datasets` library reads from `place` (its data_dir or data_files)."""
    table = load_table(request.key, builder, shown_name, **place)
    if builder == "imagefolder" and "label" not in table.column_names:
        raise RequestError(
            f"{request.key}: {shown_name}: no classes found",
            "one folder of images per class, two at least",
        )
    return _with_fields(table, request)


def load_table(key: str, builder: str, shown_name: str, **place: Any) -> Any:
    """The datasets.Dataset that the library's `builder` reads from `place`."""
    import datasets  # half a second that built-in sources need not pay

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below says it, once
    try:
        return datasets.load_dataset(builder, split="train", **place)
    except Exception as problem:  # datasets raises whatever its reader raised
        raise _unreadable(key, shown_name, builder, problem) from None


def load_frame(key: str, file_format: str, files: list[str]) -> Any:
    """Files as one pandas.DataFrame; what a csv has is text, for no file alone tells its types.

    `attrs["is_text"]` says so: training decides once what a column holds.
    """
    import pandas

    if file_format != "csv":
        table = load_table(key, file_format, files[0], data_files=files).with_format("arrow")[:]
        return table.to_pandas(integer_object_nulls=True)  # 1, not 1.0, beside a missing value
    tables: list[Any] = []
    for file in files:
        try:
            tables.append(pandas.read_csv(file, dtype=str, low_memory=False))
        except (OSError, ValueError) as problem:
            raise _unreadable(key, file, "csv", problem) from None
        if list(tables[0]) != list(tables[-1]):
            raise RequestError(f"{key}: {file} has other columns than {files[0]}", "the same")
    whole = pandas.concat(tables, ignore_index=True)
    whole.attrs["is_text"] = True
    return whole


def _unreadable(key: str, name: str, file_format: str, problem: Exception) -> RequestError:
    cause = str(problem.__cause__ or problem).splitlines()[0]
    return RequestError(
        f"{key}: {name}: cannot be read as {file_format}: {cause}", f"valid {file_format}"
    )


def _from_hub(request: _Request) -> Source:
    import datasets
    from huggingface_hub import constants, dataset_info

    try:
        if not constants.HF_HUB_OFFLINE:
            # datasets would try for half a minute before it says that a name is wrong
            dataset_info(request.name, timeout=5)
        table = datasets.load_dataset(request.name, split="train")
    except Exception as problem:
        kinds = {kind.__name__ for kind in type(problem).__mro__}
        if kinds & _NO_CONNECTION:
            reason = "the hub cannot be reached"
        else:
            reason = "not to be had from the hub either"
        built_in = f"a built-in source ({', '.join(request.built_in)})"
        raise RequestError(
            f"{request.key}: no data set {request.name!r} here: no built-in source, no files;"
            f" and {reason} ({type(problem).__name__})",
            f"{built_in}, a glob, a folder or a hub id",
        ) from None
    identity = f"hub {request.name} {table._fingerprint}"
    return Source(identity, partial(_with_fields, table, request))


def _with_fields(table: Any, request: _Request) -> Any:
    """`table` (datasets.Dataset) with the task's fields; class labels by name."""
    spec = TASK_SPECS[request.task]
    if spec.data == "table":
        return table.to_pandas()
    columns = {field: request.column(field) for field in spec.fields}
    missing = [column for column in columns.values() if column not in table.column_names]
    if missing:
        raise RequestError(
            f"{request.setting} has no column {' or '.join(missing)};"
            f" it has: {', '.join(table.column_names)}",
            f"columns for task {request.task}: {', '.join(spec.fields)}",
            f"data.columns.{spec.fields[0]}=NAME_OF_A_COLUMN",
        )
    class_names = getattr(table.features.get(columns.get("label")), "names", None)

    def rename(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        renamed = {field: rows[column] for field, column in columns.items()}
        if class_names:
            renamed["label"] = [class_names[number] for number in renamed["label"]]
        return renamed

    # A view, not rename_columns: two fields may be the same column.
    distinct = list(dict.fromkeys(columns.values()))
    return table.select_columns(distinct).with_transform(rename)
