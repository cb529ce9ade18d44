"""An evaluation's numbers beyond the task's metrics: intervals, tables and curves.

Everything is made of one value per example, in float64, so nothing depends on ranks or batches.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.data.examples import PreparedData
from bigtrain.evaluation.predictions import Predictions
from bigtrain.evaluation.worst_examples import WorstExample

Floats = NDArray[np.float64]

RESAMPLES = 1000
CONFIDENCE = 0.95
BINS = 10  # of probabilities, equally wide
_MAX_LOSS = 700.0  # its exponential is still a number
_ELEMENTS_AT_ONCE = 1 << 22  # of weights of resamples


@dataclass(frozen=True)
class ClassRow:
    """How one class fared."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    """Examples that are of this class."""


@dataclass(frozen=True)
class Bin:
    """Examples whose probabilities are alike: above `low` (the first: from 0) up to `high`."""

    low: float
    high: float
    probability: float
    """Mean of what the model said."""
    share: float
    """Of them, the share for which it was so."""
    count: int


@dataclass(frozen=True)
class Roc:
    """A point for each threshold that matters, from none called positive to all."""

    false_positive_rate: list[float]
    true_positive_rate: list[float]


@dataclass(frozen=True)
class Report:
    """What a report shows beside the metrics."""

    examples: int
    metrics: dict[str, float]
    intervals: dict[str, dict[str, float]]
    """Metric → low and high end."""
    classes: list[str] = field(default_factory=list)
    per_class: list[ClassRow] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    """Rows: true classes; columns: predicted ones."""
    roc: Roc | None = None
    calibration: list[Bin] = field(default_factory=list)
    """Of the second of two classes, or of the predicted one of more."""
    worst: list[WorstExample] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the metrics at the top, as they always were; no example's input."""
        rest = asdict(self)
        for example in rest["worst"]:
            del example["shown"]
        return rest.pop("metrics") | rest


def values_of(predictions: Predictions, prepared: PreparedData) -> dict[str, float]:
    """The metrics that follow from one value per example; without those that are not finite."""
    once = np.ones((1, len(predictions)))
    values = {}
    with np.errstate(all="ignore"):
        for name, value in _metrics(predictions, prepared, once).items():
            if math.isfinite(value[0]):
                values[name] = float(value[0])
    bins = calibration_of(predictions)
    if bins:
        values["calibration_error"] = _calibration_error(bins)
    return values


