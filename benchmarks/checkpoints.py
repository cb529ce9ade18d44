"""What a checkpoint costs: written in the background, at once, and beside a plain write of as many
bytes; and what the comparison of the weights in use with the checkpoint adds to a load.

python benchmarks/checkpoints.py (two ranks, a Transformer of 102 M parameters, below runs/ here;
ten minutes)
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bigtrain.runs.directory import RunDir
from bigtrain.runs.metrics_file import read_metrics

EVERY = 25  # steps between checkpoints
SHAPE = (
    "{num_hidden_layers: 14, hidden_size: 768, intermediate_size: 2048, num_attention_heads: 12}"
)
RECIPE = [
    "tiny-lm",
    f"model.args={SHAPE}",
    "data.seq_len=64",
    "engine.global_batch=2",
    "engine.precision=fp32",
]
LAST = 3 * EVERY + 15
RECIPE += [
    f"train.steps={LAST}",
    f"train.checkpoint_every={EVERY}",
    "train.keep_last=1",
    f"train.eval_every={LAST}",
]
# A short text for evaluation, which is not what is measured.
RECIPE += [f"data.eval={__file__}", "track.wandb=off", "optim.lr=1e-5"]
PLAIN = """
import os, sys, time
content = open(sys.argv[1], "rb").read()
began = time.perf_counter()
with open(".".join(sys.argv[1:]), "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
print(time.perf_counter() - began)
"""


def train(name: str, *overrides: str) -> RunDir:
    """Train on two ranks, from the newest checkpoint on."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", "2", "-m", "bigtrain", "train", *RECIPE]
    overrides = (f"name={name}", *overrides)
    subprocess.run([*command, *overrides], check=True, stdout=subprocess.DEVNULL)
    return RunDir(Path("runs") / name)


def check_share(name: str) -> float:
    """The comparison's share of a load under ZeRO-3: the median of five resumes of the run."""
    shares = []
    for further in range(1, 6):
        run = train(name, "engine.kind=zero3", f"train.steps={LAST + further}")
        events = read_metrics(run.metrics, "event")
        resumed = [event for event in events if event["event"] == "resumed"][-1]
        shares.append(resumed["check_seconds"] / resumed["load_seconds"])
    return statistics.median(shares)


def measure(name: str, background: bool) -> dict[str, Any]:
    """Train; what the third checkpoint cost, the first that is written over another; and for how
    long the first blocked.
    """
    run = train(name, f"train.async_save={str(background).lower()}")
    seconds = {line["step"]: line["seconds"] for line in read_metrics(run.metrics, "train")}
    first, _, saved, *_ = (
        line for line in read_metrics(run.metrics, "event") if line["event"] == "checkpoint"
    )
    usual = statistics.median(seconds[step] for step in range(2 * EVERY + 10, 3 * EVERY + 1))
    # Steps under which the writing went on, and two more for what the disk still has to do.
    busy = range(3 * EVERY + 1, 3 * EVERY + 3 + int(saved["seconds"] / usual))
    lost = saved["blocked"] + sum(seconds[step] - usual for step in busy)
    shards = sorted((run.checkpoints / f"step-{LAST:08d}").glob("rank-*.safetensors"))
    size = sum(path.stat().st_size for path in shards)
    times = {key: saved[key] for key in ("blocked", "writing")} | {
        "step": usual,
        "lost": lost,
        "first": first["blocked"],
    }
    return times | {"size": size, "shards": shards}


def plain_write(shards: list[Path]) -> float:
    """Seconds for as many processes to write and sync as many bytes to new files; the slowest, the
    median of three.
    """
    times = []
    for number in range(3):
        # As between checkpoints: memory that was just freed would make it look faster.
        time.sleep(10)
        program = [sys.executable, "-c", PLAIN]
        writers = [
            subprocess.Popen([*program, str(path), str(number)], stdout=subprocess.PIPE)
            for path in shards
        ]
        times.append(max(float(writer.communicate()[0]) for writer in writers))
    for path in shards:
        for copy in path.parent.glob(f"{path.name}.*"):
            copy.unlink()
    return statistics.median(times)


def main() -> None:
    """Both ways, one after the other, and the table."""
    stamp = int(time.time())
    found = {
        name: measure(f"checkpoints-{name}-{stamp}", name == "background")
        for name in ("background", "at-once")
    }
    plain = plain_write(found["at-once"]["shards"])
    size = found["at-once"]["size"]
    print(f"{size / 2**20:,.0f} MiB by two ranks; a step takes {found['at-once']['step']:.2f} s")
    print(
        "| checkpoint written | training waits | the first time | lost in all "
        "| slowdown at one per 50 steps | writes |"
    )
    print("|---|---|---|---|---|---|")
    for name, cost in found.items():
        slower = cost["lost"] / (50 * cost["step"])
        rate = size / cost["writing"] / 2**20
        waits = f"{cost['blocked']:.3f} s | {cost['first']:.3f} s | {cost['lost']:.2f} s"
        print(f"| {name} | {waits} | {slower:.2%} | {rate:,.0f} MiB/s |")
    print(f"| plain write and sync | | | | | {size / plain / 2**20:,.0f} MiB/s |")
    ratio = found["background"]["blocked"] / found["at-once"]["blocked"]
    share = check_share(f"checkpoints-at-once-{stamp}")
    # Below 1% at this size. A tiny model's share is larger: its load takes milliseconds.
    print(f"the comparison of weights in use: {share:.2%} of a load (ZeRO-3, two ranks, this size)")
    print(json.dumps({"blocked, background ÷ at once": round(ratio, 3)}, ensure_ascii=False))


if __name__ == "__main__":
    main()
