"""What happens when a recipe is run: read from top to bottom."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bigtrain import checkpoint, dsconfig, engine, export, footprint, models
from bigtrain.checkpoint import Checkpoints, Restored, State
from bigtrain.data import prepare, train_batches
from bigtrain.errors import LOST_PEERS, RequestError, StoppedEarly, TrainingFailed
from bigtrain.load import Loaded, changes, flatten, load_recipe, to_yaml
from bigtrain.loop import Training, evaluate, train
from bigtrain.optim import make_optimizer
from bigtrain.plan import Plan, make_plan
from bigtrain.rundir import RunDir, read_metrics, release_ownership, run_directory, take_ownership, write_atomic
from bigtrain.stop import StopFlag
from bigtrain.tasks import TASKS, Task
from bigtrain.tasks.base import outputs
from bigtrain.track import Also, Everyone, MetricsFile, Terminal, WandB, keep_warnings, logged_in
from bigtrain.watch import Watchdog

Settings = dict[str, dict[str, Any]]
_PACKAGES = ("bigtrain", "torch", "accelerate", "deepspeed", "transformers", "datasets")


def run_recipe(loaded: Loaded, screen: Console, fresh: bool = False, allow_change: Sequence[str] = ()) -> dict[str, Any]:
    """Train what the recipe says, going on from the run's newest checkpoint; returns the run's summary."""
    recipe = loaded.recipe
    begun = run_directory(recipe.name)
    goes_on = not fresh and begun.recipe.is_file() and checkpoint.committed(begun)
    changed = changes(load_recipe(str(begun.recipe)).recipe, recipe, list(allow_change)) if goes_on else {}
    if recipe.track.wandb == "online" and not logged_in():
        raise RequestError("track.wandb is online, but W&B has no key", "a login", "wandb login, or track.wandb=offline")
    if missing := [kind for kind in recipe.track.also if importlib.util.find_spec(kind) is None]:
        raise RequestError(f"track.also has {missing[0]}, which is not installed", "its extra", f"pip install {missing[0]}")
    device = engine.find_device(recipe.engine.device)
    launcher = dsconfig.read_launcher(os.environ)
    dsconfig.refuse_contradictions(launcher, recipe.engine, loaded.origins, os.environ)
    corpus = prepare(recipe)
    world_size = engine.world_from_environment()[1]
    plan, planned = make_plan(recipe.engine, world_size, len(corpus.train), corpus.sample_cost, device.bf16_is_fast, launcher)
    ds_config = {} if plan.kind == "ddp" else dsconfig.render(plan, recipe.optim.clip_norm, launcher)
    task = TASKS[recipe.task](recipe.task, corpus, recipe.train.label_smoothing)
    ranks = engine.start(plan, device, ds_config, recipe.optim.clip_norm)
    watch = Watchdog(ranks, recipe.train.hang_timeout)
    try:
        model = models.build(recipe, corpus, ranks.shard)
        ranks.prepare(model, lambda module: make_optimizer(module, recipe.optim))
        _refuse_other_ranks(ranks, task)
        flops = _try_forward(ranks, task)
        settings = _settings(loaded, plan, planned, ds_config, launcher.source) | _facts_of(model, flops, ranks, device)
        run = _open_run(loaded.recipe.name, ranks, fresh)
        try:
            return _train(loaded, run, ranks, watch, task, settings, changed, screen)
        finally:
            if ranks.main:
                release_ownership(run)
    finally:
        watch.close()
        ranks.close()


def _set_by(origin: str, values: dict[str, Any]) -> Settings:
    return {key: {"value": value, "origin": origin} for key, value in values.items()}


def _facts_of(model: torch.nn.Module, flops: float, ranks: engine.Engine, device: engine.Device) -> Settings:
    """Its size; whether its loss depends on how the global batch is cut, as with BatchNorm; and what model FLOPs
    utilisation is made of: operations per unit of weight, and what all ranks' devices could do.

    A backward pass counts two forward passes; what is computed again for activation checkpointing does not count
    (PaLM, arXiv 2204.02311, appendix B).
    """
    facts = _set_by("model", {"parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())})
    if found := sorted({type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__}):
        facts |= _set_by(f"model ({', '.join(found)})", {"normalisation": "depends on the micro-batch"})
    peaks = ranks.gather(footprint.peak_flops(ranks.device, device.bf16_is_fast))
    facts |= _set_by("model (counted)", {"flops_per_unit": 3 * flops})
    return facts | _set_by("this machine (data sheet or measured)", {"peak_flops": sum(peaks)})


def _train(
    loaded: Loaded,
    run: RunDir,
    ranks: engine.Engine,
    watch: Watchdog,
    task: Task,
    settings: Settings,
    changed: dict[str, str],
    screen: Console,
) -> dict[str, Any]:
    recipe, corpus, stop = loaded.recipe, task.corpus, StopFlag(run, ranks.main)
    path, lines = checkpoint.newest(ranks, run)
    restored = checkpoint.load(ranks, path) if path else None
    state = restored.state if restored else State(data_size=len(corpus.train))
    if state.data_size != len(corpus.train):
        raise RequestError(
            f"there are {len(corpus.train):,} training samples, and there were {state.data_size:,} when this run began",
            "the same data, or its order is another",
            "the data as it was, or --fresh",
        )
    if ranks.gather(ranks.main and _gains_nothing(run, state.step))[0]:
        raise TrainingFailed(
            f"Slurm has started {run.path} {_FRUITLESS} times at step {state.step}, and no checkpoint came of it",
            "at least one checkpoint between two restarts",
            "the job's output says why it ends; or a smaller train.checkpoint_every",
        )
    tracker = Everyone()
    keep_warnings(run, ranks.rank)
    if ranks.main:  # only now: a start that was refused must leave the run as it was
        settings |= _set_by("where it runs", _whereabouts())
        write_atomic(run.recipe, to_yaml(recipe))
        run.write_json(run.effective, settings)
        _announce(screen, run, settings, task, path)
        tracker = _tracker(loaded, run, task, settings, screen, state)
    if ranks.main and (verdict := os.environ.get("BIGTRAIN_VERDICT")):  # slurm/train.sbatch counts lives that do not get here
        Path(verdict).write_text("started")
    tracker.event(state.step, "started", ranks=ranks.world_size, job=os.environ.get("SLURM_JOB_ID"))
    for event, details in _news(settings, lines, corpus.bad, path, changed, restored):
        tracker.event(state.step, event, **details)
    batches = train_batches(task, recipe, ranks.plan, ranks.rank, state.samples)
    state.bad = sorted({*state.bad, *corpus.bad})
    checkpoints = Checkpoints(ranks, run, recipe, state)
    watch.report = lambda event, **found: tracker.event(state.step, event, **found)
    work = settings["flops_per_unit"]["value"] / settings["peak_flops"]["value"]
    training = Training(recipe, ranks, task, batches, tracker, state, stop, checkpoints, watch, work)
    summary = _carry_out(training, run, {"name": run.name, "parameters": settings["parameters"]["value"]})
    ranks.gather(None)  # waits for all: a launcher may end the job when the first rank has left for a while
    return summary


def _carry_out(t: Training, run: RunDir, summary: dict[str, Any]) -> dict[str, Any]:
    """Train, export, and close what was opened, however it ends; `summary` and what came of it."""
    try:
        results = train(t)
        t.watch.at("end")
        if t.recipe.train.keep_best:
            results = _take_the_best(t, run) or results
        counts = {key: value for key, value in asdict(t.state).items() if isinstance(value, int)}
        done = summary | {"status": "finished", **counts, **results, "baselines": t.task.corpus.baselines}
        export.write(t.engine, t.recipe, t.task.corpus, run, done)
        if t.engine.main:
            run.write_json(run.summary, done)
        summary |= done
    except BaseException as problem:
        if not isinstance(problem, StoppedEarly):  # which is an event already
            event = "lost a peer" if _lost_a_peer(problem) else "failed"
            t.tracker.event(t.state.step, event, reason=str(problem).split("\n")[0] or type(problem).__name__)
        raise
    finally:
        t.checkpoints.close()
        t.tracker.close({key: value for key, value in summary.items() if isinstance(value, int | float)})
    return summary


def _news(
    settings: Settings,
    lines: list[str],
    bad: list[str],
    path: Path | None,
    changed: dict[str, str],
    restored: Restored | None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What there is to say of a start: (event, details)."""
    if "normalisation" in settings:
        yield "normalisation", settings["normalisation"]
    for line in lines:
        yield "checkpoint not as it should be", {"reason": line}
    if bad:
        yield "bad samples left out", {"samples": bad}
    if path and changed:
        yield "recipe changed", dict(changed)
    if restored:
        details: dict[str, Any] = {"path": str(path)} | ({"moved": restored.moved} if restored.moved else {})
        yield "resumed", details | {"load_seconds": restored.load_seconds, "check_seconds": restored.check_seconds}


