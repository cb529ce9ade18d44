"""Seconds from a command to its first training step: `python benchmarks/startup.py [ROUNDS]`.

bigtrain beside a bare script and HF's Trainer, which build the same model, optimizer and engine for
the same data and do nothing else: no run directory, no checks, no W&B. Then the same for bigtrain's
restart after both ranks and their launcher were killed. Everything is started in turn, ROUNDS
times; the table has medians, of seconds and of processor seconds (of all processes together, the
launcher's too), which say more where a machine has other work.
"""

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import psutil


class Case(NamedTuple):
    """A recipe on an engine and a number of ranks."""

    recipe: str
    kind: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.recipe}, {self.kind}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"


CASES = [
    Case("digits-cnn", "ddp", 1),
    Case("digits-cnn", "ddp", 2),
    Case("digits-cnn", "zero2", 2),
    Case("tiny-lm", "ddp", 1),
    Case("tiny-lm", "zero2", 2),
    Case("tiny-lm", "zero3", 2),
]
ARMS = ["bigtrain", "bare", "hf"]
RATE = 1e-3
LLAMA = {"num_hidden_layers": 2, "hidden_size": 192, "intermediate_size": 512, "vocab_size": 4096}
LLAMA |= {"num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 256}


class Start(NamedTuple):
    """Until the first step."""

    seconds: float
    processor_seconds: float


def main(rounds: int) -> None:
    os.chdir(tempfile.mkdtemp())
    starts: dict[tuple[Case, str], list[Start]] = defaultdict(list)
    for number in range(rounds + 1):  # the first one fills caches, and does not count
        for case in CASES:
            for arm in ARMS:
                start = until_first_step(case, arm, f"run-{number}")
                if number > 0:
                    starts[case, arm].append(start)
            if case.ranks > 1 and number > 0:
                # The checkpoint is of the run that `until_first_step` has started, and killed.
                starts[case, "restart"].append(until_first_step(case, "bigtrain", f"run-{number}"))
        print(f"round {number} of {rounds} done", file=sys.stderr, flush=True)
    for index, unit in enumerate(Start._fields):
        print(f"| {unit} | bigtrain | bare | HF Trainer | ÷ bare | ÷ HF | restart |")
        print("|---|---|---|---|---|---|---|")
        for case in CASES:
            medians = []
            for arm in [*ARMS, "restart"]:
                values = [start[index] for start in starts[case, arm]]
                medians.append(statistics.median(values) if values else float("nan"))
            ours, bare, hf, restart = medians
            ratios = f"{ours / bare:.2f} | {ours / hf:.2f}"
            print(f"| {case} | {ours:.2f} | {bare:.2f} | {hf:.2f} | {ratios} | {restart:.2f} |")
        print()


def until_first_step(case: Case, arm: str, run: str) -> Start:
    """Start the command; it is killed a few steps after its first."""
    command = [sys.executable]
    if case.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.ranks}"]
    name = f"{run}-{case.recipe}-{case.kind}-{case.ranks}"
    steps = Path(f"{name}-{arm}.jsonl")
    if arm == "bigtrain":
        settings = [f"name={name}", f"engine.kind={case.kind}", "train.checkpoint_every=5"]
        settings.append("engine.precision=fp32")  # as the others have it
        command += ["-m", "bigtrain", "train", case.recipe, "--quiet", *settings]
        steps = Path("runs") / name / "metrics.jsonl"
    else:
        command += [str(Path(__file__).resolve()), arm, case.recipe, case.kind, str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["TORCH_EXTENSIONS_DIR"] = str(Path("extensions").resolve())  # DeepSpeed's own
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with Path(f"{name}-{arm}.log").open("a") as log:
        began = time.time()
        launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            times = wait_for_steps(1, steps, began, launcher)
            processor_seconds = sum(processor_times(process) for process in tree(launcher))
            wait_for_steps(8, steps, began, launcher)
        except AssertionError:
            print(Path(log.name).read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            kill_all(launcher)
    return Start(times[0] - began, processor_seconds)


def wait_for_steps(
    count: int, path: Path, began: float, launcher: subprocess.Popen[bytes]
) -> list[float]:
    while len(times := times_of_steps(path, began)) < count:
        assert launcher.poll() in (None, 0), "it has ended"
        time.sleep(0.02)
    return times


def times_of_steps(path: Path, began: float) -> list[float]:
    """When each step since `began` was done, from lines of JSON with `time`."""
    times: list[float] = []
    if path.exists():
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "train" and record["time"] > began:
                times.append(record["time"])
    return times


def tree(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The launcher, and all that it has started."""
    try:
        process = psutil.Process(launcher.pid)
    except psutil.NoSuchProcess:
        return []
    return [process, *process.children(recursive=True)]


def processor_times(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.NoSuchProcess):
        return sum(process.cpu_times()[:4])  # its own, and its ended children's
    return 0.0


def kill_all(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL for every process."""
    for process in tree(launcher):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    launcher.wait()
    time.sleep(0.5)


# What follows runs in processes of its own, which pay for every import themselves.


def note_step(steps: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        with Path(steps).open("a") as file:
            file.write(json.dumps({"kind": "train", "time": time.time()}) + "\n")


def model_and_data(recipe: str) -> tuple[Any, list[dict[str, Any]]]:
    """The recipe's model, and a few examples of its shapes. Both return a loss for labels."""
    import torch

    torch.manual_seed(0)
    if recipe == "tiny-lm":
        from transformers import LlamaConfig, LlamaForCausalLM

        tokens = torch.randint(0, 4096, (512, 256))
        data = [{"input_ids": row, "labels": row} for row in tokens]
        return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **LLAMA)), data
    import numpy as np
    from torch import nn

    from bigtrain.models.cnn import CNN

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cnn = CNN(1, 10, dropout=0.4)

        def forward(self, pixel_values: Any, labels: Any) -> dict[str, Any]:
            logits = self.cnn(pixel_values)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = torch.tensor(np.loadtxt(path, delimiter=","), dtype=torch.float32)
    images = table[:, :-1].view(-1, 1, 8, 8) / 16
    labels = table[:, -1].long()
    pairs = zip(images, labels, strict=True)
    return Classifier(), [{"pixel_values": image, "labels": label} for image, label in pairs]


def ds_config(kind: str, micro_batch: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": {"stage": int(kind[-1])},
        "zero_allow_untested_optimizer": True,
    }


def bare(recipe: str, kind: str, steps: str) -> None:
    """What a script does that knows its engine: torch alone, or DeepSpeed without Accelerate."""
    import torch
    from torch.utils.data import DataLoader

    os.environ["DS_ACCELERATOR"] = "cpu"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model, data = model_and_data(recipe)
    micro_batch = (4 if recipe == "tiny-lm" else 32) // world
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    engine: Any = None
    if kind != "ddp":
        import deepspeed

        deepspeed.init_distributed("gloo")
        config = ds_config(kind, micro_batch)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    elif world > 1:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    for batch in DataLoader(data, micro_batch, shuffle=True):
        loss = (engine or model)(**batch)["loss"]
        if engine is not None:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        note_step(steps)


def hf(recipe: str, kind: str, steps: str) -> None:
    """The same with HF's Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Note(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            note_step(steps)

    os.environ["DS_ACCELERATOR"] = "cpu"
    micro_batch = (4 if recipe == "tiny-lm" else 32) // int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        output_dir=f"{steps}.out",
        per_device_train_batch_size=micro_batch,
        learning_rate=RATE,
        use_cpu=kind == "ddp",  # told of the CPU, Accelerate would drop DeepSpeed
        ddp_backend="gloo" if "RANK" in os.environ else None,
        deepspeed=None if kind == "ddp" else ds_config(kind, micro_batch),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    model, data = model_and_data(recipe)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Note()])
    assert trainer.is_deepspeed_enabled == (kind != "ddp")
    trainer.train()


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:
        bare(*sys.argv[2:])
    elif sys.argv[1:2] == ["hf"]:
        hf(*sys.argv[2:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
