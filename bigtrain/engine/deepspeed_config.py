"""DeepSpeed's configuration: from a plan to numbers, and what a launcher has said of it.

`ds_configs/*.json` hold the settings; this file fills in what the plan decides. Numbers are always written out,
never "auto": Accelerate fills "auto" itself, and adopts DeepSpeed's values where the two differ.
"""

import json
from typing import Any

from bigtrain.engine.plan import NO_LAUNCHER, Launcher, Plan
from bigtrain.errors import RequestError
from bigtrain.runs.directory import asset


def render_deepspeed_config(
    plan: Plan, clip_norm: float, launcher: Launcher = NO_LAUNCHER
) -> dict[str, Any]:
    """The DeepSpeed configuration in force: the launcher's file or the shipped one, with the plan's numbers.

    Raises RequestError where a number in the launcher's file contradicts the plan.
    """
    shipped = plan.kind + ("_offload" if plan.offload != "none" else "") + ".json"
    config = dict(launcher.config or json.loads(asset("ds_configs", shipped).read_text()))
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        # DeepSpeed insists on this product; the loop gives the last pieces their true, smaller weight.
        "train_batch_size": plan.micro_batch * plan.accumulation * plan.world_size,
        "gradient_clipping": clip_norm,
    }
    for key, value in ours.items():
        theirs = config.get(key, "auto")
        if launcher.config is not None and theirs not in ("auto", value):
            raise RequestError(
                f"{launcher.source}: {key} is {theirs}, but the recipe makes it {value}",
                '"auto" or the same',
            )
    config |= ours
    config["bf16"] = {"enabled": plan.precision == "bf16"}
    config["data_types"] = {"grad_accum_dtype": "fp32"}  # in bf16 too: DeepSpeed#1800, #2352
    # torch's own optimizers, on every engine alike; DeepSpeed has tested only its own and says so unless told.
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    zero = config["zero_optimization"] = dict(config["zero_optimization"])
    if plan.kind == "zero3" and plan.offload == "optimizer":
        zero.pop("offload_param", None)
    config["steps_per_print"] = 2**31
    return _without_auto(config)


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys still "auto": DeepSpeed's own default then holds."""
    inner = {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    return {key: value for key, value in inner.items() if value != "auto"}
