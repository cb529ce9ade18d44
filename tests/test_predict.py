"""`bigtrain predict`: what the run's own evaluation said; after a kill; bad input."""

import csv
import json
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import bigtrain, start, wait_for
from exports import LLAMA, T5, export_of
from PIL import Image

from bigtrain.config.task_specs import TASK_SPECS
from bigtrain.data.held_out import is_held_out
from bigtrain.errors import RequestError
from bigtrain.inference.generate import Generator
from bigtrain.inference.inputs import find_inputs
from bigtrain.inference.predict import Predictor
from bigtrain.inference.predict_files import Request, predict_files
from bigtrain.sources.builtin import BUILT_IN

pytestmark = pytest.mark.trained

SHORT = ["train.eval_every=60", "train.checkpoint_every=60", "track.wandb=off", "--quiet"]
BERT = "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def is_third_of(part: Path, whole: Path) -> bool:
    return part.exists() and part.stat().st_size > whole.stat().st_size / 3


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `mails` (texts in a column `body`, some too long) and `digits`, and the texts."""
    folder = tmp_path_factory.mktemp("predict")
    draw = random.Random(0)
    rows = []
    for number in range(600):
        label = draw.choice(["ham", "spam"])
        words = draw.choices(
            ["free", "win", "now"] if label == "spam" else ["dear", "we", "at"], k=3
        )
        if draw.random() < 0.15:
            label = "ham"
        noise = draw.choices("abcdefgh ", k=draw.randrange(90))
        rows.append(
            {
                "body": f"{number} {''.join(noise)[:40]} {' '.join(words)} " + "".join(noise),
                "label": label,
            }
        )
    write_rows(folder / "mails.jsonl", rows)
    trained = bigtrain(
        "train", "stdlib-classifier", "name=mails", "data.train=mails.jsonl", f"model.args={BERT}",
        "data.tokenizer=bytes", "data.seq_len=64", "data.columns.text=body", "train.steps=60",
        "optim.lr=3e-3", "optim.warmup_steps=5", "engine.precision=fp32", *SHORT, cwd=folder,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    trained = bigtrain("train", "digits-cnn", "name=digits", "train.steps=60", *SHORT, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    return folder


def accuracy_of(run: Path) -> float:
    return float(json.loads((run / "summary.json").read_text())["accuracy"])


def test_texts_are_predicted_as_the_run_evaluated_them(folder: Path) -> None:
    rows = rows_of(folder / "mails.jsonl")
    held_out = [row for row in rows if is_held_out(row["body"], 0.2)]
    write_rows(folder / "held.jsonl", held_out)
    command = ["predict", "mails", "held.jsonl", "--out", "held.out.jsonl", "--json"]
    done = bigtrain(*command, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "out": "held.out.jsonl",
        "inputs": len(held_out),
        "unusable": 0,
        "unknown": 0,
    }
    results = rows_of(folder / "held.out.jsonl")
    assert [row["row"] for row in results] == list(range(len(held_out)))
    right = sum(
        row["prediction"] == true["label"] for row, true in zip(results, held_out, strict=True)
    )
    accuracy = accuracy_of(folder / "runs" / "mails")
    assert right / len(held_out) == pytest.approx(accuracy) and 0.55 < accuracy < 1
    for row, true in zip(results, held_out, strict=True):
        assert row.get("cut", False) == (len(true["body"].encode()) > 64)
        assert list(row["probabilities"]) == ["ham", "spam"]
        assert max(row["probabilities"], key=row["probabilities"].get) == row["prediction"]
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_a_killed_prediction_goes_on_to_the_same_file(folder: Path) -> None:
    """SIGKILL at half; what was being written when a machine went down is cut off."""
    write_rows(folder / "many.jsonl", rows_of(folder / "mails.jsonl") * 5)
    for suffix in (".jsonl", ".csv"):
        command = ["predict", "mails", "many.jsonl", "--batch", "16", "--out"]
        whole, half = folder / f"whole{suffix}", folder / f"half{suffix}"
        assert bigtrain(*command, whole.name, cwd=folder).returncode == 0
        killed = start(*command, half.name, cwd=folder)
        wait_for(partial(is_third_of, half, whole))
        killed.signal(signal.SIGKILL)
        assert killed.wait().returncode == -signal.SIGKILL
        assert 0 < half.stat().st_size < whole.stat().st_size
        with half.open("a") as file:
            file.write('{"file": "many.js')
        done = bigtrain(*command, half.name, cwd=folder)
        assert (done.returncode, done.stdout) == (0, f"{half.name} is complete: 3,000 inputs\n")
        assert half.read_bytes() == whole.read_bytes()
    assert len(list(csv.DictReader(whole.open()))) == 3000
    done = bigtrain(*command, half.name, cwd=folder)
    assert (done.returncode, done.stdout) == (0, "half.csv was complete already: 3,000 inputs\n")


def test_a_file_is_continued_by_the_same_command_alone(folder: Path, tmp_path: Path) -> None:
    export, texts, out = folder / "runs" / "mails" / "export", tmp_path / "a.txt", tmp_path / "out"
    texts.write_text("one\r\n\ntwo")

    def predict(**options: Any) -> None:
        predict_files(export, Request([texts], out, {}, **options))

    predict()
    assert [row["row"] for row in rows_of(out)] == [0, 1, 2]
    before = out.read_bytes()
    with pytest.raises(RequestError, match="not the same top"):
        predict(top=1)
    with pytest.raises(RequestError, match="not the same model"):
        predict_files(
            export_of(tmp_path / "other", "text_classification", "rnn", {}),
            Request([texts], out, {}),
        )
    out.write_bytes(before + b"mine")
    with pytest.raises(RequestError, match="changed since it was written"):
        predict()
    assert out.read_bytes() == before + b"mine"
    (tmp_path / "out.about.json").unlink()
    with pytest.raises(RequestError, match="exists already"):
        predict()
    texts.write_text("one\r\n\nthree")
    out.unlink()
    predict(top=1)
    assert all(len(row["probabilities"]) == 1 for row in rows_of(out))


def test_images_are_predicted_and_bad_ones_are_named(folder: Path) -> None:
    records = list(BUILT_IN["digits"].open("image_classification").records())
    for number, record in enumerate(records):
        if is_held_out(str(number), 0.2):
            place = folder / "images" / record["label"]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(record["image"]).save(place / f"{number}.png")
    (folder / "images" / "notes.md").write_text("no image")
    (folder / "images" / "notes.pdf").write_text("a format that is only written")
    copied = bigtrain("export", "digits", "exported", cwd=folder)
    assert copied.returncode == 0, copied.stderr
    done = bigtrain("predict", "exported", "images", cwd=folder)
    assert done.returncode == 0 and "2 files" in done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    right = [row["prediction"] == Path(row["file"]).parent.name for row in results]
    assert sum(right) / len(right) == pytest.approx(accuracy_of(folder / "runs" / "digits"))

    bad = folder / "images" / "0"
    (bad / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(bad / "b.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(bad / "c.png")
    done = bigtrain("predict", "digits", "images", "--out", "i.csv", cwd=folder)
    assert done.returncode == 2
    assert f"3 of {len(results) + 3} inputs cannot be used" in done.stderr
    for reason in (
        "a.png: does not decode",
        "b.png: an image of 1 × 9 × 8",
        "c.png: a picture in RGB",
    ):
        assert f"images/0/{reason}" in done.stderr
    with (folder / "i.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(row["error"] != "" for row in rows) == 3
    assert [row["prediction"] for row in rows if not row["error"]] == [
        row["prediction"] for row in results
    ]
    allowed = ["--max-unreadable", "3"]
    done = bigtrain("predict", "digits", "images", "--out", "i.csv", *allowed, cwd=folder)
    assert done.returncode == 0 and "3 of them unusable" in done.stdout

    odd = folder / "odd" / os.fsdecode(b"caf\xe9.png")
    odd.parent.mkdir()
    shutil.copy(folder / results[0]["file"], odd)
    done = bigtrain("predict", "digits", "odd", "--out", "odd.jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(folder / "odd.jsonl")
    assert (row["file"], row["prediction"]) == (r"odd/caf\xe9.png", results[0]["prediction"])


def test_a_sequence_to_sequence_model_writes_each_answer(tmp_path: Path) -> None:
    """As it would write it alone, whatever is in the batch."""
    export = export_of(tmp_path / "export", "seq2seq", "t5", T5)
    sources = [f"{'long ' * (n % 5)}source {n}" for n in range(20)]
    (tmp_path / "sources.txt").write_text("\n".join(sources))
    predictor = Predictor(export)
    inputs = find_inputs([tmp_path / "sources.txt"], predictor.spec, {})
    blocks = list(predictor.blocks(inputs, 2))
    assert [len(block) for block in blocks] == [16, 4]
    generator = Generator(export)
    decoding = generator.decoding(32, None, 1.0, ())
    for number, row in enumerate([row for block in blocks for row in block]):
        assert row["prediction"] == generator.write(sources[number], decoding, 0)


def test_a_text_that_is_none_is_an_error_in_its_row(folder: Path, tmp_path: Path) -> None:
    export = folder / "runs" / "mails" / "export"
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe\ngood")
    write_rows(tmp_path / "b.jsonl", [{"body": "good"}, {"body": None}])
    out = tmp_path / "out.jsonl"
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    with pytest.raises(RequestError) as problem:
        predict_files(export, Request(files, out, {}))
    assert "a.txt row 1: not UTF-8 text (byte 0)" in str(problem.value)
    assert "b.jsonl row 1: text is NoneType, not text" in str(problem.value)
    rows = rows_of(out)
    assert ["error" in row for row in rows] == [False, True, False, False, True]
    assert rows[0]["probabilities"] == rows[2]["probabilities"] == rows[3]["probabilities"]


def test_requests_that_cannot_be_served_write_nothing(folder: Path, tmp_path: Path) -> None:
    language_model = export_of(tmp_path / "lm", "causal_lm", "llama", LLAMA)
    with pytest.raises(RequestError, match="bigtrain generate RUN --from"):
        Predictor(language_model)
    text, image = TASK_SPECS["text_classification"], TASK_SPECS["image_classification"]
    table = tmp_path / "t.csv"
    table.write_text("a,b\n1,x\n")
    picture = tmp_path / "p.png"
    Image.new("L", (8, 8)).save(picture)
    empty = tmp_path / "empty.txt"
    empty.touch()
    for path, spec, message in [
        (table, text, "has no column text; it has: a, b"),
        (tmp_path / "gone.txt", text, "there is no"),
        (tmp_path, text, "is a folder"),
        (picture, text, "is no text"),
        (table, image, "is no image"),
        (empty, text, "nothing to predict"),
    ]:
        with pytest.raises(RequestError, match=message):
            find_inputs([path], spec, {})
    done = bigtrain("predict", "mails", str(table), "--out", "no/t.csv", cwd=folder)
    assert done.returncode == 2 and "--column text=" in done.stderr
    assert not (folder / "no").exists()


def test_an_export_of_an_earlier_version_is_read_with_its_recipe(folder: Path) -> None:
    export = folder / "runs" / "digits" / "export"
    about = json.loads((export / "bigtrain.json").read_text())
    for key in ("resize", "seq_len", "columns"):
        del about[key]
    (folder / "old").mkdir()
    (folder / "old" / "recipe.yaml").write_text((export.parent / "recipe.yaml").read_text())
    (export.rename(folder / "old" / "export") / "bigtrain.json").write_text(json.dumps(about))
    assert Predictor(folder / "old" / "export").about["resize"] is None
    (folder / "old" / "recipe.yaml").unlink()
    with pytest.raises(RequestError, match="exported by an earlier version"):
        Predictor(folder / "old" / "export")
