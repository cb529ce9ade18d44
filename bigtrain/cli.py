"""The commands of `bigtrain`.

Each command imports what it needs inside, so that help and errors about a recipe appear at once.
"""

import gc
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from bigtrain.cli_export import average, export, verify
from bigtrain.cli_shared import Json, RunArgument, print_json
from bigtrain.cli_use import generate, predict
from bigtrain.errors import RequestError, TrainingFailed

if TYPE_CHECKING:
    from bigtrain.cluster.sweep import SweepRun

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
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="e.g. optim.lr=3e-4 engine.kind=zero2"),
]
LAUNCHER = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node {{ranks}}"
gc_threshold = gc.get_threshold()  # Python's own; __main__.py, which raises it first, sets this


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="start NAME-2 instead of continuing NAME")
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="continue although this key of the recipe has changed"),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="print only errors and the result")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe; a run that has a checkpoint is continued from there."""
    from bigtrain.config.loader import load_recipe
    from bigtrain.supervision.signals import listen

    listen()
    loaded = load_recipe(recipe, overrides)
    from bigtrain.tracking.terminal import console
    from bigtrain.training.run import run_recipe

    gc.set_threshold(*gc_threshold)
    summary = run_recipe(loaded, console(as_json, quiet), fresh, allow_change or [])
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary)


def _print_summary(summary: dict[str, Any]) -> None:
    name = summary["name"]
    skipped = summary["step"] - summary["applied"]
    note = f", {skipped:,} of them SKIPPED (not finite)" if skipped else ""
    print(f"finished {name}: {summary['step']:,} steps{note}, {summary['samples']:,} samples")
    for key, value in summary.items():
        if isinstance(value, float):
            print(f"  held-out {key.replace('_', ' ')}: {value:.4f}")
    baselines = summary["baselines"]
    if baselines:
        unigram = baselines["unigram_bits_per_byte"]
        gzip = baselines["gzip_bits_per_byte"]
        print(
            "  for comparison, on the same text: bytes by frequency (unigram)"
            f" {unigram:.2f}, gzip -9 {gzip:.2f} bits per byte"
        )
    print(f"  everything is in runs/{name}; the model in runs/{name}/export")


@app.command()
def evaluate(
    run: RunArgument,
    overrides: Overrides = None,
    html: Annotated[Path | None, typer.Option(help="write one self-contained page there")] = None,
    harness: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="run these tasks of lm-eval instead, with commas"),
    ] = None,
    harness_path: Annotated[
        Path | None, typer.Option(help="a folder with tasks of your own for lm-eval")
    ] = None,
    harness_shots: Annotated[
        int | None, typer.Option(min=0, help="examples in each prompt; default: the task's own")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a finished run's model again, on its held-out data or on other data."""
    from bigtrain.api import find_finished_run

    directory = find_finished_run(run)
    if harness is not None:
        if overrides or html is not None:
            raise RequestError(
                f"--harness with {overrides[0] if overrides else '--html'}",
                "--harness, --harness-path, --harness-shots and --json",
            )
        from bigtrain.evaluation.harness import run_harness, show_harness

        scores = run_harness(directory, harness.split(","), harness_path, harness_shots)
        if as_json:
            print_json(scores)
        else:
            show_harness(scores)
        return
    if html is not None and not html.parent.is_dir():
        raise RequestError(f"there is no folder {html.parent}", "a page in a folder that exists")
    from bigtrain.evaluation.evaluate import evaluate_run
    from bigtrain.evaluation.views import report_evaluation, show_report

    evaluation = evaluate_run(directory, overrides or [])
    if evaluation.is_main:
        report = report_evaluation(evaluation, html)
        if as_json:
            print_json(report.as_dict())
        else:
            show_report(report)


app.command()(predict)
app.command()(generate)


app.command()(export)
app.command()(average)
app.command()(verify)


