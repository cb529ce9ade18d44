"""What is decided and placed for CUDA, without a device: stand-ins, patches and fake tensors."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import MagicMock

import pytest
import torch
from conftest import TESTS, bigtrain
from cuda_forward import sharding_engine
from distributed_cases import MODELS, VOCABULARY, HostReads, build, data_for, recipe_for
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port

from bigtrain import __main__ as command
from bigtrain.config.loader import load_recipe
from bigtrain.config.recipe import EngineConfig, ModelConfig, OptimConfig
from bigtrain.data.examples import PreparedData
from bigtrain.doctor import examine as doctor
from bigtrain.doctor.checks import _check_cores
from bigtrain.engine import deepspeed as deepspeed_engine
from bigtrain.engine import start
from bigtrain.engine.ddp import DDPEngine
from bigtrain.engine.deepspeed import DeepSpeedEngine, _take_visible_device
from bigtrain.engine.deepspeed_config import render_deepspeed_config
from bigtrain.engine.launcher import is_first_on_machine
from bigtrain.engine.plan import Plan, make_plan
from bigtrain.engine.runtime import (
    Device,
    cores_per_rank,
    find_device,
    prefer_channels_last,
    set_arithmetic,
)
from bigtrain.engine.stopwatch import StepClock
from bigtrain.errors import RequestError, StoppedEarly, TrainingFailed
from bigtrain.inference import generate, load
from bigtrain.inference.decoding import Decoding
from bigtrain.models import flops
from bigtrain.models.build import build_model
from bigtrain.models.cnn import CNN
from bigtrain.models.mlp import MLP
from bigtrain.runs.step_shares import STEP_PARTS, column_of
from bigtrain.supervision import watchdog as watchdog_module
from bigtrain.supervision.watchdog import RankPosition, Watchdog
from bigtrain.tasks.registry import TASKS
from bigtrain.testing import resume_proof
from bigtrain.training import preflight
from bigtrain.training import run as assembly
from bigtrain.training.context import StepNumbers
from bigtrain.training.loop import train_step
from bigtrain.training.optimizers import make_optimizer, states_per_parameter
from bigtrain.training.preflight import try_forward
from bigtrain.training.settings import _unused

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
plan = Plan("zero1", "none", "fp32", 1, 4, 4, "none", False)
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


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of"
    " which 1.25 GiB is free. Including non-PyTorch memory, this process has 77.85 GiB in use."
)


def run_out(*_: Any, **__: Any) -> NoReturn:
    raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def small_plan(**settings: Any) -> Plan:
    return replace(Plan("ddp", "none", "fp32", 1, 8, 8, "none", False), **settings)


def test_out_of_memory_in_the_trial_forward_is_named_with_its_remedies() -> None:
    engine: Any = SimpleNamespace(
        plan=small_plan(),
        module=nn.Sequential(nn.Linear(1, 1)),
        model=nn.Linear(1, 1),
        to_device=lambda batch: batch,
        autocast=nullcontext,
    )
    data = SimpleNamespace(train=[{}, {}], tokenizer=None)
    task: Any = SimpleNamespace(data=data, collate=lambda _: {}, name="any", loss_sum=run_out)
    with pytest.raises(RequestError) as caught:
        try_forward(engine, task)
    text = str(caught.value)
    assert "2.00 GiB" in text and "1.25 GiB is free" in text and "does not fit" not in text
    for remedy in (
        "micro_batch=4",
        "activation_checkpointing=selective",
        "activation_checkpointing=full",
        "kind=zero3",
    ):
        assert f"engine.{remedy}" in text


def test_out_of_memory_in_training_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "train", run_out)
    ctx: Any = MagicMock()
    ctx.engine.plan = small_plan(kind="zero3", micro_batch=1)
    with pytest.raises(TrainingFailed, match=r"2\.00 GiB") as caught:
        assembly._train_and_export(ctx, MagicMock(), {})
    assert "micro_batch=" not in str(caught.value) and "zero3" not in str(caught.value)
    assert ctx.tracker.event.call_args.args[1] == "failed"


def engine_on(device: str) -> Any:
    engine: Any = object.__new__(DDPEngine)
    engine.device = torch.device(device)
    engine.world_size = 2
    engine.channels_last = False
    return engine


@pytest.mark.parametrize(
    ("device", "ended_by", "destroyed"),
    [
        ("cuda", None, True),
        ("cuda", StoppedEarly, True),
        ("cuda", RuntimeError, False),
        ("cuda", TrainingFailed, False),
        ("cpu", RuntimeError, True),
    ],
)
def test_a_rank_that_fails_alone_does_not_wait_in_nccls_group(
    device: str, ended_by: Any, destroyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("group"))
    assembly._leave_group(engine_on(device), ended_by, None, None)
    assert calls == (["group"] if destroyed else [])


def test_it_prints_and_writes_its_verdict_and_leaves_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: Any) -> NoReturn:
        raise TrainingFailed("the loss is not finite")

    def leave(code: int) -> NoReturn:
        raise SystemExit(f"at once with {code}")

    monkeypatch.setenv("BIGTRAIN_VERDICT", str(tmp_path / "verdict"))
    monkeypatch.setattr(command, "app", fail)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="at once with 3"):
        command.main()
    assert (tmp_path / "verdict").read_text() == "3"
    assert "the loss is not finite" in capfd.readouterr().err


def test_a_collective_of_the_doctors_raises_instead_of_aborting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"blocking: {os.environ['TORCH_NCCL_BLOCKING_WAIT']}")

    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    monkeypatch.setattr(doctor.distributed, "init_process_group", start)
    meeting = doctor.Rendezvous(0, 2, "127.0.0.1", 0)
    with pytest.raises(RuntimeError, match="blocking: 1"):
        doctor._time_all_reduce(torch.distributed.HashStore(), meeting)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 836),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B300", 2250),
        ("NVIDIA GB300", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("AMD Instinct MI250X", 191.5),
        # measured, as what the table does not have
        ("NVIDIA RTX A1000", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A3000", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_peaks_are_found_by_whole_names(
    name: str, teraflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    monkeypatch.setattr(flops, "product_rate", lambda *_: "measured")
    expected = "measured" if teraflops is None else teraflops * 1e12
    assert flops.peak_flops(torch.device("cuda")) == expected


def test_a_packed_sequence_counts_its_tokens_and_not_its_width() -> None:
    weights = [[128, 24], [128, 32], [128], [128]]
    padded = flops._cudnn_rnn([3, 7, 24], weights)
    assert padded == 2 * 3 * 7 * (128 * 24 + 128 * 32)
    assert flops._cudnn_rnn([21, 24], weights) == padded


@pytest.mark.parametrize(
    ("capabilities", "vendor", "is_fast"),
    [
        ({"avx512_bf16": True, "amx_bf16": True}, "GenuineIntel", True),
        ({"avx512_bf16": True}, "AuthenticAMD", True),
        ({"avx512_bf16": True}, "GenuineIntel", False),
        ({}, "AuthenticAMD", False),
    ],
)
def test_a_cpu_gets_bf16_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], vendor: str, is_fast: bool
) -> None:
    """Intel's AVX512_BF16 without AMX multiplies half as fast as its fp32 does."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(Path, "read_text", lambda _: f"vendor_id : {vendor}")
    assert find_device("cpu").bf16_is_fast is is_fast


