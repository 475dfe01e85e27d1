"""What each metric is made of: sums over rows and, for ranking metrics, rows sorted by score.

A metric here is a function of a few weighted sums (of losses, hits, squares) and of rankings. The
same function gives the point value from the sums over all rows and its bootstrap distribution from
the sums of every resample, so the two can never disagree. Point values equal scikit-learn's.

Where a metric is not defined (one class only, constant truth) its value is NaN here and null with
a reason in what is written: never 0, and never left out in silence.

Legend: N rows, K columns of sums, C classes; ``...`` stands for no axis (point) or B (resamples).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.errors import nearest
from headrace.kernels.bootstrap import Ranking, rank, rank_once
from headrace.kernels.ranks import RankPair, rank_correlations, rank_pair
from headrace.schema import Task

Floats: TypeAlias = npt.NDArray[np.float64]
BuiltinMetric = Literal[
    "rmse", "mae", "r2", "mape", "pinball", "spearman",
    "roc_auc", "average_precision", "log_loss", "brier", "ece",
    "accuracy", "balanced_accuracy", "precision", "recall", "f1", "mcc",
    "macro_precision", "macro_recall", "macro_f1", "macro_roc_auc",
]  # fmt: skip
MetricName: TypeAlias = str  # a built-in one, or one of ``evaluate.user_metrics``
_CLASS_COLUMNS = 4  # of a multiclass target's sums before those of each class
_NUM_BINS = 15  # of probabilities, for the calibration error


@dataclass(frozen=True)
class Metric:
    """A metric's name in files, its title for people, which way is better, and its exact meaning.

    ``undefined`` says when there is no value, as a reader will find it beside a null, and
    ``no_interval`` why an interval from resamples would mislead, if it would. ``is_headline``:
    among the few that are shown first.
    """

    name: MetricName
    title: str
    higher_is_better: bool
    meaning: str
    undefined: str = ""
    no_interval: str = ""
    is_headline: bool = False


_ONE_CLASS = "only one class is present"
_RMSE = Metric(
    "rmse", "RMSE", False, "root of the mean squared error, in the target's unit", is_headline=True
)
_MAE = Metric("mae", "MAE", False, "mean absolute error, in the target's unit", is_headline=True)
_R2 = Metric(
    "r2", "R²", True, "1 − squared error / squared error of the mean", "the truth is constant",
    is_headline=True,
)  # fmt: skip
_MAPE = Metric("mape", "MAPE", False, "mean of |error| / |truth|", "a truth is 0")
_PINBALL = Metric(
    "pinball", "pinball loss", False,
    "mean of q × error below the truth, (1 − q) × error above it, for q = `evaluate.quantile`",
)  # fmt: skip
_SPEARMAN = Metric(
    "spearman", "Spearman's ρ", True, "correlation of the ranks of truth and prediction",
    "truth or prediction is constant",
)  # fmt: skip
_ROC_AUC = Metric(
    "roc_auc", "ROC-AUC", True, "chance that a positive row scores above a negative one, ties half",
    _ONE_CLASS, is_headline=True,
)  # fmt: skip
_AVERAGE_PRECISION = Metric(
    "average_precision", "average precision", True, "precision averaged over the recall gained",
    "no row is positive", is_headline=True,
)  # fmt: skip
_LOG_LOSS = Metric(
    "log_loss", "log-loss", False, "mean of −ln of the probability of the true class",
    is_headline=True,
)  # fmt: skip
_BRIER = Metric("brier", "Brier", False, "mean squared error of the probability", is_headline=True)
_ECE = Metric(
    "ece", "calibration error", False,
    f"mean distance of probability and share of hits over {_NUM_BINS} equally wide bins (ECE)",
    no_interval="resamples add noise within the bins, which counts as miscalibration",
)  # fmt: skip
_ACCURACY = Metric(
    "accuracy", "accuracy", True, "share of rows whose predicted class is the true one",
    is_headline=True,
)  # fmt: skip
_BALANCED_ACCURACY = Metric(
    "balanced_accuracy", "balanced accuracy", True, "mean over the true classes of their recall",
    _ONE_CLASS,
)  # fmt: skip
_PRECISION = Metric(
    "precision", "precision", True, "share of positive predictions that are right",
    "no row is predicted positive",
)  # fmt: skip
_RECALL = Metric(
    "recall", "recall", True, "share of positive rows that are found", "no row is positive"
)
_F1 = Metric(
    "f1", "F1", True, "harmonic mean of precision and recall of the positive class",
    "no row is positive, in truth or prediction", is_headline=True,
)  # fmt: skip
_MCC = Metric(
    "mcc", "MCC", True, "correlation of true and predicted class (Matthews)",
    "only one class is present, in truth or prediction",
)  # fmt: skip
_BRIER_CLASSES = Metric(
    "brier", "Brier", False, "squared error of the probabilities, summed over classes, mean of rows"
)
_MACRO_PRECISION = Metric(
    "macro_precision", "macro precision", True,
    "mean of precision over the classes present in truth or prediction; 0 for one never predicted",
)  # fmt: skip
_MACRO_RECALL = Metric(
    "macro_recall", "macro recall", True,
    "mean of recall over the classes present in truth or prediction; 0 for one that is never true",
)  # fmt: skip
_MACRO_F1 = Metric(
    "macro_f1", "macro F1", True, "mean of F1 over the classes present in truth or prediction",
    is_headline=True,
)  # fmt: skip
_MACRO_ROC_AUC = Metric(
    "macro_roc_auc", "macro ROC-AUC", True, "mean over classes of ROC-AUC of the class against all",
    "a class is absent", is_headline=True,
)  # fmt: skip

METRICS: dict[Task, tuple[Metric, ...]] = {
    "regression": (_RMSE, _MAE, _R2, _MAPE, _PINBALL, _SPEARMAN),
    "binary": (
        _ROC_AUC, _LOG_LOSS, _BRIER, _ACCURACY, _F1, _AVERAGE_PRECISION,
        _BALANCED_ACCURACY, _PRECISION, _RECALL, _MCC, _ECE,
    ),
    "multiclass": (
        _LOG_LOSS, _ACCURACY, _MACRO_F1, _MACRO_ROC_AUC, _BRIER_CLASSES,
        _BALANCED_ACCURACY, _MACRO_PRECISION, _MACRO_RECALL, _MCC, _ECE,
    ),
}  # fmt: skip
# What a model is chosen by unless params.yaml says otherwise.
DEFAULT_METRIC: dict[Task, BuiltinMetric] = {
    "regression": "rmse",
    "binary": "roc_auc",
    "multiclass": "log_loss",
}


@dataclass(frozen=True)
class Sample:
    """One model's predictions of one target beside the truth, on rows that have a label.

    Shapes: ``truth`` (N,) the value or the class code; ``prediction`` (N,) the value or the
    probability of class 1, or (N, C) probabilities of a multiclass target; ``weight`` (N,) row
    weights, or None where every row weighs 1. ``quantile`` is that of the pinball loss.
    """

    task: Task
    truth: Floats
    prediction: Floats
    weight: Floats | None = None
    quantile: float = 0.5

    def where(self, keep: npt.NDArray[np.bool_]) -> "Sample":
        """Return the rows to keep."""
        weight = None if self.weight is None else self.weight[keep]
        return replace(
            self, truth=self.truth[keep], prediction=self.prediction[keep], weight=weight
        )


@dataclass(frozen=True)
class Terms:
    """What the metrics of one sample are made of; see ``prepare``.

    Shapes: ``columns_KN`` weighted per-row terms; one ranking per scored class, its units being
    the ones the rows were given. ``pair`` is of the ranks of truth and prediction. ``fixed`` are
    the values of metrics that no resample is asked for.
    """

    task: Task
    columns_KN: Floats
    rankings: tuple[Ranking, ...]
    pair: RankPair | None = None
    fixed: Mapping[MetricName, float] = field(default_factory=dict)


def metric_of(task: Task, name: str) -> Metric:
    """Return the metric of ``task`` called ``name``.

    Raises:
        ValueError: if the task has no such metric, with the ones it has.
    """
    for metric in METRICS[task]:
        if metric.name == name:
            return metric
    known = [metric.name for metric in METRICS[task]]
    raise ValueError(
        f"{name!r} is no metric of a {task} target{nearest(name, known)}; known: {', '.join(known)}"
    )


def prepare(
    sample: Sample,
    unit: npt.NDArray[np.int64],
    *,
    threshold: float,
    only: MetricName | None = None,
) -> Terms:
    """Compute per-row terms and sort rows by score, once for all resamples.

    ``unit`` (N,) is the resampling unit of each row. ``threshold`` is the probability from which a
    row counts as predicted positive (binary only; of several classes the likeliest counts).
    ``only`` leaves out the rankings that this one metric does not need.
    """
    # Centred: R² from raw sums of squares would cancel when the mean is far from 0.
    is_number = sample.task == "regression"
    center = float(np.average(sample.truth, weights=sample.weight)) if is_number else 0.0
    columns_KN = row_terms(sample, threshold=threshold, center=center)
    if is_number:
        pair = None
        if only in (None, "spearman"):
            pair = rank_pair(sample.truth, sample.prediction, sample.weight, unit)
        return Terms("regression", columns_KN, (), pair)
    fixed: dict[MetricName, float] = {}
    if only in (None, "ece"):
        fixed["ece"] = calibration_error(sample)
    if sample.task == "binary":
        is_ranked = only in (None, "roc_auc", "average_precision")
        ranking = [
            rank(
                sample.prediction,
                sample.truth == 1,
                sample.weight,
                unit,
                with_precision=only in (None, "average_precision"),
            )
            for _ in range(is_ranked)
        ]
        return Terms("binary", columns_KN, tuple(ranking), fixed=fixed)
    num_classes = sample.prediction.shape[1] if only in (None, "macro_roc_auc") else 0
    rankings = [
        rank(
            np.ascontiguousarray(sample.prediction[:, c]),
            sample.truth == c,
            sample.weight,
            unit,
            with_precision=False,
        )
        for c in range(num_classes)
    ]
    return Terms("multiclass", columns_KN, tuple(rankings), fixed=fixed)


def row_terms(sample: Sample, *, threshold: float, center: float) -> Floats:
    """Return the weighted terms of each row, (K, N), whose sums ``combine`` takes.

    ``center`` is near the mean truth, and the same for all parts of the rows whose sums are added
    up (regression only).
    """
    if sample.task == "regression":
        return _weighted(_regression_terms(sample, center), sample.weight)
    if sample.task == "binary":
        return _weighted(_binary_terms(sample, threshold), sample.weight)
    return _weighted(_class_terms(sample), sample.weight)


def combine(task: Task, sums: Floats, ranks: Floats) -> dict[MetricName, Floats]:
    """Turn sums (..., K) and rankings' metrics (..., R, 2) into the metrics made of them (...).

    NaN where a metric is not defined, and for metrics whose rankings were left out.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if task == "regression":
            return _regression_metrics(sums)
        if task == "binary":
            return _binary_metrics(sums, ranks)
        return _class_metrics(sums, ranks)


