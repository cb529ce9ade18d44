"""A process that has imported everything once and forks a child for each command line it is sent.

Each child is what `python -m bigtrain …` would be, but for the seconds that imports take. Lines of
JSON come in on standard input; a child's output, process id and exit code go to files, for whoever
asked to wait for.
"""

import gc
import importlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any


IMPORTED = (
    "accelerate",
    "datasets",
    "deepspeed",
    "wandb",
    "bigtrain.models.hf",
    "bigtrain.inference.evaluate",
    "bigtrain.inference.generate",
    "bigtrain.training.run",
    "bigtrain.training.doctor",
    # imported late, at a first step, say
    "torch._dynamo",
    "kornia.geometry.transform",
    "sklearn.datasets",
    "torch.utils.tensorboard",
)


def serve() -> None:
    """Fork for every line, until the pipe closes."""
    for name in IMPORTED:
        importlib.import_module(name)
    # Otherwise each child's garbage collector would copy the pages that forking is to share.
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            _supervise(json.loads(line))


def _supervise(asked: dict[str, Any]) -> None:
    """Run the command in a child of our own; note its process id and its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        _become(asked)
    folder = Path(asked["files"])
    _note(folder / "pid", child)
    _note(folder / "code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def _note(path: Path, number: int) -> None:
    path.with_suffix(".tmp").write_text(str(number))
    path.with_suffix(".tmp").rename(path)


def _become(asked: dict[str, Any]) -> None:
    from wandb.sdk.data_types import _private

    from bigtrain.__main__ import main

    folder = Path(asked["files"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["cwd"])
    _private.MEDIA_TMP.name = tempfile.mkdtemp(
        dir=folder
    )  # the one that was imported would be every child's
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(":")
    sys.argv = ["bigtrain", *asked["arguments"]]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    # As at the end of any program: what must still run, runs; and nothing is left in a buffer.
    import atexit
    import threading

    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
