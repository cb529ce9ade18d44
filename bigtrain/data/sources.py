"""Where records come from: built-in sets, files, image folders, the hub.

A source is an identity (what a cache is keyed by) and a function that yields records, one dictionary each, with
the fields the task needs: `text`; `text, label`; `source, target`; `image, label`; `features, label|target`.
`group` names what must not be torn apart by the held-out split (a file, say).
"""

import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config.recipe import DataConfig
from bigtrain.data.builtin import BUILT_IN
from bigtrain.data.records import FIELDS, Record, Source, file_stamp
from bigtrain.errors import RequestError


def open_source(name: str, task: str, data: DataConfig) -> Source:
    """The source that `name` stands for; RequestError if there is none or it does not serve the task."""
    if name in BUILT_IN:
        tasks, build = BUILT_IN[name]
        if task not in tasks:
            able = [key for key, (serves, _) in BUILT_IN.items() if task in serves]
            raise RequestError(
                f"data.train={name} does not serve task {task}",
                f"task {' or '.join(tasks)}",
                _or(able),
            )
        return build(task)
    if Path(name).is_dir():
        if task == "image_classification":
            return _from_datasets(
                task,
                data,
                "imagefolder",
                sorted(p for p in Path(name).rglob("*") if p.is_file()),
                name,
            )
        name = str(Path(name) / "**" / "*")
    if files := [
        Path(path) for path in sorted(glob.glob(name, recursive=True)) if Path(path).is_file()
    ]:
        return _from_files(task, data, files)
    if any(sign in name for sign in "*?[") or name.startswith((".", "/", "~")) or Path(name).suffix:
        raise RequestError(
            f"no file matches {name!r}", "files, a folder, or a source", _or(list(BUILT_IN))
        )
    return _from_hub(task, data, name)


def _or(names: list[str]) -> str:
    return "data.train=" + " | ".join(names) if names else ""


_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def _from_files(task: str, data: DataConfig, files: list[Path]) -> Source:
    kinds = {_BUILDERS.get(path.suffix.lower(), "text") for path in files}
    if len(kinds) > 1:
        found = ", ".join(sorted({path.suffix or path.name for path in files}))
        raise RequestError(
            f"data files of several kinds: {found}",
            "one kind per glob",
            "data.train='folder/*.jsonl'",
        )
    kind = kinds.pop()
    if kind != "text":
        return _from_datasets(task, data, kind, files, None)
    if task != "causal_lm":
        raise RequestError(
            f"plain text files have no fields for task {task}",
            "jsonl, csv or parquet",
            "data.train='*.jsonl'",
        )

    def read() -> Iterable[Record]:
        root = os.path.commonpath([path.resolve().parent for path in files])
        for path in files:
            try:
                text, name = path.read_text(encoding="utf-8"), os.path.relpath(path.resolve(), root)
                # A lone file is cut at line ends, or there would be nothing to hold out.
                parts = [text] if len(files) > 1 else _cut(text, max(1, len(text) // 100))
                yield from (
                    {"text": part, "group": f"{name} {number}"} for number, part in enumerate(parts)
                )
            except UnicodeDecodeError as problem:
                raise RequestError(
                    f"{path}: not UTF-8 text (byte {problem.start})", "text, jsonl, csv or parquet"
                ) from None

    return Source(file_stamp(files), read)


def _cut(text: str, least: int) -> list[str]:
    """`text` in parts of whole lines, each of at least `least` characters but for the last."""
    parts = [""]
    for line in text.splitlines(keepends=True):
        if len(parts[-1]) >= least:
            parts.append("")
        parts[-1] += line
    return parts


def _from_datasets(
    task: str, data: DataConfig, builder: str, files: list[Path], folder: str | None
) -> Source:
    def read() -> Iterable[Record]:
        import datasets  # half a second that built-in sources need not pay

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(
            datasets.logging.CRITICAL
        )  # what is wrong is said below, once
        try:
            where: dict[str, Any] = (
                {"data_dir": folder} if folder else {"data_files": [str(path) for path in files]}
            )
            table = datasets.load_dataset(builder, split="train", **where)
        except Exception as problem:  # datasets raises whatever its reader raised
            cause = problem.__cause__ or problem
            raise RequestError(
                f"{folder or files[0]}: cannot be read as {builder}: {str(cause).splitlines()[0]}",
                f"valid {builder}",
            ) from None
        if folder is not None and "label" not in table.column_names:
            raise RequestError(
                f"{folder}: no classes found", "one folder of images per class, two at least"
            )
        return _with_fields(table, task, data)

    return Source(f"{builder} {file_stamp(files)}", read)


def _from_hub(task: str, data: DataConfig, name: str) -> Source:
    import datasets
    from huggingface_hub import constants, dataset_info

    try:
        if not constants.HF_HUB_OFFLINE:
            dataset_info(
                name, timeout=5
            )  # datasets would try for half a minute before it says that a name is wrong
        table = datasets.load_dataset(name, split="train")
    except Exception as problem:
        raise RequestError(
            f"no data set {name!r}: neither a built-in source, nor files, nor to be had from the hub ({type(problem).__name__})",
            f"a built-in source ({', '.join(BUILT_IN)}), a glob, a folder or a hub id",
        ) from None
    return Source(f"hub {name} {table._fingerprint}", lambda: _with_fields(table, task, data))


def _with_fields(table: Any, task: str, data: DataConfig) -> Any:
    """`table` under the task's field names; class labels by name."""
    fields = FIELDS[task]
    if fields[0] == "features":
        return _numeric_rows(table, fields[1], data)
    wanted = {field: data.columns.get(field, field) for field in fields}
    if missing := [column for column in wanted.values() if column not in table.column_names]:
        raise RequestError(
            f"the data has no column {' or '.join(missing)}; it has: {', '.join(table.column_names)}",
            f"columns for task {task}: {', '.join(fields)}",
            f"data.columns.{fields[0]}=NAME_OF_A_COLUMN",
        )
    names = getattr(table.features.get(wanted.get("label")), "names", None)

    def renamed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = {field: rows[column] for field, column in wanted.items()}
        return found | {"label": [names[number] for number in found["label"]]} if names else found

    # A view, not rename_columns: two fields may be the same column.
    return table.select_columns(list(dict.fromkeys(wanted.values()))).with_transform(renamed)


def _numeric_rows(table: Any, answer: str, data: DataConfig) -> Iterable[Record]:
    column = data.columns.get(answer, answer)
    kinds = {
        name: str(getattr(kind, "dtype", ""))
        for name, kind in table.features.items()
        if name != column
    }
    inputs = [name for name, kind in kinds.items() if kind.startswith(("int", "float"))]
    if column not in table.column_names or not inputs:
        raise RequestError(
            f"the data has columns {', '.join(table.column_names)}",
            f"a column {column!r} and at least one numeric column",
            f"data.columns.{answer}=NAME_OF_A_COLUMN",
        )
    rows = np.stack([np.asarray(table[name], np.float32) for name in inputs], axis=1)
    return [
        {"features": row, answer: value} for row, value in zip(rows, table[column], strict=True)
    ]
