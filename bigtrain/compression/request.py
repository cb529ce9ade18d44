"""What `bigtrain compress` is asked for. No torch: a wrong request is refused at once."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bigtrain.errors import RequestError

if TYPE_CHECKING:
    from bigtrain.models.quantized import Quantization


@dataclass(frozen=True)
class Request:
    """What the user wants to be made of a run's model."""

    prune: list[float] = field(default_factory=list)
    scope: str = "global"
    structure: str = "weights"
    quantize: "list[Quantization]" = field(default_factory=list)
    student: str | None = None
    """A recipe that is trained twice: with the run's model as its teacher, and alone."""
    steps: int | None = None
    """Of fine-tuning after pruning; None: a third of the run's."""


def parse_request(
    prune: str,
    scope: str,
    structure: str,
    int8: bool,
    int4: bool,
    student: str | None,
    steps: int | None,
) -> Request:
    """The command line's options. Raises RequestError for amounts that are none, or for nothing."""
    amounts: list[float] = []
    for text in filter(None, prune.split(",")):
        try:
            amount = float(text)
        except ValueError:
            amount = 0.0
        if not 0 < amount < 1:
            raise RequestError(
                f"--prune {text}: not a part of the weights",
                "numbers above 0 and below 1",
                "--prune 0.5,0.8",
            )
        amounts.append(amount)
    quantize: list[Quantization] = []
    if int8:
        quantize += ["int8", "int8-weights"]
    if int4:
        quantize.append("int4")
    if not (amounts or quantize or student):
        raise RequestError(
            "nothing is asked for",
            "one of --prune, --int8, --int4, --distill",
            "--prune 0.5 --int8",
        )
    return Request(amounts, scope, structure, quantize, student, steps)
