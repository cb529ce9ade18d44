"""Which keys of a recipe may change between the start of a run and its resume."""

import difflib

from bigtrain.config.loader import flatten
from bigtrain.config.recipe import Recipe
from bigtrain.config.renamed_keys import RENAMED_KEYS
from bigtrain.errors import RequestError

# Keys and sections that may change between two starts of a run: where it runs, how long, what it
# reports, and what it does about errors. Two of them can still be seen in the curve: more steps
# stretch a schedule that ends with them, and dropout and BatchNorm see the micro-batch.
SAFE_TO_CHANGE = (
    "name",
    "track",
    "slurm",
    "data.max_unreadable",
    "data.workers",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.device",
    "engine.kind",
    "engine.micro_batch",
    "engine.offload",
    "train.async_save",
    "train.checkpoint_every",
    "train.epochs",
    "train.eval_every",
    "train.hang_timeout",
    "train.keep_best",
    "train.keep_last",
    "train.log_every",
    "train.max_skipped_steps",
    "train.on_spike",
    "train.patience",
    "train.profile_steps",
    "train.steps",
)


def diff_recipes(before: Recipe, after: Recipe, allowed: list[str]) -> dict[str, str]:
    """What differs, as dotted key → "old → new".

    Raises RequestError for a key that is neither in SAFE_TO_CHANGE nor in `allowed` (keys or
    sections), and for a name in `allowed` that the recipe does not have.
    """
    old = flatten(before.model_dump(mode="json"))
    new = flatten(after.model_dump(mode="json"))
    keys = sorted(old | new)
    for name in allowed:
        if not any(_covers(name, key) for key in keys):
            raise _no_such_key(name, keys)
    changes = {
        key: f"{old.get(key)} → {new.get(key)}" for key in keys if old.get(key) != new.get(key)
    }
    patterns_before, patterns = list(before.optim.groups), list(after.optim.groups)
    if patterns_before != patterns and sorted(patterns_before) == sorted(patterns):
        # The first that fits counts, and `flatten` does not show their order.
        changes["optim.groups"] = f"{patterns_before} → {patterns}"
    accepted = (*SAFE_TO_CHANGE, *allowed)
    refused = [key for key in changes if not any(_covers(name, key) for name in accepted)]
    if refused:
        lines = [f"  {key}: {changes[key]}" for key in refused]
        options = " ".join(f"--allow-change {key}" for key in refused)
        raise RequestError(
            "\n".join(["the recipe has changed since this run began:", *lines]),
            "the same recipe, to continue the same curve",
            f"{options}, or --fresh to start a new run",
        )
    return changes


def _covers(name: str, key: str) -> bool:
    """Whether `name` is the dotted `key` or a section around it."""
    return f"{key}.".startswith(f"{name}.")


def _no_such_key(name: str, keys: list[str]) -> RequestError:
    near = difflib.get_close_matches(name, keys, n=1)
    right = RENAMED_KEYS.get(name) or (near[0] if near else "")
    return RequestError(
        f"--allow-change {name}: no such key",
        "a key of the recipe",
        f"--allow-change {right}" if right else "",
    )
