"""bigtrain beside other toolkits: `python benchmarks/bench.py [--quick]` (make bench; an hour).

Every arm trains the same model on the same batches in a process of its own, one after another, a
round of all arms and then the next; on two cores that nothing else should use. Writes bench.json,
bench.svg and the tables of README.md beside this file, and fails if losses differ.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import ARMS, KEEP_MEMORY
from report import (
    Cell,
    Measured,
    markdown,
    replace_tables,
    step_seconds,
    svg,
    unequal_losses,
)
from workloads import WORKLOADS, write_recipe

from bigtrain.runs.metrics_file import read_metrics

HERE = Path(__file__).parent
CORES = 2
# Mean losses of all steps. bf16 moves them by 6e-4 (Transformer) and 4e-3 (CNN); another
# batch, rate, clipping or starting weight moves them by more than 1e-2.
TOLERANCE = 5e-3
QUICK_ARMS = ["plain", "hf-best", "tuned", "bigtrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


@dataclass(frozen=True)
class Bench:
    """How much is measured, and where the processes work."""

    folder: Path
    rounds: int
    with_checks: bool
    machine: dict[str, Any]  # what it can do (machine_rates)
    share: float = 1.0  # of the steps of a workload
    steps_per_time: int = 1  # steps between two times that an arm notes

    @property
    def cores(self) -> int:
        return CORES if self.steps_per_time == 1 else len(os.sched_getaffinity(0))

    def steps(self, workload: str) -> int:
        return round(WORKLOADS[workload].steps * self.share)

    def warm(self, workload: str) -> int:
        return round(WORKLOADS[workload].warm * self.share)

    @property
    def faster_precision(self) -> str:
        """bf16 on processors with AMX, fp32 on many that only have AVX512-BF16."""
        bf16_rate, fp32_rate = self.machine["bf16_GFLOP_per_s"], self.machine["fp32_GFLOP_per_s"]
        return "bf16" if bf16_rate > fp32_rate else "fp32"


def run(command: list[str], folder: Path, cores: int, ranks: int, **variables: str) -> str:
    """What a command prints, on so many cores, which its ranks share. Raises SystemExit."""
    mine = sorted(os.sched_getaffinity(0))
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // ranks))} | variables
    os.sched_setaffinity(0, mine[:cores])  # the command inherits it
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    finally:
        os.sched_setaffinity(0, mine)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def last_json(output: str) -> dict[str, Any]:
    """The last line that is a JSON object: what toolkits print comes before it."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])


def run_bigtrain(
    bench: Bench, workload: str, ranks: int, overrides: tuple[str, ...], cores: int = CORES
) -> tuple[list[float], float]:
    """When each step of its own command line ended, in a fresh run directory; the mean loss."""
    steps = bench.steps(workload)
    name = f"bench-{time.time_ns()}"
    launcher = [*TORCHRUN, str(ranks)] if ranks > 1 else [sys.executable]
    command = [*launcher, "-m", "bigtrain", "train", f"{workload}.yaml", f"name={name}"]
    command += [f"train.steps={steps}", f"train.eval_every={steps}"]
    command += [f"train.checkpoint_every={steps}", *overrides]
    run(command, bench.folder, cores, ranks)
    directory = bench.folder / "runs" / name
    lines = list(read_metrics(directory / "metrics.jsonl", "train"))
    shutil.rmtree(directory)
    return [line["time"] for line in lines], sum(line["loss"] for line in lines) / len(lines)


def run_other(bench: Bench, cell: Cell) -> tuple[list[float], float]:
    """When each step of another toolkit ended, and the mean loss."""
    launcher = [*TORCHRUN, str(cell.ranks)] if cell.ranks > 1 else [sys.executable]
    command = [*launcher, str(HERE / "arms.py"), cell.arm, cell.workload]
    arm = ARMS[cell.arm]
    precision = arm.precision or bench.faster_precision
    command += [str(bench.folder), str(bench.steps(cell.workload)), precision]
    memory = KEEP_MEMORY if arm.tuned else {}
    seen = last_json(run(command, bench.folder, bench.cores, cell.ranks, **memory))
    return seen["times"], seen["mean_loss"]


