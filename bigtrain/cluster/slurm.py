"""From a recipe's slurm section to a batch script, and its submission.

The script is slurm/train.sbatch (for a sweep: slurm/sweep.sbatch) with other `#SBATCH` lines, and
with its arguments written in, each quoted.
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
from typing import Any, NamedTuple

from bigtrain.cluster.sweep import SweepRun
from bigtrain.config.loader import LoadedRecipe, recipe_path, shipped_recipes
from bigtrain.config.recipe import Recipe, SlurmConfig
from bigtrain.errors import RequestError
from bigtrain.runs.directory import asset, run_directory, write_atomic

_USAGE_CHECK_END = "exit 2\nfi\n"  # of a shipped script: its arguments are right
# What a job needs of its submitter's environment even where slurm.env names all the rest.
_ALWAYS_EXPORTED = ["HOME", "USER", "PATH", "LANG", "BIGTRAIN_PYTHON"]


# What sbatch says where no recipe is at fault: Slurm is not configured here, or does not answer.
_UNREACHABLE = ("Could not establish a configuration source", "Unable to contact")


class _KeptFile(NamedTuple):
    """A text that a queued job reads later, under a name made of the text."""

    path: Path
    text: str

    @classmethod
    def of_text(cls, folder: Path, text: str, suffix: str) -> "_KeptFile":
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return cls(folder / f"submitted-{digest}{suffix}", text)


def render_script(recipe: Recipe, reference: str, overrides: list[str]) -> str:
    """The batch script that trains `reference` (a recipe's file or name) with `overrides`."""
    arguments = shlex.join([reference, *overrides])
    written_by = f"bigtrain submit {arguments}"
    if recipe.slurm.array:
        arguments += f' "name={recipe.name}-$SLURM_ARRAY_TASK_ID" "seed=$SLURM_ARRAY_TASK_ID"'
    return _render(recipe, "train.sbatch", arguments, written_by)


def submit(loaded: LoadedRecipe, reference: str, overrides: list[str]) -> dict[str, str]:
    """Submit the job that trains a recipe.

    A job may wait for days: it trains a copy of the recipe, which is kept in the run directory with
    the script. Returns the `job`'s number, the `run` directory and the `script`'s path.
    Raises RequestError if there is no Slurm, or it does not take the job.
    """
    recipe = loaded.recipe
    _require_slurm(recipe)
    folder = run_directory(recipe.name).path
    copies = _copy_recipe(folder, reference)
    frozen = str(copies[0].path) if copies else reference
    script = _KeptFile.of_text(folder, render_script(recipe, frozen, overrides), ".sbatch")
    job = _check_and_submit(recipe, script, copies)
    _note_job(recipe.name, job, script)
    return {"job": job, "run": str(folder), "script": str(script.path)}


def submit_sweep(loaded: LoadedRecipe, reference: str, runs: list[SweepRun]) -> dict[str, str]:
    """Submit runs as one job array, from a directory NAME-sweep; otherwise as `submit`.

    `loaded` is the recipe with the settings that all runs share. Of its `slurm.array` only the
    limit of tasks at a time (%N) is kept.
    """
    folder = run_directory(f"{loaded.recipe.name}-sweep").path
    _, percent, limit = (loaded.recipe.slurm.array or "").partition("%")
    array = f"1-{len(runs)}{percent}{limit}"
    slurm = loaded.recipe.slurm.model_copy(update={"array": array})
    recipe = loaded.recipe.model_copy(update={"slurm": slurm})
    _require_slurm(recipe)
    copies = _copy_recipe(folder, reference)
    frozen = str(copies[0].path) if copies else reference
    lines = [shlex.join([frozen, *run.overrides]) + "\n" for run in runs]
    run_list = _KeptFile.of_text(folder, "".join(lines), ".txt")
    argument = shlex.quote(str(run_list.path))
    text = _render(recipe, "sweep.sbatch", argument, f"bigtrain sweep {argument}")
    script = _KeptFile.of_text(folder, text, ".sbatch")
    job = _check_and_submit(recipe, script, [*copies, run_list])
    for task, run in enumerate(runs, 1):
        _note_job(run.name, f"{job}_{task}", script)
    return {"job": job, "run": str(folder), "script": str(script.path)}


def _render(recipe: Recipe, shipped_script: str, arguments: str, written_by: str) -> str:
    """A shipped script with the recipe's options and with `arguments`, which are quoted already."""
    slurm = recipe.slurm
    options = _sbatch_options(recipe.name, slurm)
    lines = ["#!/usr/bin/env bash"]
    lines += [f"# Written by: {line}" for line in written_by.splitlines()]
    lines += [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append", "set -euo pipefail"]
    variables = {
        "BIGTRAIN_GRACE_SECONDS": str(slurm.grace_seconds),
        "BIGTRAIN_SETUP": slurm.setup,
        "BIGTRAIN_CONTAINER": slurm.container,
    }
    for name, value in variables.items():
        if value is not None:
            lines.append(f"export {name}={shlex.quote(value)}")
    lines.append(f"set -- {arguments}")
    _, _, body = asset("slurm", shipped_script).read_text().partition(_USAGE_CHECK_END)
    return "\n".join(lines) + "\n" + body


def _sbatch_options(name: str, slurm: SlurmConfig) -> dict[str, Any]:
    """sbatch's option → its value; None where the option is left out."""
    exported = [*_ALWAYS_EXPORTED, *slurm.env] if slurm.env is not None else None
    return {
        "job-name": name,
        "output": f"{name}-%A_%a.out" if slurm.array else f"{name}-%j.out",
        "nodes": slurm.nodes,
        "ntasks-per-node": slurm.gpus_per_node or 1,
        "gpus-per-node": slurm.gpus_per_node or None,
        "cpus-per-task": slurm.cpus_per_gpu,
        "time": slurm.time,
        "signal": f"USR1@{slurm.grace_seconds}",
        "export": ",".join(exported) if exported else None,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "array": slurm.array,
        "dependency": slurm.dependency,
    }


def _require_slurm(recipe: Recipe) -> None:
    """Raises RequestError without sbatch, or without a variable that slurm.env names."""
    if not shutil.which("sbatch"):
        raise RequestError(
            "there is no sbatch here",
            "a login node of a Slurm cluster",
            "--dry-run to print the script",
        )
    unset = [name for name in recipe.slurm.env or [] if name not in os.environ]
    if unset:
        raise RequestError(
            f"slurm.env names {', '.join(unset)}, which is not set here",
            "variables of this shell",
            "export them",
        )


def _copy_recipe(folder: Path, reference: str) -> list[_KeptFile]:
    """A copy of the user's recipe file; none of a shipped recipe, which does not change."""
    if reference in shipped_recipes():
        return []
    text = recipe_path(reference).read_text(encoding="utf-8")
    return [_KeptFile.of_text(folder, text, ".yaml")]


def _check_and_submit(recipe: Recipe, script: _KeptFile, others: list[_KeptFile]) -> str:
    """Let Slurm check the script, write the files that the job reads, and submit it: its number."""
    _sbatch(recipe, script.text, "--test-only")
    script.path.parent.mkdir(parents=True, exist_ok=True)
    for file in (*others, script):
        write_atomic(file.path, file.text)
    return _sbatch(recipe, script.text, "--parsable").split(";")[0]


def _note_job(run_name: str, job: str, script: _KeptFile) -> None:
    """Note in the run's directory which job is to train it."""
    path = run_directory(run_name).path / "jobs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {"job": job, "time": time.time(), "script": script.path.name}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _sbatch(recipe: Recipe, script: str, option: str) -> str:
    """What sbatch prints. It reads the script from standard input, so no file is left behind."""
    done = subprocess.run(
        ["sbatch", option],
        input=script,
        env=_job_environment(recipe),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        messages = done.stderr.strip().splitlines() or ["sbatch failed"]
        if any(sign in done.stderr for sign in _UNREACHABLE):
            raise RequestError(messages[-1].strip(), "a cluster that answers", "sinfo")
        raise RequestError(
            messages[-1].strip(), "what this cluster has (sinfo)", "other slurm.… in the recipe"
        )
    return done.stdout.strip()


def _job_environment(recipe: Recipe) -> dict[str, str]:
    """This shell's environment, without the SLURM_ variables of an allocation around it."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not name.startswith("SLURM_")
    }
    has_setup = recipe.slurm.setup is not None or "BIGTRAIN_SETUP" in os.environ
    if not has_setup:  # a setup file brings its own interpreter
        environment.setdefault("BIGTRAIN_PYTHON", sys.executable)
    return environment
