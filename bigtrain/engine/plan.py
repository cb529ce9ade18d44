"""How a global batch is cut over ranks and micro-batches: plain arithmetic on plain numbers.

The data order alone decides which samples form a step. This file only cuts that list into parts.
Each part counts as much as its samples do, so the loss does not depend on the cut.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeVar, cast

from bigtrain.config.recipe import Checkpointing, EngineConfig, TrainConfig
from bigtrain.errors import RequestError

Kind = Literal["ddp", "zero1", "zero2", "zero3"]
Offload = Literal["none", "optimizer", "params"]
Precision = Literal["fp32", "tf32", "bf16"]
T = TypeVar("T")

# engine.kind when the recipe leaves it to the plan; only the two sharded kinds can offload.
_KIND_FOR_OFFLOAD: dict[Offload, Kind] = {"none": "ddp", "optimizer": "zero2", "params": "zero3"}
_TOKENS_PER_MICRO_BATCH = 16_384
CORES_PER_GPU = 4  # fewer make a GPU wait for its host
DEFAULT_STEPS = 300


@dataclass(frozen=True)
class BatchStage:
    """From `first_step` on, the global batch has `size` samples."""

    first_step: int
    size: int
    position: int  # of its first sample in the stream of samples


@dataclass(frozen=True)
class BatchRamp:
    """A global batch whose size changes at given steps; the first stage begins at step 0."""

    stages: tuple[BatchStage, ...]

    @classmethod
    def of_sizes(cls, sizes: dict[int, int]) -> "BatchRamp":
        """`sizes`: first step → samples, in ascending order."""
        stages = [BatchStage(0, sizes[0], 0)]
        for before, first_step in pairwise(sizes):
            position = stages[-1].position + (first_step - before) * sizes[before]
            stages.append(BatchStage(first_step, sizes[first_step], position))
        return cls(tuple(stages))

    @property
    def sizes(self) -> list[int]:
        return [stage.size for stage in self.stages]

    def size_at(self, position: int) -> int:
        """Samples of the global batch that begins at `position` of the stream."""
        reached = [stage for stage in self.stages if stage.position <= position]
        return reached[-1].size

    def samples_before(self, step: int) -> int:
        """Samples of all steps before `step`."""
        reached = [stage for stage in self.stages if stage.first_step <= step]
        return reached[-1].position + (step - reached[-1].first_step) * reached[-1].size

    def steps_for(self, samples: int) -> int:
        """Steps until at least so many samples have been trained on."""
        reached = [stage for stage in self.stages if stage.position < samples]
        return reached[-1].first_step + _divide_up(samples - reached[-1].position, reached[-1].size)


@dataclass(frozen=True)
class Plan:
    """Everything that an engine needs to know, as numbers and names; nothing is `auto` here."""

    kind: Kind
    offload: Offload
    precision: Precision
    world_size: int  # processes
    global_batch: int  # samples per optimizer step, over all ranks; of a ramp the largest
    micro_batch: int  # samples per rank and forward pass, at most
    activation_checkpointing: Checkpointing
    compile: bool
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"  # of gradients on their way between ddp's ranks
    steps: int = DEFAULT_STEPS  # of the whole run
    ramp: BatchRamp | None = None  # None: every step has `global_batch` samples

    @property
    def data_parallel_size(self) -> int:
        """Into how many shares the global batch is cut: today every rank has a share of its own."""
        return self.world_size

    def data_rank(self, rank: int) -> int:
        """Which share `rank` works on: 0 … data_parallel_size - 1."""
        return rank

    def at(self, position: int) -> "Plan":
        """The plan for the step that begins at `position` of the stream of samples."""
        if self.ramp is None:
            return self
        return replace(self, global_batch=self.ramp.size_at(position))

    def progress(self, step: int) -> float:
        """How far a run is before `step`: in steps, or, on a ramp, in samples ÷ the first size.

        This is what schedules go by, so that a larger batch does not slow a decay down.
        """
        if self.ramp is None:
            return step
        return self.ramp.samples_before(step) / self.ramp.sizes[0]

    @property
    def largest_share(self) -> int:
        """Samples per step of the data-parallel rank that has most."""
        return _divide_up(self.global_batch, self.data_parallel_size)

    @property
    def accumulation(self) -> int:
        """Forward passes per step; the same on every rank, because sharded engines move in step."""
        return _divide_up(self.largest_share, self.micro_batch)

    def micro_batches(self, data_rank: int) -> list[range]:
        """The parts of the global batch that `data_rank` works on, as offsets into it.

        Shares differ by one sample at most, and so do the micro-batches of a share. A micro-batch
        may be empty: its rank then runs a forward pass that counts nothing.
        """
        share = _cut(range(self.global_batch), self.data_parallel_size)[data_rank]
        return _cut(share, self.accumulation)


def _divide_up(total: int, parts: int) -> int:
    """total ÷ parts, rounded up."""
    return -(-total // parts)


def _cut(whole: range, parts: int) -> list[range]:
    """`whole` in consecutive parts whose lengths differ by one at most, longer ones first."""
    size, longer = divmod(len(whole), parts)
    starts = [i * size + min(i, longer) for i in range(parts + 1)]
    return [whole[starts[i] : starts[i + 1]] for i in range(parts)]


@dataclass(frozen=True)
class Launcher:
    """What `accelerate launch` asked for (read by launcher.py); None where it did not say."""

    kind: Kind | None = None
    offload: Offload | None = None
    precision: Literal["bf16"] | None = None
    config: dict[str, Any] | None = None  # the content of --deepspeed_config_file
    source: str = ""  # the file or the options, for messages


NO_LAUNCHER = Launcher()


def make_plan(
    engine: EngineConfig,
    world_size: int,
    samples: int,
    tokens_per_sample: int,
    bf16_is_fast: bool,
    launcher: Launcher = NO_LAUNCHER,
    train: TrainConfig | None = None,
) -> tuple[Plan, dict[str, str]]:
    """Give every `auto` of the recipe's engine section but `device` its value, with the reason.

    `samples` is the size of the training set, `tokens_per_sample` the tokens (or elements ÷ 64)
    of one sample. Returns the plan, and the origin of each setting that was decided here.
    Raises RequestError when a rank would have no sample at all, and for what `kind` does not do.
    """
    origins: dict[str, str] = {}

    def decide(key: str, default: T, reason: str) -> T:
        """The recipe's value, else the launcher's, else `default`."""
        in_recipe = getattr(engine, key)
        if in_recipe != "auto":
            return cast(T, in_recipe)
        from_launcher = getattr(launcher, key, None)
        origins[f"engine.{key}"] = "launcher" if from_launcher else f"plan ({reason})"
        return cast(T, from_launcher or default)

    offload = engine.offload
    if launcher.offload and launcher.offload != offload:
        offload = launcher.offload
        origins["engine.offload"] = "launcher"
    ramp = _batch_ramp(engine, samples, origins)
    global_batch = max(ramp.sizes)
    if world_size > min(ramp.sizes):
        raise RequestError(
            f"{world_size} ranks share a global batch of {min(ramp.sizes)} samples: "
            "some would have none",
            "at least one sample per rank",
            f"engine.global_batch={world_size} (or fewer ranks)",
        )
    share = _divide_up(global_batch, world_size)
    kind = decide("kind", _KIND_FOR_OFFLOAD[engine.offload], "the fastest that fits the request")
    device_precision: Precision = "bf16" if bf16_is_fast else "fp32"
    precision = decide("precision", device_precision, "this device's faster one")
    _refuse_what_is_not_done(kind, engine)
    micro_batch = decide("micro_batch", _micro_batch(share, tokens_per_sample), "about 16k tokens")
    plan = Plan(
        kind=kind,
        offload=offload,
        precision=precision,
        world_size=world_size,
        global_batch=global_batch,
        micro_batch=min(micro_batch, share),
        activation_checkpointing=decide("activation_checkpointing", "none", "off by default"),
        compile=decide("compile", False, "off: costs half a minute, saves a tenth of a step"),
        reduce_dtype=engine.reduce_dtype,
        steps=_steps(train, ramp, samples, origins),
        ramp=ramp if len(ramp.stages) > 1 else None,
    )
    return plan, origins


def _batch_ramp(engine: EngineConfig, samples: int, origins: dict[str, str]) -> BatchRamp:
    """The global batch by step; `origins` gets who decided its (largest) size."""
    if engine.global_batch == "all":
        origins["engine.global_batch"] = "plan (all training samples)"
        return BatchRamp.of_sizes({0: samples})
    if isinstance(engine.global_batch, dict):
        origins["engine.global_batch"] = "plan (the largest of the ramp)"
        return BatchRamp.of_sizes(engine.global_batch)
    return BatchRamp.of_sizes({0: engine.global_batch})


def _steps(
    train: TrainConfig | None, ramp: BatchRamp, samples: int, origins: dict[str, str]
) -> int:
    """Optimizer steps of the run; `origins` gets the reason where the recipe does not say."""
    if train is None or (train.steps is None and train.epochs is None):
        origins["train.steps"] = "default"
        return DEFAULT_STEPS
    if train.epochs is not None:
        origins["train.steps"] = f"plan ({train.epochs:g} epochs of {samples:,} samples)"
        return ramp.steps_for(math.ceil(train.epochs * samples))
    return cast(int, train.steps)


def _refuse_what_is_not_done(kind: Kind, engine: EngineConfig) -> None:
    """Raises RequestError: compile under zero3, and bf16 between ranks under ZeRO."""
    if kind == "zero3" and engine.compile is True:
        raise RequestError(
            "engine.compile is true, but zero3 gathers parameters between the parts of a model:"
            " each would be compiled alone, for minutes, and run no faster",
            "engine.kind ddp, zero1 or zero2",
            "engine.compile=false, or another engine.kind",
        )
    if kind != "ddp" and engine.reduce_dtype == "bf16":
        raise RequestError(
            f"engine.reduce_dtype is bf16, but {kind} adds up gradients in DeepSpeed's way",
            "engine.kind ddp",
            "engine.reduce_dtype=fp32, or engine.kind=ddp",
        )


def _micro_batch(share: int, tokens_per_sample: int) -> int:
    """Samples per forward pass: as many as 16,384 tokens hold, evened out over a share's passes."""
    fitting = _TOKENS_PER_MICRO_BATCH // max(1, tokens_per_sample)
    largest = max(1, min(share, fitting))
    passes = _divide_up(share, largest)
    return _divide_up(share, passes)
