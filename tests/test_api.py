"""The Python API: a real run by it, read back; lazily imported; typed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bigtrain
from bigtrain.errors import RecipeError, RequestError

ROOT = Path(bigtrain.__file__).parent.parent
SHORT = ["train.steps=6", "train.eval_every=3", "track.wandb=off"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `mine` has been trained by the API."""
    folder = tmp_path_factory.mktemp("api")
    before = Path.cwd()
    os.chdir(folder)
    environment = dict(os.environ)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        loaded = bigtrain.load_recipe("digits-mlp", ["name=mine", *SHORT])
        summary = bigtrain.train(loaded, quiet=True)
    finally:
        os.chdir(before)
    assert (summary["name"], summary["step"]) == ("mine", 6)
    assert signal.getsignal(signal.SIGTERM) is handler and dict(os.environ) == environment
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_a_run_is_read_back() -> None:
    run = bigtrain.open_run("mine")
    train = run.metrics()
    assert train["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert {"samples", "loss", "lr", "grad_norm", "seconds", "time"} <= set(train.columns)
    assert train["loss"].dtype == float and "kind" not in train
    assert run.metrics("eval")["step"].tolist() == [3, 6]
    assert run.metrics("event")["event"].iloc[0] == "started"
    assert run.summary["accuracy"] == run.metrics("eval")["accuracy"].iloc[-1]
    assert run.settings["optim.lr"] == 2e-3
    assert bigtrain.open_run(run.path).path == run.path


def test_a_step_that_was_done_again_is_one_row() -> None:
    run = bigtrain.open_run("mine")
    path = run.path / "metrics.jsonl"
    lines = path.read_text()
    (again,) = [line for line in lines.splitlines() if '"kind": "train", "step": 5,' in line]
    path.write_text(f"{lines}{again}\n")
    assert sorted(run.metrics()["step"]) == [1, 2, 3, 4, 5, 6]
    path.write_text(lines)


def test_its_model_is_evaluated_and_loaded() -> None:
    run = bigtrain.open_run("mine")
    again = bigtrain.evaluate(run)
    assert again["loss"] == pytest.approx(run.summary["loss"], rel=1e-6)
    odd = run.path.rename(run.path.parent / "mine: a #copy")
    try:
        assert bigtrain.evaluate(odd) == again
    finally:
        odd.rename(run.path)
    model = bigtrain.load_model("mine")
    assert not model.training
    assert model(pixel_values=torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    exported = bigtrain.load_model(run.path / "export")
    pairs = zip(model.parameters(), exported.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_another_engine_trains_in_the_same_process_with_the_same_losses() -> None:
    bigtrain.train("digits-mlp", ["name=other", "engine.kind=zero2", *SHORT], quiet=True)
    losses = [bigtrain.open_run(name).metrics()["loss"].tolist() for name in ("mine", "other")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_mistakes_are_errors_with_a_message() -> None:
    with pytest.raises(RequestError, match="no run 'absent'"):
        bigtrain.open_run("absent")
    with pytest.raises(RecipeError, match=r"did you mean optim\.lr"):
        bigtrain.train("digits-mlp", ["optim.learning_rat=1"])
    with pytest.raises(RequestError, match="overrides for a recipe that is loaded"):
        bigtrain.train(bigtrain.load_recipe("digits-mlp"), ["train.steps=1"])
    for overrides in ("train.steps=1", {"train.steps": 1}):
        with pytest.raises(RequestError, match="a list of key=value"):
            bigtrain.load_recipe("digits-mlp", overrides)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="metrics of kind 'evals'"):
        bigtrain.open_run("mine").metrics("evals")  # type: ignore[arg-type]
    unfinished = Path("runs/unfinished")
    unfinished.mkdir(parents=True)
    (unfinished / "recipe.yaml").write_text("name: unfinished\n")
    assert bigtrain.open_run("unfinished").metrics().empty
    for read in (
        bigtrain.evaluate,
        bigtrain.load_model,
        lambda name: bigtrain.open_run(name).summary,
    ):
        with pytest.raises(RequestError, match="a finished run"):
            read("unfinished")


def test_importing_it_imports_nothing_heavy() -> None:
    program = """
import sys, bigtrain
assert not {"torch", "pydantic", "pandas", "numpy"} & set(sys.modules)
bigtrain.load_recipe("tiny-lm")
assert not {"torch", "pandas"} & set(sys.modules)
assert dir(bigtrain) == sorted([*bigtrain.__all__, "__version__"])
assert not hasattr(bigtrain, "nothing")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_it_is_typed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import bigtrain\n"
        'reveal_type(bigtrain.train("x", ["a=b"]))\n'
        'reveal_type(bigtrain.open_run("x").path)\n'
        'reveal_type(bigtrain.load_model("x"))\n'
        "bigtrain.trian\n"
    )
    # From the root, where `make types` has left a cache; without one this takes a minute.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-pretty", str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    for expected in (
        '2: note: Revealed type is "dict[str, Any]"',
        '3: note: Revealed type is "pathlib.Path"',
        '4: note: Revealed type is "torch.nn.modules.module.Module"',
        '5: error: Module has no attribute "trian"',
    ):
        assert expected in done.stdout, done.stdout + done.stderr
    assert (ROOT / "bigtrain" / "py.typed").is_file(), "so that mypy believes an installed bigtrain"
