"""make bench: its arithmetic, its tables, and one pair of arms from the start to the loss."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    """A module of benchmarks/, which is not a package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


report, bench = load("report"), load("bench")


RATES = {"bf16_GFLOP_per_s": 80.0, "fp32_GFLOP_per_s": 150.0}


def measured(arm: str, *rounds: list[float], loss: float = 2.0, ranks: int = 1) -> Any:
    cell = report.Cell("lstm", ranks, arm)
    return report.Measured(cell, list(rounds), [loss] * len(rounds))


def test_statistics() -> None:
    assert report.percentile([4.0, 1.0, 2.0, 3.0, 5.0], 0.1) == pytest.approx(1.4)
    assert report.percentile([7.0], 0.1) == 7.0
    # When steps ended: the first step has no beginning, and two are warm-up.
    assert report.step_seconds([10.0, 14.0, 15.0, 17.0], warm=2) == [1.0, 2.0]


def test_a_machine_that_slows_down_between_rounds_does_not_change_the_ratio() -> None:
    ours = measured("bigtrain", [1.0, 1.0], [5.0, 5.0], [3.0, 3.0])
    other = measured("plain", [2.0, 2.0], [10.0, 10.0], [6.0, 6.0])
    assert report.speed_ratio(ours, other) == 2.0


@pytest.mark.parametrize("loss", [2.1, float("nan")])
def test_other_losses_are_named(loss: float) -> None:
    same, other = measured("plain", [1.0], loss=2.0), measured("hf", [1.0], loss=loss)
    (problem,) = report.unequal_losses([same, other], bench.TOLERANCE)
    assert problem.startswith("lstm, 1 ranks, hf: mean loss")
    assert not report.unequal_losses([same, measured("hf", [1.0], loss=2.001)], bench.TOLERANCE)


def test_tables_and_picture(tmp_path: Path) -> None:
    cells = []
    for arm, seconds in (("plain", 0.4), ("bigtrain", 0.1)):
        cell = {"workload": "lstm", "ranks": 1, "arm": arm}
        cells.append(cell | {"step_seconds": [[seconds] * 3], "mean_losses": [2.0]})
    results = {
        "command": "make bench",
        "when": "today",
        "note": "",
        "machine": {"cores": 2, "bf16_GFLOP_per_s": 1234.56},
        "workloads": {"lstm": {"title": "LSTM", "unit": "tokens", "units_per_step": 2048}},
        "arms": {"plain": "torch <loop>", "bigtrain": "bigtrain"},
        "cells": cells,
        "checks": {},
    }
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.replace_tables(page, report.markdown(json.loads(json.dumps(results))))
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| torch <loop> | 5,120 | 400.0 | 400.0 | 4.00 | 2.0000 |" in text
    assert "| bf16 GFLOP/s | 1,234.6 |" in text
    picture = report.svg(results)
    assert "torch &lt;loop&gt;" in picture and "prefers-color-scheme: dark" in picture
    assert picture.count("<rect") == 2


def test_the_last_line_of_json_is_read() -> None:
    output = '{"train_loss": 1}\n\n{"times": [1.0], "mean_loss": 2.0}\n100%|██|\n'
    assert bench.last_json(output) == {"times": [1.0], "mean_loss": 2.0}


def test_arms_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bigtrain's command line and a plain loop: one loss, from the same weights and batches."""
    monkeypatch.setattr(bench, "CORES", 1)
    small = bench.Bench(tmp_path, 1, False, RATES, share=1 / 14)
    assert small.steps("cnn") == 3 and small.faster_precision == "fp32"
    load("workloads").write_batches("cnn", tmp_path, 3)
    results = bench.measure(small, bench.chosen_cells(["cnn"], [1], ["tuned", "bigtrain"]))
    assert not report.unequal_losses(results, bench.TOLERANCE), results
    assert all(one.median > 0 for one in results)
