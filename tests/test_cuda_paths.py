"""What is decided and placed for CUDA, without a device: stand-ins, patches and fake tensors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TESTS
from cuda_forward import sharding_engine
from torch import nn

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
