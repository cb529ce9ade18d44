"""Which machine made a number: floating-point sums are the same to the last digit only on its like."""

import os
import platform
import re
from pathlib import Path

import torch

EXACT = bool(os.environ.get("BIGTRAIN_GOLDEN_EXACT"))


def machine() -> dict[str, str]:
    """What decides the last digits: torch, and the processor with its vector instructions."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
    names = ("model name", "cpu family", "model", "stepping")
    vectors = [flag for flag in facts.get("flags", "").split() if re.match("avx|amx|fma|sse", flag)]
    return {
        "processor": " ".join(facts.get(name, "?") for name in names),
        "vector instructions": " ".join(sorted(vectors)),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def is_like(other: dict[str, str]) -> bool:
    """Whether this machine computes as `other` does; the version of Python decides no digit."""
    return machine() | {"python": ""} == other | {"python": ""}
