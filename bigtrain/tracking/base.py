"""What a tracker is, and the group of all that a run has."""

import json
import time
from typing import Any, Protocol

from bigtrain.config.secrets import redact
from bigtrain.runs.directory import to_json
from bigtrain.runs.metrics_file import Record


class Tracker(Protocol):
    """Somewhere records go."""

    def log(self, record: Record) -> None: ...

    def samples(self, step: int, rows: list[Record]) -> None:
        """Held-out examples with what the model made of them; most trackers have no room for them."""
        return None

    def close(self, summary: Record) -> None: ...


def numbers_of(record: Record) -> dict[str, float]:
    """What can be drawn over steps, under the names that a tracker shows; of events, what each machine was doing."""
    kind = record["kind"]
    if kind == "event":
        nodes = record["machines"] if record["event"] == "nodes" else {}
        return {
            f"nodes/{node}/{name}": value
            for node, values in nodes.items()
            for name, value in values.items()
        }
    return {
        f"{kind}/{k}": v
        for k, v in record.items()
        if isinstance(v, int | float) and k not in ("step", "time")
    }


def line_of(record: Record) -> str:
    values = {
        key: value for key, value in record.items() if key not in ("kind", "step", "event", "time")
    }
    shown = "  ".join(
        f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
    )
    return f"step {record['step']}  {record.get('event', 'evaluation')}  {shown}"


class TrackerGroup:
    """Records to all trackers, in order; ranks other than the first have none."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = list(trackers)

    def log(self, record: Record) -> None:
        record["time"] = time.time()
        for tracker in self.trackers:
            tracker.log(record)

    def event(self, step: int, event: str, **details: Any) -> None:
        """Something that happened, with what it takes to be understood; no secret that an error may have named."""
        self.log(
            {"kind": "event", "step": step, "event": event, **json.loads(redact(to_json(details)))}
        )

    def samples(self, step: int, rows: list[Record]) -> None:
        """Examples for those trackers that have room for them."""
        for tracker in self.trackers:
            if rows:
                tracker.samples(step, rows)

    def close(self, summary: Record) -> None:
        for tracker in self.trackers:
            tracker.close(summary)