@app.command()
def compress(
    run: RunArgument,
    prune: Annotated[
        str, typer.Option(metavar="AMOUNTS", help="parts of the weights to zero, e.g. 0.5,0.8")
    ] = "",
    scope: Annotated[
        Literal["global", "layer"], typer.Option(help="prune the smallest of all, or per layer")
    ] = "global",
    structure: Annotated[
        Literal["weights", "channels"], typer.Option(help="prune weights, or whole channels")
    ] = "weights",
    int8: Annotated[
        bool, typer.Option("--int8", help="int8 weights, with and without int8 arithmetic")
    ] = False,
    int4: Annotated[bool, typer.Option("--int4", help="int4 weights")] = False,
    qat: Annotated[
        bool, typer.Option("--qat", help="with --int8, --int4: the same after fine-tuning for it")
    ] = False,
    distill: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="a student that learns from RUN")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="of fine-tuning; default: a third of the run's")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="write one self-contained page there")] = None,
    as_json: Json = False,
) -> None:
    """Prune, quantize and distill a finished run's model; one table of all, measured here."""
    from bigtrain.api import find_finished_run
    from bigtrain.compression.request import parse_request

    request = parse_request(prune, scope, structure, int8, int4, distill, steps, qat)
    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        raise RequestError(f"--html {html}", "a file in a folder that exists", "--html page.html")
    directory = find_finished_run(run)
    from bigtrain.compression.compress import compress_run
    from bigtrain.compression.views import html_page, show
    from bigtrain.supervision.signals import listen

    listen()
    table = compress_run(directory, request, quiet=as_json)
    if html is not None:
        html.write_text(html_page(table), encoding="utf-8")
        print(f"{html} written", file=sys.stderr)
    if as_json:
        print_json(table.as_dict())
    else:
        show(table)


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

    proof = make_proof(loaded, recipe, overrides or [], ranks, steps, launcher)
    if as_json:
        print_json(proof)
    else:
        print(f"against {proof['steps']} steps straight through on {proof['ranks']} ranks:")
        for row in proof["rows"]:
            for key, value in row.items():
                print(f"  {key:<15} {value}")
            print()
        print(proof["verdict"])
    if proof["verdict"] != "PASS":
        raise typer.Exit(1)


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
        script = render_script(loaded.recipe, recipe, overrides or [])
        if as_json:
            print_json({"script": script})
        else:
            print(script, end="")
        return
    job = submit_job(loaded, recipe, overrides or [])
    if as_json:
        print_json(job)
    else:
        print(f"job {job['job']} is to train {job['run']}; its script is {job['script']}")
        print("  bigtrain status shows its state")


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

    runs = [find_run(run, submitted=True)] if run else all_runs()
    statuses = [status_or_why_not(each) for each in runs]
    if as_json:
        print_json([each.as_dict() for each in statuses])
    else:
        show(statuses)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="names below runs/, directories, globs")
    ],
    by: Annotated[
        Literal["steps", "samples", "tokens", "hours"],
        typer.Option(help="what the page's curves are drawn over"),
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
    from bigtrain.runs.compare import compare_runs
    from bigtrain.runs.compare_views import html_page, show, to_csv

    comparison = compare_runs(runs, to, price)
    if html is not None:
        html.write_text(html_page(comparison, by), encoding="utf-8")
        print(f"{html} written", file=sys.stderr)
    if csv:
        print(to_csv(comparison.results), end="")
    elif as_json:
        print_json(comparison.as_dict())
    else:
        show(comparison)


@app.command()
def sweep(
    recipe: RecipeArgument,
    settings: Annotated[
        list[str], typer.Argument(metavar="KEY=VALUES...", help="e.g. optim.lr=1e-4,3e-4 seed=0..4")
    ],
    draw: Annotated[
        int | None,
        typer.Option("--random", min=1, help="draw this many combinations instead of all"),
    ] = None,
    launcher: Annotated[str, typer.Option(help="what starts each run here")] = sys.executable,
    slurm: Annotated[bool, typer.Option("--slurm", help="submit them as one Slurm array")] = False,
    wandb: Annotated[
        bool, typer.Option("--wandb", help="print the file that W&B's sweep agents read")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the commands instead")] = False,
    as_json: Json = False,
) -> None:
    """Train many variants of a recipe: here one after another, or by Slurm or W&B."""
    from bigtrain.cluster.slurm import submit_sweep
    from bigtrain.cluster.sweep import base, expand, parse, wandb_file

    axes = parse(settings, draw)
    runs = expand(recipe, axes, draw)
    if wandb:
        print(wandb_file(recipe, axes, draw), end="")
    elif dry_run:
        commands = [[recipe, *run.overrides] for run in runs]
        if as_json:
            print_json(commands)
        else:
            for command in commands:
                print(shlex.join(["bigtrain", "train", *command]))
    elif slurm:
        job = submit_sweep(base(recipe, axes), recipe, runs)
        if as_json:
            print_json(job)
        else:
            print(f"job {job['job']} is to train {len(runs)} runs; its script is {job['script']}")
            print("  bigtrain status shows them all")
    else:
        _train_and_compare(recipe, runs, launcher, as_json)


def _train_and_compare(recipe: str, runs: "list[SweepRun]", launcher: str, as_json: bool) -> None:
    """Train the runs of a sweep here. Raises TrainingFailed after the comparison if any failed."""
    from bigtrain.cluster.sweep import run_locally
    from bigtrain.runs.compare import compare_runs
    from bigtrain.runs.compare_views import show

    failed = run_locally(recipe, runs, launcher)
    if len(failed) < len(runs):
        comparison = compare_runs([run.name for run in runs])
        if as_json:
            print_json(comparison.as_dict())
        else:
            show(comparison)
    if failed:
        raise TrainingFailed(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


@app.command()
def sync(run: RunArgument) -> None:
    """Upload to W&B what a run logged offline."""
    from bigtrain.runs.directory import find_run
    from bigtrain.tracking.wandb_sync import sync as upload

    print(upload(find_run(run)))


@app.command()
def doctor(
    slurm: Annotated[
        bool, typer.Option("--slurm", help="on every task of the allocation around this shell")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check this machine or an allocation before hours are spent; exit 1 if anything is wrong."""
    if slurm:
        _become_doctor_on_every_task(as_json)
    from bigtrain.doctor.examine import examine

    rows = examine()
    if not rows:
        return  # not rank 0, which reports for all
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            print(f"{'ok   ' if row['ok'] else 'WRONG'}  {row['check']:<16}  {row['found']}")
            if not row["ok"]:
                print(f"       try: {row['advice']}")
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def _become_doctor_on_every_task(as_json: bool) -> NoReturn:
    """Replace this process by srun. Raises RequestError outside of an allocation."""
    if "SLURM_JOB_ID" not in os.environ:
        raise RequestError(
            "there is no Slurm allocation here",
            "inside salloc or sbatch",
            "salloc --nodes=2 bash",
        )
    command = ["srun", sys.executable, "-m", "bigtrain", "doctor"]
    if as_json:
        command.append("--json")
    os.execvp("srun", command)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from bigtrain.config.loader import shipped_recipes

    titles = {}
    for name, path in shipped_recipes().items():
        titles[name] = path.read_text().splitlines()[0].lstrip("# ")
    if as_json:
        print_json(titles)
    else:
        _print_table(titles)


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
    text = recipe_path(like).read_text()
    target.write_text(re.sub(r"(?m)^name: .*$", f"name: {name}", text, count=1))
    print(f"{target} written; edit it, then: bigtrain train {target}")


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for editors."""
    from bigtrain.config.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


def _print_table(rows: dict[str, Any]) -> None:
    width = max((len(name) for name in rows), default=0)
    for name, value in rows.items():
        shown = f"{value:.6g}" if isinstance(value, float) else f"{value}"
        print(f"{name:<{width}}  {shown}")
