"""What `make gpu` runs, on one device: engines, models and options, and what came of them.

The device is a parameter, so that tests/test_gpu_matrix.py can run a part of it on a CPU.
"""

import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from distributed_cases import ON_GPUS
from test_exact import ENGINES, MICRO, Results, run_cases

Cases = dict[str, dict[str, Any]]
FAMILIES = ("transformer", "rnn", "cnn", *ON_GPUS)
# Of the losses of eight steps, relative. TF32 in a convolution would be 1e-3.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
DETERMINISTIC = {"BIGTRAIN_DETERMINISTIC": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def case(run: str, model: str, precision: str, device: str, **settings: Any) -> dict[str, Any]:
    """One case in three micro-batches a step."""
    common = {"run": run, "model": model, "precision": precision, "device": device}
    return common | {"kind": "ddp", "micro_batch": MICRO[1][3]} | settings


def references() -> Cases:
    """Each model on a CPU, by ddp in fp32: what all others are compared with."""
    return {f"cpu/{model}": case("exact", model, "fp32", "cpu") for model in FAMILIES}


def curves(device: str) -> Cases:
    """Every engine × model × precision (offload in bf16 alone), and options of the Transformer."""
    cases: Cases = {}
    for model, engine, precision in product(FAMILIES, ENGINES, TOLERANCE):
        if precision == "bf16" or "offload" not in engine:
            name = f"{model}/{engine}/{precision}"
            cases[name] = case("exact", model, precision, device, **ENGINES[engine])
    backend = "inductor" if device == "cuda" else "aot_eager"
    options: Cases = {
        "full": {"activation_checkpointing": "full"},
        "selective": {"activation_checkpointing": "selective"},
        "compiled": {"compile": True, "backend": backend},
    }
    for option, engine in product(options, ("ddp", "zero1", "zero2", "zero3")):
        if (option, engine) != ("compiled", "zero3"):  # which is refused
            settings = ENGINES[engine] | options[option]
            name = f"transformer/{engine}/bf16/{option}"
            cases[name] = case("exact", "transformer", "bf16", device, **settings)
    return cases


def waits(device: str) -> Cases:
    """Where the host waits for the device; and ddp, where it must not."""
    cases: Cases = {}
    for model, engine in product(("transformer", "rnn", "cnn"), ENGINES):
        name = f"waits/{model}/{engine}"
        cases[name] = case("waits", model, "bf16", device, **ENGINES[engine])
    for model in FAMILIES:
        cases[f"lazy/{model}"] = case("lazy", model, "fp32", device, steps=7)
    return cases


def resumes(device: str) -> Cases:
    """Eight steps, and four, a checkpoint and four more: the same bits."""
    cases: Cases = {}
    for engine in ENGINES:
        settings = ENGINES[engine] | {"dropout": 0.2}
        cases[f"resume/{engine}"] = case("resume", "transformer", "bf16", device, **settings)
    return cases


def run(device: str, folder: Path, only: str = "") -> Results:
    """All cases whose names contain a word of `only`, in three process groups of one rank.

    One on the CPU (gloo), one on the device, and one for resumes, in which CUDA has to use
    deterministic algorithms.
    """
    words = only.split() or [""]
    results = Results()
    groups: list[tuple[Cases, dict[str, str]]] = [
        (references(), {}),
        (curves(device) | waits(device), {}),
        (resumes(device), DETERMINISTIC),
    ]
    if device == "cpu":  # nothing has to be kept apart, and each start takes seconds
        groups = [(groups[0][0] | groups[1][0] | groups[2][0], {})]
    for number, (cases, environment) in enumerate(groups):
        asked = {}
        for name, settings in cases.items():
            if any(word in name for word in words):
                asked[name] = settings
        if asked:
            with patch.dict(os.environ, environment):
                results |= run_cases(1, asked, folder / f"group-{number}")
    return results


@dataclass(frozen=True)
class Row:
    """What is known of one curve beside the reference's."""

    name: str
    last_loss: float
    reference: float
    difference: float  # the largest of all steps, relative
    peak_mib: float
    ms_per_step: float

    @property
    def tolerance(self) -> float:
        model, _, precision = self.name.split("/")[:3]
        # BatchNorm over five small images magnifies what bf16 rounds.
        factor = 10 if (model, precision) == ("resnet", "bf16") else 1
        return factor * TOLERANCE[precision]


def rows(results: Results) -> list[Row]:
    """One for each curve that ended without an error."""
    found = []
    for name, result in results.items():
        model = name.split("/", maxsplit=1)[0]
        is_curve = model in FAMILIES and "error" not in result
        if not is_curve or "error" in results.get(f"cpu/{model}", {"error": ""}):
            continue
        expected = [line["loss"] for line in results[f"cpu/{model}"]["lines"]]
        losses = [line["loss"] for line in result["lines"]]
        differences = [abs(x / y - 1) for x, y in zip(losses, expected, strict=True)]
        peak = result["peak_memory"] / 2**20
        ms = 1000 * result["seconds"]
        found.append(Row(name, losses[-1], expected[-1], max(differences), peak, ms))
    return found


def table(results: Results) -> str:
    """What is printed: the curves, then where the host waited, then what failed."""
    heads = f"{'last loss':>11}{'CPU, fp32':>11}{'difference':>12}{'peak MiB':>10}{'ms/step':>9}"
    lines = [f"{'case':<42}{heads}"]
    for row in rows(results):
        numbers = f"{row.last_loss:>11.5f}{row.reference:>11.5f}{row.difference:>12.1e}"
        mark = "" if row.difference <= row.tolerance else "  too far"
        lines.append(f"{row.name:<42}{numbers}{row.peak_mib:>10.1f}{row.ms_per_step:>9.1f}{mark}")
    for name, result in results.items():
        if "error" in result:
            lines.append(f"{name:<42}{result['error'].strip().splitlines()[-1]}")
        elif name.startswith("waits/"):
            lines.append(f"{name:<42}{result}")
    return "\n".join(lines)
