"""A process that has imported everything once and forks a child for each command line it is sent.

Each child is what `python -m bigtrain …` would be, but for the seconds that imports take. Lines of
JSON come in on standard input; a child's output, process id and exit code go to files, for whoever
asked to wait for.

`python tests/fork_server.py RANKS -m bigtrain …` stands in for torchrun: the server whose standard
input is the file that FORK_SERVER names in the environment forks the ranks.
"""

import gc
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IMPORTED = (
    "accelerate",
    "datasets",
    "deepspeed",
    "wandb",
    "bigtrain.models.hf",
    "bigtrain.evaluation.evaluate",
    "bigtrain.inference.generate",
    "bigtrain.inference.predict_files",
    "bigtrain.training.run",
    "bigtrain.doctor.examine",
    # imported late, at a first step, say
    "torch._dynamo",
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
    # The folder that was made at the import would be every child's.
    _private.MEDIA_TMP.name = tempfile.mkdtemp(dir=folder)
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


def launch(count: int, arguments: list[str]) -> int:
    """Have `count` ranks forked and wait for all; the exit code of one that failed, or 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    folders = [Path(tempfile.mkdtemp(prefix="rank-")) for _ in range(count)]
    with Path(os.environ["FORK_SERVER"]).open("w") as server:
        for rank, folder in enumerate(folders):
            asked = {
                "arguments": arguments,
                "cwd": str(Path.cwd()),
                "environment": os.environ | common | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
                "files": str(folder),
            }
            server.write(json.dumps(asked) + "\n")
    while not all((folder / "code").exists() for folder in folders):
        time.sleep(0.02)
    codes = [int((folder / "code").read_text()) for folder in folders]
    for folder in folders:
        sys.stdout.write((folder / "out").read_text(errors="replace"))
        sys.stderr.write((folder / "err").read_text(errors="replace"))
        shutil.rmtree(folder)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        serve()
    else:
        sys.exit(launch(int(sys.argv[1]), sys.argv[4:]))  # without -m bigtrain
