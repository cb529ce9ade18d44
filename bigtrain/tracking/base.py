"""What a tracker is, and the group of all that a run has."""

import json
import time
from typing import Any, Protocol

from bigtrain.config.secrets import redact
from bigtrain.runs.directory import to_json
from bigtrain.runs.events import Event
from bigtrain.runs.metrics_file import Record


class Tracker(Protocol):
    """Something that takes the records of a run: training lines, evaluations and events."""

    def log(self, record: Record) -> None: ...

    def samples(self, step: int, rows: list[Record]) -> None:
        """Held-out examples with what the model made of them; most trackers cannot show them."""
        return None

    def close(self, summary: Record) -> None:
        """`summary`: the numbers of the finished run; of a run that ended early, without `step`."""


def numbers_of(record: Record) -> dict[str, float]:
    """What can be drawn over steps, under the names that a tracker shows.

    Of events only `nodes` has such numbers: how busy each machine was.
    """
    kind = record["kind"]
    numbers = {}
    if kind != "event":
        for name, value in record.items():
            if not isinstance(value, int | float) or name in ("step", "time"):
                continue
            if name.startswith("seconds_"):  # where a step's time went: a group of its own
                numbers[name.replace("_", "/", 1)] = value
            else:
                numbers[f"{kind}/{name}"] = value
        return numbers
    if record["event"] == "nodes":
        for node, values in record["machines"].items():
            for name, value in values.items():
                numbers[f"nodes/{node}/{name}"] = value
    return numbers


class TrackerGroup:
    """Passes records to all trackers, in order; on ranks other than the first there are none."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = list(trackers)

    def log(self, record: Record) -> None:
        """Pass on a record, with the time of now."""
        timed = {**record, "time": time.time()}
        for tracker in self.trackers:
            tracker.log(timed)

    def event(self, step: int, event: Event, **details: Any) -> None:
        """Something that happened; secrets in its details (an error may name one) are redacted."""
        clean = json.loads(redact(to_json(details)))
        self.log({"kind": "event", "step": step, "event": event, **clean})

    def samples(self, step: int, rows: list[Record]) -> None:
        """Held-out examples with what the model made of them, if there are any."""
        if not rows:
            return
        for tracker in self.trackers:
            tracker.samples(step, rows)

    def close(self, summary: Record) -> None:
        for tracker in self.trackers:
            tracker.close(summary)