_FRUITLESS = 3


def _gains_nothing(run: RunDir, step: int) -> bool:
    """Whether Slurm has restarted this job again and again from the same step: it would go on so for ever."""
    starts = [line["step"] for line in read_metrics(run.metrics, "event") if line["event"] == "started"]
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    return restarts >= _FRUITLESS and starts[-_FRUITLESS:] == [step] * _FRUITLESS


def _take_the_best(t: Training, run: RunDir) -> dict[str, float] | None:
    """Put the weights of the best checkpoint in place, to be exported; its results, or None if the last is the best."""
    best = run.checkpoints / f"step-{t.state.best_step:08d}"
    if t.state.best_step in (0, t.state.step):
        return None
    if broken := t.engine.gather(checkpoint.verify(best) if t.engine.main else [])[0]:
        t.tracker.event(t.state.step, "best checkpoint not exported, the last model is", path=str(best), reason=broken[0])
        return None
    checkpoint.load(t.engine, best)
    t.tracker.event(t.state.step, "best checkpoint exported", path=str(best), metric=t.recipe.train.keep_best)
    return evaluate(t.engine, t.task)


def _refuse_other_ranks(ranks: engine.Engine, task: Task) -> None:
    """Every rank has its own installation and reads the data for itself: all must have the same."""
    versions = ranks.gather([f"{package} {version(package)}" for package in _PACKAGES])
    for rank, seen in enumerate(versions):
        if pairs := [(theirs, ours) for theirs, ours in zip(seen, versions[0], strict=True) if theirs != ours]:
            raise RequestError(
                "; ".join(f"rank {rank} has {theirs}, rank 0 {ours}" for theirs, ours in pairs),
                "the same versions on every rank",
                "bigtrain doctor on every rank shows them all",
            )
    found = ranks.gather([len(task.corpus.train), len(task.corpus.eval), task.corpus.bad])
    if different := [rank for rank, seen in enumerate(found) if seen != found[0]]:
        raise RequestError(
            f"rank {different[0]} sees other data than rank 0: (training, held out, bad) {found[different[0]]}, not {found[0]}",
            "the same files on every node",
        )


