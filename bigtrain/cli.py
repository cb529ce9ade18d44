"""The `bigtrain` command. Each command imports what it needs inside, so that help and errors answer at once."""

import contextlib
import gc
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from bigtrain.errors import BigtrainError, RecipeError, RequestError, TrainingFailed

app = typer.Typer(
    help="Train large models on any number of GPUs: a recipe in, a trained model out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: importing rich would double its time
    pretty_exceptions_enable=False,
)
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a YAML file, or a shipped recipe's name")
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="a run's name below runs/, or its directory")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="e.g. optim.lr=3e-4 engine.kind=zero2"),
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
LAUNCHER = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node {{ranks}}"


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="start NAME-2 instead of going on")
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="go on although this key of the recipe has changed"),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="print errors and the result alone")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train; goes on by itself if the run has a checkpoint."""
    from bigtrain.config.loader import load_recipe
    from bigtrain.training.signals import listen

    listen()
    loaded = load_recipe(recipe, overrides)
    from bigtrain.tracking.terminal import console
    from bigtrain.training.run import run_recipe

    gc.set_threshold(700)  # Python's own again: a cycle may hold a device's memory (__main__.py)
    summary = run_recipe(loaded, console(as_json, quiet), fresh, allow_change or [])
    if os.environ.get("RANK", "0") == "0":
        _print(summary, as_json, _finished)


def _finished(summary: dict[str, Any]) -> None:
    skipped = summary["step"] - summary["applied"]
    note = f", {skipped:,} of them SKIPPED (not finite)" if skipped else ""
    print(
        f"finished {summary['name']}: {summary['step']:,} steps{note}, {summary['samples']:,} samples"
    )
    for name, value in summary.items():
        if isinstance(value, float):
            print(f"  held-out {name.replace('_', ' ')}: {value:.4f}")
    if baselines := summary["baselines"]:
        print(
            f"  for comparison, on the same text: bytes by frequency (unigram) {baselines['unigram_bits_per_byte']:.2f},"
            f" gzip -9 {baselines['gzip_bits_per_byte']:.2f} bits per byte"
        )
    print(f"  everything is in runs/{summary['name']}; the model in runs/{summary['name']}/export")


@app.command()
def evaluate(run: RunArgument, overrides: Overrides = None, as_json: Json = False) -> None:
    """Evaluate a finished run's model again, on its held-out data or on other data."""
    found = _find(run, finished=True)
    from bigtrain.inference.evaluate import evaluate_run

    _print(evaluate_run(found, overrides or []), as_json, _table)


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(help="the text to go on from")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="tokens to write, at most")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.8,
    seed: Annotated[int, typer.Option(help="decides the sample")] = 0,
    as_json: Json = False,
) -> None:
    """Let a finished language model (or sequence-to-sequence model) write."""
    found = _find(run, finished=True)
    from bigtrain.inference.generate import generate_text

    text = generate_text(found, prompt, tokens, temperature, seed)
    _print(
        {"prompt": prompt, "text": text},
        as_json,
        lambda result: print(result["prompt"] + result["text"]),
    )


@app.command()
def export(
    run: RunArgument, out: Annotated[Path, typer.Argument(help="a folder that does not exist yet")]
) -> None:
    """Copy a finished run's model (Hugging Face format) to OUT."""
    from bigtrain.inference.export import copy_export

    copy_export(_find(run, finished=True), out)
    print(out)


@app.command()
def verify(run: RunArgument, as_json: Json = False) -> None:
    """Check every file of every checkpoint of a run against its hash; exit 1 if any is broken."""
    from bigtrain.checkpoint.format import committed_checkpoints, verify_checkpoint

    result = {path.name: verify_checkpoint(path) for path in committed_checkpoints(_find(run))}
    shown = (
        "\n".join(f"{name} {'; '.join(problems) or 'ok'}" for name, problems in result.items())
        or "no checkpoints"
    )
    _print(result, as_json, lambda _: print(shown), not any(result.values()))


@app.command()
def prove(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="default: one per GPU; without GPUs two")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=4, help="of each run; the kill comes after half of them")
    ] = 20,
    launcher: Annotated[
        str, typer.Option(help="what starts {ranks} processes of python")
    ] = LAUNCHER,
    as_json: Json = False,
) -> None:
    """Prove on this machine that a killed run resumes exactly; exit 1 if it does not."""
    from bigtrain.config.loader import load_recipe

    loaded = load_recipe(recipe, overrides)
    if ranks is None:
        import torch

        ranks = torch.cuda.device_count() or 2
    from bigtrain.testing.resume_proof import prove as make_proof

    result = make_proof(loaded, recipe, overrides or [], ranks, steps, launcher)
    _print(result, as_json, _proof, result["verdict"] == "PASS")


