"""How a global batch is laid over ranks and micro-batches: plain arithmetic on plain numbers.

Which samples form step s is decided by the data order alone. This file only cuts that list into pieces, and
because every piece weighs what its samples weigh, the cut never shows in the loss.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from bigtrain.config.recipe import EngineConfig
from bigtrain.errors import RequestError

Kind = Literal["ddp", "zero1", "zero2", "zero3"]
Offload = Literal["none", "optimizer", "params"]
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Everything the engine needs to know, as numbers and names; nothing is `auto` any more."""

    kind: Kind
    offload: Offload
    precision: Literal["fp32", "bf16"]
    world_size: int
    global_batch: int  # samples per optimizer step, over all ranks
    micro_batch: int  # samples per rank and forward pass, at most
    activation_checkpointing: bool
    compile: bool

    @property
    def largest_share(self) -> int:
        """Samples per step of the rank that has most."""
        return -(-self.global_batch // self.world_size)

    @property
    def accumulation(self) -> int:
        """Forward passes per step; the same on every rank, because sharded engines move in step."""
        return -(-self.largest_share // self.micro_batch)

    def micro_batches(self, rank: int) -> list[range]:
        """`rank`'s pieces of the global batch, as offsets into it.

        Shares differ by one sample at most; so do the pieces of a share. A piece may be empty: its rank then
        runs a forward pass that weighs nothing.
        """
        share = _cut(range(self.global_batch), self.world_size)[rank]
        return _cut(share, self.accumulation)


def _cut(whole: range, pieces: int) -> list[range]:
    """`whole` in `pieces` consecutive parts whose lengths differ by one at most, longer ones first."""
    size, longer = divmod(len(whole), pieces)
    starts = [i * size + min(i, longer) for i in range(pieces + 1)]
    return [whole[starts[i] : starts[i + 1]] for i in range(pieces)]


@dataclass(frozen=True)
class Launcher:
    """What `accelerate launch` asked for, read from the environment it sets (dsconfig.py); None where it was silent."""

    kind: Kind | None = None
    offload: Offload | None = None
    precision: Literal["bf16"] | None = None
    config: dict[str, Any] | None = None  # the --deepspeed_config_file
    source: str = ""


NO_LAUNCHER = Launcher()


def make_plan(
    engine: EngineConfig,
    world_size: int,
    samples: int,
    tokens_per_sample: int,
    bf16_is_fast: bool,
    launcher: Launcher = NO_LAUNCHER,
) -> tuple[Plan, dict[str, str]]:
    """Resolve every `auto` of the recipe's engine section.

    `samples` is the size of the training set, `tokens_per_sample` the tokens (or elements ÷ 64) of one sample.
    Returns the plan and, for what it decided, the origin of each setting.
    Raises RequestError when a rank would have no sample at all.
    """
    origins: dict[str, str] = {}

    def decide(key: str, default: T, why: str) -> T:
        asked, launched = getattr(engine, key), getattr(launcher, key, None)
        if asked != "auto":
            return cast(T, asked)
        origins[f"engine.{key}"] = "launcher" if launched else f"plan ({why})"
        return cast(T, launched or default)

    plain: dict[Offload, Kind] = {"none": "ddp", "optimizer": "zero2", "params": "zero3"}
    offload = engine.offload
    if launcher.offload and launcher.offload != offload:
        offload, origins["engine.offload"] = launcher.offload, "launcher"
    global_batch = samples if engine.global_batch == "all" else engine.global_batch
    if engine.global_batch == "all":
        origins["engine.global_batch"] = "plan (all training samples)"
    if world_size > global_batch:
        raise RequestError(
            f"{world_size} ranks share a global batch of {global_batch} samples: some would have none",
            "at least one sample per rank",
            f"engine.global_batch={world_size} (or fewer ranks)",
        )
    share = -(-global_batch // world_size)
    plan = Plan(
        kind=decide("kind", plain[engine.offload], "the fastest that fits the request"),
        offload=offload,
        precision=decide(
            "precision", "bf16" if bf16_is_fast else "fp32", "this device's faster one"
        ),
        world_size=world_size,
        global_batch=global_batch,
        micro_batch=min(
            decide("micro_batch", _micro_batch(share, tokens_per_sample), "about 16k tokens"), share
        ),
        activation_checkpointing=decide("activation_checkpointing", False, "off unless asked"),
        compile=decide("compile", False, "off unless asked"),
    )
    return plan, origins


def _micro_batch(share: int, tokens_per_sample: int) -> int:
    """Samples per forward pass: as many as cost 16,384 tokens, evened out over the passes of a share."""
    most = max(1, min(share, 16_384 // max(1, tokens_per_sample)))
    passes = -(-share // most)
    return -(-share // passes)
