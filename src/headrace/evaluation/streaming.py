"""Intervals of a test set larger than memory: Poisson resamples of rows that come in parts.

Memory is a few sums and, per ranking metric, a histogram of scores for each resample; with a small
budget the parts are read several times, some resamples at a time, with the same result. Metrics
that are functions of sums are exact for each resample. ROC-AUC and average precision take the rows
of one bin as equal or in random order. Bins hold about equal numbers of different scores, and there
are ``NUM_BINS``, shared by the classes: with fewer different scores each has a bin of its own and
the metric is exact, else ``error_bound`` says what the order within bins can change.

The counts follow from (seed, resample, unit) alone, so two models are compared on the same
resamples here as well. A Poisson resample has about as many units as the data, not exactly; from a
hundred units on the intervals are those of drawing with replacement.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.bootstrap import Resampling, Scored, sums_of_classes
from headrace.evaluation.metrics import METRICS, MetricName, Sample, combine, row_terms
from headrace.kernels.poisson import LANE, Folds, one_count, rank_error, ranks_of
from headrace.schema import Task

Floats: TypeAlias = npt.NDArray[np.float64]

NUM_BINS = 4096
_FEWEST_BINS = 256  # for each of many classes
_SAMPLED = 16  # different scores that are kept for each bin, to place its edges
NEEDS_ROWS = "needs all rows in memory"


@dataclass(frozen=True)
class Part:
    """Some rows: predictions beside the truth, and the key of each row's unit (N,)."""

    sample: Sample
    unit_key: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Streamed:
    """One model's metrics, and how far binning can have moved those that have a value."""

    scored: Scored
    error_bound: Mapping[MetricName, float]