@pytest.mark.parametrize("native", [True, False])
def test_emulated_bf16_is_not_fast(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0) if native else (7, 5))
    assert find_device("auto") == Device("cuda", bf16_is_fast=native, has_tf32=native)


def test_peak_memory_is_that_of_the_rank_that_has_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 << 30)
    engine = engine_on("cuda")
    engine.rank = 1
    assert engine.peak_of_each_rank() == [0.0, 3 << 30]
    numbers = StepNumbers.from_vector([1.0, 1.0, 0.5, 3 << 30, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert numbers.peak_memory == 3 << 30 and numbers.num_targets == 8.0


@pytest.mark.parametrize(
    ("precision", "cudnn", "products"),
    [("fp32", False, "highest"), ("bf16", False, "highest"), ("tf32", True, "high")],
)
def test_fp32_means_one_thing(
    precision: Any, cudnn: bool, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not cudnn)
    before = torch.get_float32_matmul_precision()
    try:
        device = Device("cuda", bf16_is_fast=True, has_tf32=True)
        set_arithmetic(device, small_plan(precision=precision))
        assert torch.backends.cudnn.allow_tf32 == cudnn
        assert torch.get_float32_matmul_precision() == products
    finally:
        torch.set_float32_matmul_precision(before)


def test_tf32_is_refused_where_there_is_none(tmp_path: Path) -> None:
    arguments = ["train", "digits-mlp", "engine.precision=tf32", "engine.device=cpu"]
    done = bigtrain(*arguments, "train.steps=1", "track.wandb=off", cwd=tmp_path)
    assert done.returncode == 2
    assert "this device has no TF32" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


class SlowEvent:
    """A CUDA event as a throttled device would record it: half a second from one to the next."""

    recorded = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        SlowEvent.recorded += 1
        self.time = 500.0 * SlowEvent.recorded

    def elapsed_time(self, end: "SlowEvent") -> float:
        return end.time - self.time


def test_a_slow_device_is_seen_though_launching_takes_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each event is half a second after the one before, and none is read before its lap ends."""
    monkeypatch.setattr(torch.cuda, "Event", SlowEvent)
    clock = StepClock(torch.device("cuda"))
    clock.enter("data")
    for _micro_batch in range(3):
        clock.enter("forward")
        clock.enter("backward")
    lap = clock.lap()
    assert lap.seconds() == pytest.approx({"data": 0.5, "forward": 1.5, "backward": 1.5})
    clock.enter("backward")  # it is under way
    clock.enter("data")
    assert clock.lap().seconds() == pytest.approx({"backward": 0.5, "data": 0.5})


def test_on_the_cpu_the_hosts_clock_is_the_devices() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.enter("data")
    time.sleep(0.01)
    assert 0.01 <= clock.lap().seconds()["data"] < 10


class OrderedEvent:
    """A CUDA event that the device has passed once the host has waited for it or a later one."""

    recorded = 0
    passed = 0

    def __init__(self, enable_timing: bool = False) -> None:
        self.number = 0

    def record(self) -> None:
        OrderedEvent.recorded += 1
        self.number = OrderedEvent.recorded

    def synchronize(self) -> None:
        OrderedEvent.passed = max(OrderedEvent.passed, self.number)

    def elapsed_time(self, end: "OrderedEvent") -> float:
        assert end.number <= OrderedEvent.passed, "the device has not come so far"
        return 1000.0 * (end.number - self.number)


def test_where_a_step_went_is_read_without_a_wait_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop on the CPU, with CUDA's clock: each event is a second after the one before."""
    case = {"model": "cnn", "kind": "ddp", "precision": "fp32", "micro_batch": 8, "steps": 4}
    training, collect = build(case)
    monkeypatch.setattr(torch.cuda, "Event", OrderedEvent)
    training.clock = StepClock(torch.device("cuda"))

    def read(numbers: torch.Tensor) -> Callable[[], list[float]]:
        arrived = torch.cuda.Event()
        arrived.record()

        def wait() -> list[float]:
            arrived.synchronize()
            return numbers.tolist()

        return wait

    monkeypatch.setattr(training.engine, "read", read)
    for _ in range(4):
        train_step(training)
    assert len(collect.seconds) == 4
    for line in collect.seconds:
        assert sum(line[column_of(part)] for part in STEP_PARTS) == line["seconds"]
        assert line["seconds_forward"] >= 2.0, "of two micro-batches"


def quiet_watchdog(**attributes: Any) -> Any:
    """A watchdog whose thread does not run."""
    watchdog: Any = object.__new__(Watchdog)
    watchdog.rank, watchdog.world_size, watchdog.timeout = 1, 2, 600.0
    watchdog.step, watchdog.phase, watchdog.heartbeats = 0, "forward", 1
    watchdog.last_progress = time.monotonic()
    watchdog.interval = 0.01
    vars(watchdog).update(attributes)
    return watchdog


@pytest.mark.parametrize("has_nccl", [True, False])
def test_the_watchdog_writes_what_nccl_was_doing(
    has_nccl: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    bindings = torch._C._distributed_c10d
    if has_nccl:
        monkeypatch.setattr(bindings, "_dump_nccl_trace", lambda: b"trace", raising=False)
    else:
        monkeypatch.delattr(bindings, "_dump_nccl_trace", raising=False)
    monkeypatch.setattr(os, "_exit", leave)
    # The last resort of a real end would strike a minute later, in another test.
    monkeypatch.setattr(watchdog_module, "_EXIT_TIMEOUT", threading.TIMEOUT_MAX)
    watchdog = quiet_watchdog(_store=None, _posts=0, _busy_seconds=[], _logs=tmp_path / "logs")
    with pytest.raises(SystemExit):
        watchdog._end()
    written = [path.read_bytes() for path in tmp_path.glob("logs/collectives-rank1.pickle")]
    assert written == ([b"trace"] if has_nccl else [])


@pytest.mark.parametrize(
    ("moves", "posts_of_peer", "left_alone"),
    [(False, 5, True), (False, 9, False), (True, 5, False)],
)
def test_after_sigterm_a_rank_does_not_wait_for_one_that_is_gone(
    moves: bool, posts_of_peer: int, left_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog_module, "_LEFT_ALONE_AFTER", 0.01)
    looks = [
        [RankPosition(posts=5), RankPosition(posts=5)],
        [RankPosition(posts=posts_of_peer), RankPosition(posts=9)],
    ]

    watchdog = quiet_watchdog(_positions=lambda: looks.pop(0))
    watchdog._asked_to_end = watchdog._look()
    watchdog.heartbeats += moves
    time.sleep(0.02)
    assert watchdog._is_left_alone() == left_alone


def test_a_signal_is_seen_while_the_main_thread_runs_no_python() -> None:
    former = signal.signal(signal.SIGTERM, lambda *_: None)
    term = watchdog_module._TermSignal()
    try:
        assert not term.received()
        os.kill(os.getpid(), signal.SIGTERM)
        assert term.received() and not term.received()
    finally:
        term.close()
        signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("cpu", False)])
def test_prove_asks_cuda_for_deterministic_algorithms(
    device: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str] = {}

    def run(_command: Any, env: dict[str, str], **_: Any) -> Any:
        asked.update(env)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(resume_proof.subprocess, "run", run)
    resume_proof._Runner("launcher {ranks}", []).train(Path("run"), 2)
    assert asked["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"

    monkeypatch.setenv("BIGTRAIN_DETERMINISTIC", asked["BIGTRAIN_DETERMINISTIC"])
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    try:
        set_arithmetic(Device(device, True), small_plan())
        assert torch.are_deterministic_algorithms_enabled() == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_generate_writes_on_the_device_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def write(model: nn.Module, batch: dict[str, torch.Tensor], *_: Any) -> list[str]:
        seen.extend([next(model.parameters()).device.type, batch["input_ids"].device.type])
        return [""]

    (tmp_path / "bigtrain.json").write_text('{"task": "causal_lm"}')
    tokenizer = MagicMock(return_value={"input_ids": [5]}, eos_token_id=0, pad_token_id=0)
    monkeypatch.setattr(generate, "find_device", lambda _asked: Device("meta", True))
    monkeypatch.setattr(generate, "load_tokenizer", lambda _folder: tokenizer)
    monkeypatch.setattr(load, "load_exported", lambda *_: nn.Linear(2, 2))
    monkeypatch.setattr(generate, "write_batch", write)
    generate.Generator(tmp_path).write("import", Decoding(3, 0.0), 0)
    assert seen == ["meta", "meta"]


def test_generate_is_in_bf16_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "to", lambda module, _device: module)
    norm = load.placed(nn.BatchNorm1d(3), Device("cuda", True))
    assert norm.weight.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    assert load.placed(nn.Linear(2, 2), Device("cuda", False)).weight.dtype == torch.float32
    assert load.placed(nn.Linear(2, 2), Device("cpu", True)).weight.dtype == torch.float32


class Batch:
    """A tensor's memory: what is done to it, in order."""

    def __init__(self, *done: Any) -> None:
        self.done = done

    def pin_memory(self) -> "Batch":
        return Batch(*self.done, "pinned")

    def to(self, device: torch.device, non_blocking: bool) -> "Batch":
        return Batch(*self.done, device.type, non_blocking)


def test_batches_are_pinned_before_they_are_copied_without_waiting() -> None:
    batch: Any = {"input_ids": Batch()}
    assert engine_on("cuda").to_device(batch)["input_ids"].done == ("pinned", "cuda", True)
    assert engine_on("cpu").to_device(batch)["input_ids"].done == ("cpu", True)


class UsersCNN(nn.Sequential):
    """A class of a user's, who may have written `view` anywhere."""


@pytest.mark.parametrize(
    ("model", "device", "expected"),
    [
        (CNN(3, 10), "cuda", True),
        (CNN(3, 10), "cpu", True),
        (UsersCNN(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), "cuda", False),
        (MLP(12, 10), "cuda", False),
    ],
)
def test_convolutions_get_channels_last_and_on_cuda_cudnns_benchmark(
    model: nn.Module, device: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert prefer_channels_last(model, torch.device(device)) == expected
    assert torch.backends.cudnn.benchmark == (expected and device == "cuda")


def test_images_come_with_their_channels_last_and_the_same_result() -> None:
    engine = engine_on("cpu")
    images = torch.randn(2, 3, 8, 8)
    engine.channels_last = True
    moved = engine.to_device({"pixel_values": images})["pixel_values"]
    assert moved.is_contiguous(memory_format=torch.channels_last) and moved.equal(images)
    model = CNN(3, 10, channels=(8, 16))
    torch.testing.assert_close(model(moved), model(images))


GPT2 = {"name": "gpt2", "args": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 32}}


@pytest.mark.parametrize("model", [MODELS["transformer"], GPT2], ids=["llama", "gpt2"])
def test_a_forward_and_backward_pass_makes_the_host_wait_for_nothing(model: dict[str, Any]) -> None:
    recipe = recipe_for(
        {"model": "transformer", "kind": "ddp", "precision": "fp32", "micro_batch": 2}
    )
    recipe = recipe.model_copy(update={"model": ModelConfig.model_validate(model)})
    prepared = data_for("transformer")
    module = build_model(recipe, prepared)
    task = TASKS[recipe.task](recipe.task, prepared)
    # Padded on the right, and so without a mask, as the loop's own batches are.
    tokens = torch.randint(2, VOCABULARY, (2, 24))
    batch = {"input_ids": tokens, "labels": tokens}
    with HostReads() as counted:
        task.loss_sum(module, batch).backward()
    assert counted.count == 0


@pytest.mark.parametrize(
    ("environment", "cores"),
    [({}, 16), ({"LOCAL_WORLD_SIZE": "8"}, 2)],
)
def test_too_few_cores_for_a_gpu_are_named(
    environment: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: range(16), raising=False)
    assert cores_per_rank() == cores

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    few = [note for note in _unused(8, 8) if "cpus_per_gpu=8" in note]
    assert bool(few) == (cores < 4)
    for devices in (0, 1):
        row = _check_cores([MagicMock(cores=cores, devices=devices)])
        assert (row is None) == (devices == 0)
        assert row is None or row.ok == (cores >= 4)


def test_a_shipped_recipe_takes_zero1_where_its_gradients_fit() -> None:
    assert load_recipe("llama-1b").recipe.engine.kind == "zero1"


@pytest.mark.parametrize("settings", [{"kind": "zero3"}, {"offload": "params"}])
def test_compile_is_refused_under_zero3(settings: dict[str, Any]) -> None:
    for compiled in (True, False, "auto"):
        engine = EngineConfig(compile=compiled, **settings)
        refusal = pytest.raises(RequestError, match="compile is true") if compiled is True else None
        with refusal or nullcontext():
            make_plan(engine, 1, 100, 1, bf16_is_fast=True)


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, ["expandable_segments:True"]),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, []),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, []),
    ],
)
def test_cuda_memory_grows_in_place_unless_the_user_says_otherwise(
    environment: dict[str, str], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: list[str] = []
    assert torch._C._accelerator_setAllocatorSettings("expandable_segments:True") is None
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    monkeypatch.setattr(start, "set_arithmetic", lambda *_: None)
    monkeypatch.setattr(start, "DDPEngine", MagicMock())
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingFailed):  # the stand-in is no engine
        start.start_engine(small_plan(), Device("cuda", True), {}, 0.0)
    assert settings == asked


