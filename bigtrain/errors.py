"""What can go wrong, as the person on call reads it, and the exit code that each kind ends with.

Launchers and Slurm scripts rely on the codes (docs/exit-codes.md): a job that ended with 2 or 3
must never be requeued, one that ended with 75 or 76 should be.
"""

LOST_PEERS = 76  # a rank died or stopped answering; the other ranks end with this code


class BigtrainError(Exception):
    """An end of the program that needs a message and an exit code, not a traceback."""

    exit_code = 3

    def __init__(self, found: str, expected: str = "", fix: str = "") -> None:
        """The message says what was `found`, what was `expected`, and what to type (`fix`)."""
        self.found = found
        lines = [found]
        if expected:
            lines.append(f"  expected: {expected}")
        if fix:
            lines.append(f"  try:      {fix}")
        super().__init__("\n".join(lines))


class RequestError(BigtrainError):
    """The request is wrong: nothing was written, and running it again would end the same way."""

    exit_code = 2


class RecipeError(RequestError):
    """The recipe or an override is wrong. Every rank sees the same, so only rank 0 prints it."""


class BadSampleError(RequestError):
    """One sample cannot be read; `data.max_unreadable` of them may be left out."""


class TrainingFailed(BigtrainError):
    """Training failed and would fail again."""


class StoppedEarly(BigtrainError):
    """Stopped on request, with a committed checkpoint; the same command continues the run."""

    exit_code = 75
