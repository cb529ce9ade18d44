"""One arm of `make bench`, in one process or one rank: another toolkit, or a plain loop of torch.

python benchmarks/arms.py ARM WORKLOAD FOLDER STEPS bf16|fp32 (torchrun starts it for two ranks)

Prints a line of JSON: when each step ended (Unix time), and the mean of the losses. bigtrain's own
arms are its command line, which bench.py starts.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from workloads import CLIP, RATE, SEED, WORKLOADS, build_plain, without_logits

GPU_STEPS = 10  # steps of a GPU between two times
# glibc keeps what is freed: what bigtrain sets by itself (engine/runtime.py), by environment.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


@dataclass
class Job:
    """What an arm trains, and where it says that a step has ended."""

    workload: str
    model: nn.Module  # returns a mapping with `loss`
    batches: dict[str, Tensor]  # [steps, global batch, …] each
    steps: int
    tuned: bool  # fused AdamW, tanh GELU, glibc keeps memory: a toolkit's best switches
    bf16: bool
    times: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    mean_loss: float = 0.0
    steps_done: int = 0

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", "0"))

    @property
    def ranks(self) -> int:
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def micro_batch(self) -> int:
        """Samples per rank and step."""
        return WORKLOADS[self.workload].global_batch // self.ranks

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        fused = True if self.tuned else None
        return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=fused)

    @property
    def device(self) -> str:
        return "cuda" if WORKLOADS[self.workload].gpu_model else "cpu"

    def step_ended(self, loss: Tensor | None = None) -> None:
        """On a GPU the host waits for every tenth step alone, and notes the time of these."""
        self.steps_done += 1
        if self.device == "cpu":
            self.times.append(time.time())
        elif self.steps_done % GPU_STEPS == 0:
            torch.cuda.synchronize()
            self.times.append(time.time())
        if loss is not None:
            self.losses.append(loss.detach())

    def samples(self) -> "Samples":
        return Samples(self.batches)


class Samples(Dataset[dict[str, Tensor]]):
    """All samples in the order in which they are trained on, from memory."""

    def __init__(self, batches: dict[str, Tensor]) -> None:
        self.fields = {name: value.flatten(0, 1) for name, value in batches.items()}

    def __len__(self) -> int:
        return len(self.fields["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.fields.items()}


def local_batches(job: Job) -> Iterator[dict[str, Tensor]]:
    """This rank's share of each step's batch; on the CPU without copying."""
    first = job.rank * job.micro_batch
    for step in range(job.steps):
        share = slice(first, first + job.micro_batch)
        yield {name: value[step, share].to(job.device) for name, value in job.batches.items()}


def mean_over_ranks(job: Job, mean: Tensor | None = None) -> float:
    """The mean loss of all steps and ranks. `mean`: of this rank, if it is known already."""
    if mean is None:
        mean = torch.stack(job.losses).mean()
    if job.ranks > 1:
        torch.distributed.all_reduce(mean)
    return float(mean) / job.ranks


def train_loop(job: Job) -> None:
    """A loop of torch alone, with DistributedDataParallel on several ranks."""
    model: Any = job.model
    if job.tuned:
        model = without_logits(job.workload, model)
    model = model.to(job.device)
    channels_last = job.tuned and "pixel_values" in job.batches
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if job.ranks > 1:
        torch.distributed.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=job.tuned)
    optimizer = job.optimizer(model)
    for batch in local_batches(job):
        if channels_last:
            images = batch["pixel_values"]
            batch["pixel_values"] = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(job.device, torch.bfloat16, enabled=job.bf16):
            loss = model(**batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        job.step_ended(loss)
    job.mean_loss = mean_over_ranks(job)


def train_accelerate(job: Job) -> None:
    """The loop of Accelerate's documentation."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    handlers = []
    if job.ranks > 1:  # without the name each rank is alone on a CPU
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        mixed_precision="bf16" if job.bf16 else "no",
        cpu=job.device == "cpu",
        kwargs_handlers=handlers,
    )
    assert accelerator.num_processes == job.ranks, accelerator.num_processes
    loader = DataLoader(job.samples(), batch_size=job.micro_batch)
    optimizer = job.optimizer(job.model)
    model, optimizer, loader = accelerator.prepare(job.model, optimizer, loader)
    for batch in loader:
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        job.step_ended(loss)
    job.mean_loss = mean_over_ranks(job)


