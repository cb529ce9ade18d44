"""What compression costs and saves: the tables and figures of docs/compression.md.

`python benchmarks/compression.py [FOLDER]` trains and compresses `digits-cnn` and `tiny-lm`, and
distils `digits-cnn` into `digits-mlp` and quantizes a small MLP with five seeds; about twenty
minutes on two cores. FOLDER (default: one that is new) keeps the runs, so that a second call goes
on.
"""

import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import bigtrain
from bigtrain.compression.compress import compress_run
from bigtrain.compression.request import parse_request
from bigtrain.compression.views import markdown
from bigtrain.runs.directory import find_run

# Half of the digits are held out: of 900 images one is a tenth of a point.
HALF = "data.eval_fraction=0.5"
PATIENT = "train.steps=5400"
TEACHER = "digits-cnn-half"
STUDENT = f"""name: digits-mlp
task: image_classification
model: {{name: mlp, args: {{hidden: [256, 256]}}, dropout: 0.2}}
data: {{train: digits, eval_fraction: 0.5, augment: {{crop: 1}}}}
optim: {{name: adamw, lr: 2.0e-3, weight_decay: 0.05, schedule: cosine, warmup_steps: 150}}
engine: {{global_batch: 32, precision: fp32}}
track: {{wandb: "off"}}
train:
  steps: 5400
  eval_every: 5400
  checkpoint_every: 1800
  distill: {{teacher: {TEACHER}, temperature: 4.0, alpha: 1.0}}
"""
SEEDS = range(5, 10)  # the student's settings were chosen with others
T_OF_95_PERCENT = 2.776  # Student's t, four degrees of freedom
NO_TRACKER = "track.wandb=off"


def main() -> None:
    """Print everything as Markdown; exit 1 if a promise of the page does not hold."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    Path("student.yaml").write_text(STUDENT)
    problems = [*digits(), *tiny_lm(), *quantization_aware(), *distilled()]
    for problem in problems:
        print(f"NOT AS PROMISED: {problem}")
    sys.exit(1 if problems else 0)


def digits() -> list[str]:
    """The table of `digits-cnn`: everything there is."""
    bigtrain.train("digits-cnn", [f"name={TEACHER}", HALF, NO_TRACKER], quiet=True)
    request = parse_request("0.5,0.8", "global", "weights", True, True, "student.yaml", None)
    rows = table(TEACHER, request)
    request = parse_request("0.5", "global", "channels", False, False, None, None)
    table(TEACHER, request)
    loss = rows["original"]["value"] - rows["prune-0.5"]["value"]
    print(f"50% pruned: {100 * loss:+.2f} points of accuracy lost\n")
    return ["50% pruned loses more than 0.5 points"] if loss > 0.005 else []


def tiny_lm() -> list[str]:
    """The table of `tiny-lm`: int8 and int4."""
    bigtrain.train("tiny-lm", [NO_TRACKER], quiet=True)
    rows = table("tiny-lm", parse_request("", "global", "weights", True, True, None, None))
    original, int8 = rows["original"], rows["int8"]  # timed in turns
    size = int8["bytes"] / original["bytes"]
    worse = int8["value"] / original["value"] - 1
    slower = int8["relative_latency"] - 1
    print(f"int8: {size:.3f} × the bytes, {worse:+.3%} bits per byte, {slower:+.1%} time\n")
    checks = {
        "int8 is larger than 0.35": size <= 0.35,
        "int8 is more than 1% worse": worse <= 0.01,
        "int8 is slower": slower <= 0.0,
    }
    return [name for name, holds in checks.items() if not holds]


def quantization_aware() -> list[str]:
    """A small MLP in int4 with five seeds: as it is, after training for it, and after as much more.

    The last tells rounding in training from training longer.
    """
    only_int4 = parse_request("", "global", "weights", False, True, None, None)
    gains = []
    print("| seed | original | int4 | int4-qat | as many more steps, int4 |\n|---|---|---|---|---|")
    for seed in range(5):
        name = f"small-mlp-{seed}"
        common = [f"seed={seed}", "model.args={hidden: [32]}", HALF, NO_TRACKER]
        bigtrain.train("digits-mlp", [*common, f"name={name}"], quiet=True)
        of_run = compress_run(find_run(name), replace(only_int4, qat=["int4"]), quiet=True)
        longer = [f"name={name}-longer", f"model.pretrained=runs/{name}/export"]
        longer += ["train.steps=600", "train.eval_every=600", "optim.warmup_steps=50"]
        bigtrain.train("digits-mlp", [*common, *longer], quiet=True)
        of_longer = compress_run(find_run(f"{name}-longer"), only_int4, quiet=True)
        original, int4, qat = (row.value for row in of_run.rows)
        gains.append(qat - int4)
        more = of_longer.rows[-1].value
        print(f"| {seed} | {original:.4f} | {int4:.4f} | {qat:.4f} | {more:.4f} |", flush=True)
    mean = statistics.mean(gains)
    print(f"\nint4-qat against int4: {100 * mean:+.2f} points\n")
    return ["training for int4 does not help"] if mean <= 0 else []


def table(run: str, request: Any) -> dict[str, dict[str, Any]]:
    """Compress a run and print its table; the rows by the model's name."""
    made = compress_run(find_run(run), request, quiet=True)
    print(f"`{run}`, {made.device}\n\n{markdown(made)}", flush=True)
    return {row["model"]: row for row in made.as_dict()["rows"]}


def distilled() -> list[str]:
    """Five seeds of the same student, with the teacher and alone."""
    gains = []
    print("| seed | alone | distilled |\n|---|---|---|")
    for seed in SEEDS:
        common = [f"seed={seed}", NO_TRACKER]
        taught = bigtrain.train("student.yaml", [*common, f"name=taught-{seed}"], quiet=True)
        alone_name = [f"name=alone-{seed}", "train.distill=null"]
        alone = bigtrain.train("student.yaml", [*common, *alone_name], quiet=True)
        gains.append(taught["accuracy"] - alone["accuracy"])
        print(f"| {seed} | {alone['accuracy']:.4f} | {taught['accuracy']:.4f} |", flush=True)
    mean = statistics.mean(gains)
    half = T_OF_95_PERCENT * statistics.stdev(gains) / len(gains) ** 0.5
    low, high = 100 * (mean - half), 100 * (mean + half)
    print(f"\ngain: {100 * mean:+.2f} points, 95% interval {low:+.2f} to {high:+.2f}")
    return ["distillation does not help"] if low <= 0 else []


if __name__ == "__main__":
    main()
