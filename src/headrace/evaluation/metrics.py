"""What each metric is made of: sums over rows and, for ranking metrics, rows sorted by score.

A metric here is a function of a few weighted sums (of losses, hits, squares) and of rankings. The
same function gives the point value from the sums over all rows and its bootstrap distribution from
the sums of every resample, so the two can never disagree. Point values equal scikit-learn's.

Where a metric is not defined (one class only, constant truth) its value is NaN here and null with
a reason in what is written: never 0, and never left out in silence.

Legend: N rows, K columns of sums, C classes; ``...`` stands for no axis (point) or B (resamples).
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.errors import nearest
from headrace.kernels.bootstrap import Ranking, rank, rank_once
from headrace.schema import Task

Floats: TypeAlias = npt.NDArray[np.float64]
MetricName = Literal[
    "rmse", "mae", "r2", "roc_auc", "log_loss", "brier", "accuracy", "f1", "average_precision",
    "macro_f1", "macro_roc_auc",
]  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """A metric's name in files, its title for people, which way is better, and its exact meaning.

    ``undefined`` says when there is no value, as a reader will find it beside a null, and
    ``no_interval`` why an interval from resamples would mislead, if it would.
    """

    name: MetricName
    title: str
    higher_is_better: bool
    meaning: str
    undefined: str = ""
    no_interval: str = ""


_LOG_LOSS = Metric(
    "log_loss", "log-loss", False, "mean of −ln of the probability of the true class"
)
_ACCURACY = Metric(
    "accuracy", "accuracy", True, "share of rows whose predicted class is the true one"
)
_RMSE = Metric("rmse", "RMSE", False, "root of the mean squared error, in the target's unit")
_MAE = Metric("mae", "MAE", False, "mean absolute error, in the target's unit")
_R2 = Metric(
    "r2", "R²", True, "1 − squared error / squared error of the mean", "the truth is constant"
)
_ROC_AUC = Metric(
    "roc_auc", "ROC-AUC", True, "chance that a positive row scores above a negative one, ties half",
    "only one class is present",
)  # fmt: skip
_BRIER = Metric("brier", "Brier", False, "mean squared error of the probability")
_F1 = Metric(
    "f1", "F1", True, "harmonic mean of precision and recall of the positive class",
    "no row is positive, in truth or prediction",
)  # fmt: skip
_AVERAGE_PRECISION = Metric(
    "average_precision", "average precision", True, "precision averaged over the recall gained",
    "no row is positive",
)  # fmt: skip
_BRIER_CLASSES = Metric(
    "brier", "Brier", False, "squared error of the probabilities, summed over classes, mean of rows"
)
_MACRO_F1 = Metric(
    "macro_f1", "macro F1", True, "mean of F1 over the classes present in truth or prediction"
)
_MACRO_ROC_AUC = Metric(
    "macro_roc_auc", "macro ROC-AUC", True, "mean over classes of ROC-AUC of the class against all",
    "a class is absent",
)  # fmt: skip

METRICS: dict[Task, tuple[Metric, ...]] = {
    "regression": (_RMSE, _MAE, _R2),
    "binary": (_ROC_AUC, _LOG_LOSS, _BRIER, _ACCURACY, _F1, _AVERAGE_PRECISION),
    "multiclass": (_LOG_LOSS, _ACCURACY, _MACRO_F1, _MACRO_ROC_AUC, _BRIER_CLASSES),
}
# What a model is chosen by unless params.yaml says otherwise.
DEFAULT_METRIC: dict[Task, MetricName] = {
    "regression": "rmse",
    "binary": "roc_auc",
    "multiclass": "log_loss",
}


@dataclass(frozen=True)
class Sample:
    """One model's predictions of one target beside the truth, on rows that have a label.

    Shapes: ``truth`` (N,) the value or the class code; ``prediction`` (N,) the value or the
    probability of class 1, or (N, C) probabilities of a multiclass target; ``weight`` (N,) row
    weights, or None where every row weighs 1.
    """

    task: Task
    truth: Floats
    prediction: Floats
    weight: Floats | None = None

    def where(self, keep: npt.NDArray[np.bool_]) -> "Sample":
        """Return the rows to keep."""
        weight = None if self.weight is None else self.weight[keep]
        return Sample(self.task, self.truth[keep], self.prediction[keep], weight)


@dataclass(frozen=True)
class Terms:
    """What the metrics of one sample are made of; see ``prepare``.

    Shapes: ``columns_KN`` weighted per-row terms; one ranking per scored class, its units being
    the ones the rows were given.
    """

    task: Task
    columns_KN: Floats
    rankings: tuple[Ranking, ...]


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
        return Terms("regression", columns_KN, ())
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
        return Terms("binary", columns_KN, tuple(ranking))
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
    return Terms("multiclass", columns_KN, tuple(rankings))


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
    """Turn sums (..., K) and rankings' metrics (..., R, 2) into every metric of the task (...).

    NaN where a metric is not defined, and for metrics whose rankings were left out.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if task == "regression":
            return _regression_metrics(sums)
        if task == "binary":
            return _binary_metrics(sums, ranks)
        return _class_metrics(sums, ranks)


