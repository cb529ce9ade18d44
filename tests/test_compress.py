"""Pruning, quantization, and the table of `bigtrain compress`."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bigtrain
from distributed_cases import Twice, recipe_for
from safetensors.torch import load_file

import bigtrain as api
from bigtrain.compression import measure
from bigtrain.compression.compress import compress_run
from bigtrain.compression.quantize import _quantize, refuse_quantization, write_quantized
from bigtrain.compression.request import Request, parse_request
from bigtrain.config.recipe import PruneConfig
from bigtrain.errors import RequestError
from bigtrain.models.cnn import CNN
from bigtrain.models.prune import prune_model
from bigtrain.models.qat import QatLinear, round_weight, train_quantization_aware
from bigtrain.models.quantized import Int8Linear, Quantized, pack_int4, unpack_int4
from bigtrain.runs.directory import find_run

pytestmark = pytest.mark.trained

SMALL = [
    "model.args={channels: [8, 16]}",
    "track.wandb=off",
    "engine.global_batch=16",
    "train.steps=6",
    "train.eval_every=6",
    "train.checkpoint_every=6",
]
STUDENT = """name: student
task: image_classification
model: {name: mlp, args: {hidden: [32]}}
data: {train: digits, eval_fraction: 0.2}
track: {wandb: "off"}
train: {steps: 4, distill: {teacher: nobody, temperature: 4.0, alpha: 0.9}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compress")
    done = bigtrain("train", "digits-cnn", "name=cnn", *SMALL, "-q", cwd=path)
    assert done.returncode == 0, done.stderr
    (path / "student.yaml").write_text(STUDENT)
    return path


def test_one_table_of_all_variants_from_their_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(measure, "SECONDS_PER_TIMING", 0.01)
    request = parse_request("0.5", "global", "weights", True, True, "student.yaml", None, qat=True)
    table = compress_run(find_run("cnn"), request, quiet=True)
    rows = {row["model"]: row for row in table.as_dict()["rows"]}
    assert list(rows) == [
        "original",
        "prune-0.5",
        "int8",
        "int8-weights",
        "int4",
        "int8-qat",
        "int4-qat",
        "distill-student",
        "alone-student",
    ]
    summary = json.loads((folder / "runs/cnn/summary.json").read_text())
    assert rows["original"]["value"] == pytest.approx(summary["accuracy"])
    for name, row in rows.items():
        assert row["low"] <= row["value"] <= row["high"]
        files = list((folder / row["folder"]).glob("*.safetensors"))
        assert row["bytes"] == sum(file.stat().st_size for file in files), name
    assert rows["prune-0.5"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    small = rows["int8"]["bytes"] / rows["original"]["bytes"]
    assert small < 0.45, "of a model as small as this the file's header is a part"
    assert rows["int4"]["bytes"] < rows["int8"]["bytes"]
    less = compress_run(find_run("cnn"), Request(quantize=["int8"]), quiet=True)
    names = [row.model for row in less.rows]
    assert names[:2] == ["original", "int8"] and set(names) == set(rows)
    assert json.loads(Path("runs/cnn/compressed/table.json").read_text()) == less.as_dict()
    for kind in ("int8", "int4"):
        assert rows[f"{kind}-qat"]["bytes"] == rows[kind]["bytes"]
        (summary_file,) = (folder / "runs").glob(f"cnn-{kind}-qat-*/summary.json")
        trained = json.loads(summary_file.read_text())
        assert rows[f"{kind}-qat"]["value"] == pytest.approx(trained["accuracy"]), (
            "training measures the model as it will be quantized"
        )
    weights = load_file("runs/cnn/compressed/prune-0.5/model.safetensors")
    assert set(weights) == set(load_file("runs/cnn/export/model.safetensors"))


def test_what_is_there_is_kept_and_not_overwritten(folder: Path) -> None:
    """And the command's page and JSON."""
    command = ["compress", "cnn", "--int4", "--html", "page.html", "--json"]
    times = []
    for _ in range(2):
        done = bigtrain(*command, cwd=folder)
        assert done.returncode == 0, done.stderr
        names = [row["model"] for row in json.loads(done.stdout)["rows"]]
        assert names[:2] == ["original", "int4"]
        file = folder / "runs/cnn/compressed/int4/quantized.safetensors"
        times.append(file.stat().st_mtime_ns)
    assert times[0] == times[1]
    page = (folder / "page.html").read_text()
    assert "<td>int4</td>" in page and "http" not in page
    settings = file.with_name("compressed.json")
    settings.write_text(settings.read_text().replace('"model": "', '"model": "0'))
    other = bigtrain(*command, cwd=folder)
    assert other.returncode == 2 and "made of another model, or with other settings" in other.stderr


def test_a_quantized_model_is_loaded_as_any_other(folder: Path, tmp_path: Path) -> None:
    images = torch.randn(5, 1, 8, 8)
    original = api.load_model(folder / "runs/cnn")
    for kind in ("int8", "int8-weights", "int4"):
        write_quantized(folder / "runs/cnn/export", original, kind, tmp_path / kind)
        loaded = api.load_model(tmp_path / kind)
        with torch.no_grad():
            error = (loaded(images) - original(images)).norm() / original(images).norm()
        assert float(error) < (0.2 if kind == "int4" else 0.02), kind
    assert isinstance(api.load_model(tmp_path / "int8").classifier, Int8Linear)


def test_tied_weights_are_stored_and_kept_once_in_int8(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    config = {"architecture": "distributed_cases:Twice", "args": {"vocab_size": 61}}
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    (tmp_path / "export" / "bigtrain.json").write_text('{"task": "causal_lm"}')
    model = Twice(61).eval()
    write_quantized(tmp_path / "export", model, "int8", tmp_path / "int8")
    stored = load_file(tmp_path / "int8" / "quantized.safetensors")
    assert "embedding.weight.int8" in stored and "head.weight.int8" not in stored
    loaded = api.load_model(tmp_path / "int8")
    assert loaded.head.weight.data_ptr() == loaded.embedding.weight.data_ptr()
    tokens = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        error = (loaded(tokens) - model(tokens)).norm() / model(tokens).norm()
    assert float(error) < 0.02


def test_int8_layers_compute_what_torchaos_do() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = torch.nn.Linear(96, 300)
    rows = torch.randn(2, 70, 96) * torch.rand(2, 70, 1)
    theirs = torch.nn.Linear(96, 300)
    theirs.load_state_dict(layer.state_dict())
    quantize_(theirs, Int8DynamicActivationInt8WeightConfig())
    weight: Any = theirs.weight
    ours = Int8Linear(Quantized(weight.qdata, weight.scale.reshape(-1, 1)), layer.bias)
    with torch.no_grad():
        # Their integers go to 127.5, which is a rounding of its own; ours to 127.
        assert torch.allclose(ours(rows), theirs(rows), atol=2e-2)
        assert torch.allclose(ours(rows), layer(rows), atol=2e-2)
        assert ours(torch.zeros(1, 96)).equal(layer.bias[None])


@pytest.mark.parametrize("size", [1.0, 1e-9, 0.0])
def test_weights_are_rounded_in_training_as_in_the_file(size: float) -> None:
    for shape in ((64, 96), (32, 32, 3, 3), (7, 20)):
        weight = torch.nn.Parameter(torch.randn(shape) * size)
        assert round_weight(weight, 8).equal(_quantize(weight, in_int4=False).to_float())
        if shape != (7, 20):
            assert round_weight(weight, 4).equal(_quantize(weight, in_int4=True).to_float())


def test_a_layer_in_training_computes_what_the_quantized_one_will() -> None:
    """And its parameters have the gradients that the rounded ones would have."""
    for kind in ("int8", "int4"):
        model = torch.nn.Sequential(torch.nn.Linear(96, 30), torch.nn.Linear(30, 5))
        weights = [_quantize(model[0].weight, kind == "int4"), _quantize(model[1].weight, False)]
        names = list(model.state_dict())
        train_quantization_aware(model, kind)
        assert list(model.state_dict()) == names and isinstance(model[0], QatLinear)
        rows = torch.randn(8, 96)
        if kind == "int8":
            quantized = [Int8Linear(w, m.bias) for w, m in zip(weights, model, strict=True)]
            wanted = torch.nn.Sequential(*quantized)(rows)
            assert torch.allclose(model(rows), wanted, atol=1e-5)
            continue
        plain = torch.nn.Sequential(torch.nn.Linear(96, 30), torch.nn.Linear(30, 5))
        plain.load_state_dict(model.state_dict())
        for layer, weight in zip(plain, weights, strict=True):
            layer.weight = torch.nn.Parameter(weight.to_float())
        for each in (plain, model):
            each(rows).square().sum().backward()
        assert model(rows).equal(plain(rows))
        assert model[0].weight.grad.equal(plain[0].weight.grad)


def test_two_int4_in_a_byte_come_back() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 4)
    assert pack_int4(values).nbytes == values.nbytes // 2
    assert unpack_int4(pack_int4(values)).equal(values)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_smallest_weights_are_pruned_and_stay_so(scope: Any) -> None:
    """Also of a model whose output layer is its embedding, which is left whole."""
    torch.manual_seed(0)
    model = Twice(61)
    matrices = [model.block[1].weight, model.block[3].weight]
    before = [matrix.detach().clone() for matrix in matrices]
    prune_model(model, PruneConfig(amount=0.75, scope=scope))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    zeros = [matrix == 0 for matrix in matrices]
    for _ in range(3):
        model(torch.randint(0, 61, (2, 9))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [(matrix == 0).equal(zero) for matrix, zero in zip(matrices, zeros, strict=True)]
    total = sum(int(zero.sum()) for zero in zeros)
    assert total == sum(matrix.numel() for matrix in matrices) * 3 // 4
    largest = max(float(old[zero].abs().max()) for old, zero in zip(before, zeros, strict=True))
    smallest = min(float(old[~zero].abs().min()) for old, zero in zip(before, zeros, strict=True))
    if scope == "global":
        assert largest < smallest
    assert not (model.head.weight == 0).any()


def test_whole_channels_are_pruned_of_convolutions_alone() -> None:
    model = CNN(1, 10, (8, 16))
    prune_model(model, PruneConfig(amount=0.5, scope="layer", structure="channels"))
    for layer in (model.features[0], model.features[4]):
        silent = (layer.weight == 0).flatten(1).all(1)
        assert int(silent.sum()) == layer.out_channels // 2
    assert not (model.classifier.weight == 0).any()
    with pytest.raises(RequestError, match="Twice has no convolution"):
        prune_model(Twice(61), PruneConfig(amount=0.5, scope="layer", structure="channels"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prune", "1.5"], "--prune 1.5: not a part of the weights"),
        (["--prune", "half"], "--prune half: not a part of the weights"),
        ([], "nothing is asked for"),
        (["--int8", "--html", "nowhere/page.html"], "--html nowhere/page.html"),
        (["--prune", "0.5", "--qat"], "--qat: to which integers?"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], said: str, folder: Path) -> None:
    done = bigtrain("compress", "cnn", *arguments, cwd=folder)
    assert done.returncode == 2 and said in done.stderr


def test_what_cannot_be_made_is_refused_before_anything_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(RequestError, match="cannot take int4: no weight has rows of a multiple"):
        refuse_quantization("int4", torch.nn.Sequential(torch.nn.Linear(30, 2)))
    with pytest.raises(RequestError, match="has LSTM, where rounding would not be seen"):
        train_quantization_aware(torch.nn.LSTM(32, 32), "int8")
    with pytest.raises(RequestError, match="no weight with rows of a multiple of 32"):
        train_quantization_aware(torch.nn.Sequential(torch.nn.Linear(30, 32)), "int4")
    with pytest.raises(RequestError, match="no linear layer or convolution"):
        train_quantization_aware(torch.nn.Embedding(32, 32), "int4")
    run = find_run("cnn")
    Path("leaks.yaml").write_text(STUDENT.replace("0.2", "0.1"))
    with pytest.raises(RequestError, match="examples that it was trained on"):
        compress_run(run, Request(student="leaks.yaml"))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "torchao" else real(name)
    )
    with pytest.raises(RequestError, match=r"pip install 'bigtrain\[compress\]'"):
        compress_run(run, parse_request("", "global", "weights", True, False, None, None))
    unfinished = Path("runs/unfinished")
    unfinished.mkdir()
    shutil.copy("runs/cnn/recipe.yaml", unfinished)
    done = bigtrain("compress", "unfinished", "--int8", cwd=folder)
    assert done.returncode == 2 and "the run has not finished" in done.stderr


def test_pruning_needs_something_to_prune() -> None:
    case = {"model": "cnn", "kind": "ddp", "precision": "fp32", "micro_batch": 1}
    with pytest.raises(ValueError, match="prune needs pretrained"):
        recipe_for(case | {"start": {"prune": {"amount": 0.5}}})


def test_another_models_training_run_is_not_taken_for_this_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same name, with more steps behind it; a variant that was stopped goes on."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(measure, "SECONDS_PER_TIMING", 0.01)
    done = bigtrain("train", "digits-cnn", "name=again", *SMALL, "-q", cwd=folder)
    assert done.returncode == 0, done.stderr
    run = find_run("again")
    request = Request(prune=[0.7], steps=2)
    compress_run(run, request, quiet=True)
    (first,) = Path("runs").glob("again-prune-0.7-*")
    shutil.rmtree(run.path)
    done = bigtrain("train", "digits-cnn", "name=again", *SMALL, "seed=7", "-q", cwd=folder)
    assert done.returncode == 0, done.stderr
    compress_run(run, request, quiet=True)
    (second,) = set(Path("runs").glob("again-prune-0.7-*")) - {first}
    made = load_file(run.path / "compressed/prune-0.7/model.safetensors")
    for path, same in ((first, False), (second, True)):
        trained = load_file(path / "export/model.safetensors")
        assert all(made[name].equal(trained[name]) for name in made) == same
    # As after a kill between the training and the variant: the run is continued, not begun anew.
    shutil.rmtree(run.path / "compressed/prune-0.7")
    compress_run(run, request, quiet=True)
    assert set(Path("runs").glob("again-prune-0.7-*")) == {first, second}
