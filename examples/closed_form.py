"""How far runs of linear regression end from the solution that least squares has in closed form.

python closed_form.py RUN …     (bigtrain train diabetes-full-batch first, for example)
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from bigtrain.config.loader import load_recipe
from bigtrain.data.datasets import prepare
from bigtrain.runs.directory import RunDir, find_run


def main() -> None:
    """A line for least squares, and one for each run."""
    print(f"{'':<24}{'held-out mse':>14}{'r2':>9}{'distance':>12}")
    for name in sys.argv[1:] or ["diabetes-full-batch"]:
        run = find_run(name)
        design, answers, held_out, held_out_answers = columns(run)
        best = np.linalg.lstsq(design, answers, rcond=None)[0]
        found = weights(run)
        distance = np.linalg.norm(found - best) / np.linalg.norm(best)
        rows = {name: (found, f"{distance:.1e}")}
        if name == (sys.argv[1:] or [name])[0]:
            rows = {"closed form": (best, "0")} | rows
        for title, (solution, shown) in rows.items():
            errors = held_out @ solution - held_out_answers
            mse = float(np.mean(errors**2))
            r2 = 1 - mse / float(np.var(held_out_answers))
            print(f"{title:<24}{mse:>14.3f}{r2:>9.4f}{shown:>12}")


def columns(run: RunDir) -> list[NDArray[Any]]:
    """Rows with a column of ones, and answers, of the training set and of the held-out one."""
    prepared: Any = prepare(load_recipe(str(run.recipe)).recipe)
    found = []
    for part in (prepared.train.fields, prepared.eval.fields):
        rows = [part["features"][row] for row in range(len(part["target"]))]
        features = np.stack(rows).astype(np.float64)
        found += [np.column_stack([features, np.ones(len(features))]), part["target"]]
    return found


def weights(run: RunDir) -> NDArray[Any]:
    """The weight of each column, then the bias."""
    exported = load_file(run.export / "model.safetensors")
    return np.concatenate([exported["layers.0.weight"][0], exported["layers.0.bias"]])


if __name__ == "__main__":
    main()