def point_values(terms: Terms, num_units: int) -> dict[MetricName, float]:
    """Return every metric on the rows themselves; NaN where it is not defined."""
    ranks = [rank_once(ranking, num_units) for ranking in terms.rankings]
    ranks_R2 = np.array(ranks).reshape(len(ranks), 2)
    values = combine(terms.task, terms.columns_KN.sum(axis=1), ranks_R2)
    return {name: float(value) for name, value in values.items()}


def score(metric: MetricName, sample: Sample, *, threshold: float = 0.5) -> float:
    """Return the point value of one metric; NaN where it is not defined."""
    rows = np.arange(len(sample.truth))
    terms = prepare(sample, rows, threshold=threshold, only=metric)
    return point_values(terms, len(rows))[metric]


def _regression_terms(sample: Sample, center: float) -> list[Floats]:
    error = sample.prediction - sample.truth
    truth = sample.truth - center
    return [np.ones_like(error), error**2, np.abs(error), truth, truth**2]


def _regression_metrics(sums: Floats) -> dict[MetricName, Floats]:
    weight, squared, absolute, truth, truth_squared = _columns(sums)
    spread = truth_squared - truth**2 / weight
    # A constant truth leaves rounding noise here, not an exact 0.
    is_constant = spread <= 1e-12 * truth_squared
    return {
        "rmse": np.sqrt(squared / weight),
        "mae": absolute / weight,
        "r2": np.where(is_constant, np.nan, 1 - squared / spread),
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
    ]


def _binary_metrics(sums: Floats, ranks: Floats) -> dict[MetricName, Floats]:
    weight, log_loss, brier, hit, false_alarm, miss = _columns(sums)
    none = np.full(weight.shape, np.nan)
    return {
        "roc_auc": ranks[..., 0, 0] if ranks.shape[-2] else none,
        "log_loss": log_loss / weight,
        "brier": brier / weight,
        "accuracy": 1 - (false_alarm + miss) / weight,
        "f1": 2 * hit / (2 * hit + false_alarm + miss),
        "average_precision": ranks[..., 0, 1] if ranks.shape[-2] else none,
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
    weight, log_loss, brier, correct = _columns(sums[..., :4])
    num_classes = (sums.shape[-1] - 4) // 3
    hit, in_truth, in_prediction = (
        sums[..., 4 + i * num_classes : 4 + (i + 1) * num_classes] for i in range(3)
    )
    is_present = in_truth + in_prediction > 0
    f1 = np.where(is_present, 2 * hit / np.where(is_present, in_truth + in_prediction, 1), 0)
    none = np.full(weight.shape, np.nan)
    return {
        "log_loss": log_loss / weight,
        "accuracy": correct / weight,
        "macro_f1": f1.sum(axis=-1) / is_present.sum(axis=-1),
        "macro_roc_auc": ranks[..., 0].mean(axis=-1) if ranks.shape[-2] else none,
        "brier": brier / weight,
    }


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
