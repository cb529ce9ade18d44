"""`bigtrain predict`: from files to a file, or to standard output."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from bigtrain.data.records import file_stamp
from bigtrain.errors import RequestError
from bigtrain.inference.inputs import Inputs, find_inputs, table_columns
from bigtrain.inference.predict import Predictor, Result, model_hash
from bigtrain.inference.prediction_file import PredictionFile, name_of, row_writer


@dataclass(frozen=True)
class Request:
    """What is to be predicted, and how it is written."""

    files: list[Path]
    out: Path | None  # None: jsonl to standard output
    columns: dict[str, str]  # field → column, where the model's own are not meant
    top: int | None = None  # classes whose probability is written; None: all
    batch: int | None = None  # inputs per forward pass; None: by a rule
    max_unreadable: int = 0


@dataclass
class Outcome:
    """What came of it."""

    inputs: int
    unusable: int = 0
    unusable_first: tuple[str, ...] = ()
    was_complete: bool = False
    unknown: int = 0  # rows of a table with a category that the training part did not have

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "inputs": self.inputs,
            "predicted": self.inputs - self.unusable,
            "unusable": self.unusable,
            "unknown": self.unknown,
        }


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
        outcome = _print_all(predictor, inputs, request)
    else:
        outcome = _write_all(predictor, inputs, request, folder, columns)
    if outcome.unknown:
        print(
            f"rows with categories that the training data did not have: {outcome.unknown:,}"
            " (`unknown` names the columns)",
            file=sys.stderr,
        )
    _refuse_unusable(outcome, request)
    return outcome


def _print_all(predictor: Predictor, inputs: Inputs, request: Request) -> Outcome:
    outcome = Outcome(len(inputs))
    _, to_text = row_writer(".jsonl", predictor.classes)
    first: list[str] = []
    for rows in _blocks(predictor, inputs, request, 0):
        sys.stdout.write("".join(map(to_text, rows)))
        sys.stdout.flush()
        bad = [f"{name_of(row)}: {row['error']}" for row in rows if "error" in row]
        outcome.unusable += len(bad)
        outcome.unknown += sum("unknown" in row for row in rows)
        first += bad
    outcome.unusable_first = tuple(first)
    return outcome


def _write_all(
    predictor: Predictor, inputs: Inputs, request: Request, folder: Path, columns: dict[str, str]
) -> Outcome:
    assert request.out is not None
    made_from = {
        "model": model_hash(folder),
        "files": file_stamp(inputs.files),
        "columns": columns,
        "top": request.top,
        "batch": request.batch,
        "device": f"{predictor.device.kind}, {predictor.dtype}",
        "torch": torch.__version__,
    }
    header, to_text = row_writer(request.out.suffix.lower(), predictor.classes)
    with PredictionFile(request.out, made_from, len(inputs)) as file:
        was_complete = file.is_complete
        for rows in _blocks(predictor, inputs, request, file.rows):
            text = "".join(map(to_text, rows))
            file.append(text if file.rows else header + text, rows)
        file.complete()
    return Outcome(
        len(inputs), file.num_unusable, tuple(file.unusable), was_complete, file.num_unknown
    )


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


def _refuse_unusable(outcome: Outcome, request: Request) -> None:
    if outcome.unusable <= request.max_unreadable:
        return
    others = outcome.inputs - outcome.unusable
    named = "\n  ".join(outcome.unusable_first[:5])
    more = outcome.unusable - len(outcome.unusable_first[:5])
    where = f"{request.out} has" if request.out else "above are"
    raise RequestError(
        f"{outcome.unusable:,} of {outcome.inputs:,} inputs cannot be used:\n  {named}"
        + (f"\n  and {more:,} more" if more else "")
        + f"\n{where} the predictions of the other {others:,}, and a row with `error` for each of"
        " these",
        f"at most {request.max_unreadable}",
        f"--max-unreadable {outcome.unusable}, or repair them",
    )
