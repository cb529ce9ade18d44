"""What a loss spike is, and what is done about it."""

import math
import statistics

from bigtrain.checkpoint.reader import load_checkpoint, newest_checkpoint
from bigtrain.training.context import TrainContext, report_checkpoints

WINDOW = 32  # losses that a spike is measured against


def is_spike(recent: list[float], loss: float) -> bool:
    """Whether a loss lies above the median of the last ones by more than six times what the 90th percentile does.

    Both are robust, so a spike does not hide the next; heavy tails, as of small batches, widen the scale by themselves.
    """
    if len(recent) < WINDOW or not math.isfinite(loss):
        return False
    middle, high = statistics.median(recent), statistics.quantiles(recent, n=10)[-1]
    return loss > middle + 6 * max(high - middle, 0.02 * abs(middle))


def handle_loss_spike(t: TrainContext, loss: float, spiked: bool) -> None:
    """Say that the loss has spiked and do what the recipe wants; else remember the loss."""
    state, policy = t.state, t.recipe.train.on_spike
    high, usual = spiked or is_spike(state.recent, loss), statistics.median(state.recent or [loss])
    if (
        math.isfinite(loss) and not spiked
    ):  # one that is only warned about counts: it may be the new level
        state.recent = [*state.recent, loss][-WINDOW:]
    if not high:
        return
    t.tracker.event(state.step, "loss_spike", loss=loss, usual=usual, policy=policy)
    if policy == "rewind":
        t.watch.at("checkpoint")
        report_checkpoints(t, t.checkpoints.finish())
        path, _ = newest_checkpoint(t.engine, t.checkpoints.run)
        if path is not None:
            before, _ = load_checkpoint(t.engine, path)
            # The data goes on: what led to the spike, and the spike itself, do not come again.
            kept = {"samples": state.samples, "bad": state.bad, "rewinds": state.rewinds + 1}
            vars(state).update(vars(before) | kept)
            t.tracker.event(state.step, "rewound", path=str(path))
