"""The commands about a trained model as files: `export`, `average` and `verify`.

cli.py gives them their names. What is heavy is imported inside, as there.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bigtrain.cli_shared import Json, RunArgument, print_json
from bigtrain.errors import RequestError

Dtype = Annotated[
    Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="of parameters; default: fp32")
]
ShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="larger weights are cut into files of this size")
]
Sign = Annotated[
    Path | None, typer.Option(metavar="KEY.pem", help="sign it with an Ed25519 private key")
]
Push = Annotated[str | None, typer.Option(metavar="HUB_ID", help="upload it afterwards")]
_SHARD_SIZE = "5GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
    step: Annotated[
        str | None,
        typer.Option(
            metavar="N|best|last",
            help="of this checkpoint; default: a finished run's model, else the last",
        ),
    ] = None,
    form: Annotated[
        Literal["hf", "onnx"], typer.Option("--format", help="Hugging Face's, or ONNX")
    ] = "hf",
    dtype: Dtype = None,
    shard_size: ShardSize = _SHARD_SIZE,
    sign: Sign = None,
    push: Push = None,
    as_json: Json = False,
) -> None:
    """Write a run's model to OUT as others load it; the run need not have finished."""
    from bigtrain.runs.directory import find_run

    directory = find_run(run)
    max_bytes = _bytes(shard_size)
    if step is not None and step not in ("best", "last") and not step.isdecimal():
        raise RequestError(f"--step {step}", "a step's number, best or last", "--step last")
    if form == "onnx" and dtype not in (None, "fp32"):
        raise RequestError(f"--format onnx with --dtype {dtype}", "fp32", "leave --dtype out")
    if form == "onnx" and shard_size != _SHARD_SIZE:
        raise RequestError(
            f"--format onnx with --shard-size {shard_size}", "one file", "leave --shard-size out"
        )
    from bigtrain.exporting.export import refuse_used_folder, write_model
    from bigtrain.models.export import Stored, whole_folder

    refuse_used_folder(out)
    finish = _Finish(sign, push)
    with whole_folder(out) as folder:
        result = write_model(directory, folder, step, Stored(dtype, max_bytes))
        if form == "onnx":
            from bigtrain.exporting.onnx_export import replace_by_onnx

            result["onnx"] = replace_by_onnx(folder)
        finish.sign(folder)
    finish.push(out)
    whose = "" if result["weights"] == "the run's end" else f" of {result['weights']}"
    _report(result, out, as_json, f"the model{whose} is in {out}")


def average(
    run: RunArgument,
    out: Annotated[Path | None, typer.Argument(help="default: average/ in the run")] = None,
    last: Annotated[int, typer.Option(min=2, help="how many of the newest checkpoints")] = 5,
    dtype: Dtype = None,
    shard_size: ShardSize = _SHARD_SIZE,
    sign: Sign = None,
    push: Push = None,
    as_json: Json = False,
) -> None:
    """Export the mean of a run's last checkpoints' weights, and evaluate it."""
    from bigtrain.runs.directory import find_run

    directory = find_run(run)
    out = out or directory.path / "average"
    max_bytes = _bytes(shard_size)
    from bigtrain.exporting.average import average_checkpoints
    from bigtrain.models.export import Stored

    finish = _Finish(sign, push)
    result = average_checkpoints(directory, out, last, Stored(dtype, max_bytes), finish.sign)
    finish.push(out)
    if not as_json:
        for name, before in result["before"].items():
            print(
                f"  held-out {name.replace('_', ' ')}: {before:.6g} → {result['after'][name]:.6g}"
            )
        if result["not_evaluated"]:
            print(f"  not evaluated: {result['not_evaluated']}")
    steps = ", ".join(str(step) for step in result["steps"])
    _report(result, out, as_json, f"the mean of steps {steps} is in {out}")


def verify(
    run: Annotated[
        str, typer.Argument(metavar="RUN|FOLDER", help="a run, or a folder that was exported")
    ],
    key: Annotated[
        Path | None, typer.Option(metavar="PUB.pem", help="the public key of who signed it")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check the files of a run's checkpoints, or of a signed export; exit 1 if any is wrong."""
    from bigtrain.runs.signatures import SIGNATURE

    folder = Path(run)
    is_run = (folder / "recipe.yaml").is_file() or not folder.is_dir()
    if key is not None or not is_run or (folder / SIGNATURE).is_file():
        _verify_signature(folder, key, as_json)
        return
    from bigtrain.checkpoint.format import committed_checkpoints, verify_checkpoint
    from bigtrain.runs.directory import find_run

    checkpoints = committed_checkpoints(find_run(run))
    problems = {path.name: verify_checkpoint(path) for path in checkpoints}
    if as_json:
        print_json(problems)
    elif not problems:
        print("no checkpoints")
    else:
        for name, found in problems.items():
            print(name, "; ".join(found) or "ok")
    if any(problems.values()):
        raise typer.Exit(1)


def _verify_signature(folder: Path, key: Path | None, as_json: bool) -> None:
    from bigtrain.runs.signatures import load_public_key, verify_folder

    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder", "a folder that was exported with --sign")
    problems = verify_folder(folder, None if key is None else load_public_key(key))
    if as_json:
        is_authenticated = key is not None and not problems
        print_json({str(folder): problems, "authenticated": is_authenticated})
    else:
        for problem in problems:
            print(problem)
        if not problems:
            print(f"{folder} ok")
        if key is None:
            print("  no --key PUB.pem: anyone may have signed this", flush=True)
    if problems:
        raise typer.Exit(1)


class _Finish:
    """What is done with a folder once it is written; refuses what cannot work before it is."""

    def __init__(self, sign: Path | None, push: str | None) -> None:
        self.key: Any = None
        self.hub_id = push
        if sign is not None:
            from bigtrain.runs.signatures import load_private_key

            self.key = load_private_key(sign)
        if push is not None:
            from bigtrain.exporting.publish import refuse_bad_hub_id

            refuse_bad_hub_id(push)

    def sign(self, folder: Path) -> None:
        if self.key is not None:
            from bigtrain.runs.signatures import sign_folder

            sign_folder(folder, self.key)

    def push(self, folder: Path) -> None:
        if self.hub_id is not None:
            from bigtrain.exporting.publish import push

            push(folder, self.hub_id)


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", size.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise RequestError(f"--shard-size {size}", "e.g. 5GB or 500MB", "--shard-size 5GB")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def _report(result: dict[str, Any], out: Path, as_json: bool, text: str) -> None:
    if as_json:
        print_json({"out": str(out), **result})
    else:
        print(text)
