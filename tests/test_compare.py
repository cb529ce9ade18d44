"""What is read back from run directories (status, goodput, compare and its page); doctor; FLOPs."""

import csv
import html
import io
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bigtrain, quickest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config.renamed_keys import RENAMED_KEYS
from bigtrain.doctor.checks import RankReport, check_ranks
from bigtrain.models.flops import PEAKS, flop_counter
from bigtrain.runs.compare import read_run
from bigtrain.runs.curves import AXES, all_curves, seed_groups, thin_out
from bigtrain.runs.directory import RunDir, asset
from bigtrain.runs.metrics_file import MetricsFile, Record, read_columns, read_metrics
from bigtrain.runs.status import RunStatus, goodput, status_of
from bigtrain.runs.step_shares import PARTS, column_of

GOLDEN = Path(__file__).parent / "golden" / "compare.txt"


def make_run(
    folder: Path, name: str, seed: int, rate: float, steps: int = 200, noise: float = 0.0
) -> Path:
    """The files of a run that has finished, with curves from a formula."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    recipe = (
        asset("recipes", "digits-cnn.yaml").read_text().replace("name: digits-cnn", f"name: {name}")
    )
    (run / "recipe.yaml").write_text(recipe.replace("steps: 1800", f"steps: {steps}"))
    settings = {
        "task": "image_classification",
        "seed": seed,
        "optim.lr": rate,
        "engine.world_size": 2,
        "engine.kind": "ddp",
    }
    (run / "effective.json").write_text(
        json.dumps({key: {"value": value, "origin": ""} for key, value in settings.items()})
    )
    (run / "summary.json").write_text("{}")
    lines: list[dict[str, Any]] = [{"kind": "event", "step": 0, "event": "started", "time": 1000.0}]
    for step in range(1, steps + 1):
        loss = (
            2.0 * math.exp(-step * rate) + 0.1 + 0.01 * seed + noise * math.sin(step * (seed + 1))
        )
        line = {
            "kind": "train",
            "step": step,
            "samples": step * 64,
            "weight": step * 64,
            "loss": loss,
            "applied": True,
        }
        line |= {"samples_per_s": 1280.0, "mfu": 0.4, "seconds": 0.05, "peak_memory_bytes": 2**30}
        lines.append(line | {"time": 1000 + step * 0.1})
        if step % 50 == 0:
            lines.append(
                {
                    "kind": "eval",
                    "step": step,
                    "loss": loss,
                    "accuracy": 1 - loss / 3,
                    "time": 1000 + step * 0.1,
                }
            )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of each of two learning rates."""
    folder = tmp_path_factory.mktemp("six")
    for rate, label in ((0.01, "slow"), (0.03, "fast")):
        for seed in range(3):
            make_run(folder, f"{label}-{seed}", seed, rate)
    return folder


def test_six_runs_are_compared_as_written_down(six: Path) -> None:
    done = bigtrain(
        "compare", "slow-*", "fast-*", "--to", "0.5", "--price", "2", cwd=six, COLUMNS="100"
    )
    assert done.returncode == 0, done.stderr
    shown = "\n".join(line.rstrip() for line in done.stdout.splitlines()) + "\n"
    if not GOLDEN.exists():
        GOLDEN.write_text(shown)
    assert shown == GOLDEN.read_text()


def test_json_and_csv_say_the_same(six: Path) -> None:
    (result,) = json.loads(bigtrain("compare", "fast-0", "--json", cwd=six).stdout)["results"]
    (row,) = csv.DictReader(io.StringIO(bigtrain("compare", "fast-0", "--csv", cwd=six).stdout))
    assert {key: str(value) for key, value in result.items()} == row
    assert result["hours"] == pytest.approx(200 * 0.05 / 3600)


def test_seeds_of_one_recipe_are_one_group_with_an_interval(six: Path) -> None:
    runs = [read_run(RunDir(path)) for path in sorted((six / "runs").iterdir())]
    assert seed_groups(runs) == ["fast-0"] * 3 + ["slow-0"] * 3
    averaged = [curve_set for curve_set in all_curves(runs) if curve_set.averaged]
    loss = averaged[0].metrics["loss"]
    members = np.stack([run.lines["loss"] for run in runs[:3]])
    assert np.allclose(loss.mean, members.mean(0))
    assert np.allclose(
        loss.high - loss.low, 2 * 4.30 * members.std(0, ddof=1) / math.sqrt(3), rtol=1e-2
    )