OPTIMIZERS = [{"name": "adamw"}, {"name": "sgd"}, {"name": "sgd", "momentum": 0.9}]
OPTIMIZERS += [{"name": "rmsprop", "momentum": 0.9}, {"name": "adagrad"}]


def engine_of(model: nn.Module, optim: OptimConfig, device: str, **settings: Any) -> Any:
    engine = engine_on(device)
    engine.plan = small_plan(**settings)
    engine.rank, engine.world_size, engine.main = 0, 1, True
    engine.module, engine._host = model, {}
    engine.optimizer = make_optimizer(model, optim, lambda parameter: tuple(parameter.shape))
    return engine


@pytest.mark.parametrize("settings", OPTIMIZERS)
def test_what_a_checkpoint_takes_of_host_memory_is_known_before_training(
    settings: dict[str, Any],
) -> None:
    optim = OptimConfig(**settings)
    model = MLP(12, 10)
    engine = engine_of(model, optim, "cpu")
    expected = engine.snapshot_bytes(states_per_parameter(optim))
    model(features=torch.randn(4, 12)).sum().backward()
    engine.optimizer.step()
    copied = [tensor for name, tensor in engine.snapshot().items() if not name.endswith("scalar")]
    assert sum(tensor.nbytes for tensor in copied) == expected


