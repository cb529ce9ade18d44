"""From a recipe's slurm section to a batch script, and what Slurm says of the jobs.

The script is slurm/train.sbatch with other `#SBATCH` lines and its arguments written in, each quoted.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bigtrain.config.loader import LoadedRecipe, recipe_path, shipped_recipes
from bigtrain.config.recipe import Recipe
from bigtrain.errors import RequestError
from bigtrain.runs.directory import asset, run_directory, write_atomic

_START = "set -euo pipefail\n"
# What a job needs of its submitter's environment even where slurm.env names all the rest.
_ALWAYS = ["HOME", "USER", "PATH", "LANG", "BIGTRAIN_PYTHON"]


def render_script(
    recipe: Recipe, reference: str, overrides: list[str], script: str = "train.sbatch"
) -> str:
    """The batch script that trains `reference` (a recipe's file or name; for sweep.sbatch: of runs) with `overrides`."""
    asked, name = recipe.slurm, recipe.name
    options: dict[str, Any] = {
        "job-name": name,
        "output": f"{name}-{'%A_%a' if asked.array else '%j'}.out",
        "nodes": asked.nodes,
        "ntasks-per-node": asked.gpus_per_node or 1,
        "gpus-per-node": asked.gpus_per_node or None,
        "cpus-per-task": asked.cpus_per_gpu,
        "time": asked.time,
        "signal": f"USR1@{asked.grace_seconds}",
        "export": ",".join([*_ALWAYS, *asked.env]) if asked.env is not None else None,
    }
    options |= {
        key: getattr(asked, key)
        for key in ("partition", "account", "qos", "constraint", "array", "dependency")
    }
    command = ["bigtrain", "submit" if script == "train.sbatch" else "sweep", reference, *overrides]
    lines = ["#!/usr/bin/env bash", f"# Written by: {shlex.join(command)!r}"]
    lines += [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    variables = {
        "GRACE_SECONDS": str(asked.grace_seconds),
        "SETUP": asked.setup,
        "CONTAINER": asked.container,
    }
    start = [
        f"export BIGTRAIN_{key}={shlex.quote(value)}"
        for key, value in variables.items()
        if value is not None
    ]
    arguments = shlex.join([reference, *overrides])
    if asked.array and script == "train.sbatch":
        arguments += f' "name={name}-$SLURM_ARRAY_TASK_ID" "seed=$SLURM_ARRAY_TASK_ID"'
    start.append(f"set -- {arguments}")
    body = asset("slurm", script).read_text().split(_START, 1)[1]
    return "\n".join(lines) + "\n" + _START + "\n".join(start) + "\n" + body


def submit(
    loaded: LoadedRecipe,
    reference: str,
    overrides: list[str],
    runs: dict[str, list[str]] | None = None,
) -> dict[str, Any]:
    """Let Slurm check the script, keep it and the recipe as they are now in the run directory, and submit it.

    With `runs`, name → overrides of each: as one job array, from a directory of the sweep's own.
    Raises RequestError when there is no Slurm, or it does not take the job.
    """
    if not shutil.which("sbatch"):
        raise RequestError(
            "there is no sbatch here",
            "a login node of a Slurm cluster",
            "--dry-run to print the script",
        )
    recipe, folder = loaded.recipe, run_directory(loaded.recipe.name + "-sweep" * bool(runs)).path
    frozen, kept = reference, dict[str, str]()
    if (
        reference not in shipped_recipes()
    ):  # a job may wait for days: what it trains must not change meanwhile
        frozen = _keep(kept, folder, recipe_path(reference).read_text(encoding="utf-8"), ".yaml")
    if unset := [name for name in recipe.slurm.env or [] if name not in os.environ]:
        raise RequestError(
            f"slurm.env names {', '.join(unset)}, which is not set here",
            "variables of this shell",
            "export them",
        )
    if runs:
        lines = "".join(shlex.join([frozen, *run]) + "\n" for run in runs.values())
        listed = _keep(kept, folder, lines, ".txt")
        array = f"1-{len(runs)}" + "".join(
            (recipe.slurm.array or "").partition("%")[1:]
        )  # as many at once as it says
        asked = recipe.model_copy(
            update={"slurm": recipe.slurm.model_copy(update={"array": array})}
        )
        script = render_script(asked, listed, [], "sweep.sbatch")
    else:
        script = render_script(recipe, frozen, overrides)
    copy = Path(_keep(kept, folder, script, ".sbatch"))
    _sbatch(recipe, script, "--test-only")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in kept.items():
        write_atomic(Path(path), text)
    job = _sbatch(recipe, script, "--parsable").split(";")[0]
    names = {f"{job}_{task}": name for task, name in enumerate(runs or (), 1)} or {job: recipe.name}
    for number, name in names.items():
        jobs = run_directory(name).path / "jobs.jsonl"
        jobs.parent.mkdir(parents=True, exist_ok=True)
        with jobs.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"job": number, "time": time.time(), "script": copy.name}) + "\n")
    return {"job": job, "run": str(folder), "script": str(copy)}


def _keep(kept: dict[str, str], folder: Path, text: str, suffix: str) -> str:
    """Note that `text` is to be kept in `folder`, under a name that is made of it; that name."""
    path = str(folder / f"submitted-{hashlib.sha256(text.encode()).hexdigest()[:8]}{suffix}")
    kept[path] = text
    return path


def _sbatch(recipe: Recipe, script: str, option: str) -> str:
    """sbatch reads the script from its standard input, so that there is no file to clear away."""
    # An allocation that this is called from must not shine through; only the cluster's configuration must.
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"
    }
    if (
        recipe.slurm.setup is None and "BIGTRAIN_SETUP" not in os.environ
    ):  # a set-up brings its own interpreter
        environment.setdefault("BIGTRAIN_PYTHON", sys.executable)
    done = subprocess.run(
        ["sbatch", option],
        input=script,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        found = done.stderr.strip().splitlines() or ["sbatch failed"]
        raise RequestError(
            found[-1].strip(), "what this cluster has (sinfo)", "other slurm.… in the recipe"
        )
    return done.stdout.strip()
