"""bigtrain beside other toolkits on one NVIDIA GPU: `python benchmarks/gpu.py [MODEL …]`.

GPT-2 124M, a Llama of 1B and one of 7B, in bf16, with the arms of `make bench`; the 7B model needs
the memory of an H200. Writes bench-gpu.json and prints the tables. Nobody has run it on a GPU yet.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from arms import ARMS, GPU_STEPS
from bench import HERE, TOLERANCE, Bench, as_json, chosen_cells, measure, run
from report import markdown, unequal_losses
from workloads import WORKLOADS, write_recipe

GPU_ARMS = ["hf", "accelerate", "hf-best", "accelerate-best", "tuned", "bigtrain"]
SIZE = 8192  # rows and columns of the matrices


def gpu_facts() -> dict[str, float | str]:
    """The GPU, and its rate of matrix products, in the words of machine_rates.py."""
    facts: dict[str, float | str] = {"GPU": torch.cuda.get_device_name()}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left = torch.randn(SIZE, SIZE, device="cuda", dtype=dtype)
        torch.mm(left, left)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            torch.mm(left, left)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / 20
        facts[f"{name}_GFLOP_per_s"] = 2e-9 * SIZE**3 / seconds
    return facts


def main() -> None:
    """Measure and print; ends with code 1 without a GPU, or if losses differ."""
    if not torch.cuda.is_available():
        sys.exit(
            f"benchmarks/gpu.py: torch {torch.__version__} sees no CUDA device\n"
            "  expected: an NVIDIA GPU and a CUDA build of torch\n"
            "  try: make bench, which needs none"
        )
    models = [name for name, workload in WORKLOADS.items() if workload.gpu_model]
    parser = argparse.ArgumentParser(description="bigtrain beside other toolkits, on one GPU.")
    parser.add_argument("models", nargs="*", default=models[:2], metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    folder = Path("build/bench").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, asked.rounds, False, gpu_facts(), steps_per_time=GPU_STEPS)
    for name in asked.models:
        write_recipe(name, folder)
        preparation = [sys.executable, str(HERE / "workloads.py"), name, str(folder)]
        run([*preparation, str(bench.steps(name))], folder, len(os.sched_getaffinity(0)), 1)
    arms = [name for name in GPU_ARMS if name in ARMS]
    measured = measure(bench, chosen_cells(asked.models, [1], arms))
    results = as_json(bench, measured, "") | {"command": "python benchmarks/gpu.py"}
    (HERE / "bench-gpu.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    print(markdown(results))
    problems = unequal_losses(measured, TOLERANCE)
    if problems:
        sys.exit("losses differ:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
