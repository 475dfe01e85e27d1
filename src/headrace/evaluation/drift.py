"""How far two sets of rows differ: one column at a time, and by a classifier that tells them apart.

Per column: the population stability index over deciles (or values, or classes; a missing value is
a bin of its own), less what chance alone gives samples of this size, and a chi-squared test over
the same bins. Rows of one unit (a day, a group) are alike, so both take the number of rows that
count as independent: the rows over the design effect (Rao and Scott 1981, first order). By
convention an index below 0.1 is stable and from 0.25 on a shift. Both are asked for, the index and
the test, because with many rows the test rejects differences that do not matter.

Adversarial validation: trees learn to tell the two sets apart from all columns, judged out of fold,
whole units in one fold. An ROC-AUC of 0.5 says that nothing tells them apart; its interval is from
the resamples of the units. Trees run on one thread: on several, sums differ in the last digits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.bootstrap import Interval, Resampling, Units, bootstrap, estimate
from headrace.evaluation.coded import Coded
from headrace.evaluation.metrics import Sample

Floats: TypeAlias = npt.NDArray[np.float64]
Codes: TypeAlias = npt.NDArray[np.int64]

STABLE, SHIFTED = 0.1, 0.25  # the index: below the one stable, from the other on a shift
REAL = 0.01  # p-value from which on a difference may be chance
_NUM_BINS = 10
_MOST_VALUES = 20  # bins of their own: values of a number with few, labels of a category
_FOLDS = 3
_TREES, _LEAVES, _LEAF_ROWS = 40, 15, 20
_MOST_CODES = 250  # the trees take 255


@dataclass(frozen=True)
class Shift:
    """How far one column differs; ``index`` is the stability index, ``distance`` Kolmogorov's.

    ``distance`` is None for categories.
    """

    column: str
    index: float
    p_value: float
    distance: float | None

    @property
    def is_real(self) -> bool:
        """Whether it is more than chance."""
        return self.p_value < REAL


def shift(column: Coded, is_second: npt.NDArray[np.bool_], unit: Codes) -> Shift:
    """Compare a column of the rows that are not ``is_second`` with those that are.

    ``unit`` (N,) are the codes of the rows' units.
    """
    bins, num_bins = _binned(column, ~is_second)
    sides = [(bins[side], unit[side]) for side in (~is_second, is_second)]
    shares = [np.bincount(codes, minlength=num_bins) / len(codes) for codes, _ in sides]
    sizes = [
        len(codes) / _design_effect(codes, own, num_bins, share)
        for (codes, own), share in zip(sides, shares, strict=True)
    ]
    distance = None
    if column.kind != "category":
        distance = _kolmogorov(column.values[~is_second], column.values[is_second])
    return Shift(column.name, *_compared(shares, sizes), distance)


def adversarial(
    columns: Sequence[Coded],
    is_second: npt.NDArray[np.bool_],
    units: Units,
    resampling: Resampling,
) -> Interval:
    """Return the ROC-AUC, out of fold, of trees that tell the second set of rows from the first."""
    fold, reason = _folds(is_second, units, resampling.seed)
    if reason:
        return Interval(None, None, None, reason=reason)
    x_NF = np.column_stack([_tree_input(column) for column in columns])
    is_category = np.array([column.kind == "category" for column in columns])
    scores = np.empty(len(is_second))
    for number in range(_FOLDS):
        is_judged = fold == number
        scores[is_judged] = _told_apart(
            x_NF[~is_judged], is_second[~is_judged], x_NF[is_judged], is_category, resampling.seed
        )
    sample = Sample("binary", is_second.astype(np.float64), scores)
    scored = bootstrap(sample, units, resampling, threshold=0.5, only="roc_auc")
    return estimate("roc_auc", scored, units, resampling)


def _told_apart(
    learn_NF: Floats,
    is_second: npt.NDArray[np.bool_],
    judge_NF: Floats,
    is_category: npt.NDArray[np.bool_],
    seed: int,
) -> Floats:
    is_known = ~np.isnan(learn_NF).all(axis=0)  # the trees refuse a column without any value
    if not is_known.any():
        return np.full(len(judge_NF), 0.5)
    from sklearn.ensemble import HistGradientBoostingClassifier
    from threadpoolctl import threadpool_limits

    trees = HistGradientBoostingClassifier(
        max_iter=_TREES,
        max_leaf_nodes=_LEAVES,
        min_samples_leaf=_LEAF_ROWS,
        categorical_features=is_category[is_known],
        early_stopping=False,
        random_state=seed % 2**32,
    )
    with threadpool_limits(1, user_api="openmp"):
        trees.fit(learn_NF[:, is_known], is_second)
        scores: Floats = trees.predict_proba(judge_NF[:, is_known])[:, 1]
    return scores


def _tree_input(column: Coded) -> Floats:
    if column.kind != "category":
        return column.values
    return np.minimum(column.values, _MOST_CODES)


def _folds(is_second: npt.NDArray[np.bool_], units: Units, seed: int) -> tuple[Codes, str]:
    """Return the fold of each row, whole units in one, or why there are too few units."""
    first_of_unit = np.zeros(units.count, bool)
    first_of_unit[units.of_row[~is_second]] = True
    fold = np.empty(units.count, np.int64)
    rng = np.random.default_rng(seed)
    for side in (first_of_unit, ~first_of_unit):
        members = np.flatnonzero(side)
        if len(members) < _FOLDS:
            return fold, f"of one of the splits there are only {len(members)} {units.name}s"
        fold[rng.permutation(members)] = np.arange(len(members)) % _FOLDS
    return fold[units.of_row], ""


def _binned(column: Coded, is_reference: npt.NDArray[np.bool_]) -> tuple[Codes, int]:
    """Return the bin of each row, 0 where missing, and the number of bins."""
    is_there = ~np.isnan(column.values)
    bins = np.zeros(len(column.values), np.int64)
    if column.kind == "category":
        bins[is_there] = 1 + np.minimum(column.values[is_there], _MOST_VALUES).astype(np.int64)
        return bins, _MOST_VALUES + 2
    known = column.values[is_there & is_reference]
    values = np.unique(known)
    if len(values) <= _MOST_VALUES:
        edges = (values[1:] + values[:-1]) / 2
    else:
        edges = np.unique(np.quantile(known, np.linspace(0, 1, _NUM_BINS + 1)[1:-1]))
    bins[is_there] = 1 + np.searchsorted(edges, column.values[is_there], side="right")
    return bins, len(edges) + 2


def _design_effect(codes: Codes, unit: Codes, num_bins: int, share: Floats) -> float:
    """Return how many rows stand for one independent row, at least 1."""
    present, of_row = np.unique(unit, return_inverse=True)
    num_units, num_rows = len(present), len(codes)
    if num_units in (1, num_rows):
        return float(num_rows) if num_units == 1 else 1.0
    in_bin = np.bincount(of_row * num_bins + codes, minlength=num_units * num_bins)
    of_unit = np.bincount(of_row)[:, None]
    spread = ((in_bin.reshape(num_units, num_bins) - share * of_unit) ** 2).sum(axis=0)
    variance = spread * num_units / (num_units - 1) / num_rows**2
    is_used = share > 0
    # Each bin's variance over that of independent rows, weighed as the test weighs the bins.
    effect = variance[is_used] * num_rows / share[is_used]
    return max(1.0, float(effect.sum()) / max(1, int(is_used.sum()) - 1))


def _compared(shares: Sequence[Floats], sizes: Sequence[float]) -> tuple[float, float]:
    """Return the index, less what chance gives, and the p-value of the chi-squared test."""
    from scipy.special import chdtrc

    is_used = shares[0] + shares[1] > 0
    num_bins = int(is_used.sum())
    if num_bins < 2:
        return 0.0, 1.0
    p, q = (
        (share[is_used] * size + 0.5) / (size + 0.5 * num_bins)
        for share, size in zip(shares, sizes, strict=True)
    )
    chance = sum(1 / size for size in sizes)
    index = float(((p - q) * np.log(p / q)).sum()) - (num_bins - 1) * chance
    first, second = (share[is_used] for share in shares)
    pooled = (first * sizes[0] + second * sizes[1]) / sum(sizes)
    squared = float(((first - second) ** 2 / pooled).sum()) / chance
    return max(0.0, index), float(chdtrc(num_bins - 1, squared))


def _kolmogorov(first: Floats, second: Floats) -> float:
    """Return the largest gap between the distribution functions of the values that are there."""
    first, second = np.sort(first[~np.isnan(first)]), np.sort(second[~np.isnan(second)])
    if not len(first) or not len(second):
        return 0.0
    at = np.concatenate([first, second])
    gaps = np.searchsorted(first, at, side="right") / len(first)
    gaps -= np.searchsorted(second, at, side="right") / len(second)
    return float(np.abs(gaps).max())
