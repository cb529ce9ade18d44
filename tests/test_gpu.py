"""The engines on CUDA, one NCCL rank: `pytest -m gpu -s` prints losses against the CPU's, and peak
memory.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import torchrun
from test_exact import ENGINES, MICRO, TOLERANCE, Results, reference, run_cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(900),
]
CASES = {
    f"{model}/{engine}/{precision}": {
        "run": "exact",
        "model": model,
        "precision": precision,
        "device": "cuda",
        "micro_batch": MICRO[1][2],
    }
    | ENGINES[engine]
    for model in ("transformer", "rnn", "cnn")
    for engine in ENGINES
    for precision in TOLERANCE
}

LAZY = {
    "run": "lazy",
    "model": "cnn",
    "precision": "fp32",
    "device": "cuda",
    "micro_batch": 4,
    "kind": "ddp",
    "steps": 7,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    found = Results(run_cases(1, CASES | {"lazy": LAZY}, tmp_path_factory.mktemp("gpu")))
    print(
        f"\n{'case':<32}{'last loss':>12}{'CPU, plain':>12}"
        f"{'largest relative difference':>30}{'peak MiB':>10}"
    )
    for name in CASES:
        result = found[name]
        expected, lines = reference(name.split("/", maxsplit=1)[0])[0], result["lines"]
        worst = max(
            abs(line["loss"] / loss - 1) for line, loss in zip(lines, expected, strict=True)
        )
        memory = result["peak_memory"] / 2**20
        print(
            f"{name:<32}{lines[-1]['loss']:>12.5f}{expected[-1]:>12.5f}{worst:>30.2e}{memory:>10.1f}"
        )
    return found


@pytest.mark.parametrize("name", CASES)
def test_losses_on_cuda_are_the_cpus(name: str, results: Results) -> None:
    expected = reference(name.split("/", maxsplit=1)[0])[0]
    assert [line["loss"] for line in results[name]["lines"]] == pytest.approx(expected, rel=5e-3)


def test_nothing_waits_for_the_device_in_a_step_that_does_not_log(results: Results) -> None:
    found = results["lazy"]  # where something waited, the case itself would have failed
    assert found["lines"] and found["weights"] and found["applied"] == 6


def test_the_main_job_runs_on_the_gpu(tmp_path: Path) -> None:
    done = torchrun(
        1, "-m", "bigtrain", "train", "tiny-lm", "train.steps=30", "track.wandb=off", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    effective = json.loads((tmp_path / "runs" / "tiny-lm" / "effective.json").read_text())
    assert effective["engine.precision"]["value"] == "bf16"
