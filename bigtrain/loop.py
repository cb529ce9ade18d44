"""The one loop: every task, every engine."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bigtrain import checkpoint
from bigtrain.checkpoint import State
from bigtrain.data import Corpus, eval_batches
from bigtrain.data.order import key
from bigtrain.data.stream import Piece
from bigtrain.engine import Engine
from bigtrain.errors import StoppedEarly, TrainingFailed
from bigtrain.optim import learning_rate
from bigtrain.recipe import Recipe
from bigtrain.rundir import RunDir
from bigtrain.stop import StopFlag
from bigtrain.tasks import Task
from bigtrain.track import Everyone


@dataclass
class Training:
    """All that the loop moves; built by run.py."""

    recipe: Recipe
    run: RunDir
    engine: Engine
    task: Task
    corpus: Corpus
    batches: Iterator[list[Piece]]
    tracker: Everyone
    state: State
    stop: StopFlag


def train(t: Training) -> dict[str, float]:
    """Steps from where the state stands to the end; returns the last evaluation.

    Raises StoppedEarly after a signal, once a checkpoint is committed.
    """
    settings, state = t.recipe.train, t.state
    results: dict[str, float] = {}
    while state.step < settings.steps:
        stopping, saving = _step(t)
        last = state.step == settings.steps
        if state.skips >= settings.max_skips:
            good = [path.name for path in checkpoint.committed(t.run)][-1:] or ["none"]
            raise TrainingFailed(
                f"{state.skips} steps in a row had a loss or gradient that is not finite (step {state.step})",
                "finite numbers",
                f"a lower optim.lr, or other data; the last good checkpoint is {good[0]}",
            )
        # Who is told to stop has seconds, not minutes.
        if last or (state.step % settings.eval_every == 0 and not stopping):
            results = evaluate(t.engine, t.task, t.corpus)
            t.tracker.log({"kind": "eval", "step": state.step, **results})
        # While steps are skipped, the checkpoint before them is the one to keep.
        if last or stopping or saving or (state.step % settings.checkpoint_every == 0 and not state.skips):
            _save(t)
        if stopping and not last:
            t.tracker.event(state.step, "stopped", reason=t.stop.received or "asked for on another rank")
            raise StoppedEarly(f"stopped at step {state.step} of {settings.steps}; the same command goes on from there")
    return results


def _save(t: Training) -> None:
    """Commit a checkpoint. One that cannot be written is reported, and training goes on: the last one is still there."""
    try:
        path = checkpoint.save(t.engine, t.run, t.state, t.recipe.train.keep)
        t.tracker.event(t.state.step, "checkpoint", path=str(path))
    except checkpoint.NotSavedError as problem:
        t.tracker.event(t.state.step, "checkpoint FAILED", reason=str(problem))
    if t.engine.main:
        for wish in ("STOP", "SAVE"):  # granted
            (t.run.path / wish).unlink(missing_ok=True)


def _step(t: Training) -> tuple[bool, bool]:
    """One optimizer step; returns whether any rank was asked to stop, or to save."""
    began = time.perf_counter()
    engine, task, state, recipe = t.engine, t.task, t.state, t.recipe
    pieces = next(t.batches)
    local = sum(task.weight(piece.batch) for piece in pieces if piece.counts)
    weight, stopping, saving = engine.sum(local, *t.stop.wanted(t.run))
    rate = learning_rate(state.applied, recipe.train.steps, recipe.optim)
    engine.model.train()
    loss = torch.zeros((), device=engine.device)
    _seed_draws(recipe.seed, state.step, engine.rank)
    for number, piece in enumerate(pieces):
        with engine.micro_batch(last=number == len(pieces) - 1):
            with engine.autocast():
                loss_sum = task.loss_sum(engine.model, engine.to_device(piece.batch))
            loss_sum = loss_sum if piece.counts else loss_sum * 0.0
            engine.backward(loss_sum, weight)
        loss += loss_sum.detach()
    result = engine.step(rate)
    (total,) = engine.sum(loss)
    state.step += 1
    state.applied += result.applied
    state.skips = 0 if result.applied else state.skips + 1
    state.samples += engine.plan.global_batch
    state.weight += int(weight)
    if state.step % recipe.train.log_every == 0 or state.step == recipe.train.steps:
        seconds = time.perf_counter() - began
        t.tracker.log(
            {
                "kind": "train",
                "step": state.step,
                "samples": state.samples,
                "weight": state.weight,
                "loss": float(total / weight),
                "lr": rate,
                "grad_norm": result.grad_norm,
                "applied": result.applied,
                f"{task.unit}_per_s": float(weight) / seconds,
                "mfu": None,
                "seconds": seconds,
                "peak_memory_bytes": engine.peak_memory(),
            }
        )
    return bool(stopping), bool(saving)


def _seed_draws(seed: int, step: int, rank: int) -> None:
    """Dropout's draws are a function of (seed, step, rank): a resumed run draws what the undisturbed one would."""
    torch.manual_seed(int(key(seed, step, rank)) >> 1)


@torch.no_grad()
def evaluate(engine: Engine, task: Task, corpus: Corpus) -> dict[str, float]:
    """The task's metrics over the held-out set, each example counted once. A collective."""
    engine.sync_buffers()
    engine.model.eval()
    evaluator = task.evaluator(engine.device)
    for piece in eval_batches(corpus.eval, engine.plan, engine.rank, task.collate):
        batch = engine.to_device(piece.batch)
        with engine.autocast():
            if piece.counts:
                evaluator.update(engine.model, batch)
            else:
                task.loss_sum(engine.model, batch)  # sharded engines gather weights together, so all ranks run along
    return evaluator.compute()