def make_report(
    metrics: dict[str, float], predictions: Predictions, prepared: PreparedData
) -> Report:
    """The metrics with all that is shown beside them."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_curve

    intervals = _bootstrap(predictions, prepared)
    classes = prepared.classes
    if not classes:
        return Report(len(predictions), metrics, intervals)
    numbers = list(range(len(classes)))
    label, predicted = predictions.label, predictions.predicted
    of_classes = precision_recall_fscore_support(label, predicted, labels=numbers, zero_division=0)
    per_class = []
    for name, precision, recall, f1, support in zip(classes, *of_classes, strict=True):
        row = ClassRow(name, float(precision), float(recall), float(f1), int(support))
        per_class.append(row)
    roc = None
    if _has_ranking(predictions):
        false_rate, true_rate, _ = roc_curve(label, predictions.score)
        roc = Roc(false_rate.tolist(), true_rate.tolist())
    return Report(
        len(predictions),
        metrics,
        intervals,
        classes,
        per_class,
        confusion_matrix(label, predicted, labels=numbers).tolist(),
        roc,
        calibration_of(predictions),
    )


def calibration_of(predictions: Predictions) -> list[Bin]:
    """What share of examples was as the model said, by what it said; only bins with examples.

    No bins without probabilities, or where one is no number. Of two classes: probability of the
    second, share of the second. Of more: probability of the predicted class, share of right
    predictions.
    """
    said = predictions.probability
    came_true = predictions.predicted == predictions.label
    if len(predictions.score):
        said = predictions.score
        came_true = predictions.label == 1
    if not np.isfinite(said).all():
        return []
    edges = np.linspace(0, 1, BINS + 1)
    bin_of = np.searchsorted(edges[1:-1], said)
    counts = np.bincount(bin_of, minlength=BINS)
    sums_said = np.bincount(bin_of, said, BINS)
    sums_true = np.bincount(bin_of, came_true, BINS)
    bins = []
    for number in np.flatnonzero(counts).tolist():
        count = int(counts[number])
        each = Bin(
            low=float(edges[number]),
            high=float(edges[number + 1]),
            probability=float(sums_said[number] / count),
            share=float(sums_true[number] / count),
            count=count,
        )
        bins.append(each)
    return bins


def _calibration_error(bins: list[Bin]) -> float:
    """Expected calibration error: how far what was said is from what came true, on average."""
    total = sum(each.count for each in bins)
    return sum(each.count * abs(each.probability - each.share) for each in bins) / total


def _bootstrap(predictions: Predictions, prepared: PreparedData) -> dict[str, dict[str, float]]:
    """Percentile intervals of the metrics: what they are of examples drawn with replacement."""
    number = len(predictions)
    if number < 2:
        return {}
    draws = np.random.default_rng(0)
    at_once = max(1, _ELEMENTS_AT_ONCE // number)
    found: dict[str, list[Floats]] = {}
    for first in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - first)
        drawn = draws.integers(number, size=(count, number))
        drawn += np.arange(count)[:, None] * number
        # How often each example was drawn [count, number].
        weights = np.bincount(drawn.ravel(), minlength=count * number).reshape(count, number)
        with np.errstate(all="ignore"):
            for name, values in _metrics(predictions, prepared, weights.astype(float)).items():
                found.setdefault(name, []).append(values)
    tail = 100 * (1 - CONFIDENCE) / 2
    intervals = {}
    for name, parts in found.items():
        values = np.concatenate(parts)
        values = values[np.isfinite(values)]
        if len(values):
            low, high = np.percentile(values, [tail, 100 - tail])
            intervals[name] = {"low": float(low), "high": float(high)}
    return intervals


def _metrics(p: Predictions, prepared: PreparedData, weights: Floats) -> dict[str, Floats]:
    """Metric → its value [resamples], `weights` [resamples, examples] saying what is counted."""
    if prepared.classes:
        return _of_classes(p, len(prepared.classes), weights)
    if len(p.exact):
        return _of_tokens(p, prepared.eval_bytes, weights)
    return _of_values(p, weights)


def _of_tokens(p: Predictions, eval_bytes: int | None, weights: Floats) -> dict[str, Floats]:
    loss = (weights @ p.loss) / (weights @ p.targets)
    metrics = {"loss": loss, "perplexity": np.exp(np.minimum(loss, _MAX_LOSS))}
    if eval_bytes is None:
        metrics["exact_match"] = (weights @ p.exact) / weights.sum(1)
    else:
        tokens_per_byte = p.targets.sum() / eval_bytes
        metrics["bits_per_byte"] = loss / math.log(2) * tokens_per_byte
    return metrics


def _of_values(p: Predictions, weights: Floats) -> dict[str, Floats]:
    count = weights.sum(1)
    mse = (weights @ p.loss) / count
    centred = p.label - p.label.mean()
    variance = (weights @ centred**2) / count - ((weights @ centred) / count) ** 2
    variance[variance <= 0] = np.nan  # one row has no variance to explain
    return {"loss": mse, "mse": mse, "r2": 1 - mse / variance}


def _of_classes(p: Predictions, num_classes: int, weights: Floats) -> dict[str, Floats]:
    right = _by_class(weights * (p.label == p.predicted), p.label, num_classes)
    support = _by_class(weights, p.label, num_classes)
    claimed = _by_class(weights, p.predicted, num_classes)
    total = weights.sum(1)
    metrics = {"loss": (weights @ p.loss) / total, "accuracy": right.sum(1) / total}
    of_each = {
        "recall": right / np.maximum(support, 1),
        "f1": 2 * right / np.maximum(support + claimed, 1),
        "precision": right / np.maximum(claimed, 1),
    }
    is_there = support + claimed > 0
    for name, values in of_each.items():
        if num_classes == 2:
            metrics[name] = values[:, 1]
        else:
            metrics[name] = values.sum(1) / is_there.sum(1)
    if _has_ranking(p):
        metrics["auc"] = _areas(p, weights)
    return metrics


def _by_class(weights: Floats, numbers: NDArray[Any], num_classes: int) -> Floats:
    """[resamples, examples] → [resamples, classes]: sums over the examples of each class."""
    return np.stack([np.bincount(numbers, row, num_classes) for row in weights])


def _has_ranking(p: Predictions) -> bool:
    """Whether examples of both of two classes have scores that can be compared."""
    return bool(len(p.score)) and bool(np.isfinite(p.score).all()) and len(set(p.label)) == 2


def _areas(p: Predictions, weights: Floats) -> Floats:
    """Area under the ROC curve [resamples]: how often a positive scores above a negative.

    A tie counts a half. NaN without examples of both classes.
    """
    order = np.argsort(p.score, kind="stable")
    _, starts = np.unique(p.score[order], return_index=True)
    is_positive = (p.label == 1)[order]
    ordered = weights[:, order]
    positive = np.add.reduceat(ordered * is_positive, starts, axis=1)  # of each score
    negative = np.add.reduceat(ordered * ~is_positive, starts, axis=1)
    below = negative.cumsum(1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    return (positive * below).sum(1) / pairs
