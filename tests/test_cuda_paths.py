"""What is decided and placed for CUDA, without a device: stand-ins, patches and fake tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TESTS
from cuda_forward import sharding_engine
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port

from bigtrain.engine.deepspeed import _take_visible_device
from bigtrain.engine.launcher import is_first_on_machine

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { C10_REGISTER_GUARD_IMPL(
    CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>) }
"""


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that lets torch without CUDA set a CUDA device: to no effect."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "guard.cpp").write_text(GUARD)
    torch_folder = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", abi, "guard.cpp", "-o", "guard.so"]
    command += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "guard.so"


def test_zero3_moves_buffers_to_the_device() -> None:
    engine = sharding_engine("meta")
    norm = nn.BatchNorm1d(3)
    engine.prepare(norm, lambda _model: None)
    assert {buffer.device.type for buffer in norm.buffers()} == {"meta"}


FAMILIES = ["stdlib-classifier", "digits-resnet", "gpt2-124m", "llama-1b", "digits-cnn"]


def test_a_forward_pass_under_zero3_has_one_device(guard: Path) -> None:
    command = [sys.executable, str(TESTS / "cuda_forward.py"), str(guard), *FAMILIES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    expected = [f"{recipe} cuda" for recipe in FAMILIES]
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]


START = """
import torch
from bigtrain.engine.deepspeed_config import render_deepspeed_config
from bigtrain.engine.plan import Plan
from bigtrain.engine.runtime import Device
from bigtrain.engine.start import start_engine

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
plan = Plan("zero1", "none", "fp32", 1, 4, 4, False, False)
engine = start_engine(plan, Device("cpu", False), render_deepspeed_config(plan, 0.0), 0.0)
print(engine.device.type)
"""


def test_zero_runs_on_the_cpu_of_a_machine_with_a_gpu() -> None:
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | rank | {"MASTER_PORT": str(get_free_port())}
    command = [sys.executable, "-c", START]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["cpu"], done.stderr[-2000:]


@pytest.mark.parametrize(("visible", "number"), [(1, "0"), (2, "1"), (8, "3")])
def test_deepspeed_is_given_a_device_that_exists(
    visible: int, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("BIGTRAIN_LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    _take_visible_device()
    assert os.environ["LOCAL_RANK"] == number
    assert not is_first_on_machine(os.environ), "another rank speaks for this machine"
