"""`bigtrain evaluate`: ranks, intervals, tables and curves, its page, and lm-eval's tasks."""

import html
import json
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import bigtrain, on_ranks, start
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from bigtrain.evaluation.predictions import Predictions
from bigtrain.evaluation.report_metrics import ClassRow, Report, make_report, values_of
from bigtrain.evaluation.views import html_page
from bigtrain.evaluation.worst_examples import WorstExample

pytestmark = pytest.mark.trained

QUIET = ("track.wandb=off", "-q")
# A micro-batch that divides none of their held-out sets.
RECIPES = {
    "breast-cancer": ("train.steps=30", "engine.micro_batch=7"),
    "digits-cnn": ("train.steps=20", "engine.micro_batch=7"),
    "diabetes": ("train.steps=20", "engine.micro_batch=7"),
    "dates-seq2seq": ("train.steps=3", "engine.global_batch=24"),
    "tiny-lm": ("train.steps=2", "engine.global_batch=3", "data.seq_len=64"),
    "rnn-lm": ("train.steps=2", "engine.global_batch=3", "data.seq_len=64"),
}
LM_DATA = ("data.train='*.txt'", "data.eval_fraction=0.3", "data.tokenizer=bytes")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind of task, and of a model of ours that writes."""
    folder = tmp_path_factory.mktemp("evaluate")
    for number in range(6):
        text = f"def f{number}(x):\n    return x + {number}\n" * (20 + number)
        (folder / f"{number}.txt").write_text(text)
    for name, settings in RECIPES.items():
        extra = LM_DATA if name.endswith("-lm") else ()
        done = bigtrain("train", name, *settings, *extra, *QUIET, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def evaluated(folder: Path, name: str, *options: str) -> dict[str, Any]:
    done = bigtrain("evaluate", name, "--json", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def numbers(value: Any) -> list[Any]:
    """All numbers and texts of a JSON value, in order."""
    if isinstance(value, dict):
        return [inner for key in value for inner in [key, *numbers(value[key])]]
    if isinstance(value, list):
        return [inner for item in value for inner in numbers(item)]
    return [value]


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_find_what_one_finds(trained: Path, name: str) -> None:
    one = evaluated(trained, name)
    done = on_ranks(2, "evaluate", name, "--json", cwd=trained)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    for first, second in zip(numbers(one), numbers(two), strict=True):
        if isinstance(first, float):
            assert second == pytest.approx(first, rel=1e-9, abs=1e-9)
        else:
            assert second == first
    summary = json.loads((trained / "runs" / name / "summary.json").read_text())
    for key in set(summary) & set(one):
        if isinstance(summary[key], float):
            assert one[key] == pytest.approx(summary[key], rel=1e-5), "the run's own evaluation"
    assert one["intervals"]["loss"]["low"] < one["loss"] < one["intervals"]["loss"]["high"]


def test_only_the_first_rank_speaks_under_srun_too(trained: Path) -> None:
    step = {"SLURM_STEP_NODELIST": "here", "SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1"}
    shell = bigtrain("evaluate", "diabetes", cwd=trained, **step, SLURM_STEP_NUM_TASKS="1")
    assert shell.returncode == 0, "a shell of salloc is alone"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        step["MASTER_PORT"] = str(probe.getsockname()[1])
    command = ("evaluate", "breast-cancer")
    ranks = [start(*command, cwd=trained, **step, SLURM_PROCID=f"{rank}") for rank in range(2)]
    ends = [rank.wait() for rank in ranks]
    assert [end.returncode for end in ends] == [0, 0], ends
    assert ends[0].stdout.count("malignant") == 3, "classes, and who was taken for whom"
    assert ends[1].stdout == ""


@pytest.fixture(scope="module", params=[2, 5])
def classified(request: pytest.FixtureRequest) -> Predictions:
    """Made-up predictions with ties, and with a class that is never predicted."""
    classes = request.param
    draws = np.random.default_rng(1)
    logits = draws.normal(size=(301, classes)).round(1)
    logits[:, 0] -= 9 * (classes > 2)
    label = draws.integers(classes, size=301)
    logits[np.arange(301), label] += 0.7
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predicted = logits.argmax(1)
    return Predictions(
        loss=-np.log(probabilities[np.arange(301), label]),
        targets=np.ones(301, np.int64),
        exact=np.empty(0, np.bool_),
        label=label,
        predicted=predicted,
        probability=probabilities.max(1),
        score=probabilities[:, 1] if classes == 2 else np.empty(0),
    )


def made_up(label: Any, **columns: Any) -> Predictions:
    """Predictions that are all right, but for `columns`."""
    empty = np.empty(0)
    ones = np.ones(len(label), np.int64)
    found = {"loss": ones * 1.0, "targets": ones, "label": np.asarray(label)}
    found |= {"predicted": found["label"], "exact": empty.astype(bool)}
    return Predictions(**{"probability": empty, "score": empty, **found, **columns})


def report_of(predictions: Predictions) -> Report:
    names = [f"c{number}" for number in range(predictions.label.max() + 1)]
    prepared: Any = SimpleNamespace(classes=names, eval_bytes=None)
    return make_report(values_of(predictions, prepared), predictions, prepared)


def test_scikit_learn_agrees(classified: Predictions) -> None:
    report, p = report_of(classified), classified
    is_binary = len(p.score) > 0
    average = "binary" if is_binary else "macro"
    options = {"average": average, "zero_division": 0}
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(p.label, p.predicted),
        "precision": sklearn_metrics.precision_score(p.label, p.predicted, **options),
        "recall": sklearn_metrics.recall_score(p.label, p.predicted, **options),
        "f1": sklearn_metrics.f1_score(p.label, p.predicted, **options),
    }
    share, said = calibration_curve(p.label == p.predicted, p.probability, n_bins=10)
    if is_binary:
        expected["loss"] = sklearn_metrics.log_loss(p.label, p.score)
        expected["auc"] = sklearn_metrics.roc_auc_score(p.label, p.score)
        share, said = calibration_curve(p.label, p.score, n_bins=10)
        assert report.roc is not None
        area = sklearn_metrics.auc(report.roc.false_positive_rate, report.roc.true_positive_rate)
        assert area == pytest.approx(expected["auc"], abs=1e-9)
    for name, value in expected.items():
        assert report.metrics[name] == pytest.approx(value, abs=1e-9), name
    assert [each.share for each in report.calibration] == pytest.approx(share, abs=1e-9)
    assert [each.probability for each in report.calibration] == pytest.approx(said, abs=1e-9)
    counts = np.asarray([each.count for each in report.calibration])
    error = (counts * abs(share - said)).sum() / counts.sum()
    assert report.metrics["calibration_error"] == pytest.approx(error, abs=1e-9)
    confusion = sklearn_metrics.confusion_matrix(p.label, p.predicted)
    assert report.confusion == confusion.tolist()
    assert sum(row.support for row in report.per_class) == counts.sum() == 301


def test_intervals_are_those_of_a_bootstrap_by_hand(classified: Predictions) -> None:
    p, found = classified, report_of(classified).intervals
    draws = np.random.default_rng(2)
    average = "binary" if len(p.score) else "macro"
    drawn: dict[str, list[float]] = {"accuracy": [], "f1": [], "loss": []}
    if len(p.score):
        drawn["auc"] = []
    for _ in range(300):
        chosen = draws.integers(301, size=301)
        label, predicted = p.label[chosen], p.predicted[chosen]
        drawn["accuracy"].append((label == predicted).mean())
        f1 = sklearn_metrics.f1_score(label, predicted, average=average, zero_division=0)
        drawn["f1"].append(f1)
        drawn["loss"].append(p.loss[chosen].mean())
        if len(p.score):
            drawn["auc"].append(sklearn_metrics.roc_auc_score(label, p.score[chosen]))
    for name, values in drawn.items():
        low, high = np.percentile(values, [2.5, 97.5])
        tolerance = 0.2 * (high - low)  # of a few hundred draws
        assert found[name]["low"] == pytest.approx(low, abs=tolerance), name
        assert found[name]["high"] == pytest.approx(high, abs=tolerance), name


def test_a_model_gone_wrong_is_still_reported(tmp_path: Path) -> None:
    """Probabilities that are no numbers, and one example alone."""
    nothing = np.full(3, np.nan)
    bad = made_up(np.asarray([0, 1, 1]), loss=nothing, probability=nothing, score=nothing)
    report = report_of(bad)
    assert report.metrics["accuracy"] == 1.0
    assert (report.roc, report.calibration) == (None, [])
    prepared: Any = SimpleNamespace(classes=[], eval_bytes=None)
    assert make_report({"mse": 1.0}, made_up([1.0]), prepared).intervals == {}


def test_the_page_shows_it_all_and_names_cannot_break_it(trained: Path) -> None:
    page = trained / "page.html"
    found = evaluated(trained, "digits-cnn", "--html", str(page))
    text = page.read_text()
    for words in ("Metrics", "Reliability", "Confusion matrix", "Worst examples"):
        assert words in text
    assert text.count("data:image/png;base64,") == 24
    assert "http" not in text, "no network"
    assert {row["name"] for row in found["per_class"]} == {str(digit) for digit in range(10)}
    assert len(found["worst"]) == 24
    odd = "<td><u>"
    report = Report(
        examples=0,
        metrics={},
        intervals={},
        classes=[odd],
        per_class=[ClassRow(odd, 1, 1, 1, 1)],
        confusion=[[1]],
        worst=[WorstExample(0, 1.0, odd, odd, 0.5, "<script>alert(1)</script>")],
    )
    text = html_page("<u>", report, made_up([]))
    assert "<u>" not in text
    assert "<script>alert" not in text
    for name, words in (("breast-cancer", "ROC of"), ("diabetes", "Predicted and true")):
        evaluated(trained, name, "--html", str(page))
        assert words in page.read_text()
    assert "bmi=" in page.read_text(), "a row is shown as the table has it"


def test_wrong_requests_are_one_paragraph(trained: Path) -> None:
    def refused(*arguments: str) -> str:
        done = bigtrain("evaluate", *arguments, cwd=trained)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "no folder absent" in refused("breast-cancer", "--html", "absent/page.html")
    assert "a causal_lm or seq2seq run" in refused("diabetes", "--harness", "arc_easy")
    assert "one of transformers'" in refused("rnn-lm", "--harness", "arc_easy")
    assert "no folder" in refused("tiny-lm", "--harness", "x", "--harness-path", "absent")
    assert "--harness with data.eval=x" in refused("tiny-lm", "data.eval=x", "--harness", "x")
    assert "--harness with --html" in refused("tiny-lm", "--harness", "x", "--html", "page.html")
    for idle in ("data.missing=refuse", "data.columns.features=[bmi]", "optim.lr=1", "name=b"):
        assert f"{idle}: an evaluation takes it as" in refused("diabetes", idle)
    (trained / "runs" / "unfinished").mkdir(exist_ok=True)
    shutil.copy(trained / "runs" / "tiny-lm" / "recipe.yaml", trained / "runs" / "unfinished")
    assert "has not finished" in refused("unfinished")


def test_lm_eval_runs_on_the_export_beside_the_base_model(trained: Path, tmp_path: Path) -> None:
    base = trained / "runs" / "tiny-lm" / "export"
    tuned = ("name=tuned", f"model.pretrained={base}", "train.steps=1", "model.args={}")
    done = bigtrain(
        "train", "tiny-lm", *tuned, *LM_DATA[:2], "data.tokenizer=auto", *QUIET, cwd=trained
    )
    assert done.returncode == 0, done.stderr
    rows = [{"q": f"def f{n}(x):", "c": ["return", "zebra"], "a": 0} for n in range(8)]
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters.yaml").write_text(f"""
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/letters.jsonl}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: a
metric_list: [{{metric: acc}}]
metadata: {{version: 3}}
""")
    options = ("--harness", "letters", "--harness-path", str(tmp_path), "--harness-shots", "1")
    shown = bigtrain("evaluate", "tuned", *options, cwd=trained)
    assert shown.returncode == 0, shown.stderr
    scores = json.loads((trained / "runs" / "tuned" / "harness.json").read_text())
    task = scores["tasks"]["letters"]
    assert (task["version"], task["shots"], task["examples"]) == (3, 1, 8)
    assert task["template"]["doc_to_text"] == "{{q}}"
    assert len(task["hash"]) == 64
    assert set(task["metrics"]) == set(task["base_metrics"]) == {"acc,none", "acc_stderr,none"}
    assert f"{task['metrics']['acc,none']:.4f} ±" in shown.stdout
    shown = bigtrain("evaluate", "dates-seq2seq", *options[:4], "--json", cwd=trained)
    assert shown.returncode == 0, shown.stderr
    alone = json.loads(shown.stdout)["tasks"]["letters"]
    assert "base_metrics" not in alone
    assert alone["hash"] != task["hash"], "other prompts"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (make browser installs it)")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_in_a_real_browser(trained: Path, tmp_path: Path, width: int) -> None:
    page = tmp_path / "page.html"
    evaluated(trained, "breast-cancer", "--html", str(page))
    probe = """<script>
const plots = [...document.querySelectorAll("svg")].map(plot => plot.getBoundingClientRect().width);
document.getElementById("theme").click();
const dark = getComputedStyle(document.body).backgroundColor;
parent.document.title = JSON.stringify({plots, dark, page: page.scrollWidth, window: innerWidth});
</script></body>"""
    framed = html.escape(page.read_text().replace("</body>", probe))
    # In a frame, because Chromium's own window is never that narrow.
    style = f"width:{width}px;height:900px"
    page.write_text(f'<title>-</title><iframe style="{style}" srcdoc="{framed}"></iframe>')
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), "--window-size=1400,1000", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    seen = json.loads(html.unescape(done.stdout.split("<title>")[1].split("</title>")[0]))
    assert len(seen["plots"]) == 2
    assert min(seen["plots"]) > 250
    assert seen["dark"] == "rgb(20, 22, 26)"
    assert seen["page"] <= seen["window"], "nothing wider than the window"