def _proof(result: dict[str, Any]) -> None:
    print(f"against {result['steps']} steps straight through on {result['ranks']} ranks:")
    for row in result["rows"]:
        print("\n".join(f"  {key:<15} {value}" for key, value in row.items()), end="\n\n")
    print(result["verdict"])


@app.command()
def submit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the script instead")] = False,
    as_json: Json = False,
) -> None:
    """Write the Slurm job of a recipe, and submit it."""
    from bigtrain.cluster.slurm import render_script
    from bigtrain.cluster.slurm import submit as submit_job
    from bigtrain.config.loader import load_recipe

    loaded = load_recipe(recipe, overrides)
    if dry_run:
        result, told = {"script": render_script(loaded.recipe, recipe, overrides or [])}, "{script}"
    else:
        result = submit_job(loaded, recipe, overrides or [])
        told = "job {job} is to train {run}; its script is {script}\n  bigtrain status shows how it goes\n"
    _print(result, as_json, lambda result: print(told.format(**result), end=""))


@app.command()
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="default: all below runs/")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what runs are doing, and whether they are well."""
    from bigtrain.runs.directory import find_run
    from bigtrain.runs.status import all_runs, show, status_or_why_not

    found = [
        status_or_why_not(each) for each in ([find_run(run, submitted=True)] if run else all_runs())
    ]
    _print(found, as_json, show)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="names below runs/, directories, globs")
    ],
    by: Annotated[
        Literal["steps", "samples", "tokens", "hours"],
        typer.Option(help="what the page's curves run over"),
    ] = "steps",
    html: Annotated[Path | None, typer.Option(help="write one self-contained page there")] = None,
    to: Annotated[
        float | None, typer.Option(help="a training loss: steps and hours until it is reached")
    ] = None,
    price: Annotated[float, typer.Option(min=0, help="of one rank's GPU per hour")] = 0.0,
    csv: Annotated[bool, typer.Option("--csv", help="print the results as CSV")] = False,
    as_json: Json = False,
) -> None:
    """Put runs side by side: settings that differ, results, and curves."""
    from bigtrain.runs.compare import compare as compare_runs
    from bigtrain.runs.compare import page, show, to_csv

    compared, found = compare_runs(runs, to, price)
    if html is not None:
        html.write_text(page(compared, found, by), encoding="utf-8")
        print(f"{html} written", file=sys.stderr)
    if csv:
        print(to_csv(compared["results"]), end="")
    else:
        _print(compared, as_json, show)


@app.command()
def sweep(
    recipe: RecipeArgument,
    settings: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUES...", help="e.g. optim.lr=1e-4,3e-4 seed=0..4")
    ],
    draw: Annotated[
        int | None, typer.Option("--random", min=1, help="draw so many combinations instead of all")
    ] = None,
    launcher: Annotated[str, typer.Option(help="what starts each run here")] = sys.executable,
    slurm: Annotated[bool, typer.Option("--slurm", help="submit them as one Slurm array")] = False,
    wandb: Annotated[
        bool, typer.Option("--wandb", help="print the file that W&B's sweep agents read")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the runs instead")] = False,
    as_json: Json = False,
) -> None:
    """Train many variants of a recipe, here one after another, and compare them; or let Slurm or W&B do it."""
    from bigtrain.cluster.slurm import submit as submit_job
    from bigtrain.cluster.sweep import base, expand, parse, run_locally, wandb_file

    axes = parse(settings, draw)
    runs = expand(recipe, axes, draw)
    if wandb:
        print(wandb_file(recipe, axes, draw), end="")
    elif dry_run:
        _print(
            [[recipe, *run] for run in runs.values()],
            as_json,
            lambda found: print("\n".join(map(shlex.join, found))),
        )
    elif slurm:
        told = f"job {{job}} is to train {len(runs)} runs; its script is {{script}}\n  bigtrain status shows them all"
        _print(
            submit_job(base(recipe, axes), recipe, [], runs),
            as_json,
            lambda result: print(told.format(**result)),
        )
    else:
        failed = run_locally(recipe, runs, launcher)
        if len(failed) < len(runs):
            compare(list(runs), "steps", None, None, 0.0, False, as_json)
        if failed:
            raise TrainingFailed(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


@app.command()
def sync(run: RunArgument) -> None:
    """Upload to W&B what a run logged offline."""
    from bigtrain.tracking.wandb_sync import sync as upload

    print(upload(_find(run)))


@app.command()
def doctor(
    slurm: Annotated[
        bool, typer.Option("--slurm", help="on every task of the allocation that this is called in")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check this machine, or a whole allocation, before hours are spent; exit 1 if anything is wrong."""
    if slurm:
        if "SLURM_JOB_ID" not in os.environ:
            raise RequestError(
                "there is no Slurm allocation here",
                "inside salloc or sbatch",
                "salloc --nodes=2 bash",
            )
        os.execvp(
            "srun", ["srun", sys.executable, "-m", "bigtrain", "doctor", *["--json"] * as_json]
        )
    from bigtrain.training.doctor import examine

    if rows := examine():
        _print(rows, as_json, _diagnosis, all(row["ok"] for row in rows))


