"""lm-eval's tasks on a finished language model, beside the model that it was trained from."""

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bigtrain.cluster.rendezvous import find_rendezvous
from bigtrain.config.loader import load_recipe
from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir

_TEMPLATE = ("doc_to_text", "doc_to_choice", "doc_to_target", "target_delimiter", "description")
_BATCH = 8


def run_harness(
    run: RunDir, tasks: list[str], folder: Path | None, shots: int | None
) -> dict[str, Any]:
    """Scores of the run's export, and of the model it was trained from; also in harness.json.

    `folder`: with task files of the user's own. `shots`: examples in each prompt; None as each
    task has it. With version, template and hash of each task, so that the scores can be compared
    with others. Raises RequestError for a model that lm-eval cannot run, and for unknown tasks.
    """
    _refuse_what_cannot_run(run)
    manager = _task_manager(tasks, folder)
    results = _evaluate(str(run.export), tasks, manager, shots)
    scores: dict[str, Any] = {
        "harness": "lm-eval",
        "version": version("lm_eval"),
        "base": load_recipe(str(run.recipe)).recipe.model.pretrained,
        "chat_template": None,  # prompts are the tasks' own
        "tasks": {name: _described(name, results) for name in sorted(results["results"])},
    }
    if scores["base"]:
        try:
            base_results = _evaluate(scores["base"], tasks, manager, shots)
        except RequestError as problem:
            scores["base_problem"] = problem.found
        else:
            for name, task in scores["tasks"].items():
                task["base_metrics"] = _described(name, base_results)["metrics"]
    run.write_json(run.path / "harness.json", scores)
    return scores


def _refuse_what_cannot_run(run: RunDir) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise RequestError(
            "lm-eval is not installed", "bigtrain's extra", "pip install 'bigtrain[harness]'"
        ) from None
    if find_rendezvous().world_size > 1:
        raise RequestError(
            "lm-eval is to run on several ranks",
            "one process",
            f"bigtrain evaluate {run.name} --harness TASKS",
        )
    task = json.loads((run.export / "bigtrain.json").read_text())["task"]
    if not TASK_SPECS[task].is_language:
        raise RequestError(
            f"{run.path} was trained for task {task}",
            "a causal_lm or seq2seq run for lm-eval",
            f"bigtrain evaluate {run.name}",
        )
    config = json.loads((run.export / "config.json").read_text())
    if "architecture" in config:
        raise RequestError(
            f"the model of {run.path} ({config['architecture']}) is not one of transformers'",
            "a model that lm-eval can load",
            f"bigtrain evaluate {run.name}",
        )


def _task_manager(tasks: list[str], folder: Path | None) -> Any:
    """lm-eval's list of tasks, with its own only if they are needed: reading them takes seconds."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        if not folder.is_dir():
            raise RequestError(f"{folder} is no folder", "a folder with task files (YAML)")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if all(manager.match_tasks([name]) for name in tasks):
            return manager
    manager = TaskManager(include_path=str(folder) if folder else None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise RequestError(
            f"lm-eval {version('lm_eval')} has no task {', '.join(unknown)}",
            "its own tasks, or those of --harness-path",
            "lm-eval ls tasks",
        )
    return manager


def _evaluate(model: str, tasks: list[str], manager: Any, shots: int | None) -> dict[str, Any]:
    """lm-eval's results. Raises RequestError, with its words, where it fails."""
    import lm_eval

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": model},
            tasks=manager.match_tasks(tasks),
            task_manager=manager,
            num_fewshot=shots,
            batch_size=_BATCH,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # of lm-eval, datasets, the hub, or a task's own code
        reason = str(problem).split("\n")[0]
        raise RequestError(
            f"lm-eval could not run {', '.join(tasks)} on {model}:"
            f" {type(problem).__name__}: {reason}",
            "a model with its tokenizer, and tasks whose data can be read",
        ) from problem
    return results


def _described(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """One task's scores, and what else decides them. A group has no prompts of its own."""
    config = results["configs"].get(name, {})
    return {
        "version": results["versions"].get(name),
        "shots": results["n-shot"].get(name),
        "examples": results["n-samples"].get(name, {}).get("effective"),
        "hash": _hash(results["samples"].get(name, [])),
        "template": {key: str(config[key]) for key in _TEMPLATE if config.get(key) is not None},
        "metrics": {
            key: value
            for key, value in results["results"][name].items()
            if "," in key and isinstance(value, int | float)  # metric,filter
        },
    }


def _hash(samples: list[dict[str, Any]]) -> str | None:
    """lm-eval's own hash of a task: of its documents, prompts and targets."""
    if not samples:
        return None
    parts = [
        sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples
    ]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def show_harness(scores: dict[str, Any]) -> None:
    """A table on the terminal: each score with its standard error, the base model's beside it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    heads = ["task", "shots", "metric", "this run"]
    if scores["base"]:
        heads.append(f"base: {scores['base']}")
    table = Table(*[Column(escape(head), overflow="fold") for head in heads], box=None)
    for name, task in scores["tasks"].items():
        for metric in task["metrics"]:
            if "_stderr," in metric:
                continue
            row = [name, f"{task['shots']}", metric.removesuffix(",none")]
            row.append(_with_error(task["metrics"], metric))
            if scores["base"]:
                row.append(_with_error(task.get("base_metrics", {}), metric))
            table.add_row(*[escape(cell) for cell in row])
    screen = Console()
    screen.print(table)
    if "base_problem" in scores:
        screen.print(f"the base model has no scores: {scores['base_problem']}", markup=False)
    screen.print(f"lm-eval {scores['version']}; more in harness.json of the run", markup=False)


def _with_error(metrics: dict[str, float], metric: str) -> str:
    if metric not in metrics:
        return ""
    error = metrics.get(metric.replace(",", "_stderr,"))
    return f"{metrics[metric]:.4f}" + (f" ± {error:.4f}" if error is not None else "")