def test_downsampling_keeps_least_mean_and_greatest() -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    values[1234], values[77] = 50.0, np.nan
    lines = {column: np.arange(10_000) for column in AXES.values()}
    curve = thin_out(lines, values)
    assert len(curve.mean) <= 800
    assert curve.high.max() == 50.0
    assert curve.low.min() == np.nanmin(values)
    assert np.average(curve.mean, weights=np.full(800, 12.5)) == pytest.approx(
        np.nanmean(values), abs=0.01
    )


@pytest.mark.parametrize(
    "odd", ["none", "empty", "cut", "no steps", "nan", "broken inside", "not text"]
)
def test_a_run_that_is_odd_is_named_and_the_others_are_compared(odd: str, tmp_path: Path) -> None:
    make_run(tmp_path, "good", 0, 0.01)
    path = make_run(tmp_path, "odd $(x) [b]", 1, 0.01)
    metrics = path / "metrics.jsonl"
    text = metrics.read_text()
    if odd == "none":
        shutil.rmtree(path)
    new = {
        "empty": "",
        "cut": text[:-40],
        "no steps": text.splitlines()[0] + "\n",
        "nan": text.replace('"loss": 0.', '"loss": null, "x": 0.'),
        "broken inside": text.replace('"step": 100, "samples"', '"step": 1"00, "samples"'),
    }.get(odd)
    if new is not None:
        metrics.write_text(new)
    if odd == "not text":
        metrics.write_bytes(b"\xff\xfe\n" + text.encode() + b'{"kind": "train", "step": "\xff"}\n')
    for command in (["compare", "good", "odd*"], ["status"]):
        done = bigtrain(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "good" in done.stdout
    done = bigtrain("compare", "good", "odd*", cwd=tmp_path)
    assert "odd" in done.stdout or "note: odd" in done.stderr or "note: runs/odd" in done.stderr


def test_nothing_to_compare_is_a_wrong_request(tmp_path: Path) -> None:
    done = bigtrain("compare", "nope", cwd=tmp_path)
    assert done.returncode == 2
    assert "nope: no run" in done.stderr


@pytest.mark.parametrize("page", ["nodir/x.html", "."])
def test_a_page_that_cannot_be_written_is_a_wrong_request(
    page: str, six: Path, tmp_path: Path
) -> None:
    shutil.copytree(six / "runs", tmp_path / "runs")
    done = bigtrain("compare", "fast-0", "--html", page, cwd=tmp_path)
    assert done.returncode == 2
    assert f"bigtrain: {page} cannot be read or written: " in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unforeseen_error_ends_with_3_without_its_secrets(tmp_path: Path) -> None:
    """Also of a command that needs no torch."""
    program = """if True:
        import sys
        from bigtrain import __main__
        def fail(standalone_mode):
            raise ValueError("hf_" + 30 * "a")
        __main__.app = fail
        try:
            __main__.main()
        finally:
            assert "torch" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "ValueError: [redacted]" in done.stderr and "hf_aaa" not in done.stderr


@pytest.mark.timed
def test_ten_runs_of_a_hundred_thousand_steps_open_in_three_seconds(tmp_path: Path) -> None:
    first = make_run(tmp_path, "run-0", 0, 1e-4, steps=100_000)
    for number in range(1, 10):
        shutil.copytree(first, first.with_name(f"run-{number}"))

    def look() -> None:
        done = bigtrain("compare", "run-*", "--html", "page.html", cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    assert quickest(look, 3) < 3
    assert (tmp_path / "page.html").stat().st_size < 2e6


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
PROBE = """<script>
addEventListener("error", e => { parent.document.title = "ERROR " + e.message; });
setTimeout(() => {
  const box = $("canvas").getBoundingClientRect(), pen = $("canvas").getContext("2d");
  const middle = {clientX: box.left + box.width / 2, clientY: box.top + 50, pointerType: "mouse"};
  $("canvas").dispatchEvent(new PointerEvent("pointermove", middle));
  const pixels = pen.getImageData(0, 0, $("canvas").width, $("canvas").height).data;
  const colours = new Set();
  for (let i = 0; i < pixels.length; i += 4)
    if (pixels[i + 3] === 255) colours.add(pixels.slice(i, i + 3).join());
  parent.document.title = JSON.stringify({
    tip: $("tip").innerText, shown: $("tip").style.display, colours: [...colours],
    page: document.documentElement.scrollWidth, window: innerWidth,
    rows: $("results").rows.length});
}, 300);
</script></body>"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (make browser installs it)")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_and_answers_in_a_real_browser(
    six: Path, tmp_path: Path, width: int
) -> None:
    file = tmp_path / "page.html"
    done = bigtrain("compare", "slow-*", "fast-*", "--html", str(file), cwd=six)
    assert done.returncode == 0, done.stderr
    page = file.read_text()
    assert "http" not in page, "no network"
    # In a frame, because Chromium's own window is never that narrow.
    probed = html.escape(page.replace("</body>", PROBE))
    style = f"width:{width}px;height:900px"
    file.write_text(f'<title>-</title><iframe style="{style}" srcdoc="{probed}"></iframe>')
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1400,1000",
        "--virtual-time-budget=3000",
    ]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, f"file://{file}"],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    probe = json.loads(html.unescape(title))
    assert probe["shown"] == "block"
    assert "fast-0 (3 seeds): 0." in probe["tip"]
    assert {"112,72,232", "138,109,59"} <= set(probe["colours"]), "both curves, in their colours"
    assert probe["page"] <= probe["window"], "nothing wider than the window"
    assert probe["rows"] > 10