def _try_forward(ranks: engine.Engine, task: Task) -> float:
    """Two examples through the model before anything is written: it must fit the data and the task. A collective.

    Returns the floating-point operations of a forward pass per unit of weight (token, image, row).
    """
    train = task.corpus.train
    if task.corpus.tokenizer is not None:  # the longest text: positions may run out
        size = lambda i: sum(len(value) for value in train[i].values() if isinstance(value, np.ndarray))  # noqa: E731
        longest = max(range(min(512, len(train))), key=size)
    else:
        longest = len(train) - 1
    batch = ranks.to_device(task.collate([train[longest], train[0]]))
    name = type(ranks.module).__name__
    ranks.model.eval()
    try:
        with torch.no_grad(), ranks.autocast():
            # What is compiled cannot be counted; and to say so imports torch._dynamo, which takes seconds.
            eager = torch.compiler.set_stance("force_eager") if ranks.plan.compile else contextlib.nullcontext()
            with footprint.counter() as counted, eager:
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
    return counted.get_total_flops() / task.weight(batch)


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
    settings |= _set_by("plan", {"engine.accumulation": plan.accumulation})
    origin = source if source.endswith(".json") else f"ds_configs for {plan.kind}"
    settings |= _set_by(origin, flatten(ds_config, "deepspeed") if ds_config else {})
    settings |= _set_by("installed", {f"versions.{package}": version(package) for package in _PACKAGES})
    return settings | _set_by("OMP_NUM_THREADS or the machine", {"threads": torch.get_num_threads()})