def train_hf(job: Job) -> None:
    """transformers' Trainer; its own default optimizer is the fused AdamW already."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            job.step_ended()

    arguments = TrainingArguments(
        output_dir=f"hf-{os.getpid()}",
        max_steps=job.steps,
        per_device_train_batch_size=job.micro_batch,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        seed=SEED,
        save_strategy="no",
        use_cpu=job.device == "cpu",
        ddp_backend="gloo" if job.ranks > 1 else None,
        bf16=job.bf16,
        **({"optim": "adamw_torch_fused", "disable_tqdm": True} if job.tuned else {}),
    )
    assert arguments.world_size == job.ranks, arguments.world_size
    trainer = Trainer(job.model, arguments, train_dataset=job.samples(), callbacks=[Clock()])
    # The Trainer's is of this rank alone.
    job.mean_loss = mean_over_ranks(job, torch.tensor(trainer.train().training_loss))


def train_lightning(job: Job) -> None:
    """Lightning's Trainer; its best switches leave out logger, progress bar and checkpoints."""
    import lightning
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.strategies import DDPStrategy

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer(self)

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            # Lightning's own refuses fused optimizers in mixed precision.
            nn.utils.clip_grad_norm_(self.parameters(), CLIP)

    class Clock(Callback):
        def on_train_batch_end(self, _: Any, __: Any, outputs: Any, *___: Any) -> None:
            job.step_ended(outputs["loss"])

    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    several: Any = DDPStrategy(process_group_backend="gloo")
    trainer = lightning.Trainer(
        accelerator=job.device,
        devices=job.ranks,
        strategy=several if job.ranks > 1 else "auto",
        precision="bf16-mixed" if job.bf16 else "32-true",
        max_steps=job.steps,
        max_epochs=1,
        gradient_clip_val=CLIP,
        callbacks=[Clock()],
        default_root_dir=f"lightning-{os.getpid()}",
        **(quiet if job.tuned else {}),
    )
    assert trainer.world_size == job.ranks, trainer.world_size
    trainer.fit(Module(), DataLoader(job.samples(), batch_size=job.micro_batch))
    job.mean_loss = mean_over_ranks(job)


@dataclass(frozen=True)
class Arm:
    """A toolkit and how it is switched. `train` is None for bigtrain's command line."""

    title: str
    train: Callable[[Job], None] | None
    tuned: bool = False
    precision: str = ""  # empty: the one whose matrix products are faster on this machine
    overrides: tuple[str, ...] = ()  # of bigtrain's recipe
    only_ranks: int | None = None


ARMS = {
    "plain": Arm("torch loop, fp32", train_loop, precision="fp32"),
    "hf": Arm("HF Trainer, bf16", train_hf, precision="bf16"),
    "lightning": Arm("Lightning, bf16", train_lightning, precision="bf16"),
    "accelerate": Arm("Accelerate, bf16", train_accelerate, precision="bf16"),
    "hf-best": Arm("HF Trainer, best switches", train_hf, tuned=True),
    "lightning-best": Arm("Lightning, best switches", train_lightning, tuned=True),
    "accelerate-best": Arm("Accelerate, best switches", train_accelerate, tuned=True),
    "tuned": Arm("torch loop, tuned by hand", train_loop, tuned=True),
    "bigtrain": Arm("bigtrain, defaults", None),
    "zero1": Arm("bigtrain, zero1", None, overrides=("engine.kind=zero1",), only_ranks=2),
    "zero2": Arm("bigtrain, zero2", None, overrides=("engine.kind=zero2",), only_ranks=2),
    "zero3": Arm("bigtrain, zero3", None, overrides=("engine.kind=zero3",), only_ranks=2),
}


def main() -> None:
    """Train, and print what was seen."""
    name, workload, folder, steps, precision = sys.argv[1:]
    arm = ARMS[name]
    assert arm.train is not None, f"{name} is a command of its own"
    torch.manual_seed(SEED)
    content = torch.load(Path(folder) / f"{workload}.pt", weights_only=True)
    batches = {key: value[: int(steps)] for key, value in content["batches"].items()}
    if workload == "transformer" or WORKLOADS[workload].gpu_model:
        # transformers' models shift labels by themselves unless they are given the shifted ones.
        batches["shift_labels"] = batches["labels"]
    model = build_plain(workload, content["weights"], arm.tuned)
    job = Job(workload, model, batches, int(steps), arm.tuned, bf16=precision == "bf16")
    arm.train(job)
    if job.rank == 0:
        print("\n" + json.dumps({"times": job.times, "mean_loss": job.mean_loss}))


if __name__ == "__main__":
    main()
