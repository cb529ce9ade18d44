"""What `bigtrain export` needs of the host's memory: a model of a billion parameters, whose
checkpoint two ranks wrote.

python benchmarks/export_memory.py (4 GB below a temporary folder here, twice; five minutes)
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from bigtrain.checkpoint.format import MANIFEST, seal, sync_and_hash, write_tensors
from bigtrain.checkpoint.state import TrainState
from bigtrain.config.loader import load_recipe, to_yaml
from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import PreparedData
from bigtrain.engine.fragments import WEIGHT, flat_range, name_of_piece
from bigtrain.models.build import build_model
from bigtrain.models.model_inputs import write_model_inputs
from bigtrain.runs.directory import RunDir

SHAPE = (
    "{hidden_size: 2048, intermediate_size: 5632, num_hidden_layers: 20, num_attention_heads: 16,"
    " num_key_value_heads: 8, tie_word_embeddings: true}"
)
RANKS = 2


def write_rank(folder: Path, rank: int, shapes: dict[str, list[int]]) -> None:
    """One rank's file: its half of every parameter, as ZeRO-3 cuts them, random."""
    torch.manual_seed(rank)
    tensors = {}
    for name, shape in shapes.items():
        half = torch.Size(shape).numel() // RANKS
        piece = flat_range(rank * half, half)
        tensors[name_of_piece(name, WEIGHT, piece)] = torch.randn(half).mul_(0.02)
    write_tensors(tensors, folder / f"rank-{rank:05d}.safetensors")


def write_run(run: RunDir, recipe: Recipe) -> None:
    """A run with one checkpoint."""
    checkpoint = run.checkpoints / "step-00000001"
    checkpoint.mkdir(parents=True)
    run.recipe.write_text(to_yaml(recipe))
    prepared = PreparedData(train=[], eval=[], tokens_per_sample=1)
    write_model_inputs(recipe, prepared, run)
    with torch.device("meta"):
        model = build_model(recipe, prepared)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for rank in range(RANKS):
        write_rank(checkpoint, rank, shapes)
    (checkpoint / "state.json").write_text(json.dumps(asdict(TrainState(step=1, samples=1))))
    files = {path.name: sync_and_hash(path) for path in checkpoint.iterdir()}
    manifest = {"files": files, "shapes": shapes, "optimizer": "none", "engine": "zero3"}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"seal": seal(manifest)}))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters in fp32, in a checkpoint of {RANKS} ranks", flush=True)


def export(run: RunDir, size: str) -> None:
    """Print what an export cut into files of `size` needed."""
    out = run.path / f"out-{size}"
    command = [sys.executable, "-m", "bigtrain", "export", str(run.path), str(out)]
    began = time.perf_counter()
    started = subprocess.Popen([*command, "--shard-size", size])
    _, status, usage = os.wait4(started.pid, 0)
    assert status == 0
    seconds = time.perf_counter() - began
    files = [path.stat().st_size for path in out.glob("*.safetensors")]
    peak = usage.ru_maxrss * 1024 / 1e9
    largest = max(files) / 1e9
    print(
        f"--shard-size {size}: {len(files)} files, the largest {largest:.2f} GB; peak of host"
        f" memory {peak:.2f} GB (1.3 × largest + 1 = {1.3 * largest + 1:.2f}); {seconds:.0f} s"
    )
    for path in out.iterdir():
        path.unlink()


def main() -> None:
    overrides = ["name=billion", f"model.args={SHAPE}", "data.seq_len=128", "track.wandb=off"]
    recipe = load_recipe("tiny-lm", overrides).recipe
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = RunDir(Path(folder) / "billion")
        # By another process: a child's peak begins with what its parent holds.
        writer = multiprocessing.Process(target=write_run, args=(run, recipe))
        writer.start()
        writer.join()
        for size in ("5GB", "1GB"):
            export(run, size)


if __name__ == "__main__":
    main()
