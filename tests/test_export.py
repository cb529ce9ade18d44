"""Exports of checkpoints that two ranks wrote under ZeRO-3: strict, whole, and the same model."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import bigtrain, on_ranks
from safetensors.torch import load_file
from torch import Tensor, nn

import bigtrain as package
from bigtrain.checkpoint.format import committed_checkpoints
from bigtrain.errors import RequestError, TrainingFailed
from bigtrain.evaluation.evaluate import evaluate_run
from bigtrain.exporting.average import average_checkpoints
from bigtrain.exporting.export import choose_checkpoint, model_of, write_model
from bigtrain.exporting.onnx_export import replace_by_onnx
from bigtrain.exporting.weights import CheckpointWeights
from bigtrain.models.export import (
    AS_TRAINED,
    Stored,
    WeightsInMemory,
    whole_folder,
    write_export,
)
from bigtrain.models.model_card import ExportOrigin
from bigtrain.models.unpacked_rnn import without_packing
from bigtrain.models.weight_files import weight_files
from bigtrain.runs.directory import RunDir
from bigtrain.runs.metrics_file import read_metrics
from bigtrain.tasks.base import outputs

pytestmark = pytest.mark.trained

SMALL = {
    "tiny-lm": (
        "model.args={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,"
        " num_attention_heads: 2, num_key_value_heads: 2, tie_word_embeddings: true}",
        "data.seq_len=32",
        "data.train=lines.jsonl",
        "data.eval_fraction=0.2",
        "data.tokenizer=bytes",
    ),
    "dates-seq2seq": ("model.args={d_model: 32, d_kv: 16, d_ff: 64, num_layers: 1, num_heads: 2}",),
    "digits-resnet": (
        "model.args={embedding_size: 4, hidden_sizes: [4], depths: [1], layer_type: basic}",
    ),
    "digits-rnn": ("model.args={hidden: 16}",),
}
BATCHES: dict[str, dict[str, Tensor]] = {
    "tiny-lm": {"input_ids": torch.arange(12).view(2, 6) % 50},
    "dates-seq2seq": {
        "input_ids": torch.arange(12).view(2, 6) % 50,
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
        "decoder_input_ids": torch.arange(8).view(2, 4) % 50,
    },
    "digits-resnet": {"pixel_values": torch.linspace(-1, 1, 512).view(2, 1, 16, 16)},
    "digits-rnn": {"pixel_values": torch.linspace(-1, 1, 128).view(2, 1, 8, 8)},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run of each, by two ranks under ZeRO-3."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [json.dumps({"text": f"{number} is {number * number} squared"}) for number in range(80)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    for name, overrides in SMALL.items():
        done = on_ranks(
            2,
            "train",
            name,
            *overrides,
            "engine.kind=zero3",
            "engine.global_batch=8",
            "train.steps=4",
            "train.checkpoint_every=2",
            "train.eval_every=4",
            "track.wandb=off",
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
    yield folder


def run_of(trained: Path, name: str) -> RunDir:
    return RunDir(trained / "runs" / name)


def logits(model: nn.Module, name: str) -> Tensor:
    with torch.inference_mode():
        return outputs(model.eval(), **BATCHES[name])


@pytest.mark.parametrize("name", SMALL)
def test_a_checkpoints_export_is_the_model_that_was_trained(
    trained: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and logits as the engine gathered them at the end; metrics as it measured them.

    The data is not needed, and neither is the run's end.
    """
    monkeypatch.chdir(trained)  # evaluate reads the data
    run = RunDir(tmp_path / "unfinished")
    shutil.copytree(trained / "runs" / name, run.path)
    own = package.load_model(run.export)
    for path in (run.export, run.path / "summary.json"):
        shutil.move(path, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    write_model(run, out, None, Stored(max_bytes=2_000))
    assert len(weight_files(out)) > 1
    expected = load_file(tmp_path / "export" / "model.safetensors")
    found = {key: tensor for path in weight_files(out) for key, tensor in load_file(path).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    exported = package.load_model(out)
    torch.testing.assert_close(logits(exported, name), logits(own, name), rtol=0, atol=1e-6)
    run.export = out
    measured = list(read_metrics(run.metrics, "eval"))[-1]
    for metric, value in evaluate_run(run, ["engine.device=cpu"]).metrics.items():
        if metric in measured:
            assert value == pytest.approx(measured[metric], abs=1e-6, rel=1e-6), metric


def test_plain_transformers_loads_them_and_ours_through_its_auto_classes(
    trained: Path, tmp_path: Path
) -> None:
    import transformers

    import bigtrain.models.auto  # noqa: F401

    classes = {
        "tiny-lm": "AutoModelForCausalLM",
        "dates-seq2seq": "AutoModelForSeq2SeqLM",
        "digits-resnet": "AutoModelForImageClassification",
        "digits-rnn": "AutoModelForImageClassification",
    }
    for name, auto in classes.items():
        folder = run_of(trained, name).export
        model, report = getattr(transformers, auto).from_pretrained(
            folder, output_loading_info=True
        )
        assert not any(report.values()), report
        ours = package.load_model(folder)
        torch.testing.assert_close(logits(model, name), logits(ours, name), rtol=0, atol=1e-6)
    generation = json.loads(
        (run_of(trained, "tiny-lm").export / "generation_config.json").read_text()
    )
    assert {"eos_token_id", "pad_token_id", "bos_token_id"} <= generation.keys()


@pytest.mark.parametrize("name", SMALL)
def test_onnx_computes_the_same_on_batches_of_any_size(
    trained: Path, name: str, tmp_path: Path
) -> None:
    import onnxruntime

    out = tmp_path / "out"
    shutil.copytree(run_of(trained, name).export, out)
    expected = logits(package.load_model(out), name)
    found = replace_by_onnx(out)
    assert found["inputs"] == list(BATCHES[name])
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (computed,) = session.run(None, {key: value.numpy() for key, value in BATCHES[name].items()})
    torch.testing.assert_close(torch.from_numpy(computed), expected, rtol=0, atol=1e-4)
    assert not weight_files(out)
    with pytest.raises(RequestError, match="holds an ONNX model"):
        package.load_model(out)


def test_an_rnn_without_packing_is_the_same() -> None:
    """Texts of several lengths, both directions, two layers."""
    from bigtrain.models.rnn import RNN

    batch = {
        "input_ids": torch.arange(15).view(3, 5),
        "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
    }
    for cell in ("lstm", "gru"):
        model = RNN(3, vocab_size=20, cell=cell, hidden=8, layers=2, bidirectional=True).eval()
        packed = model(**batch)
        without_packing(model)
        torch.testing.assert_close(model(**batch), packed)


def test_an_onnx_that_differs_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigtrain.exporting.onnx_export._TOLERANCE", -1.0)
    out = tmp_path / "out"
    with (
        pytest.raises(TrainingFailed, match="differ from torch's"),
        whole_folder(out) as folder,
    ):
        write_model(run_of(trained, "digits-resnet"), folder, None, AS_TRAINED)
        replace_by_onnx(folder)
    assert not list(tmp_path.iterdir())


def test_nan_in_one_trial_of_an_onnx_is_a_difference(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    differences = iter([0.0, float("nan")])
    monkeypatch.setattr("bigtrain.exporting.onnx_export._difference", lambda *_: next(differences))
    shutil.copytree(run_of(trained, "digits-resnet").export, tmp_path / "out")
    with pytest.raises(TrainingFailed, match="by up to nan"):
        replace_by_onnx(tmp_path / "out")


def test_a_missing_or_surplus_weight_is_named_and_nothing_is_left(
    trained: Path, tmp_path: Path
) -> None:
    run = run_of(trained, "digits-resnet")
    model = model_of(run)
    weights = load_file(run.export / "model.safetensors")
    missing = {name: tensor for name, tensor in weights.items() if name != "classifier.1.bias"}
    for broken, said in (
        (missing, "classifier.1.bias"),
        (weights | {"stray": torch.zeros(1)}, "stray"),
        (weights | {"classifier.1.bias": torch.zeros(3)}, "classifier.1.bias"),
    ):
        with pytest.raises(TrainingFailed, match=said), whole_folder(tmp_path / "out") as folder:
            write_export(WeightsInMemory(broken), *model, folder, ExportOrigin({}), AS_TRAINED)
        assert not list(tmp_path.iterdir())


def test_the_command_line_says_what_it_wrote_and_refuses_what_it_cannot(trained: Path) -> None:
    done = bigtrain(
        "export", "digits-resnet", "half", "--step", "2", "--dtype", "bf16", "--json", cwd=trained
    )
    assert json.loads(done.stdout)["weights"] == "checkpoint step-00000002", done.stderr
    stored = load_file(trained / "half" / "model.safetensors")
    for name, tensor in stored.items():
        is_buffer = "running_" in name or "num_batches" in name
        assert is_buffer or tensor.dtype == torch.bfloat16, name
    assert package.load_model(trained / "half")
    card = (trained / "half" / "README.md").read_text()
    for fact in ("checkpoint step-00000002", "no restart", "torch 2.", "`model.safetensors`"):
        assert fact in card
    push = bigtrain("export", "digits-resnet", "out", "--push", "me/model", cwd=trained)
    assert push.returncode == 3
    assert "hf upload me/model out" in push.stderr and (trained / "out" / "config.json").is_file()
    for arguments, said in (
        (["half"], "half exists already"),
        (["new", "--step", "3"], "one of its steps (2, 4)"),
        (["new", "--step", "best"], "train.keep_best"),
        (["new", "--shard-size", "big"], "5GB"),
        (["new", "--push", "a b"], "OWNER/NAME"),
        (["new", "--format", "onnx", "--shard-size", "1GB"], "leave --shard-size out"),
        (["new", "--sign", "key.pem"], "openssl genpkey -algorithm ed25519"),
    ):
        refused = bigtrain("export", "digits-resnet", *arguments, cwd=trained)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
    assert not (trained / "new").exists()


def test_an_unfinished_run_without_checkpoints_and_a_broken_one_are_refused(
    trained: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "digits-resnet")
    shutil.copytree(trained / "runs" / "digits-resnet", run.path)
    (victim,) = run.checkpoints.glob("step-00000004/rank-00000.safetensors")
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(RequestError, match="does not verify"):
        choose_checkpoint(run, "last")
    shutil.rmtree(run.checkpoints)
    with pytest.raises(RequestError, match="no finished checkpoint"):
        choose_checkpoint(run, "last")


def test_a_finished_run_that_has_gone_on_exports_its_last_checkpoint(
    trained: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "digits-resnet")
    shutil.copytree(trained / "runs" / "digits-resnet", run.path)
    summary = json.loads(run.summary.read_text())
    summary["exported_step"] = 2
    run.write_json(run.summary, summary)
    for number, stored in enumerate((AS_TRAINED, Stored("bf16"))):
        with whole_folder(tmp_path / f"best-{number}") as folder:
            found = write_model(run, folder, None, stored)
        assert found == {"weights": "checkpoint step-00000002, the best", "step": 2}
    assert (
        "of checkpoint step-00000002, the best" in (folder.parent / "best-1/README.md").read_text()
    )
    run.write_json(run.summary, summary | {"step": 2})
    for number, stored in enumerate((AS_TRAINED, Stored("bf16"))):
        with whole_folder(tmp_path / f"last-{number}") as folder:
            found = write_model(run, folder, None, stored)
        assert found == {"weights": "checkpoint step-00000004", "step": 4}


def test_a_damaged_export_is_neither_copied_nor_converted(trained: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "digits-resnet")
    shutil.copytree(trained / "runs" / "digits-resnet", run.path)
    weights = run.export / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for stored in (AS_TRAINED, Stored("bf16")):
        with (
            pytest.raises(RequestError, match=r"model\.safetensors is not as it was written"),
            whole_folder(tmp_path / "out") as folder,
        ):
            write_model(run, folder, None, stored)
    weights.unlink()
    with pytest.raises(RequestError, match=r"model\.safetensors is not as"):
        write_model(run, tmp_path / "none", None, AS_TRAINED)


def test_nobody_elses_folder_is_deleted_and_the_users_own_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "model").touch()
    assert (tmp_path / "out.partial" / "mine").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with whole_folder(Path()) as folder:
        (folder / "model").touch()
    assert [path.name for path in Path().iterdir()] == ["model"]
    assert len(list(tmp_path.iterdir())) == 3


def test_the_average_is_the_mean_with_statistics_of_its_own(trained: Path, tmp_path: Path) -> None:
    run = run_of(trained, "digits-resnet")
    result = average_checkpoints(run, tmp_path / "mean", 2, AS_TRAINED, lambda _: None)
    assert result["steps"] == [2, 4] and result["before"].keys() == result["after"].keys()
    found = load_file(tmp_path / "mean" / "model.safetensors")
    both = [CheckpointWeights(path) for path in committed_checkpoints(run)]
    for name, tensor in found.items():
        if name.endswith(("running_mean", "running_var")):
            # Those of the mean's own activations, which no checkpoint has.
            assert not torch.equal(tensor, both[1].read(name))
        if not both[1].is_trained(name):
            continue
        mean = (both[0].read(name).double() + both[1].read(name).double()) / 2
        torch.testing.assert_close(tensor, mean.float(), rtol=0, atol=1e-7)
    assert [path.name for path in tmp_path.iterdir()] == ["mean"]
    keeps_best = RunDir(tmp_path / "digits-resnet")
    shutil.copytree(run.path, keeps_best.path)
    text = re.sub(r"keep_last: \d+", "keep_last: 1", keeps_best.recipe.read_text())
    keeps_best.recipe.write_text(text.replace("keep_best: null", "keep_best: loss"))
    with pytest.raises(RequestError, match="1 checkpoints, not 2: step-00000004"):
        average_checkpoints(keeps_best, tmp_path / "row", 2, AS_TRAINED, lambda _: None)
    with pytest.raises(RequestError, match=r"(?s)2 checkpoints, not 3.*train\.keep_last=3"):
        average_checkpoints(run, tmp_path / "more", 3, AS_TRAINED, lambda _: None)