def test_status_says_what_each_run_does(six: Path, tmp_path: Path) -> None:
    shutil.copytree(six / "runs", tmp_path / "runs")
    died = tmp_path / "runs" / "slow-1"
    failed = tmp_path / "runs" / "slow-2"
    (died / "summary.json").unlink()
    (failed / "summary.json").unlink()
    with (failed / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "event", "step": 200, "event": "failed", "reason": "it burnt"}\n')
    statuses = json.loads(bigtrain("status", "--json", cwd=tmp_path).stdout)
    by_run = {status["run"]: status for status in statuses}
    assert {run: status["state"] for run, status in by_run.items()} == {
        "fast-0": "finished",
        "fast-1": "finished",
        "fast-2": "finished",
        "slow-0": "finished",
        "slow-1": "died",
        "slow-2": "FAILED",
    }
    assert by_run["slow-2"]["health"] == ["it burnt"]
    half = pytest.approx(0.5, rel=0.01)
    assert by_run["fast-0"]["goodput"] == half, "half the wall time is spent on steps"
    assert "it burnt" in bigtrain("status", cwd=tmp_path, COLUMNS="160").stdout


def test_status_has_the_same_keys_for_every_run(tmp_path: Path) -> None:
    """Other programs read them. Of a run whose files are not readable too."""
    make_run(tmp_path, "good", 0, 0.01)
    bad = make_run(tmp_path, "bad", 0, 0.01)
    (bad / "metrics.jsonl").write_text('{"kind": "train", "step": []}\n')
    statuses = json.loads(bigtrain("status", "--json", cwd=tmp_path).stdout)
    assert {status["run"]: status["state"] for status in statuses} == {
        "good": "finished",
        "bad": "UNREADABLE",
    }
    keys = ["run", "state", "step", "steps", "loss", "samples_per_s"]
    keys += ["left", "restarts", "goodput", "shares", "job", "health"]
    for status in statuses:
        assert list(status) == keys
    tokens = RunStatus("text", "running", rate=5.0, unit="tokens").as_dict()
    assert list(tokens) == [key.replace("samples", "tokens") for key in keys]
    assert tokens["tokens_per_s"] == 5.0


def test_where_the_time_went_is_in_status_and_compare_where_lines_say_it(tmp_path: Path) -> None:
    """The first half of a run is from a version whose lines did not; they count for nothing."""
    run = make_run(tmp_path, "half", 0, 0.01)
    make_run(tmp_path, "old", 0, 0.01)
    seconds = dict.fromkeys(PARTS, 0.0) | {"forward": 0.02, "backward": 0.03, "checkpoint": 0.05}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train" and line["step"] > 100:
            line |= {column_of(part): value for part, value in seconds.items()}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = bigtrain("status", "half", cwd=tmp_path).stdout
    assert "time of a step: checkpoint 50%, backward 30%, forward 20%\n" in shown
    assert "time of a step" not in bigtrain("status", "old", cwd=tmp_path).stdout
    shown = bigtrain("compare", "half", "old", "--json", cwd=tmp_path).stdout
    half, old = json.loads(shown)["results"]
    assert half["share backward"] == pytest.approx(0.3)
    assert not [key for key in old if key.startswith("share")]


