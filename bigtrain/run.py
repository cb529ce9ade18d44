"""What happens when a recipe is run: read from top to bottom."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bigtrain import checkpoint, dsconfig, engine, export, models
from bigtrain.data import Corpus, prepare, train_batches
from bigtrain.errors import RequestError
from bigtrain.load import Loaded, changes, flatten, load_recipe, to_yaml
from bigtrain.loop import Training, train
from bigtrain.optim import make_optimizer
from bigtrain.plan import Plan, make_plan
from bigtrain.recipe import Recipe
from bigtrain.rundir import RunDir, release_ownership, run_directory, take_ownership, write_atomic
from bigtrain.stop import StopFlag
from bigtrain.tasks import TASKS, Task
from bigtrain.tasks.base import outputs
from bigtrain.track import Everyone, MetricsFile, NoTracker, Terminal, WandB, console, logged_in

Settings = dict[str, dict[str, Any]]


def run_recipe(
    loaded: Loaded, fresh: bool = False, allow_change: Sequence[str] = (), as_json: bool = False
) -> dict[str, Any]:
    """Train what the recipe says, going on from the run's newest checkpoint; returns the run's summary."""
    recipe = loaded.recipe
    changed = {} if fresh else _changes_since(run_directory(recipe.name), recipe, list(allow_change))
    if recipe.track.wandb == "online" and not logged_in():
        raise RequestError(
            "track.wandb is online, but W&B has no key", "a login", "wandb login, or track.wandb=offline"
        )
    device = engine.find_device(recipe.engine.device)
    launcher = dsconfig.read_launcher(os.environ)
    dsconfig.refuse_contradictions(launcher, recipe.engine, loaded.origins, os.environ)
    corpus = prepare(recipe)
    plan, planned = make_plan(
        recipe.engine,
        world_size=engine.world_from_environment()[1],
        samples=len(corpus.train),
        sample_cost=corpus.sample_cost,
        bf16_is_fast=device.bf16_is_fast,
        launcher_kind=launcher.kind,
        launcher_offload=launcher.offload,
        launcher_precision=launcher.precision,
    )
    ds_config = {} if plan.kind == "ddp" else dsconfig.render(plan, recipe.optim.clip_norm, launcher)
    task = TASKS[recipe.task](recipe.task, corpus, recipe.train.label_smoothing)
    ranks = engine.start(plan, device, ds_config, recipe.optim.clip_norm)
    try:
        model = models.build(recipe, corpus, ranks.shard)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        ranks.prepare(model, lambda module: make_optimizer(module, recipe.optim))
        _try_forward(ranks, task, corpus)
        settings = _settings(loaded, plan, planned, ds_config, launcher.source) | _micro_batch_dependence(model)
        run = _open_run(loaded, ranks, settings, fresh)
        try:
            return _train(loaded, run, ranks, task, corpus, settings, changed, parameters, console(as_json))
        finally:
            if ranks.main:
                release_ownership(run)
    finally:
        ranks.close()


def _changes_since(run: RunDir, recipe: Recipe, allowed: list[str]) -> dict[str, str]:
    """How the recipe differs from the one this run began with; RequestError for what may not differ."""
    if not run.recipe.is_file() or not checkpoint.committed(run):
        return {}
    return changes(load_recipe(str(run.recipe)).recipe, recipe, allowed)


def _micro_batch_dependence(model: torch.nn.Module) -> Settings:
    """Normalisation over the micro-batch makes the loss depend on how the global batch is cut: say so."""
    found = sorted({type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__})
    if not found:
        return {}
    return {"normalisation": {"value": "depends on the micro-batch", "origin": f"model ({', '.join(found)})"}}


def _train(
    loaded: Loaded,
    run: RunDir,
    ranks: engine.Engine,
    task: Task,
    corpus: Corpus,
    settings: Settings,
    changed: dict[str, str],
    parameters: int,
    screen: Console,
) -> dict[str, Any]:
    recipe = loaded.recipe
    path, broken = checkpoint.newest(ranks, run)
    state, moved = checkpoint.load(ranks, path) if path else (checkpoint.State(), "")
    if ranks.main:
        _announce(screen, run, settings, corpus, parameters, path)
    tracker = _tracker(loaded, run, ranks, task, settings, screen)
    if "normalisation" in settings:
        tracker.event(state.step, "normalisation", **settings["normalisation"])
    for line in broken:
        tracker.event(state.step, "checkpoint set aside", reason=line)
    if path and changed:
        tracker.event(state.step, "recipe changed", **changed)
    if path:
        tracker.event(state.step, "resumed", path=str(path), **({"moved": moved} if moved else {}))
    batches = train_batches(
        corpus.train,
        ranks.plan,
        ranks.rank,
        recipe.seed,
        state.samples,
        task.collate,
        recipe.data.augment,
        recipe.data.workers,
    )
    training = Training(recipe, run, ranks, task, corpus, batches, tracker, state, StopFlag())
    summary: dict[str, Any] = {"name": run.name, "parameters": parameters}
    try:
        results = train(training) or _last_results(training)
        summary |= {"status": "finished", **asdict(state), **results, "baselines": corpus.baselines}
        export.write(ranks, recipe, corpus, run, summary)
        if ranks.main:
            run.write_json(run.summary, summary)
    finally:
        tracker.close({key: value for key, value in summary.items() if isinstance(value, int | float)})
    return summary


def _last_results(training: Training) -> dict[str, float]:
    """The results of a run that had nothing left to do."""
    from bigtrain.loop import evaluate

    return evaluate(training.engine, training.task, training.corpus)


def _try_forward(ranks: engine.Engine, task: Task, corpus: Corpus) -> None:
    """Two examples through the model before anything is written: it must fit the data and the task. A collective."""
    if corpus.tokenizer is not None:  # the longest text: positions may run out
        size = lambda i: sum(len(value) for value in corpus.train[i].values() if isinstance(value, np.ndarray))  # noqa: E731
        longest = max(range(min(512, len(corpus.train))), key=size)
    else:
        longest = len(corpus.train) - 1
    batch = ranks.to_device(task.collate([corpus.train[longest], corpus.train[0]]))
    name = type(ranks.module).__name__
    ranks.model.eval()
    try:
        with torch.no_grad(), ranks.autocast():
            task.loss_sum(ranks.model, batch)
            looks_ahead = task.name == "causal_lm" and _looks_ahead(ranks, task, batch)
    except RequestError:
        raise
    except Exception as problem:  # whatever a model says of an input that does not fit it
        given = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in batch.items() if key != "labels")
        raise RequestError(
            f"{name}.forward does not fit task {task.name}: {type(problem).__name__}: {problem}",
            f"forward({given}) → logits",
            "other model.args, or another model, for this data",
        ) from None
    if looks_ahead:
        raise RequestError(f"{name} sees the tokens it is to predict", "a causal language model (gpt2, llama, rnn …)")


def _looks_ahead(ranks: engine.Engine, task: Task, batch: dict[str, torch.Tensor]) -> bool:
    """Whether another second half changes what is said of the first."""
    ids, half = batch["input_ids"][:1], batch["input_ids"].shape[1] // 2
    other = torch.cat([ids[:, :half], (ids[:, half:] + 1) % (task.corpus.vocab_size or 2)], dim=1)
    before, after = (outputs(ranks.model, input_ids=tokens)[:, :half] for tokens in (ids, other))
    return half > 0 and bool((before - after).abs().max() > 1e-3 * before.std())


def _settings(loaded: Loaded, plan: Plan, planned: dict[str, str], ds_config: dict[str, Any], source: str) -> Settings:
    """Every setting in force with its value and origin; what the plan decided replaces the recipe's `auto`."""
    values = flatten(loaded.recipe.model_dump(mode="json"))
    settings = {key: {"value": value, "origin": loaded.origins.get(key, "default")} for key, value in values.items()}
    for name, value in asdict(plan).items():
        key = f"engine.{name}"
        if key in planned or key not in settings or settings[key]["value"] != value:
            settings[key] = {"value": value, "origin": planned.get(key, "launcher" if name == "world_size" else "plan")}
    settings["engine.accumulation"] = {"value": plan.accumulation, "origin": "plan"}
    origin = source if source and ds_config and source.endswith(".json") else f"ds_configs for {plan.kind}"
    for key, value in flatten(ds_config).items() if ds_config else ():
        settings[f"deepspeed.{key}"] = {"value": value, "origin": origin}
    for package in ("bigtrain", "torch", "accelerate", "deepspeed", "transformers", "datasets"):
        settings[f"versions.{package}"] = {"value": version(package), "origin": "installed"}
    settings["threads"] = {"value": torch.get_num_threads(), "origin": "OMP_NUM_THREADS or the machine"}
    return settings


