"""README.md of an export: what was trained on what, how it went, and what was measured."""

import json
from collections import Counter
from typing import Any, NamedTuple

from bigtrain.config.loader import dump, to_yaml
from bigtrain.config.recipe import Recipe
from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.config.versions import installed_versions
from bigtrain.runs.directory import RunDir
from bigtrain.runs.events import EVENT_TEXTS
from bigtrain.runs.hashes import text_hash
from bigtrain.runs.metrics_file import read_metrics

# What a reader of a model card wants to know of a run's course.
_INCIDENTS = (
    "lost_peer",
    "failed",
    "hang",
    "stopped",
    "loss_spike",
    "rewound",
    "step_skipped",
    "checkpoint_rejected",
    "samples_unreadable",
    "best_exported",
)


class ExportOrigin(NamedTuple):
    """Where the weights of an export come from."""

    results: dict[str, Any]
    """`step`, `samples` and the held-out metrics (floats); a run's summary."""
    run: RunDir | None = None
    weights: str = "the run's end"
    """In words, e.g. "checkpoint step-00000020"."""
    evaluated: int | None = None
    """The step of the metrics, where it is another."""


def end_of_run(summary: dict[str, Any], run: RunDir | None) -> ExportOrigin:
    """Of what a finished run exports: its last weights, or those of its best checkpoint."""
    exported = summary.get("exported_step", summary.get("step"))
    if exported == summary.get("step"):
        return ExportOrigin(summary, run)
    return ExportOrigin(summary, run, f"checkpoint step-{exported:08d}, the best", exported)


def model_card(recipe: Recipe, origin: ExportOrigin, hashes: dict[str, str]) -> str:
    """`hashes`: of the weight files, by name."""
    results = origin.results
    start = "random weights"
    if recipe.model.pretrained:
        start = f"pretrained {recipe.model.pretrained}"
    library = "transformers" if TASK_SPECS[recipe.task].is_language else "bigtrain"
    progress = f"{results.get('step', 0):,} steps, {results.get('samples', 0):,} samples"
    when = f" at step {origin.evaluated}" if origin.evaluated is not None else ""
    rows = []
    for name, value in results.items():
        if isinstance(value, float):
            rows.append(f"| {name} | {value:.6g} |")
    hash_rows = [f"| `{name}` | `{digest}` |" for name, digest in hashes.items()]
    hash_rows.append(f"| the recipe | `{_recipe_hash(recipe, origin.run)}` |")
    sections = [
        f"---\nlibrary_name: {library}\ntags: [bigtrain, {recipe.task}]\n---",
        f"# {recipe.name}",
        f"A {recipe.model.name} model for {recipe.task}, trained with bigtrain from {start} on"
        f" `{_data_in_words(recipe)}`:\n{progress}, seed {recipe.seed}. The weights are those of"
        f" {origin.weights}.",
        _table(f"held-out metric{when}", "value", rows),
        "## How it went",
        _course(origin.run),
        "## Hashes (BLAKE3)",
        _table("file", "hash", hash_rows),
        "## Versions",
        ", ".join(f"{package} {version}" for package, version in installed_versions().items()),
        "## Recipe",
        f"`bigtrain train recipe.yaml` trains the model again.\n\n```yaml\n{_shown(recipe)}```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _recipe_hash(recipe: Recipe, run: RunDir | None) -> str:
    """Of the run's own file: a later version of bigtrain would write it with more keys."""
    return text_hash(to_yaml(recipe) if run is None else run.recipe.read_text())


def _shown(recipe: Recipe) -> str:
    """Without what concerns nobody but the one who trained it: trackers, notes, accounts."""
    return dump(recipe.model_dump(mode="json", exclude={"track", "slurm"}, exclude_none=True))


def _data_in_words(recipe: Recipe) -> str:
    train = recipe.data.train
    return train if isinstance(train, str) else json.dumps(train.model_dump())


def _table(first: str, second: str, rows: list[str]) -> str:
    return "\n".join([f"| {first} | {second} |", "|---|---|", *rows]) if rows else ""


def _course(run: RunDir | None) -> str:
    """The run's restarts one by one, and how often anything else worth knowing happened."""
    if run is None or not run.metrics.is_file():
        return ""
    restarts = []
    counts: Counter[str] = Counter()
    for event in read_metrics(run.metrics, "event"):
        name = event["event"]
        if name == "resumed":
            moved = f" ({event['moved']})" if event.get("moved") else ""
            restarts.append(f"- restarted from step {event['step']:,}{moved}")
        elif name in _INCIDENTS:
            counts[EVENT_TEXTS[name]] += 1
    lines = [*restarts, *(f"- {text}: {count} times" for text, count in counts.items())]
    return "\n".join(lines) or "Straight through: no restart, and no step was skipped."
