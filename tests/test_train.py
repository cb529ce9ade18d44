"""The main job as a user runs it: the command line on real input, one process and two, to a usable
model.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TESTS, bigtrain, on_ranks, start, torchrun, wait_for
from distributed_cases import data_for, recipe_for
from safetensors.torch import load_file

from bigtrain.errors import TrainingFailed
from bigtrain.models.build import build_model
from bigtrain.models.export import export_model
from bigtrain.runs.metrics_file import read_metrics

QUICK = ["train.steps=12", "train.eval_every=6", "train.checkpoint_every=4", "track.wandb=off"]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl", "train")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run of a language model, with W&B offline; the folder that holds runs/."""
    folder = tmp_path_factory.mktemp("finished")
    done = bigtrain(
        "train",
        "tiny-lm",
        *QUICK[:3],
        "track.wandb=offline",
        "engine.precision=fp32",
        "--json",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_run_directory_keeps_its_contract(finished: Path) -> None:
    run = finished / "runs" / "tiny-lm"
    assert {p.name for p in run.iterdir()} >= {
        "recipe.yaml", "effective.json", "metrics.jsonl", "checkpoints", "export", "summary.json"
    }  # fmt: skip
    lines = list(read_metrics(run / "metrics.jsonl", "train"))
    assert [line["step"] for line in lines] == list(range(1, 13))
    for key in (
        "samples",
        "weight",
        "loss",
        "lr",
        "grad_norm",
        "applied",
        "tokens_per_s",
        "mfu",
        "seconds",
        "peak_memory_bytes",
    ):
        assert key in lines[0]
    evals = list(read_metrics(run / "metrics.jsonl", "eval"))
    assert [line["step"] for line in evals] == [6, 12]
    assert {"loss", "perplexity", "bits_per_byte"} <= set(evals[-1])
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000008",
        "step-00000012",
    ]
    effective = json.loads((run / "effective.json").read_text())
    assert effective["train.steps"] == {"value": 12, "origin": "override train.steps=12"}
    assert effective["engine.kind"]["origin"].startswith("plan")
    assert effective["optim.eps"]["origin"] == "default"
    assert effective["model.name"]["origin"].endswith(":5")
    assert effective["engine.world_size"]["value"] == 1


def test_bits_per_byte_is_what_the_text_costs(finished: Path) -> None:
    """Recomputed from the loss, the number of target tokens and the held-out bytes."""
    from bigtrain.config.loader import load_recipe
    from bigtrain.data.datasets import prepare

    run = finished / "runs" / "tiny-lm"
    prepared = prepare(load_recipe(str(run / "recipe.yaml")).recipe)
    last = list(read_metrics(run / "metrics.jsonl", "eval"))[-1]
    tokens = len(prepared.eval.flat)  # type: ignore[attr-defined]
    assert prepared.eval_bytes
    assert last["bits_per_byte"] == pytest.approx(
        last["loss"] * tokens / np.log(2) / prepared.eval_bytes
    )
    assert 4 < prepared.baselines["unigram_bits_per_byte"] < 5
    assert 1.8 < prepared.baselines["gzip_bits_per_byte"] < 2.5


