"""The `bigtrain` command, and `python -m bigtrain`: how it starts, and how it ends."""

import atexit
import gc
import os
import sys
from typing import NoReturn

# Looking for garbage during the imports, and again at the end, would cost 40 ms of 250.
_threshold = gc.get_threshold()
gc.set_threshold(100_000)
atexit.register(gc.freeze)

from bigtrain import cli  # noqa: E402
from bigtrain.cli import app  # noqa: E402
from bigtrain.errors import BigtrainError, RecipeError  # noqa: E402

cli.gc_threshold = _threshold  # what a training process returns to


def main() -> None:
    """Run the command line; every error of a user ends with a message and its exit code."""
    # Looking for pydantic's plugins would cost a tenth of the start.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        app(standalone_mode=True)
    except BigtrainError as problem:
        _print_problem(problem)
        _exit(problem.exit_code)
    except Exception as problem:
        from bigtrain.config.secrets import redact

        if isinstance(problem, OSError) and problem.filename:
            reason = f"{problem.filename} cannot be read or written: {problem.strerror}"
            print(redact(f"bigtrain: {reason}"), file=sys.stderr)
            _exit(2)
        import traceback

        print(redact(traceback.format_exc()), file=sys.stderr)
        code = 3
        if "torch" in sys.modules:
            from bigtrain.supervision.endings import exit_code_of

            code = exit_code_of(problem)
        # No verdict: it may be the end of another rank, in words that exit_code_of does not know.
        _leave(code)


def _print_problem(problem: BigtrainError) -> None:
    """Print an error on the ranks that have something new to say.

    Every rank sees the same fault in a recipe, and every rank of a machine the same in its files.
    """
    from bigtrain.config.secrets import redact
    from bigtrain.engine.launcher import is_first_on_machine

    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(redact(f"bigtrain: {problem}"), file=sys.stderr)
    elif is_first_on_machine(os.environ) and not isinstance(problem, RecipeError):
        print(redact(f"bigtrain (rank {rank}): {problem}"), file=sys.stderr)


def _exit(code: int) -> NoReturn:
    """End with `code`, and note 2 and 3 for slurm/train.sbatch, which must not requeue them.

    srun alone would not do: it passes on the highest code of all ranks.
    """
    if code in (2, 3):
        from bigtrain.supervision.verdict import write_verdict

        write_verdict(f"{code}")
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End with `code`; at once if the process group is still there, which would wait for peers."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