def _open_run(loaded: Loaded, ranks: engine.Engine, settings: Settings, fresh: bool) -> RunDir:
    """The run directory, with recipe.yaml and effective.json in it: the first thing that is written."""
    run, refused = run_directory(loaded.recipe.name, fresh), None
    if ranks.main:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            take_ownership(run)
            write_atomic(run.recipe, to_yaml(loaded.recipe))
            run.write_json(run.effective, settings)
        except RequestError as problem:
            refused = problem
    run, refused = ranks.gather((run, refused))[0]
    if refused is not None:
        raise refused
    return run


def _announce(screen: Console, run: RunDir, settings: Settings, corpus: Corpus, parameters: int, path: Any) -> None:
    """The settings in force, grouped by who set them; then what is about to happen."""
    groups: dict[str, list[str]] = {}
    for key, setting in settings.items():
        groups.setdefault(setting["origin"].split(":")[0].split(" ")[0], []).append(f"{key}={setting['value']}")
    for origin, texts in groups.items():
        screen.print(f"[bold]{origin}[/]: " + "  ".join(text.replace("[", r"\[") for text in texts), highlight=False)
    for note in corpus.notes:
        screen.print(f"note: {note}", highlight=False)
    begin = f"going on from {path.name}" if path else "starting"
    screen.print(
        f"{begin}: {run.path}  {parameters:,} parameters, "
        f"{len(corpus.train):,} training and {len(corpus.eval):,} held-out samples",
        highlight=False,
    )


def _tracker(
    loaded: Loaded, run: RunDir, ranks: engine.Engine, task: Task, settings: Settings, screen: Console
) -> Everyone:
    if not ranks.main:
        return Everyone(NoTracker())
    recipe = loaded.recipe
    config = {key: setting["value"] for key, setting in settings.items()}
    wandb = NoTracker() if recipe.track.wandb == "off" else WandB(recipe.track, run, recipe.name, config)
    return Everyone(MetricsFile(run), Terminal(recipe.train.steps, task.unit, screen), wandb)


def exit_code_of(problem: BaseException) -> int:
    """3 for what would fail again; 76 when the words are those of a collective that lost a peer."""
    lost = ("connection closed by peer", "connection reset", "broken pipe", "timed out waiting", "socket closed")
    alone = engine.world_from_environment()[1] == 1
    if alone or not (isinstance(problem, RuntimeError) and any(sign in str(problem).lower() for sign in lost)):
        return 3
    print("bigtrain: lost a peer; the same command goes on from the last checkpoint", file=sys.stderr)
    return 76
