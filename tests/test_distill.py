"""Knowledge distillation: the loss, and which teachers are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bigtrain
from distributed_cases import write_export

import bigtrain as api
from bigtrain.config.recipe import DistillConfig
from bigtrain.errors import RequestError
from bigtrain.models.teacher import Teacher

pytestmark = pytest.mark.trained

DIGITS = ["track.wandb=off", "train.eval_every=4", "train.checkpoint_every=2", "train.steps=4"]
SMALL = ["digits-cnn", "model.args={channels: [8]}", "engine.global_batch=16", *DIGITS]


def test_the_loss_is_hintons_over_the_targets_alone() -> None:
    """Against numpy in float64, with positions that do not count."""
    draw = np.random.default_rng(0)
    logits, taught = draw.normal(size=(2, 3, 7)), draw.normal(size=(2, 3, 7))
    labels = torch.tensor([[1, 2, -100], [0, -100, -100]])
    settings = DistillConfig(teacher="none", temperature=2.5, alpha=0.3)

    def log_softmax(values: Any) -> Any:
        return values - np.log(np.exp(values).sum(-1, keepdims=True))

    student, teacher = log_softmax(logits / 2.5), log_softmax(taught / 2.5)
    divergence = (np.exp(teacher) * (teacher - student)).sum(-1)
    expected = 0.7 * 11.0 + 0.3 * 2.5**2 * divergence[labels.numpy() != -100].sum()
    found = Teacher(settings, torch.nn.Linear(1, 1)).blend(
        torch.tensor(11.0), torch.tensor(logits).float(), torch.tensor(taught).float(), labels
    )
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that was trained for four steps, in runs/teacher."""
    path = tmp_path_factory.mktemp("distill")
    done = bigtrain("train", *SMALL, "name=teacher", "-q", cwd=path)
    assert done.returncode == 0, done.stderr
    return path


def test_a_teacher_is_noted_and_another_one_is_refused_on_a_resume(folder: Path) -> None:
    """The teacher is named by its run; evaluation stays the task's own."""
    shutil.copytree(folder / "runs" / "teacher" / "export", folder / "taught-by")
    taught = ["name=taught", "train.distill={teacher: taught-by, alpha: 1.0}"]
    done = bigtrain("train", *SMALL, *taught, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    settings = json.loads((folder / "runs/taught/effective.json").read_text())
    assert len(settings["train.distill.weights"]["value"]) == 64
    evaluated = bigtrain("evaluate", "taught", "--json", cwd=folder)
    loss = json.loads(evaluated.stdout)["loss"]
    assert loss == pytest.approx(json.loads(done.stdout)["loss"], rel=1e-6)

    write_export(folder / "other", seed=5)
    shutil.copy(folder / "other" / "model.safetensors", folder / "taught-by")
    refused = bigtrain("train", *SMALL, *taught, "train.steps=6", cwd=folder)
    assert refused.returncode == 2
    assert (
        "the weights of the teacher taught-by have changed since this run began" in refused.stderr
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": ["0", "1"]}, 'was trained with classes ["0", "1"]'),
        ({"task": "text_classification"}, 'was trained with task "text_classification"'),
        ({"image_mean": [0.25]}, "was trained with image_mean [0.25]"),
    ],
)
def test_a_teacher_that_sees_or_says_other_things_is_refused(
    change: dict[str, Any], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    shutil.copytree("runs/teacher/export", "unlike", dirs_exist_ok=True)
    about = json.loads(Path("unlike/bigtrain.json").read_text())
    Path("unlike/bigtrain.json").write_text(json.dumps(about | change))
    overrides = [*SMALL[1:], "name=refused", "train.distill.teacher=unlike"]
    with pytest.raises(RequestError, match="teacher: unlike was") as problem:
        api.train("digits-cnn", overrides, quiet=True)
    assert said in str(problem.value)
    assert not Path("runs/refused").exists()


def test_a_teacher_with_another_tokenizer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(f"a text of number {n}" for n in range(60)))
    small = [
        "data.train=text.txt",
        "data.seq_len=16",
        "model={name: rnn, args: {embed: 8, hidden: 8}}",
        *DIGITS,
        "engine.global_batch=4",
    ]
    bpe = "data.tokenizer={train: bpe, vocab_size: 270}"
    api.train("tiny-lm", [*small, "data.tokenizer=bytes", "name=teacher"], quiet=True)
    taught = [*small, "name=student", "train.distill.teacher=teacher"]
    with pytest.raises(RequestError) as problem:
        api.train("tiny-lm", [*taught, bpe], quiet=True)
    assert "has another tokenizer than this recipe's data" in str(problem.value)
    assert "data.tokenizer=runs/teacher/export" in str(problem.value)
    done = api.train("tiny-lm", [*taught, "data.tokenizer=runs/teacher/export"], quiet=True)
    assert done["step"] == 4


def test_regression_has_nothing_to_distil() -> None:
    with pytest.raises(RequestError, match="for losses over classes or tokens"):
        api.load_recipe("diabetes", ["train.distill.teacher=x"])
