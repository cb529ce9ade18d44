"""What a loss spike is, and what the recipe's train.on_spike does about one."""

import math
import statistics
from dataclasses import replace

from bigtrain.checkpoint.reader import load_checkpoint, newest_checkpoint
from bigtrain.training.checkpointing import finish_checkpoint
from bigtrain.training.context import TrainContext

WINDOW = 32  # losses that a spike is measured against


def is_spike(recent: list[float], loss: float) -> bool:
    """Whether `loss` is far above the `recent` ones. False until there are WINDOW of them.

    Far: above the median by more than six times the distance from the median to the 90th
    percentile, or to 2% of the median where that is more. Both are robust, so one spike does not
    hide the next; heavy tails, as small batches have them, widen the scale by themselves.
    """
    if len(recent) < WINDOW or not math.isfinite(loss):
        return False
    median = statistics.median(recent)
    percentile_90 = statistics.quantiles(recent, n=10)[-1]
    scale = max(percentile_90 - median, 0.02 * abs(median))
    return loss > median + 6 * scale


def handle_loss_spike(ctx: TrainContext, loss: float, left_out: bool) -> None:
    """Report a spike and do what the recipe says; remember the loss otherwise.

    `left_out`: the step was recognised as a spike before its update, which was left out.
    """
    state, policy = ctx.state, ctx.recipe.train.on_spike
    spiked = left_out or is_spike(state.recent, loss)
    usual = statistics.median(state.recent or [loss])
    # A spike that is only warned about counts for the next ones: it may be the new level.
    if math.isfinite(loss) and not left_out:
        state.recent = [*state.recent, loss][-WINDOW:]
    if not spiked:
        return
    ctx.tracker.event(state.step, "loss_spike", loss=loss, usual=usual, policy=policy)
    if policy == "rewind":
        _rewind(ctx)


def _rewind(ctx: TrainContext) -> None:
    """Load the newest checkpoint again, and train on with the samples after the spike."""
    finish_checkpoint(ctx)
    path, _ = newest_checkpoint(ctx.engine, ctx.checkpoints.run)
    if path is None:
        return
    before = load_checkpoint(ctx.engine, path).state
    # The samples that led to the spike, and the spike's own, do not come again.
    ctx.state = replace(
        before,
        samples=ctx.state.samples,
        bad=ctx.state.bad,
        rewinds=ctx.state.rewinds + 1,
    )
    ctx.tracker.event(ctx.state.step, "rewound", path=str(path))
