"""When the loop saves a checkpoint, and how it reports what became of one."""

from bigtrain.checkpoint.format import committed_checkpoints
from bigtrain.checkpoint.writer import SavedCheckpoint
from bigtrain.training.context import RankRequests, TrainContext


def save_if_due(ctx: TrainContext, requests: RankRequests, stopping: bool) -> None:
    """Begin a checkpoint where one is due, and commit what all ranks have written. A collective."""
    settings, state = ctx.recipe.train, ctx.state
    ctx.enter("checkpoint")
    last = stopping or ctx.is_last_step
    requested = requests.save > 0
    # While steps are skipped, the checkpoint before them is the one to keep.
    regular = ctx.is_due(settings.checkpoint_every) and not state.skips
    is_best = settings.keep_best is not None and state.best_step == state.step
    if last or requested or regular or is_best:
        if not ctx.checkpoints.has(state.step):
            state.rewinds = 0  # they are counted since the last checkpoint
        _report(ctx, ctx.checkpoints.begin(state))
        if last or requested or not settings.async_save:
            _report(ctx, ctx.checkpoints.finish())
        if requested:
            ctx.stop.acknowledge_save()
    elif requests.written == ctx.engine.world_size:
        _report(ctx, ctx.checkpoints.finish())


def finish_checkpoint(ctx: TrainContext) -> None:
    """Wait for the checkpoint in progress, if any, and report it. A collective."""
    ctx.enter("checkpoint")
    _report(ctx, ctx.checkpoints.finish())


def last_good_checkpoint(ctx: TrainContext) -> str:
    """The newest committed checkpoint in words, for an error's message."""
    committed = committed_checkpoints(ctx.checkpoints.run)
    name = committed[-1].name if committed else "none"
    return f"the last good checkpoint is {name}"


def _report(ctx: TrainContext, checkpoints: list[SavedCheckpoint]) -> None:
    """Report each; training continues without one that failed: the one before is still there."""
    for saved in checkpoints:
        ctx.checkpoint_problem = saved.problem
        if saved.problem:
            ctx.tracker.event(saved.step, "checkpoint_failed", reason=saved.problem)
            continue
        ctx.tracker.event(
            saved.step,
            "checkpoint",
            path=str(saved.path),
            seconds=saved.seconds,
            blocked=saved.blocked,
            writing=saved.writing,
        )
        needed = saved.blocked + saved.writing
        grace = ctx.stop.grace_seconds
        if needed > grace:
            advice = f"a signal leaves {grace:.0f} s: ask for more (sbatch --signal=USR1@SECONDS)"
            ctx.tracker.event(saved.step, "checkpoint_slow", seconds=needed, reason=advice)
