"""The engines on CUDA, one NCCL rank, in less than ten minutes: `make gpu`.

Prints a table, and writes it to benchmarks/gpu.json.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_matrix
import pytest
import torch
from conftest import TESTS, torchrun
from test_exact import Results
from test_launch import launch

from bigtrain.config.versions import installed_versions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(900),
]
CURVES = gpu_matrix.curves("cuda")
WAITS = gpu_matrix.waits("cuda")
SHORT = ["digits-cnn", "train.steps=3", "train.eval_every=3", "track.wandb=off"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    found = gpu_matrix.run("cuda", tmp_path_factory.mktemp("gpu"))
    print("\n" + gpu_matrix.table(found))
    kept: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": installed_versions(),
        "curves": [asdict(row) for row in gpu_matrix.rows(found)],
        "waits": {name: found.get(name) for name in WAITS if name.startswith("waits/")},
        "failed": [name for name, result in found.items() if "error" in result],
    }
    path = TESTS.parent / "benchmarks" / "gpu.json"
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return found


@pytest.mark.parametrize("name", CURVES)
def test_losses_on_cuda_are_the_cpus(name: str, results: Results) -> None:
    assert results[name]["lines"]
    (row,) = [row for row in gpu_matrix.rows(results) if row.name == name]
    assert row.difference <= row.tolerance


@pytest.mark.parametrize("name", [name for name in WAITS if name.startswith("lazy/")])
def test_nothing_waits_for_the_device_in_a_step_that_does_not_log(
    name: str, results: Results
) -> None:
    found = results[name]  # where something waited, the case itself would have failed
    assert found["lines"] and found["applied"] == 6


@pytest.mark.parametrize("name", [name for name in WAITS if name.startswith("waits/")])
def test_where_the_host_waits_is_known(name: str, results: Results) -> None:
    places = results[name]["places"]
    if name.endswith("/ddp"):
        assert places == {}


@pytest.mark.parametrize("name", gpu_matrix.resumes("cuda"))
def test_a_resume_is_bit_exact(name: str, results: Results) -> None:
    found = results[name]
    assert found["problems"] == [] and found["same_losses"] and found["same_weights"]


def test_the_main_job_runs_on_the_gpu(tmp_path: Path) -> None:
    done = torchrun(
        1, "-m", "bigtrain", "train", "tiny-lm", "train.steps=30", "track.wandb=off", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    effective = json.loads((tmp_path / "runs" / "tiny-lm" / "effective.json").read_text())
    assert effective["engine.precision"]["value"] == "bf16"


OUT_OF_MEMORY = """
import sys
import torch
from bigtrain.__main__ import main

torch.cuda.set_per_process_memory_fraction(2e8 / torch.cuda.get_device_properties(0).total_memory)
sys.argv[1:] = ["train", "tiny-lm", "train.steps=2", "track.wandb=off", "engine.global_batch=512"]
sys.argv += ["engine.micro_batch=512"]
main()
"""


def test_out_of_memory_is_named_with_its_remedies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr[-3000:]
    assert "Tried to allocate" in done.stderr and "engine.micro_batch=256" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_launch_script_starts_a_rank_on_each_gpu(tmp_path: Path) -> None:
    found = launch("one_box.sh", *SHORT, cwd=tmp_path)
    assert found["engine.world_size"]["value"] == torch.cuda.device_count()


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_accelerate_starts_what_its_configuration_says(kind: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "accelerate"), "launch"]
    command += ["--config_file", str(TESTS.parent / "launch" / f"{kind}.yaml")]
    command += ["--num_processes", "1", "-m", "bigtrain", "train", *SHORT]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    effective = json.loads((tmp_path / "runs" / "digits-cnn" / "effective.json").read_text())
    assert effective["engine.kind"]["value"] == kind
