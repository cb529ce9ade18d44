"""What can happen to a run: the names of events in metrics.jsonl, and what a person reads."""

from typing import Literal

Event = Literal[
    "started",
    "resumed",
    "recipe_changed",
    "normalisation",
    "samples_unreadable",
    "checkpoint",
    "checkpoint_failed",
    "checkpoint_rejected",
    "checkpoint_slow",
    "step_skipped",
    "loss_spike",
    "rewound",
    "straggler",
    "nodes",
    "profile",
    "profile_failed",
    "best_exported",
    "best_not_exported",
    "finished",
    "stopped",
    "failed",
    "hang",
    "lost_peer",
]

# On the terminal, and in alerts.
EVENT_TEXTS: dict[Event, str] = {
    "started": "started",
    "resumed": "resumed",
    "recipe_changed": "recipe changed",
    "normalisation": "batch normalisation",
    "samples_unreadable": "unreadable samples left out",
    "checkpoint": "checkpoint written",
    "checkpoint_failed": "checkpoint NOT written",
    "checkpoint_rejected": "problem with a checkpoint",
    "checkpoint_slow": "checkpoint slower than the grace period",
    "step_skipped": "step skipped",
    "loss_spike": "loss spike",
    "rewound": "back to a checkpoint",
    "straggler": "slow rank",
    "nodes": "load of the machines",
    "profile": "profile written",
    "profile_failed": "profile NOT written",
    "best_exported": "best checkpoint exported",
    "best_not_exported": "best checkpoint not exported; the last model is",
    "finished": "finished",
    "stopped": "stopped early",
    "failed": "training FAILED",
    "hang": "no progress",
    "lost_peer": "lost another rank",
}

# Names in the metrics.jsonl of earlier versions; readers translate them.
OLD_EVENT_NAMES: dict[str, Event] = {
    "recipe changed": "recipe_changed",
    "bad samples left out": "samples_unreadable",
    "checkpoint FAILED": "checkpoint_failed",
    "checkpoint left out": "checkpoint_rejected",
    "checkpoint set aside": "checkpoint_rejected",
    "checkpoint not as it should be": "checkpoint_rejected",
    "checkpoint slower than the grace period": "checkpoint_slow",
    "step skipped": "step_skipped",
    "loss spike": "loss_spike",
    "best checkpoint exported": "best_exported",
    "best checkpoint not exported, the last model is": "best_not_exported",
    "lost a peer": "lost_peer",
}
