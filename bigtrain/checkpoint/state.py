"""The state of a run: what a checkpoint holds besides tensors."""

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """How far a run has come. Together with weights and optimizer it decides the next step.

    Written to a checkpoint's state.json under these names.
    """

    step: int = 0  # optimizer steps done, the skipped ones included
    applied: int = 0  # those that changed the weights; the learning rate follows this one
    samples: int = 0  # the position in the stream of samples
    weight: int = 0  # target tokens, images or rows that have counted in the loss
    skips: int = 0  # steps in a row that were not applied
    rewinds: int = 0  # since the last checkpoint
    bad: list[str] = field(default_factory=list)  # samples that could not be read
    data_size: int = 0  # training samples there were when the run began
    recent: list[float] = field(default_factory=list)  # losses that a spike is measured against
    evaluated: int = 0  # the step of the last evaluation
    results: dict[str, float] = field(default_factory=dict)  # the last evaluation's metrics
    best: float | None = (
        None  # the best value of train.keep_best (or loss), negated where higher is better
    )
    best_step: int = 0
    best_metric: str | None = None
    evaluations_since_best: int = 0
    evaluations_since_decay: int = 0  # of the rate, or since the best if that is later
    rate_decays: int = 0  # of the plateau schedule
    wandb_id: str = ""
