"""DeepSpeed's configuration: the shipped file or the launcher's, with the plan's numbers.

`ds_configs/*.json` hold the settings; this file fills in what the plan decides. Numbers are always
written out, never "auto": Accelerate fills "auto" itself, and adopts DeepSpeed's values where the
two differ.
"""

import json
from typing import Any

from bigtrain.engine.plan import NO_LAUNCHER, Launcher, Plan
from bigtrain.errors import RequestError
from bigtrain.runs.directory import asset


def render_deepspeed_config(
    plan: Plan, clip_norm: float, launcher: Launcher = NO_LAUNCHER
) -> dict[str, Any]:
    """The DeepSpeed configuration in force: the launcher's file, else the shipped one, completed.

    Raises RequestError where a number in the launcher's file contradicts the plan.
    """
    numbers: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        # DeepSpeed insists on this product; the loop gives short micro-batches their true weight.
        "train_batch_size": plan.micro_batch * plan.accumulation * plan.data_parallel_size,
        "gradient_clipping": clip_norm,
    }
    if launcher.config is None:
        suffix = "" if plan.offload == "none" else "_offload"
        config = json.loads(asset("ds_configs", f"{plan.kind}{suffix}.json").read_text())
    else:
        config = dict(launcher.config)
        _refuse_other_numbers(config, numbers, launcher.source)
    config |= numbers
    config["bf16"] = {"enabled": plan.precision == "bf16"}
    config["data_types"] = {"grad_accum_dtype": "fp32"}  # in bf16 too: DeepSpeed#1800, #2352
    # torch's own optimizers, on every engine alike. DeepSpeed has tested only its own ones, and
    # refuses others without this.
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    config["zero_optimization"] = dict(config["zero_optimization"])
    if plan.kind == "zero3" and plan.offload == "optimizer":
        config["zero_optimization"].pop("offload_param", None)
    config["steps_per_print"] = 2**31
    # It waits for the device before each forward pass and after each step (utils/timer.py:238).
    config.setdefault("timers", {"throughput": {"enabled": False}})
    return _without_auto(config)


def _refuse_other_numbers(config: dict[str, Any], numbers: dict[str, Any], source: str) -> None:
    """Raises RequestError where the launcher's file has another number than the plan."""
    for key, planned in numbers.items():
        in_file = config.get(key, "auto")
        if in_file not in ("auto", planned):
            raise RequestError(
                f"{source}: {key} is {in_file}, but the recipe makes it {planned}",
                '"auto" or the same',
            )


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Without the keys still "auto": DeepSpeed's own default then holds."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            kept[key] = _without_auto(value)
        elif value != "auto":
            kept[key] = value
    return kept