def test_pinned_blocks_are_powers_of_two_and_offloaded_state_is_not_pinned() -> None:
    model = nn.Linear(1000, 1)  # 4,000 and 4 bytes
    optim = OptimConfig(name="adamw")
    assert engine_of(model, optim, "cuda").snapshot_bytes(2) == 3 * (4096 + 4)
    assert engine_of(model, optim, "cuda", offload="optimizer").snapshot_bytes(2) == 3 * 4004


@pytest.mark.parametrize(
    ("available", "total", "outcome"),
    [(200, 300, ""), (100, 300, "note"), (100, 150, "refused")],
)
def test_checkpoints_that_do_not_fit_a_machines_memory_are_named_before_training(
    available: int, total: int, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(available=available << 30, total=total << 30)
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: memory)
    engine: Any = SimpleNamespace(snapshot_bytes=lambda _states: 99 << 30)
    others = [("other", 99 << 30, 120 << 30, 110 << 30)]
    engine.gather = lambda mine: [mine, mine, *others]  # two ranks on this machine, one elsewhere
    if outcome == "refused":
        with pytest.raises(RequestError, match=r"198\.0 GiB on .* has 150\.0 GiB"):
            preflight.check_host_memory(engine, OptimConfig())
        return
    notes = preflight.check_host_memory(engine, OptimConfig())
    assert len(notes) == (outcome == "note")
    assert all("198.0 GiB" in note and "100.0 GiB free" in note for note in notes)


