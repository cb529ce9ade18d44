"""The commands that use a trained model: `predict` and `generate`.

cli.py gives them their names. What is heavy is imported inside, as there.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bigtrain.cli_shared import Json
from bigtrain.errors import RequestError

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="a run's name below runs/, its directory, or an exported folder"
    ),
]


def predict(
    run: ModelArgument,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES...",
            help="texts (one in each line; jsonl, csv, parquet), or images and folders of them",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl|.csv", help="default: jsonl to the terminal; a file can be resumed"
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD=NAME", help="the column of a field, e.g. text=body"),
    ] = None,
    top: Annotated[
        int | None, typer.Option(min=1, help="write only the likeliest classes' probabilities")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="inputs per forward pass; default: about 16k tokens")
    ] = None,
    max_unreadable: Annotated[
        int, typer.Option(min=0, help="how many inputs may be unusable; one more ends with 2")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Write what a model makes of files: classes with probabilities, numbers or texts."""
    from bigtrain.api import find_export

    folder = find_export(run)
    if as_json and out is None:
        raise RequestError("--json without --out: standard output is jsonl already", "--out FILE")
    columns: dict[str, str] = {}
    for setting in column or []:
        field, sign, name = setting.partition("=")
        if not sign:
            raise RequestError(f"--column {setting}", "FIELD=NAME", "--column text=body")
        columns[field] = name
    from bigtrain.inference.predict_files import Request, predict_files

    outcome = predict_files(folder, Request(files, out, columns, top, batch, max_unreadable))
    if as_json:
        counts = {
            "inputs": outcome.inputs,
            "unusable": outcome.unusable,
            "unknown": outcome.unknown,
        }
        print(json.dumps({"out": str(out), **counts}))
    elif out is not None:
        state = "was complete already" if outcome.was_complete else "is complete"
        note = f", {outcome.unusable:,} of them unusable" if outcome.unusable else ""
        print(f"{out} {state}: {outcome.inputs:,} inputs{note}")


def generate(
    run: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="the text to continue")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="how many tokens to write at most")] = 200,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0 takes the likeliest token; default: 0.8, and 0 for answers"),
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(min=0, max=1, help="draw from the likeliest tokens of this probability"),
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="a text that ends the writing, and is not printed"),
    ] = None,
    seed: Annotated[int, typer.Option(help="decides the sample")] = 0,
    prompts: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="prompts, one in each line, or jsonl"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Let a language model (or sequence-to-sequence model) write."""
    from bigtrain.api import find_export

    folder = find_export(run)
    if prompt and prompts is not None:
        raise RequestError("a prompt, and --from", "one of them")
    from bigtrain.inference.generate import Generator, read_prompts

    generator = Generator(folder)
    decoding = generator.decoding(tokens, temperature, top_p, tuple(stop or []))
    if prompts is not None:
        for answered, text in generator.write_all(read_prompts(prompts), decoding, seed):
            _print_line({"prompt": answered, "text": text})
    elif as_json:
        _print_line({"prompt": prompt, "text": generator.write(prompt, decoding, seed)})
    else:
        generator.write(prompt, decoding, seed, show=partial(print, end="", flush=True))
        print()


def _print_line(result: dict[str, str]) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)
