"""What `bigtrain compress` is asked for. No torch: a wrong request is refused at once."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bigtrain.errors import RequestError

if TYPE_CHECKING:
    from bigtrain.config.recipe import Qat
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
    """Of fine-tuning after pruning and for `qat`; None: a third of the run's."""
    qat: "list[Qat]" = field(default_factory=list)
    """What the model is fine-tuned for with rounded weights, and then quantized to."""


def parse_request(
    prune: str,
    scope: str,
    structure: str,
    int8: bool,
    int4: bool,
    student: str | None,
    steps: int | None,
    qat: bool = False,
) -> Request:
    """The command line's options.

    Raises RequestError for amounts that are none, for nothing, and for `qat` of nothing.
    """
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
    for_qat: list[Qat] = []
    if qat:
        for_qat = [kind for kind in ("int8", "int4") if kind in quantize]
        if not for_qat:
            raise RequestError("--qat: to which integers?", "--int8 or --int4", "--int4 --qat")
    if not (amounts or quantize or student):
        raise RequestError(
            "nothing is asked for",
            "one of --prune, --int8, --int4, --distill",
            "--prune 0.5 --int8",
        )
    return Request(amounts, scope, structure, quantize, student, steps, for_qat)