def class_sums(task: Task, sums: Floats) -> Floats | None:
    """Return hits, true and predicted weight of each class, (..., 3, C), out of sums (..., K).

    None of a target without classes.
    """
    if task == "regression":
        return None
    if task == "multiclass":
        return sums[..., _CLASS_COLUMNS:].reshape(*sums.shape[:-1], 3, -1)
    hit, false_alarm, miss, rest = _columns(sums[..., -4:])
    of_classes = [[rest, hit], [rest + false_alarm, hit + miss], [rest + miss, hit + false_alarm]]
    return np.stack([np.stack(pair, axis=-1) for pair in of_classes], axis=-2)


def point_values(terms: Terms, num_units: int) -> dict[MetricName, float]:
    """Return every metric on the rows themselves; NaN where it is not defined."""
    ranks = [rank_once(ranking, num_units) for ranking in terms.rankings]
    ranks_R2 = np.array(ranks).reshape(len(ranks), 2)
    found = combine(terms.task, terms.columns_KN.sum(axis=1), ranks_R2)
    values = {name: float(value) for name, value in found.items()}
    if terms.pair is not None:
        (values["spearman"],) = rank_correlations(terms.pair, np.ones((1, num_units), np.uint8))
    return {**values, **terms.fixed}


def score(metric: MetricName, sample: Sample, *, threshold: float = 0.5) -> float:
    """Return the point value of one metric; NaN where it is not defined."""
    rows = np.arange(len(sample.truth))
    terms = prepare(sample, rows, threshold=threshold, only=metric)
    return point_values(terms, len(rows))[metric]


