"""Ten minutes of random kills: `python benchmarks/soak.py [MINUTES]` (make soak).

Two ranks under ZeRO-2 train digits-cnn, once undisturbed and once while one rank or another is
killed (SIGKILL), stopped for good (SIGSTOP, found by the watchdog) or all are asked to save
(SIGTERM), every few seconds. The run is started again with the same command until it has finished.
Both must have the same losses at every step, to the bit.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from bigtrain.runs.directory import RunDir
from bigtrain.runs.metrics_file import read_metrics
from bigtrain.runs.status import status_of

MINUTES = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
STEPS = int(600 * MINUTES)
RECIPE = [
    "digits-cnn",
    "engine.kind=zero2",
    "engine.micro_batch=16",
    f"train.steps={STEPS}",
    f"train.eval_every={STEPS}",
]
RECIPE += ["train.checkpoint_every=50", "train.hang_timeout=5", "track.wandb=off"]
COMMAND = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
    "-m",
    "bigtrain",
    "train",
]
FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "save": signal.SIGTERM}


def start(name: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
    log = Path(f"{name}.log").open("ab")  # noqa: SIM115
    return subprocess.Popen(
        [*COMMAND, *RECIPE, f"name={name}"], env=environment, stdout=log, stderr=log
    )


def losses(name: str) -> dict[int, float]:
    return {
        line["step"]: line["loss"]
        for line in read_metrics(Path("runs") / name / "metrics.jsonl", "train")
    }


def disturb(draw: random.Random) -> Counter[str]:
    """Train `survivor` to its end, with a fault every few seconds; how many of each."""
    done: Counter[str] = Counter()
    while True:
        launcher, fault = start("survivor"), "ended by itself"
        try:
            launcher.wait(draw.uniform(8, 25))
        except subprocess.TimeoutExpired:
            ranks = [
                p for p in psutil.Process(launcher.pid).children() if "bigtrain" in p.cmdline()
            ]
            fault = draw.choice(list(FAULTS))
            if len(ranks) == 2:
                done[fault] += 1
                draw.choice(ranks).send_signal(FAULTS[fault])
        launcher.wait()
        if (Path("runs") / "survivor" / "summary.json").exists():
            return done
        print(f"  {fault} at step {max(losses('survivor'), default=0):,} of {STEPS:,}", flush=True)


def main() -> None:
    """Exit code 0 when the curves are the same."""
    seed = random.SystemRandom().randrange(10**6)
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    began = time.monotonic()
    assert start("control").wait() == 0, Path("control.log").read_text()[-2000:]
    straight = time.monotonic() - began
    print(
        f"{STEPS:,} steps undisturbed: {straight:.0f} s; now with faults (seed {seed}):", flush=True
    )
    faults = disturb(random.Random(seed))
    same = losses("control") == losses("survivor")
    survivor = status_of(RunDir(Path("runs") / "survivor"))
    print(
        f"{sum(faults.values())} faults {dict(faults)}, {survivor.restarts} restarts, "
        f"{time.monotonic() - began:.0f} s in all"
    )
    print(
        f"goodput {survivor.goodput:.1%}; losses of {len(losses('control')):,} steps "
        + ("identical" if same else "DIFFER")
    )
    print(folder)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
