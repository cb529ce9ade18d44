"""What can go wrong, as the person on call reads it, and the exit code each kind ends with.

The codes are a contract with launchers and Slurm scripts (README, "Exit codes"): 2 must never be requeued,
75 and 76 should be.
"""

LOST_PEERS = 76  # a rank died or fell silent; its peers leave with this


class BigtrainError(Exception):
    """An end of the program that needs a message and an exit code, not a traceback."""

    exit_code = 3

    def __init__(self, found: str, expected: str = "", fix: str = "") -> None:
        """Build the message: what was `found`, what was `expected`, and what to type (`fix`)."""
        self.found = found
        lines = {"\n  expected: ": expected, "\n  try:      ": fix}
        super().__init__(found + "".join(opening + text for opening, text in lines.items() if text))


class RequestError(BigtrainError):
    """The request is wrong: nothing was written, and running it again would end the same way."""

    exit_code = 2


class RecipeError(RequestError):
    """The recipe or an override is wrong. Every rank finds the same, so only rank 0 prints it."""


class BadSampleError(RequestError):
    """One sample cannot be read; `data.max_unreadable` of them may be left out."""


class TrainingFailed(BigtrainError):
    """Training failed and would fail again."""


class StoppedEarly(BigtrainError):
    """Stopped on request with a committed checkpoint; the same command goes on."""

    exit_code = 75
