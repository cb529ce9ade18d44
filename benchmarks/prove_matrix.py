"""`bigtrain prove` for every recipe that needs no GPU, on every engine and in both precisions.

python benchmarks/prove_matrix.py [--output proofs.jsonl] [RECIPE …]

Two ranks, below runs/ here; an hour for all. Every proof is a line of the output file, and one that
has its line there is not made again. Ranks are forked by a process that has imported everything, as
in the tests (tests/fork_server.py).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from recipes import ALL

from bigtrain.config.loader import load_recipe
from bigtrain.errors import BigtrainError
from bigtrain.testing.resume_proof import prove

STEPS = 12
FORK_SERVER = Path(__file__).parent.parent / "tests" / "fork_server.py"
ENGINES = {
    "ddp": ["engine.kind=ddp"],
    "zero1": ["engine.kind=zero1"],
    "zero2": ["engine.kind=zero2"],
    "zero3": ["engine.kind=zero3"],
    "zero2, optimizer offloaded": ["engine.kind=zero2", "engine.offload=optimizer"],
    "zero3, all offloaded": ["engine.kind=zero3", "engine.offload=params"],
}
PRECISIONS = ("fp32", "bf16")


def make_proof(recipe: str, engine: str, precision: str) -> dict[str, Any]:
    """The verdict, the rows, and the greatest relative difference of losses (0: all the same)."""
    overrides = [*ENGINES[engine], f"engine.precision={precision}", "name=matrix"]
    launcher = f"{sys.executable} {FORK_SERVER} {{ranks}}"
    cell: dict[str, Any] = {"recipe": recipe, "engine": engine, "precision": precision}
    try:
        result = prove(load_recipe(recipe, overrides), recipe, overrides, 2, STEPS, launcher)
    except BigtrainError as problem:
        return cell | {"verdict": "ERROR", "problem": str(problem)}
    differences = re.findall(
        r"[0-9.]+e[-+][0-9]+", " ".join(row["losses"] for row in result["rows"])
    )
    worst = max(map(float, differences), default=0.0)
    return cell | {"verdict": result["verdict"], "worst": worst, "rows": result["rows"]}


def print_table(cells: list[dict[str, Any]], recipes: list[str]) -> None:
    """A row per recipe and precision, a column per engine."""
    print(f"| recipe | precision | {' | '.join(ENGINES)} |")
    print("|---|---|" + "---|" * len(ENGINES))
    for recipe, precision in product(recipes, PRECISIONS):
        texts = {}
        for cell in cells:
            if (cell["recipe"], cell["precision"]) == (recipe, precision):
                worst = f" {cell['worst']:.0e}" if cell.get("worst") else ""
                texts[cell["engine"]] = cell["verdict"] + worst
        columns = [texts.get(engine, "") for engine in ENGINES]
        print(f"| {recipe} | {precision} | {' | '.join(columns)} |")


def main() -> None:
    """Make the proofs that are missing, then print the table."""
    parser = argparse.ArgumentParser(
        description="Prove exact resumes of shipped recipes, on every engine."
    )
    parser.add_argument("recipes", nargs="*", default=sorted(ALL), metavar="RECIPE")
    parser.add_argument("--output", type=Path, default=Path("proofs.jsonl"))
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    lines = asked.output.read_text().splitlines() if asked.output.exists() else []
    cells = [json.loads(line) for line in lines]
    made = {(cell["recipe"], cell["engine"], cell["precision"]) for cell in cells}
    server = subprocess.Popen([sys.executable, str(FORK_SERVER)], stdin=subprocess.PIPE)
    os.environ["FORK_SERVER"] = f"/proc/{server.pid}/fd/0"
    for key in product(asked.recipes, ENGINES, PRECISIONS):
        if key in made:
            continue
        cells.append(make_proof(*key))
        with asked.output.open("a") as file:
            file.write(json.dumps(cells[-1]) + "\n")
        for left in Path("runs").glob("matrix-prove-*"):  # of a proof that failed
            shutil.rmtree(left)
    server.communicate()  # closes its standard input, at which it ends
    print_table(cells, asked.recipes)


if __name__ == "__main__":
    main()
