"""Warnings and logs of libraries: into a file per rank, without secrets."""

import contextlib
import logging
import re
import sysconfig
import warnings

from bigtrain.config.secrets import redact
from bigtrain.runs.directory import RunDir

# Libraries that write to the terminal themselves unless they are stopped from it.
_LOUD = ("accelerate", "DeepSpeed", "torch.distributed", "transformers")
_STDLIB = re.escape(sysconfig.get_paths()["stdlib"])
_LIBRARY_PATH = re.compile(rf"site-packages|dist-packages|^{_STDLIB}")


class _Redacted(logging.Formatter):
    """Without secrets, also in a traceback.

    Not a filter: an error in a formatter is only printed; one in a filter ends what was logging.
    """

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _OnlyOnce(logging.Filter):
    """Each message once. Python's own memory of warnings is cleared whenever its filters change."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self.seen
        self.seen.add(message)
        return is_new


def _is_of_user(record: logging.LogRecord) -> bool:
    """Whether the code that logged or warned is in none of the installed libraries."""
    # The text of a warning begins with the path of the code that it is about.
    source = record.getMessage() if record.name == "py.warnings" else record.pathname
    return not _LIBRARY_PATH.search(source)


def keep_warnings(run: RunDir, rank: int) -> None:
    """From now on, write warnings and logs to `runs/NAME/logs/rank-N.log`.

    Those of the user's own code are shown on rank 0's terminal too.
    """
    terminal = logging.StreamHandler()
    terminal.setFormatter(_Redacted())
    terminal.addFilter(_is_of_user)
    file: logging.Handler = logging.NullHandler()
    with contextlib.suppress(OSError):  # a disk that does not show this rank the run directory
        run.logs.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(run.logs / f"rank-{rank}.log")
    file.setFormatter(_Redacted("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().handlers = [file, terminal] if rank == 0 else [file]
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addFilter(_OnlyOnce())
    warnings.resetwarnings()
    for name in _LOUD:
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
        logger.setLevel(logging.WARNING)
