"""Columns that give a target away: those that predict it alone, as hardly an honest one does.

Each input is cut into groups (its labels, or up to 256 quantiles), the target's mean of each group
is taken from one half of the rows and judged on the other: ROC-AUC of a class, R² of a value. A
number is also judged as it is, by its linear R². A missing value is a group of its own, so a column
that is missing exactly where the answer is "no" is found too. Rows are a sample; cost: one sort per
number. What is found is a suspicion: a recorded outcome, or an honest and very good measurement.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from headrace.data.encoder import EncodedBatch
from headrace.schema import Target

Floats: TypeAlias = npt.NDArray[np.float64]

SUSPICIOUS = 0.999
SAMPLE_ROWS = 50_000
_MOST_GROUPS = 256
_LEAST_ROWS = 40  # labelled, of which half judge; fewer say nothing


@dataclass(frozen=True)
class SingleColumn:
    """How well a column alone predicts ``target``; ``measure`` is ROC-AUC or R²."""

    column: str
    target: str
    measure: str
    value: float
    num_rows: int

    @property
    def is_suspicious(self) -> bool:
        """Whether it is better than hardly an honest column is."""
        return self.value > SUSPICIOUS

    def __str__(self) -> str:
        return (
            f"column {self.column!r} alone predicts target {self.target!r} with {self.measure} "
            f"{self.value:.4f} ({self.num_rows:,} train rows)"
        )


def suspicious_columns(
    rows: EncodedBatch,
    *,
    numeric: Sequence[str],
    categories: Sequence[str],
    targets: Sequence[Target],
) -> tuple[SingleColumn, ...]:
    """Return the inputs of ``rows`` whose single-column AUC or R² is above ``SUSPICIOUS``."""
    inputs = {name: rows.numeric[:, j] for j, name in enumerate(numeric)}
    inputs |= {name: rows.codes[:, j] for j, name in enumerate(categories)}
    labels = {target.name: rows.targets[:, j] for j, target in enumerate(targets)}
    return tuple(one for one in single_columns(inputs, labels, targets) if one.is_suspicious)


def single_columns(
    inputs: Mapping[str, npt.NDArray[Any]],
    labels: Mapping[str, npt.NDArray[np.floating]],
    targets: Sequence[Target],
) -> Iterator[SingleColumn]:
    """Yield how well each input alone predicts each target that has enough labels.

    Shapes: (N,) all; an input of floats is a number, NaN where missing, one of integers the codes
    of a category, from 0 on; labels are values or class codes, NaN where missing. Rows are in
    random order.
    """
    for name, column in inputs.items():
        is_number = np.issubdtype(column.dtype, np.floating)
        group = _groups(column) if is_number else column.astype(np.int64)
        for target in targets:
            y = labels[target.name].astype(np.float64)
            is_known = ~np.isnan(y)
            if is_known.sum() < _LEAST_ROWS:
                continue
            value = _value(group[is_known], y[is_known], target)
            if is_number and target.task == "regression":
                value = max(value, _linear(column[is_known].astype(np.float64), y[is_known]))
            measure = "R²" if target.task == "regression" else "ROC-AUC"
            yield SingleColumn(name, target.name, measure, value, int(is_known.sum()))


def _groups(column: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """Return the group of each number: its value if there are few, else its quantile; NaN is 0."""
    is_there = ~np.isnan(column)
    values, place = np.unique(column[is_there], return_inverse=True)
    if len(values) > _MOST_GROUPS:
        counts = np.bincount(place)
        before = np.cumsum(counts) - counts
        place = (before * _MOST_GROUPS // counts.sum())[place]
    group = np.zeros(len(column), np.int64)
    group[is_there] = 1 + place
    return group


def _value(group: npt.NDArray[np.int64], y: Floats, target: Target) -> float:
    """Return AUC (of several classes the mean) or R² of the groups' means, on the other half."""
    # Alternate rows: they are sorted by a hash, so that is a random half.
    learn, judge = slice(0, None, 2), slice(1, None, 2)
    if target.task == "regression":
        means = _means(group[learn], y[learn], group[judge])
        return _r2(y[judge], means)
    classes = [1] if target.task == "binary" else range(len(target.labels))
    areas = [
        _area(y[judge] == k, _means(group[learn], (y[learn] == k).astype(np.float64), group[judge]))
        for k in classes
    ]
    return float(np.mean(areas))


def _means(group: npt.NDArray[np.int64], y: Floats, asked: npt.NDArray[np.int64]) -> Floats:
    """Return the mean of ``y`` in the groups ``asked``; the mean of all where there is none."""
    size = int(max(group.max(), asked.max())) + 1
    counts = np.bincount(group, minlength=size)
    sums = np.bincount(group, weights=y, minlength=size)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), y.mean())
    return means[asked]


def _area(is_positive: npt.NDArray[np.bool_], score: Floats) -> float:
    num_positive = int(is_positive.sum())
    num_negative = len(is_positive) - num_positive
    if not num_positive or not num_negative:
        return 0.5
    ranks = rankdata(score)[is_positive].sum()
    above = ranks - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


def _r2(y: Floats, prediction: Floats) -> float:
    spread = ((y - y.mean()) ** 2).sum()
    return float(1 - ((y - prediction) ** 2).sum() / spread) if spread > 0 else 0.0


def _linear(x: Floats, y: Floats) -> float:
    """Return the squared correlation over the rows that have a number, 0 if these are few."""
    is_there = ~np.isnan(x)
    if is_there.sum() < max(_LEAST_ROWS, len(x) // 2):
        return 0.0
    x, y = x[is_there] - x[is_there].mean(), y[is_there] - y[is_there].mean()
    spread = (x @ x) * (y @ y)
    return float((x @ y) ** 2 / spread) if spread > 0 else 0.0