def _diagnosis(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(f"{'ok   ' if row['ok'] else 'WRONG'}  {row['check']:<16}  {row['found']}")
        if not row["ok"]:
            print(f"       try: {row['advice']}")


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from bigtrain.config.loader import shipped_recipes

    result = {
        name: path.read_text().splitlines()[0].lstrip("# ")
        for name, path in shipped_recipes().items()
    }
    _print(result, as_json, _table)


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="the new recipe's name: NAME.yaml is written here")],
    like: Annotated[
        str, typer.Option("--from", help="the shipped recipe to begin with")
    ] = "tiny-lm",
) -> None:
    """Write a shipped recipe out under a name of your own, to edit."""
    import re

    from bigtrain.config.loader import load_recipe, recipe_path

    load_recipe(like, [f"name={json.dumps(name)}"])  # refuses what is no name
    target = Path(f"{name}.yaml")
    if target.exists():
        raise RequestError(f"{target} exists already", "a new name")
    target.write_text(
        re.sub(r"(?m)^name: .*$", f"name: {name}", recipe_path(like).read_text(), count=1)
    )
    print(f"{target} written; edit it, then: bigtrain train {target}")


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    from bigtrain.config.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


def _find(run: str, finished: bool = False) -> Any:
    """The run's directory. Raises RequestError where there is none, or it should have finished and has not."""
    from bigtrain.runs.directory import find_run

    found = find_run(run)
    if finished and not (found.export / "bigtrain.json").is_file():
        fix = f"bigtrain train {found.recipe}"
        raise RequestError(
            f"{found.path} has no export: the run has not finished", "a finished run", fix
        )
    return found


def _print(result: Any, as_json: bool, show: Any, good: bool = True) -> None:
    """Print a command's result; and end with 1 where it is not good."""
    if as_json:
        from bigtrain.runs.directory import to_json

        print(to_json(result))
    else:
        show(result)
    if not good:
        raise typer.Exit(1)


def _table(result: dict[str, Any]) -> None:
    width = max(map(len, result), default=0)
    for name, value in result.items():
        print(f"{name:<{width}}  {f'{value:.6g}' if isinstance(value, float) else value}")


def _leave(code: int) -> NoReturn:
    """End; and tell slurm/train.sbatch of a code that must not be requeued: srun only knows the highest of all ranks."""
    if code in (2, 3) and (verdict := os.environ.get("BIGTRAIN_VERDICT")):
        with contextlib.suppress(OSError):
            Path(verdict).write_text(f"{code}")
    sys.exit(code)


def main() -> None:
    """Run the command line; every error of a user ends with a message and its exit code."""
    os.environ.setdefault(
        "PYDANTIC_DISABLE_PLUGINS", "__all__"
    )  # looking for them would cost a tenth of the start
    try:
        app(standalone_mode=True)
    except BigtrainError as problem:
        from bigtrain.config.secrets import redact

        # Every rank finds the same fault in a recipe, and every rank of a machine the same in its files.
        rank, first = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0") == "0"
        if rank == "0" or (first and not isinstance(problem, RecipeError)):
            print(
                redact(
                    f"bigtrain: {problem}" if rank == "0" else f"bigtrain (rank {rank}): {problem}"
                ),
                file=sys.stderr,
            )
        _leave(problem.exit_code)
    except (PermissionError, FileExistsError, NotADirectoryError) as problem:
        print(
            f"bigtrain: {problem.filename} cannot be written: {problem.strerror}", file=sys.stderr
        )
        _leave(2)
    except Exception as problem:
        if "torch" not in sys.modules:
            raise
        import traceback

        from bigtrain.config.secrets import redact
        from bigtrain.training.endings import exit_code_of

        print(redact(traceback.format_exc()), file=sys.stderr)
        sys.exit(
            exit_code_of(problem)
        )  # no verdict: it may be another rank's death in words that nobody knew