def _whereabouts() -> dict[str, Any]:
    """The commit of the folder that the run was started in, whether it was changed since; Slurm's job."""
    found: dict[str, Any] = {"slurm.job": job} if (job := os.environ.get("SLURM_JOB_ID")) else {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git, or no repository, or a slow disk
        ask = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=5).stdout  # noqa: E731
        found |= {"git.commit": ask("rev-parse", "HEAD").strip(), "git.dirty": bool(ask("status", "--porcelain", "-uno"))}
    return found


def _open_run(name: str, ranks: engine.Engine, fresh: bool) -> RunDir:
    """The run directory, which is ours alone from now on: the first thing that is written."""
    run, refused = run_directory(name, fresh), None
    if ranks.main:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            take_ownership(run)
        except RequestError as problem:
            refused = problem
    run, refused = ranks.gather((run, refused))[0]
    if refused is not None:
        raise refused
    return run


def _announce(screen: Console, run: RunDir, settings: Settings, task: Task, path: Any) -> None:
    """The settings in force, grouped by who set them; then what is about to happen."""
    groups: dict[str, list[str]] = {}
    for key, setting in settings.items():
        groups.setdefault(setting["origin"].split(":")[0].split(" ")[0], []).append(f"{key}={setting['value']}")
    for origin, texts in groups.items():
        screen.print(f"[bold]{origin}[/]: " + "  ".join(text.replace("[", r"\[") for text in texts), highlight=False)
    ranks = settings["engine.world_size"]["value"]
    for note in (*task.corpus.notes, *_idle(settings["engine.global_batch"]["value"], ranks)):
        screen.print(f"note: {note}", highlight=False)
    begin = f"going on from {path.name}" if path else "starting"
    screen.print(
        f"{begin}: {run.path}  {settings['parameters']['value']:,} parameters, "
        f"{len(task.corpus.train):,} training and {len(task.corpus.eval):,} held-out samples",
        highlight=False,
    )


def _idle(global_batch: int, ranks: int) -> Iterator[str]:
    """What is left unused: time of the ranks with one sample less than others; GPUs, where one process was started bare."""
    if idle := -global_batch % ranks:
        lost = idle / (global_batch + idle)
        yield f"{global_batch} samples over {ranks} ranks are uneven: exact, but {lost:.1%} of the ranks' time is idle"
    if ranks == 1 < (count := torch.cuda.device_count()):
        every = f"torchrun --nproc_per_node {count} -m bigtrain train … uses them all"
        yield f"this is one process, and {count} GPUs are visible: {every}"


def _tracker(loaded: Loaded, run: RunDir, task: Task, settings: Settings, screen: Console, state: State) -> Everyone:
    recipe = loaded.recipe
    # First, because they may fail: what is opened after them runs in threads.
    also = [Also(engine.tracker(kind, recipe.track.project, run.name, run.path, state.step)) for kind in recipe.track.also]
    everyone = Everyone(MetricsFile(run), *also, Terminal(recipe.train.steps, task.unit, screen))
    if recipe.track.wandb != "off":
        config = {key: setting["value"] for key, setting in settings.items()}
        wandb = WandB(recipe.track, run, recipe.name, config, state.wandb_id, state.step)
        state.wandb_id = wandb.id
        everyone.trackers.append(wandb)
    return everyone


def exit_code_of(problem: BaseException) -> int:
    """3 for what would fail again; 76 for a collective that lost a peer."""
    if not _lost_a_peer(problem):
        return 3
    print("bigtrain: lost a peer; the same command goes on from the last checkpoint", file=sys.stderr)
    return LOST_PEERS


def _lost_a_peer(problem: BaseException) -> bool:
    """Whether the words are those of a collective that lost a peer."""
    gloo = ["connection closed by", "connection reset", "broken pipe", "timed out waiting", "socket closed"]
    lost = [*gloo, "remote process exited", "ncclremoteerror", "watchdog caught collective operation timeout"]
    lost += ["waiting for clients", "client socket has timed out", "connection refused", "connectfullmesh", "wait timeout"]
    alone = engine.world_from_environment()[1] == 1
    return not alone and isinstance(problem, RuntimeError) and any(sign in str(problem).lower() for sign in lost)
