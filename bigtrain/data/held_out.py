"""Which records are held out, and which data is refused."""

from collections.abc import Collection

from blake3 import blake3

from bigtrain.config.recipe import Recipe
from bigtrain.data.records import Record
from bigtrain.errors import RequestError


def held_out(record: Record, index: int, field: str, fraction: float) -> bool:
    """Whether a record belongs to the held-out part: decided by its group, text or number, never by the seed,
    so that runs with other seeds are judged on the same examples."""
    text = record.get("group") or (
        record[field] if isinstance(record.get(field), str) else str(index)
    )
    return int.from_bytes(blake3(text.encode()).digest(8), "big") < fraction * 2**64


def refuse_empty(records: dict[str, int], bad: Collection[str] = ()) -> None:
    """Raises RequestError if a part has no record."""
    for part, count in records.items():
        if not count:
            unreadable = f"; {len(bad)} cannot be read, e.g. {min(bad)}" if bad else ""
            raise RequestError(
                f"data.{part} is empty ({records} records{unreadable})",
                "at least one record in each part",
                "data.eval_fraction=0.2",
            )


def refuse_bad(bad: list[str], recipe: Recipe) -> None:
    """Raises RequestError for more bad records than the recipe allows."""
    if len(bad) > recipe.data.max_unreadable:
        more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
        raise RequestError(
            f"{bad[0]}{more}",
            "data that can be read",
            f"mend it, or data.max_unreadable={len(bad)} to leave it out",
        )
