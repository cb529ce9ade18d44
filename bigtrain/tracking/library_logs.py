"""Warnings and logs of libraries: into a file per rank, without secrets."""

import contextlib
import logging
import re
import sysconfig
import warnings

from bigtrain.config.secrets import redact
from bigtrain.runs.directory import RunDir


class _Redacted(logging.Formatter):
    """Without secrets, also in a traceback. (A filter would not do: what fails in one, fails in who logs.)"""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def keep_warnings(run: RunDir, rank: int) -> None:
    """What libraries warn of goes to `runs/NAME/logs/rank-N.log`; what the user's own code does, to rank 0's terminal too."""
    shown, seen = logging.StreamHandler(), set[str]()
    kept: logging.Handler = logging.NullHandler()
    with contextlib.suppress(
        OSError
    ):  # a disk that shows this rank no run directory must not end the run
        run.logs.mkdir(parents=True, exist_ok=True)
        kept = logging.FileHandler(run.logs / f"rank-{rank}.log")
    kept.setFormatter(_Redacted("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    shown.setFormatter(_Redacted())
    theirs = re.compile(
        rf"site-packages|dist-packages|^{re.escape(sysconfig.get_paths()['stdlib'])}"
    )

    def is_new(
        record: logging.LogRecord,
    ) -> bool:  # Python forgets what it has warned of whenever a filter changes
        known = record.getMessage() in seen
        seen.add(record.getMessage())
        return not known

    shown.addFilter(
        lambda record: (
            not theirs.search(
                record.getMessage() if record.name == "py.warnings" else record.pathname
            )
        )
    )
    logging.getLogger().handlers = [kept, shown] if rank == 0 else [kept]
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addFilter(is_new)
    warnings.resetwarnings()
    for name in (
        "accelerate",
        "DeepSpeed",
        "torch.distributed",
        "transformers",
    ):  # which speak to the terminal themselves
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.WARNING)