def calibration_error(sample: Sample) -> float:
    """Return the expected calibration error: of P(labels[1]), or of the likeliest class's.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    if sample.task == "binary":
        told, is_hit = sample.prediction, sample.truth == 1
    else:
        told = sample.prediction.max(axis=1)
        is_hit = sample.prediction.argmax(axis=1) == sample.truth
    weight = np.ones(len(told)) if sample.weight is None else sample.weight
    place = np.clip(np.ceil(told * _NUM_BINS).astype(np.int64) - 1, 0, _NUM_BINS - 1)
    distance = np.bincount(place, weight * (told - is_hit), minlength=_NUM_BINS)
    return float(np.abs(distance).sum() / weight.sum())


def _regression_terms(sample: Sample, center: float) -> list[Floats]:
    error = sample.prediction - sample.truth
    size, truth = np.abs(error), sample.truth - center
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(sample.truth == 0, np.nan, size / np.abs(sample.truth))
    pinball = np.where(error < 0, sample.quantile, 1 - sample.quantile) * size
    return [np.ones_like(error), error**2, size, truth, truth**2, relative, pinball]


def _regression_metrics(sums: Floats) -> dict[MetricName, Floats]:
    weight, squared, absolute, truth, truth_squared, relative, pinball = _columns(sums)
    spread = truth_squared - truth**2 / weight
    # A constant truth leaves rounding noise here, not an exact 0.
    is_constant = spread <= 1e-12 * truth_squared
    return {
        "rmse": np.sqrt(squared / weight),
        "mae": absolute / weight,
        "r2": np.where(is_constant, np.nan, 1 - squared / spread),
        "mape": relative / weight,
        "pinball": pinball / weight,
    }


def _binary_terms(sample: Sample, threshold: float) -> list[Floats]:
    is_positive = sample.truth == 1
    is_predicted = sample.prediction >= threshold
    of_truth = np.where(is_positive, sample.prediction, 1 - sample.prediction)
    return [
        np.ones_like(sample.prediction),
        _negative_log(of_truth),
        (sample.prediction - sample.truth) ** 2,
        (is_positive & is_predicted).astype(np.float64),
        (~is_positive & is_predicted).astype(np.float64),
        (is_positive & ~is_predicted).astype(np.float64),
        (~is_positive & ~is_predicted).astype(np.float64),
    ]


def _binary_metrics(sums: Floats, ranks: Floats) -> dict[MetricName, Floats]:
    weight, log_loss, brier, hit, false_alarm, miss, rest = _columns(sums)
    none = np.full(weight.shape, np.nan)
    positive, negative, predicted = hit + miss, false_alarm + rest, hit + false_alarm
    recall = hit / positive
    spread = np.sqrt(positive * negative) * np.sqrt(predicted * (miss + rest))
    return {
        "roc_auc": ranks[..., 0, 0] if ranks.shape[-2] else none,
        "log_loss": log_loss / weight,
        "brier": brier / weight,
        "accuracy": 1 - (false_alarm + miss) / weight,
        "f1": 2 * hit / (2 * hit + false_alarm + miss),
        "average_precision": ranks[..., 0, 1] if ranks.shape[-2] else none,
        "balanced_accuracy": (recall + rest / negative) / 2,
        "precision": hit / predicted,
        "recall": recall,
        "mcc": (hit * rest - false_alarm * miss) / spread,
    }


def _class_terms(sample: Sample) -> list[Floats]:
    num_rows, num_classes = sample.prediction.shape
    truth = sample.truth.astype(np.int64)
    predicted = sample.prediction.argmax(axis=1)
    is_truth_NC = np.arange(num_classes) == truth[:, None]
    is_predicted_NC = np.arange(num_classes) == predicted[:, None]
    return [
        np.ones(num_rows),
        _negative_log(sample.prediction[np.arange(num_rows), truth]),
        ((sample.prediction - is_truth_NC) ** 2).sum(axis=1),
        (predicted == truth).astype(np.float64),
        *(is_truth_NC & is_predicted_NC).T.astype(np.float64),
        *is_truth_NC.T.astype(np.float64),
        *is_predicted_NC.T.astype(np.float64),
    ]


def _class_metrics(sums: Floats, ranks: Floats) -> dict[MetricName, Floats]:
    weight, log_loss, brier, correct = _columns(sums[..., :_CLASS_COLUMNS])
    of_classes = sums[..., _CLASS_COLUMNS:].reshape(*sums.shape[:-1], 3, -1)
    hit, in_truth, in_prediction = (of_classes[..., i, :] for i in range(3))
    num_present = (in_truth + in_prediction > 0).sum(axis=-1)
    recall = _share(hit, in_truth)
    is_true = in_truth > 0
    none = np.full(weight.shape, np.nan)
    both = (in_truth * in_prediction).sum(axis=-1)
    spread = np.sqrt(_mixed(in_truth, weight) * _mixed(in_prediction, weight))
    balanced = recall.sum(axis=-1) / is_true.sum(axis=-1)
    return {
        "log_loss": log_loss / weight,
        "accuracy": correct / weight,
        "macro_f1": _share(2 * hit, in_truth + in_prediction).sum(axis=-1) / num_present,
        "macro_roc_auc": ranks[..., 0].mean(axis=-1) if ranks.shape[-2] else none,
        "brier": brier / weight,
        "balanced_accuracy": np.where(is_true.sum(axis=-1) > 1, balanced, np.nan),
        "macro_precision": _share(hit, in_prediction).sum(axis=-1) / num_present,
        "macro_recall": recall.sum(axis=-1) / num_present,
        "mcc": (correct * weight - both) / spread,
    }


def _share(part: Floats, whole: Floats) -> Floats:
    """Return ``part`` / ``whole``; 0 where there is nothing."""
    found: Floats = np.where(whole > 0, part / np.where(whole > 0, whole, 1), 0)
    return found


def _mixed(per_class: Floats, weight: Any) -> Any:
    """Return the weight of pairs of unlike classes; NaN where only rounding leaves any."""
    found = weight**2 - (per_class**2).sum(axis=-1)
    return np.where(found > 1e-12 * weight**2, found, np.nan)


def _negative_log(probability: Floats) -> Floats:
    # The clip scikit-learn makes: a sure and wrong prediction costs 36.04, not infinity.
    tiny = np.finfo(np.float64).eps
    out: Floats = -np.log(np.clip(probability, tiny, 1 - tiny))
    return out


def _weighted(terms: list[Floats], weight: Floats | None) -> Floats:
    columns_KN = np.stack(terms)
    if weight is not None:
        columns_KN *= weight
    return columns_KN


def _columns(sums: Floats) -> list[Any]:
    return [sums[..., k] for k in range(sums.shape[-1])]
