"""docs/course.md: its commands run as they stand there (shortened), and what it says is so."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import bigtrain
from safetensors.numpy import load_file
from transformers import ResNetConfig, ResNetForImageClassification

from bigtrain.config.loader import load_recipe, shipped_recipes
from bigtrain.data.datasets import prepare
from bigtrain.data.examples import PreparedData
from bigtrain.errors import RequestError
from bigtrain.models.build import build_model
from bigtrain.models.rnn import RNN

ROOT = Path(__file__).parent.parent
SHORT = ["train.steps=4", "train.eval_every=4", "train.checkpoint_every=4", "track.wandb=off"]
# Settings of the page that would be long, or that four steps cannot have.
LONG = ("train.steps=", "train.eval_every=", "train.epochs=")


def load_page() -> ModuleType:
    """benchmarks/course.py, which reads the page."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return __import__("course")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


course = load_page()
BLOCKS = list(course.blocks((ROOT / "docs" / "course.md").read_text(encoding="utf-8")))


def shortened(command: str) -> list[str]:
    """The words of a command; what it trains is trained for four steps."""
    words = shlex.split(command)
    if words[:2] == ["bigtrain", "compress"]:
        return [*words, "--steps", "4"]
    if words[:2] not in (["bigtrain", "train"], ["bigtrain", "sweep"]):
        return words
    kept = [word for word in words if not word.startswith(LONG)]
    kept = [re.sub(r"^seed=(\d+)\.\.\d+$", r"seed=\1", word) for word in kept]
    launcher = ["--launcher", f"{sys.executable} {ROOT / 'tests' / 'fork_server.py'} 1"]
    return [*kept, *SHORT, *(launcher if words[1] == "sweep" else [])]


def run(words: list[str], cwd: Path) -> None:
    if words[0] == "bigtrain":
        done = bigtrain(*words[1:], cwd=cwd)
    else:
        program = [sys.executable, *words[1:]] if words[0] == "python" else words
        done = subprocess.run(program, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"


@pytest.mark.course
@pytest.mark.timeout(600)
def test_every_command_of_the_course_runs(tmp_path: Path) -> None:
    """In the order of the page, in one folder: later commands use what earlier ones have made."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for block in BLOCKS:
        for command in block.commands:
            for part in command.split(" && "):
                run(shortened(part), tmp_path)


def test_every_recipe_that_runs_here_is_in_the_course_or_in_the_benchmarks() -> None:
    """And every block of the course has a place for its figure."""
    page = (ROOT / "docs" / "course.md").read_text(encoding="utf-8")
    for_gpus = {"gpt2-124m", "llama-1b", "llama-8b-zero3", "finetune-llama", "resnet50-imagefolder"}
    elsewhere = set(re.findall(r'"([a-z0-9-]+)": "', (ROOT / "benchmarks/recipes.py").read_text()))
    named = set(re.findall(r"bigtrain (?:train|sweep) ([a-z0-9-]+)", page))
    assert set(shipped_recipes()) - for_gpus - elsewhere <= named
    assert page.count("```bash") == page.count(course.MARK) == len(BLOCKS)


def test_full_batch_gradient_descent_ends_at_the_closed_form(tmp_path: Path) -> None:
    done = bigtrain("train", "diabetes-full-batch", "track.wandb=off", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    prepared = prepare(load_recipe("diabetes-full-batch").recipe)
    columns = []
    for part in (prepared.train, prepared.eval):
        fields = part.fields  # type: ignore[attr-defined]
        features = np.stack([part[row]["features"] for row in range(len(part))]).astype(np.float64)
        columns.append((np.c_[features, np.ones(len(features))], fields["target"]))
    (design, answers), (held_out, held_out_answers) = columns
    best = np.linalg.lstsq(design, answers, rcond=None)[0]
    exported = tmp_path / "runs" / "diabetes-full-batch" / "export" / "model.safetensors"
    tensors = load_file(exported)
    found = np.r_[tensors["layers.0.weight"][0], tensors["layers.0.bias"]]
    assert np.linalg.norm(found - best) <= 1e-4 * np.linalg.norm(best)
    mse = np.mean((held_out @ best - held_out_answers) ** 2)
    assert json.loads(done.stdout)["mse"] == pytest.approx(mse, rel=1e-4)


def test_attention_sees_no_padding_and_weighs_all_states() -> None:
    torch.manual_seed(0)
    model = RNN(3, vocab_size=20, embed=8, hidden=6, bidirectional=True, attention=True).eval()
    ids = torch.randint(1, 20, (2, 5))
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    mask = (torch.arange(9) < 5).long().repeat(2, 1)
    alone = model(input_ids=ids, attention_mask=mask[:, :5])
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask), alone)
    torch.testing.assert_close(model(input_ids=ids), alone)  # without a mask all states count
    states, _ = model.rnn(model.embedding(ids))
    weights = torch.tanh(model.attention.hidden(states)) @ model.attention.score.weight[0]
    mean = torch.einsum("bt,btw->bw", weights.softmax(1), states)
    torch.testing.assert_close(model.head(mean), alone)
    with pytest.raises(ValueError, match="attention is for classes"):
        RNN(20, vocab_size=20, per_position=True, attention=True)


def test_a_pretrained_network_gets_a_new_head_for_other_classes_and_says_so(tmp_path: Path) -> None:
    """As the course has it. The body must fit: what does not is refused."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    stored = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10))
    stored.save_pretrained(tmp_path)
    overrides = [f"model.pretrained={tmp_path}", f"model.args={json.dumps(sizes)}"]
    recipe = load_recipe("cifar10-resnet", overrides).recipe
    prepared = PreparedData([], [], 1, classes=["a", "b", "c"], image=(3, 32, 32))
    weights = build_model(recipe, prepared).state_dict()
    assert weights["classifier.1.weight"].shape == (3, 16)
    for name, tensor in stored.state_dict().items():
        assert name.startswith("classifier") or (weights[name] == tensor).all(), name
    assert prepared.notes == [
        "classifier.1.bias, classifier.1.weight: drawn anew, for 3 other classes"
    ]
    wider = load_recipe("cifar10-resnet", [*overrides, "model.args.embedding_size=16"]).recipe
    with pytest.raises(RequestError, match="has another shape"):
        build_model(wider, prepared)