def test_wandbs_own_reader_sees_the_losses_of_metrics_jsonl(finished: Path) -> None:
    run = finished / "runs" / "tiny-lm"
    (folder,) = (run / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = {}
    for line in shown.splitlines():
        history = json.loads(line).get("history", {}).get("item", {})
        if "train/loss" in history:
            found[history["step"]] = history["train/loss"]
    assert found == losses(run)


def test_an_export_refuses_weights_that_its_model_has_no_place_for(tmp_path: Path) -> None:
    case = {"model": "transformer", "kind": "ddp", "precision": "fp32", "micro_batch": 1}
    recipe, prepared = recipe_for(case), data_for("transformer")
    weights = build_model(recipe, prepared).state_dict()
    weights["model.stray"] = torch.zeros(2)
    with pytest.raises(TrainingFailed, match=r"no place for model\.stray"):
        export_model(weights, recipe, prepared, tmp_path / "export", {})


def test_the_export_loads_in_transformers_and_evaluates_alike(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = finished / "runs" / "tiny-lm"
    AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert (
        tokenizer.decode(tokenizer("def f(x):\n    return x")["input_ids"])
        == "def f(x):\n    return x"
    )
    done = bigtrain("evaluate", "tiny-lm", "--json", cwd=finished)
    assert done.returncode == 0, done.stderr
    expected = list(read_metrics(run / "metrics.jsonl", "eval"))[-1]
    found = json.loads(done.stdout)
    for key in ("loss", "perplexity", "bits_per_byte"):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)
    written = bigtrain("generate", "tiny-lm", "import ", "--tokens", "8", cwd=finished)
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("import ")
    copied = bigtrain("export", "tiny-lm", "out", cwd=finished)
    assert (copied.returncode, copied.stdout) == (0, "the model is in out\n")
    assert load_file(finished / "out" / "model.safetensors")


def test_verify_names_a_changed_file(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    assert bigtrain("verify", "tiny-lm", cwd=tmp_path).returncode == 0
    victim = (
        tmp_path / "runs" / "tiny-lm" / "checkpoints" / "step-00000012" / "rank-00000.safetensors"
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = bigtrain("verify", "tiny-lm", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "rank-00000.safetensors: content does not match"
        in json.loads(done.stdout)["step-00000012"][0]
    )


# Packages that take about half a second or more to import, each; and what only some steps need.
SLOW = {"datasets", "kornia", "matplotlib", "pandas", "requests", "scipy", "sklearn"}
SLOW |= {"tensorboard", "torchmetrics", "torchvision", "transformers", "triton", "wandb"}
UNTIL_THE_FIRST_LINE = f"""
import os, sys
from bigtrain.__main__ import main
from bigtrain.runs.metrics_file import MetricsFile

def log(self, record):
    if record["kind"] == "train":
        sys.stdout.flush()
        print("imported:", *({SLOW} | {{"deepspeed"}}) & set(sys.modules), file=sys.stderr)
        os._exit(0)

MetricsFile.log = log
main()
"""


@pytest.mark.parametrize(("kind", "imported"), [("ddp", []), ("zero2", ["deepspeed"])])
def test_a_first_step_waits_for_no_import_that_it_does_not_need(
    kind: str, imported: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", UNTIL_THE_FIRST_LINE, "train", "digits-cnn"]
    done = subprocess.run(
        [*command, f"engine.kind={kind}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].split() == ["imported:", *imported]


def test_a_signal_saves_and_the_same_command_goes_on_exactly(tmp_path: Path) -> None:
    arguments = [
        "train",
        "digits-cnn",
        "train.steps=60",
        "train.eval_every=60",
        "train.checkpoint_every=60",
        "track.wandb=off",
    ]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    assert bigtrain(*arguments, cwd=straight).returncode == 0
    process = start(*arguments, cwd=stopped)
    metrics = stopped / "runs" / "digits-cnn" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 5)
    process.signal(signal.SIGTERM)
    process.signal(signal.SIGINT)  # a second one, of another kind, changes nothing
    assert process.wait().returncode == 75
    again = bigtrain(*arguments, cwd=stopped)
    assert again.returncode == 0
    assert "resuming from step-" in again.stdout
    assert losses(stopped / "runs" / "digits-cnn") == losses(straight / "runs" / "digits-cnn")
    weights = [
        load_file(f / "runs" / "digits-cnn" / "export" / "model.safetensors")
        for f in (straight, stopped)
    ]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_two_ranks_train_every_shape_of_recipe_as_one_does(tmp_path: Path) -> None:
    """torchrun, ZeRO-3, uneven shares, dropout off: the curve of one process; and an export that
    loads.
    """
    arguments = ["digits-cnn", *QUICK, "engine.global_batch=15", "model.dropout=0.0"]
    assert bigtrain("train", *arguments, "name=one", cwd=tmp_path).returncode == 0
    done = torchrun(
        2, "-m", "bigtrain", "train", *arguments, "name=two", "engine.kind=zero3", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "runs" / "two") == pytest.approx(
        losses(tmp_path / "runs" / "one"), rel=1e-5
    )
    found = json.loads(bigtrain("evaluate", "two", "--json", cwd=tmp_path).stdout)
    expected = json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert done.stdout.count("finished two") == 1, "only rank 0 speaks"


def test_accelerate_launch_decides_the_engine_and_contradictions_are_refused(
    tmp_path: Path,
) -> None:
    config = str(TESTS.parent / "ds_configs" / "zero2.json")
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--use_deepspeed",
        "--num_processes",
        "2",
        "--deepspeed_config_file",
        config,
    ]
    command = [
        sys.executable,
        *launch,
        "-m",
        "bigtrain",
        "train",
        "tiny-lm",
        *QUICK,
        "engine.precision=fp32",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    effective = json.loads((tmp_path / "runs" / "tiny-lm" / "effective.json").read_text())
    assert effective["engine.kind"] == {"value": "zero2", "origin": "launcher"}
    assert effective["engine.world_size"]["value"] == 2
    assert effective["deepspeed.zero_optimization.stage"] == {"value": 2, "origin": config}
    environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": config}
    refused = bigtrain(
        "train", "tiny-lm", "name=no", "engine.kind=zero3", cwd=tmp_path, **environment
    )
    assert refused.returncode == 2
    assert "engine.kind is zero3 (override engine.kind=zero3)" in refused.stderr
    assert "zero2.json says zero2" in refused.stderr
    assert not (tmp_path / "runs" / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["digits-cnn", "optim.learning_rate=1"], "did you mean optim.lr?"),
        (["no-such-recipe"], "no recipe 'no-such-recipe'"),
        (["digits-cnnn"], "bigtrain train digits-cnn"),
        (["digits-cnn", "model.name=resnett"], "did you mean resnet?"),
        (["digits-cnn", "model.name=t5"], "t5"),
        (["digits-cnn", "model.args={chanels: [8]}"], "did you mean channels?"),
        (["digits-cnn", "model.args={channels: 8}"], "model.args: cnn refuses"),
        (["diabetes", "model.name=cnn"], "does not serve task regression"),
        (["tiny-lm", "model.args.vocab_size=100"], "beyond it"),
        (["tiny-lm", "data.seq_len=512"], "the model has 256 positions"),
        (["tiny-lm", "model.args.hiden_size=9"], "did you mean hidden_size?"),
        (["tiny-lm", "model.pretrained=/nowhere"], "model.pretrained: no model at '/nowhere'"),
        (["digits-cnn", "engine.device=cuda"], "sees no CUDA device"),
        (
            ["digits-cnn", "engine.offload=params", "engine.kind=zero2"],
            "offload: params needs kind: zero3",
        ),
        (["digits-cnn", "model.name=tests_no_module:X", "model.args={}"], "No module named"),
        (
            ["digits-cnn", "model.name=distributed_cases:SAMPLES", "model.args={}"],
            "not a torch.nn.Module",
        ),
        (
            [
                "digits-cnn",
                "model.name=bad_models:WrongShape",
                "model.args={}",
                "model.dropout=null",
            ],
            "[batch, classes] = (2, 10)",
        ),
        (
            [
                "digits-cnn",
                "model.name=bad_models:WrongArguments",
                "model.args={}",
                "model.dropout=null",
            ],
            "forward(pixel_values",
        ),
        (["digits-cnn", "model.args={channels: [8, 8, 8, 8, 8, 8]}"], "does not fit task"),
        (
            [
                "tiny-lm",
                "train.steps=2",
                "model.name=xlnet",
                "model.args={d_model: 32, n_layer: 1, n_head: 2, d_inner: 32}",
            ],
            "sees the tokens",
        ),
        (["diabetes", "train.label_smoothing=0.1"], "label_smoothing is for losses over classes"),
        (["digits-resnet", "model.dropout=0.5"], "resnet has no dropout"),
        (["digits-mlp", "track.wandb=online"], "W&B has no key"),
        (
            [
                "digits-cnn",
                "model.name=bad_models:WrongResult",
                "model.args={}",
                "model.dropout=null",
            ],
            "returned dict",
        ),
    ],
)
def test_a_wrong_request_ends_with_2_a_message_and_nothing_written(
    arguments: list[str], expected: str, tmp_path: Path
) -> None:
    done = bigtrain("train", *arguments, cwd=tmp_path, PYTHONPATH=str(TESTS))
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_model_that_learns_nothing_finite_is_not_reported_as_perfect(tmp_path: Path) -> None:
    done = bigtrain(
        "train",
        "diabetes",
        "optim.lr=1e30",
        "train.steps=5",
        "track.wandb=off",
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"] is None or json.loads(done.stdout)["loss"] > 1e6


def test_other_data_is_judged_with_the_models_own_tokenizer(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("import os\n" * 500)
    shutil.copytree(finished / "runs", tmp_path / "runs")
    done = bigtrain("evaluate", "tiny-lm", f"data.eval={tmp_path}/*.txt", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training a bpe tokenizer" not in done.stderr
    assert json.loads(done.stdout)["bits_per_byte"] < 8


def test_more_ranks_than_samples_is_refused(tmp_path: Path) -> None:
    done = on_ranks(2, "train", "digits-mlp", "engine.global_batch=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "2 ranks share a global batch of 1 samples" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_a_users_class_may_leave_a_parameter_unused(kind: str, tmp_path: Path) -> None:
    """On two ranks, stopped and gone on from: no gradient for it ever comes, and nobody waits for
    one.
    """
    arguments = [
        "digits-cnn",
        *QUICK,
        "model.name=bad_models:Unused",
        "model.args={}",
        "model.dropout=null",
    ]
    for steps in ("train.steps=6", "train.steps=9"):
        done = on_ranks(
            2,
            "train",
            *arguments,
            f"engine.kind={kind}",
            steps,
            cwd=tmp_path,
            PYTHONPATH=str(TESTS),
        )
        assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "runs" / "digits-cnn")) == 9


def test_logistic_regression_reaches_its_figure(tmp_path: Path) -> None:
    """The others take longer: benchmarks/recipes.py prints them all."""
    done = bigtrain("train", "breast-cancer", "track.wandb=off", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["accuracy"] >= 0.95
    assert {"recall", "f1"} <= set(summary)


def test_linear_regression_ends_where_least_squares_does(tmp_path: Path) -> None:
    from bigtrain.config.loader import load_recipe
    from bigtrain.data.datasets import prepare

    done = bigtrain("train", "diabetes", "track.wandb=off", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    prepared = prepare(load_recipe("diabetes").recipe)
    train, held = prepared.train.fields, prepared.eval.fields  # type: ignore[attr-defined]
    design = np.c_[train["features"], np.ones(len(train["features"]))]
    answer = np.linalg.lstsq(design, train["target"], rcond=None)[0]
    residual = held["target"] - np.c_[held["features"], np.ones(len(held["features"]))] @ answer
    r2 = 1 - (residual**2).sum() / ((held["target"] - held["target"].mean()) ** 2).sum()
    assert json.loads(done.stdout)["r2"] == pytest.approx(r2, abs=0.005)


def test_an_image_model_starts_from_pretrained_weights(tmp_path: Path) -> None:
    short = ["digits-resnet", "train.steps=2", "train.eval_every=2", "track.wandb=off"]
    assert bigtrain("train", *short, cwd=tmp_path).returncode == 0
    first = tmp_path / "runs" / "digits-resnet"
    done = bigtrain(
        "train",
        *short,
        "name=second",
        f"model.pretrained={first / 'export'}",
        "optim.lr=1e-12",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    weights = [
        load_file(run / "export" / "model.safetensors")
        for run in (first, tmp_path / "runs" / "second")
    ]
    name = "classifier.1.weight"
    assert weights[0][name].sub(weights[1][name]).abs().max() < 1e-6


def test_pretrained_weights_are_where_training_starts(finished: Path, tmp_path: Path) -> None:
    """A run that starts from another's export begins at that one's loss, on one process and sharded
    over two.
    """
    export = finished / "runs" / "tiny-lm" / "export"
    expected = list(read_metrics(finished / "runs" / "tiny-lm" / "metrics.jsonl", "eval"))[-1][
        "loss"
    ]
    arguments = [
        "tiny-lm",
        f"model.pretrained={export}",
        "train.steps=1",
        "optim.lr=1e-12",
        "track.wandb=off",
        "engine.precision=fp32",
    ]
    assert bigtrain("train", *arguments, "name=one", cwd=tmp_path).returncode == 0
    done = on_ranks(2, "train", *arguments, "name=two", "engine.kind=zero3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("one", "two"):
        (line,) = read_metrics(tmp_path / "runs" / name / "metrics.jsonl", "eval")
        assert line["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_sequence_to_sequence_model_answers_a_prompt(tmp_path: Path) -> None:
    short = ["train.steps=1", "data.eval_fraction=0.01", "track.wandb=off"]
    assert bigtrain("train", "dates-seq2seq", *short, cwd=tmp_path).returncode == 0
    command = ["generate", "dates-seq2seq", "1 May 1999", "--tokens", "4", "--json"]
    answer = bigtrain(*command, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["prompt"] == "1 May 1999"
