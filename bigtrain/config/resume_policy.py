"""Which keys of a recipe may change between the start of a run and its resume."""

import difflib

from bigtrain.config.loader import flatten
from bigtrain.config.recipe import Recipe
from bigtrain.errors import RequestError

# What may change between two starts of a run: where it runs, how long, who is told, and what is done about what goes wrong.
# (More steps stretch a schedule that ends with them; the micro-batch is seen by dropout and BatchNorm alone.)
SAFE_TO_CHANGE = ("name", "track", "slurm", "data.workers", "engine.kind", "engine.offload", "engine.device", "engine.micro_batch",
            "engine.activation_checkpointing", "engine.compile", "train.steps", "train.eval_every", "train.checkpoint_every",
            "train.keep_last", "train.keep_best", "train.async_save", "train.log_every", "train.max_skipped_steps", "train.on_spike",
            "train.hang_timeout", "data.max_unreadable")  # fmt: skip


def diff_recipes(before: Recipe, after: Recipe, allowed: list[str]) -> dict[str, str]:
    """What differs, as key → "old → new". Raises RequestError for a key that is neither harmless nor allowed."""
    old, new = flatten(before.model_dump(mode="json")), flatten(after.model_dump(mode="json"))
    if unknown := [
        key for key in allowed if not any(f"{known}.".startswith(f"{key}.") for known in old | new)
    ]:
        near = difflib.get_close_matches(unknown[0], old | new, n=1)
        raise RequestError(
            f"--allow-change {unknown[0]}: no such key",
            "a key of the recipe",
            f"--allow-change {near[0]}" if near else "",
        )
    found = {
        k: f"{old.get(k)} → {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)
    }
    refused = [
        key
        for key in found
        if not any(f"{key}.".startswith(f"{ok}.") for ok in (*SAFE_TO_CHANGE, *allowed))
    ]
    if refused:
        raise RequestError(
            "the recipe has changed since this run began:\n"
            + "\n".join(f"  {key}: {found[key]}" for key in refused),
            "the same recipe, to go on with the same curve",
            " ".join(f"--allow-change {key}" for key in refused) + ", or --fresh to start anew",
        )
    return found