def test_steps_done_twice_count_once_in_goodput() -> None:
    lines = {
        "step": np.array([1, 2, 3, 2, 3]),
        "seconds": np.ones(5),
        "time": np.array([1.0, 2, 3, 9, 10]),
    }
    turns = [{"event": "started", "time": 0.0}, {"event": "started", "time": 7.0}]
    assert goodput(lines, turns, running=False) == pytest.approx(0.3)


def test_the_time_after_a_finish_is_not_lost_and_a_later_start_no_restart(tmp_path: Path) -> None:
    """Finished, started again with nothing to do, extended."""
    metrics = make_run(tmp_path, "good", 0, 0.01) / "metrics.jsonl"
    status = status_of(RunDir(metrics.parent))
    assert (status.restarts, status.goodput) == (0, pytest.approx(0.5))
    lines = metrics.read_text().splitlines(keepends=True)
    for event, time in [("finished", 1020), ("started", 2000), ("finished", 2000)]:
        line = {"kind": "event", "step": 200, "event": event, "time": time}
        lines.append(json.dumps(line) + "\n")
    metrics.write_text("".join(lines))
    assert status_of(RunDir(metrics.parent)) == status
    started = {"kind": "event", "step": 200, "event": "started", "time": 3000}
    more = {"kind": "train", "step": 201, "loss": 0.1, "seconds": 0.05, "time": 3000.1}
    with metrics.open("a") as file:
        file.write(json.dumps(started) + "\n" + json.dumps(more) + "\n")
    longer = status_of(RunDir(metrics.parent))
    assert (longer.restarts, longer.goodput) == (0, pytest.approx(0.5, rel=0.01))
    with metrics.open("a") as file:
        file.write(json.dumps(started | {"time": 4000}) + "\n")
    assert status_of(RunDir(metrics.parent)).restarts == 1


def test_a_checkpoint_not_written_is_seen_behind_a_rejected_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, "good", 0, 0.01)
    with (run / "metrics.jsonl").open("a") as file:
        for event in ("checkpoint_failed", "checkpoint_rejected"):
            line = {"kind": "event", "step": 200, "event": event, "reason": "disk full"}
            file.write(json.dumps(line) + "\n")
    assert status_of(RunDir(run)).health == ["checkpoint not written: disk full"]


def test_a_long_name_is_not_cut(tmp_path: Path) -> None:
    name = "digits-mlp-with-a-rather-long-name-of-a-run"
    make_run(tmp_path, name, 0, 0.01)
    piped = bigtrain("status", cwd=tmp_path, COLUMNS="80").stdout.splitlines()[1]
    assert piped.startswith(f"{name} finished 200/200 ")
    terminal = bigtrain("status", cwd=tmp_path, COLUMNS="80", FORCE_COLOR="1").stdout
    assert "…" not in terminal and "1,280 samples/s" in terminal


def test_lines_are_read_alike_in_both_ways(six: Path) -> None:
    path = six / "runs" / "fast-0" / "metrics.jsonl"
    losses = [line["loss"] for line in read_metrics(path, "train")]
    columns, others = read_columns(path, {"loss": "float64"})
    assert columns["loss"].tolist() == losses
    assert others == [line for line in read_metrics(path) if line["kind"] != "train"]


@st.composite
def written_lines(draw: st.DrawFn) -> tuple[Record, str]:
    """A record, and its line as a program may have written it: any order of keys, any spacing."""
    kind = draw(st.sampled_from(["train", "eval", "event"]))
    record: Record = {"kind": kind, "step": draw(st.integers(0, 9)), "loss": draw(st.floats(0, 9))}
    if kind == "event":
        record["event"] = "started"
    keys = draw(st.permutations(list(record)))
    separators = draw(st.sampled_from([(", ", ": "), (",", ":"), (" , ", " :  ")]))
    margin = draw(st.sampled_from(["", " ", "\t"]))
    line = json.dumps({key: record[key] for key in keys}, separators=separators)
    return record, margin + line + margin


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(written_lines(), min_size=1, max_size=8), cut=st.integers(0, 4))
def test_a_line_counts_whatever_the_order_of_its_keys(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[Record, str]], cut: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    records = [record for record, _ in lines]
    text = "\n".join(line for _, line in lines)
    if cut:  # as a crash leaves the last line
        text = text.rstrip()[:-cut]
        records.pop()
    path.write_text(text)
    assert list(read_metrics(path)) == records
    for kind in ("train", "eval", "event"):
        expected = [record for record in records if record["kind"] == kind]
        assert list(read_metrics(path, kind)) == expected
    columns, others = read_columns(path, {"step": "int64", "loss": "float64"})
    training = [record for record in records if record["kind"] == "train"]
    assert columns["step"].tolist() == [record["step"] for record in training]
    assert columns["loss"].tolist() == [record["loss"] for record in training]
    assert others == [record for record in records if record["kind"] != "train"]