def measure(bench: Bench, cells: list[Cell]) -> list[Measured]:
    """All cells, round after round."""
    measured = [Measured(cell) for cell in cells]
    for number in range(bench.rounds):
        for one in measured:
            cell = one.cell
            if ARMS[cell.arm].train is None:
                overrides = ARMS[cell.arm].overrides
                times, loss = run_bigtrain(
                    bench, cell.workload, cell.ranks, overrides, cores=bench.cores
                )
            else:
                times, loss = run_other(bench, cell)
            # bigtrain's default is a line, and so a time, per step.
            every = 1 if ARMS[cell.arm].train is None else bench.steps_per_time
            seconds = step_seconds(times, bench.warm(cell.workload) // every)
            one.rounds.append([second / every for second in seconds])
            one.losses.append(loss)
            shown = f"{1e3 * one.median:9.1f} ms per step, mean loss {loss:.5f}"
            where = f"{cell.workload:12} {cell.ranks} × {cell.arm:16}"
            print(f"round {number + 1}: {where} {shown}", flush=True)
    return measured


def machine_rates(folder: Path) -> dict[str, Any]:
    """This machine, and what it can do at best."""
    script = str(HERE / "machine_rates.py")
    rates = last_json(run([sys.executable, script], folder, CORES, ranks=1))
    of_two_ranks = run([*TORCHRUN, "2", script], folder, CORES, ranks=2)
    rates |= last_json(of_two_ranks)
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = platform.machine()
    for line in facts:
        if line.startswith("model name"):
            processor = line.partition(": ")[2]
    return {"processor": processor, "cores": CORES} | rates


def scaling(bench: Bench) -> dict[str, str]:
    """Two ranks of one thread each against one: ddp, four micro-batches of two per rank."""
    rates = []
    for ranks in (1, 2):
        overrides = ("engine.micro_batch=2", f"engine.global_batch={8 * ranks}", "engine.kind=ddp")
        per_rank = []
        for _ in range(bench.rounds):
            times, _loss = run_bigtrain(bench, "transformer", ranks, overrides, cores=ranks)
            per_rank += step_seconds(times, bench.warm("transformer"))
        seconds = sorted(per_rank)[len(per_rank) // 2]
        rates.append(ranks / seconds)
    return {"goal": "≥ 1.85 ×", "measured": f"{rates[1] / rates[0]:.2f} ×"}


def on_cpu() -> list[str]:
    """The workloads that need no GPU."""
    return [name for name, workload in WORKLOADS.items() if not workload.gpu_model]


def chosen_cells(workloads: list[str], ranks: list[int], arms: list[str]) -> list[Cell]:
    """What is measured: every arm that there is for so many ranks."""
    cells = []
    for workload in workloads:
        for number in ranks:
            for arm in arms:
                if ARMS[arm].only_ranks in (None, number):
                    cells.append(Cell(workload, number, arm))
    return cells


def checks(bench: Bench) -> dict[str, Any]:
    """The loop, the loader, and two ranks against one."""
    script = str(HERE / "loop_overhead.py")
    seen = last_json(run([sys.executable, script], bench.folder, CORES, 1))
    return seen | {"two ranks × one thread against one, accumulation 4": scaling(bench)}


def as_json(bench: Bench, measured: list[Measured], note: str) -> dict[str, Any]:
    """All that was measured."""
    workloads = {}
    for name in dict.fromkeys(one.cell.workload for one in measured):
        facts = WORKLOADS[name]
        units = facts.global_batch * facts.units_per_sample
        workloads[name] = {
            "title": facts.title,
            "unit": facts.unit,
            "units_per_step": units,
        }
    cells = []
    for one in measured:
        rounds = []
        for steps in one.rounds:
            rounds.append([round(second, 6) for second in steps])
        entry = one.cell._asdict()
        entry["step_seconds"] = rounds
        entry["mean_losses"] = one.losses
        cells.append(entry)
    return {
        "command": "make bench",
        "when": time.strftime("%Y-%m-%d"),
        "note": note,
        "machine": bench.machine | {"faster precision": bench.faster_precision},
        "workloads": workloads,
        "arms": {name: arm.title for name, arm in ARMS.items()},
        "cells": cells,
        "checks": checks(bench) if bench.with_checks else {},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="bigtrain beside other toolkits, on two cores.")
    parser.add_argument("--quick", action="store_true", help="a minute; writes to the folder only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", choices=on_cpu(), default=on_cpu())
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--checks", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--note", default="", help="a sentence that is printed with the tables")
    return parser.parse_args()


def main() -> None:
    """Measure, write, and end with code 1 if losses differ.

    Only a complete run changes what lies beside this file; others write to the folder.
    """
    asked = arguments()
    if asked.quick:
        asked.workloads, asked.arms, asked.ranks = ["transformer"], QUICK_ARMS, [1]
        asked.rounds, asked.checks = 1, False
    cells = chosen_cells(asked.workloads, asked.ranks, asked.arms)
    is_complete = cells == chosen_cells(on_cpu(), [1, 2], list(ARMS)) and asked.checks
    share = 1 / 3 if asked.quick else 1.0
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, asked.rounds, asked.checks, machine_rates(folder), share)
    for name in asked.workloads:
        write_recipe(name, bench.folder)
        preparation = [sys.executable, str(HERE / "workloads.py"), name, str(bench.folder)]
        run([*preparation, str(bench.steps(name))], bench.folder, CORES, 1)
    measured = measure(bench, cells)
    results = as_json(bench, measured, asked.note)
    target = HERE if is_complete else bench.folder
    (target / "bench.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    (target / "bench.svg").write_text(svg(results), encoding="utf-8")
    tables = markdown(results)
    print(tables)
    if is_complete:
        picture = "![Rates of all arms](bench.svg)"
        replace_tables(HERE / "README.md", f"{picture}\n\n{tables}")
    problems = unequal_losses(measured, TOLERANCE)
    if problems:
        sys.exit("losses differ:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
