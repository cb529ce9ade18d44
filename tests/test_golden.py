"""The numbers of a run: the first twenty steps of every small recipe, and of every engine.

`make golden` writes golden/losses.json; the test runs the same commands and compares. A change that
is not meant to change a number leaves that file alone; with BIGTRAIN_GOLDEN_EXACT=1 every digit has
to be the same. Everything goes through the command line and metrics.jsonl, so that these cases
outlive any change of the code behind them.
"""

import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, bigtrain, on_ranks
from machine import EXACT, is_like, machine

GOLDEN = TESTS / "golden" / "losses.json"
SHORT = ["train.steps=20", "train.eval_every=20", "train.checkpoint_every=20"]
PLAIN = ["engine.precision=fp32", "track.wandb=off"]
# Python's own library differs from version to version: these read a text made by a rule.
TEXT = {
    "tiny-lm": ["data.train=corpus.txt", "data.seq_len=64"],
    "rnn-lm": ["data.train=corpus.txt", "data.seq_len=64"],
    "stdlib-classifier": ["data.train=corpus.jsonl", "data.seq_len=64"],
}
IMAGES_AND_TABLES = ["breast-cancer", "diabetes", "digits-cnn", "digits-mlp", "digits-resnet"]
RECIPES = [*IMAGES_AND_TABLES, "digits-rnn", "dates-seq2seq", *TEXT]
ENGINES = {
    "ddp": ["engine.kind=ddp"],
    "zero1": ["engine.kind=zero1"],
    "zero2": ["engine.kind=zero2"],
    "zero3": ["engine.kind=zero3"],
    "zero1-offload": ["engine.kind=zero1", "engine.offload=optimizer"],
    "zero2-offload": ["engine.kind=zero2", "engine.offload=optimizer"],
    "zero3-offload": ["engine.kind=zero3", "engine.offload=params"],
}
NOT_COMPARED = ("kind", "step", "time")  # of an evaluation's line


@dataclass(frozen=True)
class Case:
    """A run: on how many ranks, and what follows `bigtrain train`."""

    ranks: int
    arguments: list[str]


def _cases() -> dict[str, Case]:
    """Every recipe on one rank; a tied Transformer, an RNN and a CNN on each engine."""
    runs = [(recipe, "", 1) for recipe in RECIPES]
    for recipe in ("tiny-lm", "rnn-lm", "digits-cnn"):
        runs += [(recipe, engine, 2) for engine in ENGINES]
        runs.append((recipe, "zero3", 1))
    cases = {}
    for recipe, engine, ranks in runs:
        name = f"{recipe}-{engine or 'alone'}-{ranks}"
        changes = [*SHORT, *PLAIN, *TEXT.get(recipe, []), *ENGINES.get(engine, [])]
        cases[name] = Case(ranks, [recipe, f"name={name}", *changes])
    return cases


CASES = _cases()


def write_corpora(folder: Path) -> None:
    """200 kB of made-up words: text whose first words are common, and texts with a label each."""
    draw = random.Random(0).random  # the one function whose numbers Python promises never to change
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]

    def choose(values: list[str], power: int) -> str:
        return values[int(len(values) * draw() ** power)]

    words = [choose(syllables, 1) + choose(syllables, 1) for _ in range(600)]
    lines = [" ".join(choose(words, 3) for _ in range(12)) + ".\n" for _ in range(3300)]
    (folder / "corpus.txt").write_text("".join(lines))
    records = []
    for number in range(3300):
        label = number % 10
        own = words[60 * label : 60 * label + 60]
        text = " ".join(choose(own if draw() < 0.5 else words, 1) for _ in range(12))
        records.append(json.dumps({"text": text, "label": f"class {label}"}) + "\n")
    (folder / "corpus.jsonl").write_text("".join(records))


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """Train in `folder`, which has the corpora, and read the numbers from metrics.jsonl."""
    case = CASES[name]
    if case.ranks == 1:
        done = bigtrain("train", *case.arguments, cwd=folder)
    else:
        done = on_ranks(case.ranks, "train", *case.arguments, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    settings = json.loads((folder / "runs" / name / "effective.json").read_text())
    models_tokens = name.startswith(("tiny-lm", "rnn-lm", "dates-seq2seq"))
    assert ("loss" in settings) == models_tokens, "these alone can do without logits, and have to"
    text = (folder / "runs" / name / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 21))
    evaluation = next(line for line in lines if line["kind"] == "eval")
    return {
        "command": f"{case.ranks} x bigtrain train {' '.join(case.arguments)}",
        "samples": [line["samples_digest"] for line in steps],
        "losses": [line["loss"] for line in steps],
        "grad_norms": [line["grad_norm"] for line in steps],
        "evaluation": {key: evaluation[key] for key in evaluation if key not in NOT_COMPARED},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden")
    write_corpora(path)
    return path


def test_the_file_has_every_case() -> None:
    assert list(json.loads(GOLDEN.read_text())["cases"]) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_run_has_the_numbers_it_always_had(name: str, folder: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    expected = golden["cases"][name]
    found = run_case(name, folder)
    assert found["samples"] == expected["samples"], "other samples, or another order of them"
    if EXACT:
        assert found == expected
    tolerance, scores = 1e-6, list(expected["evaluation"])
    if not is_like(golden["made on"]):  # an example may change sides there: a jump in accuracy
        tolerance, scores = 1e-4, ["loss"]
    for key in ("losses", "grad_norms"):
        assert found[key] == pytest.approx(expected[key], rel=tolerance), key
    for key in scores:
        number = expected["evaluation"][key]
        assert found["evaluation"][key] == pytest.approx(number, rel=tolerance), key


def write_golden() -> None:
    """Run every case and write what came of it, one line per list of numbers."""
    texts = []
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["BIGTRAIN_CACHE"] = str(Path(temporary) / "cache")
        write_corpora(Path(temporary))
        for name in CASES:
            print(name, file=sys.stderr)
            found = run_case(name, Path(temporary))
            lines = [f'"{key}": {json.dumps(value)}' for key, value in found.items()]
            texts.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
    cases = ",\n".join(texts)
    GOLDEN.write_text(f'{{"made on": {json.dumps(machine())},\n"cases": {{\n{cases}\n}}}}\n')


if __name__ == "__main__":
    write_golden()
