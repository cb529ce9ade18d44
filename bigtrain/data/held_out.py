"""Which records are held out for evaluation, and which data is refused."""

from collections.abc import Collection

from blake3 import blake3

from bigtrain.config.recipe import Recipe
from bigtrain.errors import RequestError
from bigtrain.sources.records import Record


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the record known by `key` is in the held-out part, a `fraction` of all.

    The seed has no say in it, so runs with other seeds are judged on the same examples.
    """
    return int.from_bytes(blake3(key.encode()).digest(8), "big") < fraction * 2**64


def split_key(record: Record, index: int, field: str) -> str:
    """What decides about a record: its group (which is never torn), its text or its number."""
    if record.get("group"):
        return str(record["group"])
    text = record.get(field)
    return text if isinstance(text, str) else str(index)


def refuse_empty(counts: dict[str, int], recipe: Recipe, unreadable: Collection[str] = ()) -> None:
    """Raises RequestError if a part ("train", "eval") has no record."""
    for part, count in counts.items():
        if count:
            continue
        note = ""
        if unreadable:
            note = f"; {len(unreadable)} cannot be read, e.g. {min(unreadable)}"
        other_count = sum(counts.values())
        if recipe.data.eval or other_count == 0:
            raise RequestError(f"data.{part} is empty{note}", "at least one record")
        records = "1 record" if other_count == 1 else f"{other_count} records"
        left = "hold out" if part == "eval" else "train on"
        raise RequestError(
            f"nothing is left to {left}: data.train has {records}{note}",
            "at least one record in each part",
            "data.eval_fraction=0.2, more data, or data.eval",
        )


def refuse_unreadable(unreadable: list[str], recipe: Recipe) -> None:
    """Raises RequestError for more unreadable records than the recipe allows."""
    if len(unreadable) <= recipe.data.max_unreadable:
        return
    more = f" (and {len(unreadable) - 1} more like it)" if len(unreadable) > 1 else ""
    raise RequestError(
        f"{unreadable[0]}{more}",
        "data that can be read",
        f"repair it, or data.max_unreadable={len(unreadable)} to leave it out",
    )