def stream_bootstrap(
    read: Callable[[], Iterable[Part]],
    task: Task,
    resampling: Resampling,
    *,
    threshold: float,
    budget_bytes: int,
) -> Streamed:
    """Return every metric on all rows and on each Poisson resample of their units.

    ``read`` gives the same parts each time it is called, which is twice or more: as often as
    ``budget_bytes`` asks for. It does not change the result.

    Raises:
        ValueError: if there are no rows, or bca intervals are asked for.
    """
    if resampling.method == "bca":
        raise ValueError("bca intervals need all units in memory; expected percentile or basic")
    looked = _look(read(), task)
    points, error, is_tied_RT = _points(read(), looked, threshold)
    num_columns, num_rankings = points[0].shape[0], len(looked.edges)
    per_lane = 8 * LANE * (num_columns + 2 * num_rankings * looked.num_bins)
    # A lane's histogram is turned into ranks by a few arrays of its size.
    step = LANE * max(1, (budget_bytes - 6 * per_lane) // per_lane)
    sums, ranks = [], []
    with ThreadPoolExecutor(resampling.threads) as pool:
        for first in range(0, resampling.num_resamples, step):
            folds = Folds(
                min(step, resampling.num_resamples - first),
                first=first,
                seed=resampling.seed,
                num_columns=num_columns,
                num_rankings=num_rankings,
                num_bins=looked.num_bins,
            )
            for part in read():
                columns_KN, cells_RN, weight = _prepared(part, looked, threshold)
                folds.add(part.unit_key, columns_KN, cells_RN, weight, pool)
            sums.append(folds.sums_BK)
            ranks.append(folds.ranks_BR2(is_tied_RT))
    sums_BK = np.concatenate(sums)
    resamples = combine(task, sums_BK, np.concatenate(ranks))
    values = {name: float(value) for name, value in combine(task, *points).items()}
    metrics = [metric for metric in METRICS[task] if metric.name in values]
    missing = {metric.name: NEEDS_ROWS for metric in METRICS[task] if metric.name not in values}
    nothing = np.full(resampling.num_resamples, np.nan)
    scored = Scored(
        {metric.name: values.get(metric.name, np.nan) for metric in METRICS[task]},
        {metric.name: resamples.get(metric.name, nothing) for metric in METRICS[task]},
        no_interval=missing
        | {metric.name: metric.no_interval for metric in metrics if metric.no_interval},
        classes=sums_of_classes(task, points[0], sums_BK),
    )
    return Streamed(scored, error)


@dataclass(frozen=True)
class _Looked:
    """What one pass over the rows found: the mean truth, and edges of score bins per ranking."""

    task: Task
    center: float
    edges: tuple[Floats, ...]
    num_bins: int


def _look(parts: Iterable[Part], task: Task) -> _Looked:
    total = mass = 0.0
    kept: list[Floats] = []
    num_bins = NUM_BINS
    for part in parts:
        sample = part.sample
        weight = np.ones(len(sample.truth)) if sample.weight is None else sample.weight
        total, mass = total + float(weight @ sample.truth), mass + float(weight.sum())
        scores = _scores(sample)
        num_bins = max(_FEWEST_BINS, NUM_BINS // max(1, len(scores)))
        kept = kept or [np.empty(0) for _ in scores]
        kept = [
            _sampled(np.concatenate([old, new]), _SAMPLED * num_bins)
            for old, new in zip(kept, scores, strict=True)
        ]
    if not mass:
        raise ValueError("no rows, or all of weight 0; expected some with a label")
    return _Looked(
        task,
        # Near the mean will do; the last bits of it follow from how rows were cut into parts.
        float(np.float32(total / mass)),
        tuple(_edges(values, num_bins) for values in kept),
        num_bins,
    )


def _points(
    parts: Iterable[Part], looked: _Looked, threshold: float
) -> tuple[tuple[Floats, Floats], dict[MetricName, float], npt.NDArray[np.bool_]]:
    """Return sums and ranks of all rows, what binning can change, and which bins are of one score.

    Shapes: sums (K,), ranks (R, 2), bins (R, T).
    """
    num_rankings, num_bins = len(looked.edges), looked.num_bins
    sums: list[Floats] = []
    cells_RC = np.zeros((num_rankings, 2 * num_bins))
    low_RT = np.full((num_rankings, num_bins), np.inf)
    high_RT = np.full((num_rankings, num_bins), -np.inf)
    for part in parts:
        columns_KN, cells_RN, weight = _prepared(part, looked, threshold)
        sums_K, counts_RC = one_count(columns_KN, cells_RN, weight, num_bins)
        sums = [sums[0] + sums_K] if sums else [sums_K]
        cells_RC += counts_RC
        for number, scores in enumerate(_scores(part.sample)):
            np.minimum.at(low_RT[number], cells_RN[number] // 2, scores)
            np.maximum.at(high_RT[number], cells_RN[number] // 2, scores)
    is_tied_RT = low_RT >= high_RT
    ranks_R2, error_R2 = ranks_of(cells_RC, is_tied_RT), rank_error(cells_RC, is_tied_RT)
    low, high = (combine(looked.task, sums[0], ranks_R2 + sign * error_R2) for sign in (-1, 1))
    widths = {name: float(high[name] - low[name]) for name in high}
    error = {name: width / 2 for name, width in widths.items() if np.isfinite(width)}
    return (sums[0], ranks_R2), error, is_tied_RT


def _prepared(
    part: Part, looked: _Looked, threshold: float
) -> tuple[Floats, npt.NDArray[np.int64], Floats]:
    """Return terms (K, N), cells (R, N) and weights (N,) of some rows."""
    sample = part.sample
    scores = _scores(sample)
    cells_RN = np.empty((len(scores), len(sample.truth)), np.int64)
    for number, (values, edges) in enumerate(zip(scores, looked.edges, strict=True)):
        is_positive = sample.truth == (1 if looked.task == "binary" else number)
        cells_RN[number] = 2 * np.searchsorted(edges, values, side="right") + is_positive
    weight = np.ones(len(sample.truth)) if sample.weight is None else sample.weight
    return row_terms(sample, threshold=threshold, center=looked.center), cells_RN, weight


def _scores(sample: Sample) -> list[Floats]:
    """The scores that rows are ranked by, one array for each ranking."""
    if sample.task == "regression":
        return []
    if sample.task == "binary":
        return [sample.prediction]
    return list(np.ascontiguousarray(sample.prediction.T))


def _sampled(values: Floats, most: int) -> Floats:
    """Return ``most`` different values, chosen by their hash: the same in any order and parts."""
    different = np.unique(values + 0.0)  # -0.0 is 0.0
    if len(different) <= most:
        return different
    mixed = different.view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
    return np.sort(different[np.argpartition(mixed ^ (mixed >> np.uint64(29)), most)[:most]])


def _edges(different: Floats, num_bins: int) -> Floats:
    """Return where bins begin, at most ``num_bins - 1``: each value its own bin if they suffice."""
    if len(different) < num_bins:
        return different
    places = np.linspace(0, len(different), num_bins, endpoint=False)[1:].astype(np.int64)
    edges: Floats = different[places]
    return edges
