"""The Python API: what the command line does, for scripts and notebooks.

    import bigtrain

    bigtrain.train("digits-mlp", ["optim.lr=1e-3", "name=mine"])
    run = bigtrain.open_run("mine")
    run.metrics("eval").plot("step", "accuracy")

What the command line ends with (a message and an exit code) is raised here: BigtrainError and its
kinds in bigtrain.errors.
"""

import contextlib
import json
import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from bigtrain.config.loader import LoadedRecipe, load_recipe
from bigtrain.errors import RequestError
from bigtrain.runs.directory import RunDir, find_run
from bigtrain.runs.metrics_file import read_metrics

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

__all__ = ["LoadedRecipe", "Run", "evaluate", "load_model", "load_recipe", "open_run", "train"]

MetricsKind = Literal["train", "eval", "event"]


class Run:
    """What a run has written so far, read anew from its directory at every access."""

    def __init__(self, directory: RunDir) -> None:
        self._directory = directory

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self._directory.path

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting in force at the run's last start: dotted key → value.

        Empty if effective.json cannot be read.
        """
        return self._directory.settings()

    @property
    def summary(self) -> dict[str, Any]:
        """What `train` returned. Raises RequestError while the run has not finished."""
        return _read_json(self._directory.summary, "a finished run")

    def metrics(self, kind: MetricsKind = "train") -> "pd.DataFrame":
        """The lines of metrics.jsonl of one kind, in the order they were written.

        train: one row per logged step with `step`, `samples`, `loss`, `lr`, `grad_norm`, `seconds`
        (per step), `time` (Unix time) and more. eval: one row per evaluation with the task's
        metrics. A step that a resumed run did again is the row of its last time. event: all
        events. Raises RequestError for another kind.
        """
        if kind not in get_args(MetricsKind):
            kinds = " or ".join(get_args(MetricsKind))
            raise RequestError(f"metrics of kind {kind!r}", kinds, 'metrics("train")')
        import pandas as pd

        frame = pd.DataFrame(list(read_metrics(self._directory.metrics, kind)))
        if frame.empty:
            return frame
        if kind != "event":
            frame = frame.drop_duplicates("step", keep="last")
        return frame.drop(columns="kind").reset_index(drop=True)


def open_run(name: str | Path) -> Run:
    """The run `name` below runs/, or in a directory. Raises RequestError if there is none."""
    return Run(find_run(str(name)))


def train(
    recipe: str | Path | LoadedRecipe,
    overrides: list[str] | None = None,
    *,
    fresh: bool = False,
    allow_change: Sequence[str] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a recipe (a file, a shipped recipe's name, or what `load_recipe` returned).

    A run that has a checkpoint is continued; with `fresh` a new run NAME-2 starts. `allow_change`
    names keys that may differ from those that the run began with. Returns the summary, which is in
    summary.json too: name, step, samples, the held-out metrics and more. On several ranks every
    rank calls this, once in each process.

    Raises RequestError if the request is wrong, TrainingFailed if training failed, and
    StoppedEarly after SIGTERM, SIGINT or SIGUSR1, with a checkpoint. To be called from the main
    thread, which gets signals.
    """
    if isinstance(recipe, LoadedRecipe) and overrides:
        raise RequestError(
            "overrides for a recipe that is loaded already",
            "them where it is loaded",
            "load_recipe(ref, overrides)",
        )
    loaded = recipe if isinstance(recipe, LoadedRecipe) else load_recipe(recipe, overrides)
    from bigtrain.tracking.terminal import console
    from bigtrain.training.run import run_recipe

    with _process_state_restored():
        return run_recipe(loaded, console(quiet=quiet), fresh, allow_change)


def evaluate(run: str | Path | Run, overrides: list[str] | None = None) -> dict[str, float]:
    """The metrics of a finished run's model on its held-out data, or on data named by an override.

    For example `evaluate("mine", ["data.eval=other.jsonl"])`. On several ranks every rank calls
    this, and gets the same. Raises RequestError if the run has not finished or the data does not
    fit the model.
    """
    directory = find_finished_run(run.path if isinstance(run, Run) else run)
    from bigtrain.evaluation.evaluate import evaluate_run

    with _process_state_restored():
        return evaluate_run(directory, overrides or []).metrics


def load_model(run_or_folder: str | Path | Run) -> "nn.Module":
    """The trained model of a finished run, or of a folder that `bigtrain export` wrote.

    On the CPU, in fp32 and in evaluation mode. Of a transformers model it is that library's class.
    Raises RequestError if the run has not finished.
    """
    folder = find_export(run_or_folder.path if isinstance(run_or_folder, Run) else run_or_folder)
    from bigtrain.models.export import load_exported

    task = _read_json(folder / "bigtrain.json", "an exported model")["task"]
    return load_exported(folder, task).eval()


def find_finished_run(ref: str | Path) -> RunDir:
    """The directory of a finished run. Raises RequestError if there is none."""
    directory = find_run(str(ref))
    if not (directory.export / "bigtrain.json").is_file():
        raise RequestError(
            f"{directory.path} has no export: the run has not finished",
            "a finished run",
            f"bigtrain train {directory.recipe}",
        )
    return directory


def find_export(ref: str | Path) -> Path:
    """The exported model of a finished run, or the folder itself if it holds one.

    Raises RequestError if there is none.
    """
    place = Path(ref)
    return place if (place / "bigtrain.json").is_file() else find_finished_run(place).export


def _read_json(path: Path, expected: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as problem:
        raise RequestError(f"{path} cannot be read ({problem})", expected) from None


@contextlib.contextmanager
def _process_state_restored() -> Iterator[None]:
    """Put back what training takes over in this process, so that another training can follow.

    Signals, the environment (which engines read and write), warnings, and the root logger.
    """
    environment = dict(os.environ)
    stop_signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in stop_signals}
    log_handlers = logging.getLogger().handlers
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.captureWarnings(False)
        logging.getLogger().handlers = log_handlers
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