@pytest.mark.parametrize("settings", [{"kind": "zero1"}, {"offload": "optimizer"}])
def test_gradients_in_bf16_between_ranks_are_refused_under_zero(settings: dict[str, Any]) -> None:
    engine = EngineConfig(reduce_dtype="bf16", **settings)
    with pytest.raises(RequestError, match=r"reduce_dtype is bf16, but zero[12]"):
        make_plan(engine, 2, 100, 1, bf16_is_fast=True)
    plan, _ = make_plan(EngineConfig(reduce_dtype="bf16"), 2, 100, 1, bf16_is_fast=True)
    assert plan.reduce_dtype == "bf16"


@pytest.mark.parametrize(
    ("image", "samples", "device", "micro_batch"),
    [
        ((3, 224, 224), 1024, "cuda", 256),
        ((3, 224, 224), 1024, "cpu", 6),
        ((3, 32, 32), 4096, "cuda", 4096),
        ((1, 8, 8), 64, "cuda", 64),
        (None, 64, "cuda", 8),
    ],
)
def test_a_gpu_is_given_as_many_images_as_keep_it_busy(
    image: Any, samples: int, device: str, micro_batch: int
) -> None:
    elements = math.prod(image) if image else 64 * 2048
    prepared = PreparedData([], [], elements // 64 + (image is not None), image=image)
    engine = EngineConfig(global_batch=samples)
    plan, _ = make_plan(engine, 1, samples, prepared.cost_on(device), bf16_is_fast=True)
    assert plan.micro_batch == micro_batch


@pytest.mark.parametrize(
    ("device", "offload", "threads"),
    [("cuda", "optimizer", 6), ("cuda", "none", 1), ("cpu", "optimizer", 1)],
)
def test_an_optimizer_in_host_memory_has_all_of_a_ranks_cores(
    device: str, offload: Any, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [1]
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(deepspeed_engine, "cores_per_rank", lambda: 6)
    monkeypatch.setattr(deepspeed_engine, "_take_visible_device", lambda: None)
    monkeypatch.setattr(deepspeed_engine, "_compile_nothing", lambda: None)
    monkeypatch.setattr(deepspeed_engine, "_prepare_environment", lambda: None)
    monkeypatch.setattr(deepspeed_engine, "make_accelerator", MagicMock())
    plan = small_plan(kind="zero2", offload=offload)
    DeepSpeedEngine(plan, Device(device, True), render_deepspeed_config(plan, 0.0), 0.0)
    assert given[-1] == threads