def test_the_writer_puts_the_kind_first(tmp_path: Path) -> None:
    file = MetricsFile(RunDir(tmp_path))
    file.log({"step": 1, "kind": "train", "loss": math.inf})
    file.close({})
    line = '{"kind": "train", "step": 1, "loss": null}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == line


def test_a_run_of_an_earlier_version_is_read_with_todays_names(tmp_path: Path) -> None:
    """Its events had free texts for names, and some of its settings other keys."""
    old = make_run(tmp_path, "old", 0, 0.01)
    new = make_run(tmp_path, "new", 0, 0.01)
    (old / "summary.json").unlink()
    with (old / "metrics.jsonl").open("a") as file:
        for event in ("loss spike", "checkpoint FAILED", "lost a peer"):
            record = {"kind": "event", "step": 200, "event": event, "reason": "it was so"}
            file.write(json.dumps(record) + "\n")
    for folder, keys in ((old, RENAMED_KEYS.keys()), (new, RENAMED_KEYS.values())):
        effective = json.loads((folder / "effective.json").read_text())
        effective |= {key: {"value": 3, "origin": "recipe"} for key in keys}
        (folder / "effective.json").write_text(json.dumps(effective))
    names = [line["event"] for line in read_metrics(old / "metrics.jsonl", "event")]
    assert names == ["started", "loss_spike", "checkpoint_failed", "lost_peer"]
    (status,) = json.loads(bigtrain("status", "old", "--json", cwd=tmp_path).stdout)
    assert status["state"] == "lost a rank"
    assert status["health"] == ["checkpoint not written: it was so", "1 loss spike", "it was so"]
    compared = json.loads(bigtrain("compare", "old", "new", "--json", cwd=tmp_path).stdout)
    assert compared["settings"] == {}


def healthy(rank: int) -> RankReport:
    return RankReport(
        rank=rank,
        host=f"node{rank}",
        versions={"torch": "2.13.0"},
        device="cpu",
        devices=0,
        memory=1e11,
        used=0,
        blind=False,
        shm=1e11,
        disk=1e12,
        flops=1e12,
        wandb=True,
        write=1e9,
    )


SICK: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"versions": {"torch": "2.12.0"}}, "torch"),
    ({"versions": {"torch": "2.13.0", "CUDA": "13"}}, "CUDA"),
    ({"devices": 7}, "devices per node"),
    ({"shm": 1e6}, "/dev/shm free"),
    ({"shared": False}, "run directory"),
    ({"skew": -9.0}, "clocks"),
    ({"flops": 5e11}, "matrix multiply"),
    ({"used": 9e10}, "device is ours"),
    ({"blind": True}, "CUDA"),
]


@pytest.mark.parametrize("sick, check", SICK)
def test_the_doctor_names_the_sick_rank(sick: dict[str, Any], check: str | None) -> None:
    rows = check_ranks([healthy(0), healthy(1), replace(healthy(2), **sick)])
    wrong = [row for row in rows if not row.ok]
    assert [row.check for row in wrong] == ([check] if check else [])
    assert all("2" in row.found and row.advice for row in wrong)


def test_no_accelerator_is_taken_for_another() -> None:
    names = list(PEAKS)
    assert not [
        name
        for number, name in enumerate(names)
        if any(earlier in name for earlier in names[:number])
    ]


def test_flops_of_any_module_are_counted() -> None:
    lstm, attention = (
        torch.nn.LSTM(32, 64, batch_first=True),
        torch.nn.functional.scaled_dot_product_attention,
    )
    x, q = torch.randn(4, 10, 32), torch.randn(2, 4, 16, 32)
    for call, expected in [
        (lambda: torch.nn.Linear(32, 64)(x), 2 * 4 * 10 * 32 * 64),
        (lambda: lstm(x), 2 * 4 * 10 * 4 * 64 * (32 + 64)),
        (lambda: torch.nn.Conv2d(1, 8, 3)(torch.randn(2, 1, 8, 8)), 2 * 2 * 8 * 9 * 36),
        (lambda: attention(q, q, q, is_causal=True), 2 * 2 * 2 * 4 * 16 * 16 * 32),
    ]:
        with torch.no_grad(), flop_counter() as counted:
            call()
        assert counted.get_total_flops() == expected
