"""`bigtrain predict`: from files to a file, or to standard output."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from bigtrain.errors import RequestError
from bigtrain.inference.inputs import Inputs, find_inputs, table_columns
from bigtrain.inference.predict import Predictor, Result, model_hash
from bigtrain.inference.prediction_file import PredictionFile, State, note_results, row_writer
from bigtrain.sources.records import file_stamp


@dataclass(frozen=True)
class Request:
    """What is to be predicted, and how it is written."""

    files: list[Path]
    out: Path | None  # None: jsonl to standard output
    columns: dict[str, str]  # field → column, where the model's own are not meant
    top: int | None = None  # classes whose probability is written; None: all
    batch: int | None = None  # inputs per forward pass; None: by a rule
    max_unreadable: int = 0


class Outcome(NamedTuple):
    """What came of it."""

    inputs: int
    unusable: int
    unknown: int  # rows of a table with categories that the training part did not have
    was_complete: bool  # before


def predict_files(folder: Path, request: Request) -> Outcome:
    """Predict what an exported model makes of files, into `request.out` or to standard output.

    A file that was begun by the same command is continued. Raises RequestError for a request that
    cannot be served, before anything is written; and at the end if more inputs than
    `max_unreadable` could not be used: all others have their prediction then.
    """
    if request.top is not None and request.out is not None and request.out.suffix == ".csv":
        raise RequestError(
            "--top with a csv, which has a column for every class", "a jsonl", "--out FILE.jsonl"
        )
    predictor = Predictor(folder)
    columns = predictor.about["columns"] | request.columns
    table = table_columns(predictor.about)
    inputs = find_inputs(request.files, predictor.spec, columns, table)
    if inputs.left_out:
        print(f"{inputs.left_out:,} files are no images by their names: left out", file=sys.stderr)
    if request.out is None:
        was_complete, state = False, _print_all(predictor, inputs, request)
    else:
        was_complete, state = _write_all(predictor, inputs, request, folder, columns)
    if state.unknown:
        print(
            f"rows with categories that the training data did not have: {state.unknown:,}"
            " (`unknown` names the columns)",
            file=sys.stderr,
        )
    _refuse_unusable(state, len(inputs), request)
    return Outcome(len(inputs), state.unusable, state.unknown, was_complete)


def _print_all(predictor: Predictor, inputs: Inputs, request: Request) -> State:
    _, to_text = row_writer(".jsonl", predictor.classes)
    state = State({})
    for rows in _blocks(predictor, inputs, request, 0):
        sys.stdout.write("".join(map(to_text, rows)))
        sys.stdout.flush()
        note_results(state, rows)
    return state


def _write_all(
    predictor: Predictor, inputs: Inputs, request: Request, folder: Path, columns: dict[str, str]
) -> tuple[bool, State]:
    """Whether all of it was there before, and what is there now."""
    assert request.out is not None
    made_from = {
        "model": model_hash(folder),
        "files": file_stamp(inputs.files),
        "columns": columns,
        "top": request.top,
        "batch": request.batch,
        "device": f"{predictor.device.kind} {predictor.dtype}",
        "torch": torch.__version__,
    }
    header, to_text = row_writer(request.out.suffix.lower(), predictor.classes)
    with PredictionFile(request.out, made_from) as file:
        was_complete = file.state.rows == len(inputs)
        for rows in _blocks(predictor, inputs, request, file.state.rows):
            text = "".join(map(to_text, rows))
            file.append(text if file.state.rows else header + text, rows)
        file.complete()
    return was_complete, file.state


def _blocks(
    predictor: Predictor, inputs: Inputs, request: Request, first: int
) -> Iterator[list[Result]]:
    batch_size = request.batch or predictor.batch_size(len(inputs))
    size = predictor.block_size(batch_size)
    blocks = track(
        predictor.blocks(inputs, batch_size, first),
        "predicting",
        total=-(-len(inputs) // size),
        completed=first // size,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    for rows in blocks:
        for row in rows:
            if request.top is not None and "probabilities" in row:
                row["probabilities"] = _likeliest(row["probabilities"], request.top)
        yield rows


def _likeliest(probabilities: dict[str, float], top: int) -> dict[str, float]:
    ordered = sorted(probabilities, key=lambda name: -probabilities[name])
    return {name: probabilities[name] for name in ordered[:top]}


def _refuse_unusable(state: State, num_inputs: int, request: Request) -> None:
    if state.unusable <= request.max_unreadable:
        return
    named = "\n  ".join(state.unusable_first)
    where = request.out or "standard output"
    raise RequestError(
        f"{state.unusable:,} of {num_inputs:,} inputs cannot be used, the first of them:\n  {named}"
        f"\n{where} has the predictions of all others, and a row with an error for each of these",
        f"at most {request.max_unreadable} (--max-unreadable)",
        f"--max-unreadable {state.unusable}, or repair them",
    )
