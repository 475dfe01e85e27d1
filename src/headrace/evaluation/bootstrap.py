"""Intervals of metrics from resamples of units, and of differences between models.

Rows are often not independent: flights of one day share its weather, visits of one patient share
the patient. So what is drawn with replacement is the *unit* (row, group or time block), with all
its rows; a resample has as many units as the data (fewer would widen the interval for no reason).
Every interval says its unit and how many there are. Units may be drawn in strata, each of which
keeps its number of units, or in blocks of units that follow each other in time.

Two models are compared on the same resamples: their difference has an interval of its own, often
far narrower than either model's.

Three methods (Efron and Tibshirani 1993, chapters 13 and 14):
- percentile: quantiles of the resamples' values;
- basic: the same, mirrored at the value, so it may leave the metric's range;
- bca: quantiles moved for bias and for a spread that changes with the truth (acceleration). The
  acceleration comes from what each unit adds to the metric, so only metrics have it of which that
  is known: functions of sums (every unit left out in turn) and rankings (to first order).
Where there is no interval there is a reason. None is replaced by another in silence.
"""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.metrics import (
    METRICS,
    MetricName,
    Sample,
    Terms,
    class_sums,
    combine,
    point_values,
    prepare,
)
from headrace.kernels.bootstrap import draw_counts, rank_influence, rank_once, resample
from headrace.kernels.ranks import RankPair, rank_correlations
from headrace.schema import Task

Floats: TypeAlias = npt.NDArray[np.float64]
IntervalMethod = Literal["percentile", "basic", "bca"]

# With fewer units a percentile interval covers the truth clearly less often than it says.
FEW_UNITS = 20
# With more undefined resamples the rest no longer stands for the data.
MAX_UNDEFINED_SHARE = 0.2


UNDEFINED = "undefined"  # the reason where a metric has no value; the metric itself knows why
_CHUNK = 16  # resamples one thread takes at a time
# Resamples that must lie beyond each bound: the bound is their quantile, and of fewer it is noise.
MIN_TAIL = 5


@dataclass(frozen=True)
class Units:
    """What is drawn with replacement: ``name`` of one unit, and the unit of each row, from 0.

    ``strata`` are the numbers of units in each stratum, whose units follow each other; empty if
    all are one stratum. ``block`` units that follow each other are drawn together.
    """

    name: str
    of_row: npt.NDArray[np.int64]  # (N,)
    count: int
    strata: tuple[int, ...] = ()
    block: int = 1

    def of(self, keep: npt.NDArray[np.bool_]) -> "Units":
        """Return the units of the rows to keep; a unit that loses all its rows is gone."""
        present, of_row = np.unique(self.of_row[keep], return_inverse=True)
        strata: tuple[int, ...] = ()
        if self.strata:
            stratum = np.searchsorted(np.cumsum(self.strata), present, side="right")
            strata = tuple(np.unique(stratum, return_counts=True)[1].tolist())
        return replace(self, of_row=of_row.astype(np.int64), count=len(present), strata=strata)

    def stratified(self, stratum: npt.NDArray[np.int64]) -> "Units":
        """Return the same units, numbered anew by the ``stratum`` of their rows (N,).

        Raises:
            ValueError: if rows of one unit are of different strata, with the number of such units.
        """
        low = np.full(self.count, np.iinfo(np.int64).max)
        high = np.full(self.count, np.iinfo(np.int64).min)
        np.minimum.at(low, self.of_row, stratum)
        np.maximum.at(high, self.of_row, stratum)
        if num_mixed := int((low < high).sum()):
            raise ValueError(
                f"{num_mixed} of {self.count} units ({self.name}) have rows of several strata"
            )
        order = np.argsort(low, kind="stable")
        number = np.empty(self.count, np.int64)
        number[order] = np.arange(self.count)
        strata = tuple(np.unique(low, return_counts=True)[1].tolist())
        return replace(self, of_row=number[self.of_row], strata=strata)

    @property
    def num_independent(self) -> int:
        """How many units are drawn independently of each other: whole blocks."""
        return self.count // self.block

    def __str__(self) -> str:
        """What is drawn and how many there are: 30 days, 4 blocks of 7 days."""
        plural = "s" if self.num_independent != 1 else ""
        if self.block == 1:
            return f"{self.count} {self.name}{plural}"
        return f"{self.num_independent} block{plural} of {self.block} {self.name}s"


@dataclass(frozen=True)
class Resampling:
    """How to draw: number of resamples, share of them inside an interval, seed, threads, method."""

    num_resamples: int
    confidence: float
    seed: int
    threads: int = 1
    method: IntervalMethod = "percentile"

    @property
    def tail(self) -> float:
        """Share of the resamples beyond each bound."""
        return (1 - self.confidence) / 2


@dataclass(frozen=True)
class Interval:
    """A value and its interval; None where there is none, and then ``reason`` says why.

    ``num_undefined`` resamples had no value (one class only); they are left out of the interval.
    ``standard_error`` and ``median`` are those of the resamples that had a value.
    """

    value: float | None
    low: float | None
    high: float | None
    num_undefined: int = 0
    reason: str = ""
    standard_error: float | None = None
    median: float | None = None

    def negated(self) -> Self:
        """Return the interval of the negative: of a difference taken the other way round."""
        return replace(
            self,
            value=_minus(self.value),
            low=_minus(self.high),
            high=_minus(self.low),
            median=_minus(self.median),
        )


@dataclass(frozen=True)
class Scored:
    """One model's metrics: point values, and the value of every resample (B,).

    ``influence`` is what each unit adds to a metric (U,), where bca intervals were asked for and
    it is known. ``no_interval`` says why a metric has no interval, for those that have none.
    ``classes`` are hits, true and predicted weight of each class, (3, C) of the rows and (B, 3, C)
    of the resamples; None of a target without classes, or where one metric alone was asked for.
    """

    points: Mapping[MetricName, float]
    resamples: Mapping[MetricName, Floats]
    influence: Mapping[MetricName, Floats] = field(default_factory=dict)
    no_interval: Mapping[MetricName, str] = field(default_factory=dict)
    classes: tuple[Floats, Floats] | None = None


def bootstrap(
    sample: Sample,
    units: Units,
    resampling: Resampling,
    *,
    threshold: float,
    only: MetricName | None = None,
) -> Scored:
    """Return every metric of ``sample`` (or ``only`` one) on the rows and on each resample.

    Resample ``b`` holds the same units for every sample with these units and seed.
    """
    terms = prepare(sample, units.of_row, threshold=threshold, only=only)
    columns_KU = sums_per_unit(terms.columns_KN, units)
    sums_BK, ranks_BR = resample(
        columns_KU,
        terms.rankings,
        num_resamples=resampling.num_resamples,
        seed=resampling.seed,
        threads=resampling.threads,
        strata=units.strata,
        block=units.block,
    )
    points = point_values(terms, units.count)
    resamples = combine(terms.task, sums_BK, ranks_BR)
    nothing = np.full(resampling.num_resamples, np.nan)  # of a metric without an interval
    if terms.pair is not None:
        resamples["spearman"] = _correlations(terms.pair, units, resampling)
    metrics = [metric for metric in METRICS[sample.task] if only in (None, metric.name)]
    added = _influence(terms, columns_KU, points) if resampling.method == "bca" else {}
    return Scored(
        {metric.name: points[metric.name] for metric in metrics},
        {metric.name: resamples.get(metric.name, nothing) for metric in metrics},
        {metric.name: added[metric.name] for metric in metrics if metric.name in added},
        {metric.name: metric.no_interval for metric in metrics if metric.no_interval},
        None if only else sums_of_classes(terms.task, terms.columns_KN.sum(axis=1), sums_BK),
    )


def estimate(metric: MetricName, scored: Scored, units: Units, resampling: Resampling) -> Interval:
    """Return one metric's value with its interval, or with the reason why it has none."""
    if reason := scored.no_interval.get(metric, ""):
        return _without(scored.points[metric], reason)
    return interval(
        scored.points[metric],
        scored.resamples[metric],
        units,
        resampling,
        influence=scored.influence.get(metric),
    )


def difference(
    metric: MetricName, model: Scored, reference: Scored, units: Units, resampling: Resampling
) -> Interval:
    """Return model − reference of one metric, on the same resamples."""
    value = model.points[metric] - reference.points[metric]
    if reason := model.no_interval.get(metric, ""):
        return _without(value, reason)
    is_known = metric in model.influence and metric in reference.influence
    return interval(
        value,
        model.resamples[metric] - reference.resamples[metric],
        units,
        resampling,
        influence=model.influence[metric] - reference.influence[metric] if is_known else None,
    )


def interval(
    value: float,
    resamples: Floats,
    units: Units,
    resampling: Resampling,
    *,
    influence: Floats | None = None,
) -> Interval:
    """Return ``value`` with the interval of its resamples.

    ``influence`` (U,) is what each unit adds to the value, which bca intervals need.
    """
    if not math.isfinite(value):
        return Interval(None, None, None, reason=UNDEFINED)
    defined = resamples[np.isfinite(resamples)]
    num_undefined = len(resamples) - len(defined)
    reason = _too_few(units, resampling)
    if not reason and num_undefined > MAX_UNDEFINED_SHARE * len(resamples):
        reason = f"undefined in {num_undefined} of {len(resamples)} resamples"
    tails = (resampling.tail, 1 - resampling.tail)
    if not reason and resampling.method == "bca":
        tails, reason = _corrected(value, defined, influence, units, resampling)
    if reason:
        return replace(_without(value, reason), num_undefined=num_undefined)
    low, median, high = np.quantile(defined, [tails[0], 0.5, tails[1]]).tolist()
    if resampling.method == "basic":
        low, high = 2 * value - high, 2 * value - low
    return Interval(
        value, low, high, num_undefined, standard_error=float(defined.std(ddof=1)), median=median
    )


def fewest_resamples(confidence: float) -> int:
    """Return how many resamples leave ``MIN_TAIL`` beyond each bound of an interval.

    >>> fewest_resamples(0.95), fewest_resamples(0.99)
    (200, 1000)
    """
    return math.ceil(round(2 * MIN_TAIL / (1 - confidence), 6))


def fewest_units(confidence: float) -> int:
    """Return from how many units on one resample alone cannot fill a tail of the interval.

    Of U units the rarest resample, one unit U times, has chance U^-U; with fewer units a bound is
    just the value of that one unit.

    >>> fewest_units(0.95), fewest_units(0.999)
    (4, 5)
    """
    tail = (1 - confidence) / 2
    return next(count for count in range(2, 1000) if count**-count <= tail)


def require_resamples(num_resamples: int, confidence: float) -> None:
    """Check that the tails of an interval hold enough resamples; for params.

    Raises:
        ValueError: with the number that would do.
    """
    fewest = fewest_resamples(confidence)
    if num_resamples < fewest:
        raise ValueError(
            f"num_resamples is {num_resamples} and confidence {confidence:g}, so fewer than "
            f"{MIN_TAIL} resamples lie beyond each bound; set num_resamples to {fewest} or more"
        )


def counts(
    units: Units, resampling: Resampling, *, first: int, num_resamples: int
) -> npt.NDArray[np.uint8]:
    """Return how often each unit is drawn (resamples, U), from resample ``first`` on."""
    return draw_counts(
        units.count,
        num_resamples=num_resamples,
        seed=resampling.seed,
        first=first,
        strata=units.strata,
        block=units.block,
    )


def sums_per_unit(columns_KN: Floats, units: Units) -> Floats:
    """Add up the rows of each unit: (K, N) becomes (K, U)."""
    if units.count == columns_KN.shape[1]:
        # One row each: put rows in unit order instead of adding.
        columns_KU = np.empty_like(columns_KN)
        columns_KU[:, units.of_row] = columns_KN
        return columns_KU
    return np.stack(
        [np.bincount(units.of_row, weights=c, minlength=units.count) for c in columns_KN]
    )


def sums_of_classes(task: Task, sums_K: Floats, sums_BK: Floats) -> tuple[Floats, Floats] | None:
    """Return ``Scored.classes`` out of the sums of the rows and of the resamples."""
    of_rows, of_resamples = class_sums(task, sums_K), class_sums(task, sums_BK)
    if of_rows is None or of_resamples is None:
        return None
    return of_rows, of_resamples.copy()  # without it the sums of all metrics would stay


def resampled_sums(columns_KU: Floats, units: Units, resampling: Resampling) -> Floats:
    """Return the sums of columns per unit on each resample: (K, U) becomes (B, K)."""
    sums_BK, _ = resample(
        columns_KU,
        (),
        num_resamples=resampling.num_resamples,
        seed=resampling.seed,
        threads=resampling.threads,
        strata=units.strata,
        block=units.block,
    )
    return sums_BK


def bytes_needed(num_rows: int, num_outputs: int, *, method: IntervalMethod = "percentile") -> int:
    """Return about how many bytes one call of ``bootstrap`` holds at its peak."""
    columns = 6 if num_outputs == 1 else 4 + 3 * num_outputs
    # Terms and their sums in unit order; per ranking its unit and two weights; a sort's scratch.
    # Measured at 2M rows: 25 words a row (binary), 61 (five classes), 14 (regression).
    words = 2 * columns + 4 * num_outputs + 10
    if method == "bca":  # sums and rankings without each unit, and every metric made of them
        words += 2 * columns + 2 * num_outputs
    return num_rows * 8 * words


def _too_few(units: Units, resampling: Resampling) -> str:
    """Why there are too few units or resamples for any interval; empty if there are not."""
    share = f"a {100 * resampling.confidence:.4g} % interval"
    if units.num_independent < (fewest := fewest_units(resampling.confidence)):
        return f"{units}: {share} needs at least {fewest}"
    if units.strata and min(units.strata) < 2:
        return f"a stratum has only 1 {units.name}: it would be the same in every resample"
    if resampling.num_resamples < (fewest := fewest_resamples(resampling.confidence)):
        return f"{resampling.num_resamples} resamples: {share} needs at least {fewest}"
    return ""


def _corrected(
    value: float,
    defined: Floats,
    influence: Floats | None,
    units: Units,
    resampling: Resampling,
) -> tuple[tuple[float, float], str]:
    """Return the tails of a bca interval, or why it has none."""
    from scipy.special import ndtr, ndtri

    tails = np.array([resampling.tail, 1 - resampling.tail])
    remedy = "set `evaluate.interval` to percentile or basic"
    if units.strata or units.block > 1:
        return (0, 0), f"bca needs units that are drawn one by one and alike; {remedy}"
    if influence is None or np.isnan(influence).all():
        return (0, 0), f"bca needs what each {units.name} adds to the metric; {remedy}"
    if not np.isfinite(influence).all():
        return (0, 0), f"bca: undefined without one of the {units.name}s; {remedy}"
    below = ((defined < value).mean() + (defined <= value).mean()) / 2
    if not 0 < below < 1:
        return (0, 0), f"bca: every resample lies on one side of the value; {remedy}"
    bias = ndtri(below)
    moved = bias + ndtri(tails)
    found = ndtr(bias + moved / (1 - _acceleration(influence) * moved))
    if min(found[0], 1 - found[1]) * len(defined) < 1:
        return (0, 0), f"bca: a bound lies beyond all {len(defined)} resamples; {remedy}"
    return (float(found[0]), float(found[1])), ""


def _acceleration(influence: Floats) -> float:
    """A sixth of the skewness of what the units add; 0 where they all add the same."""
    spread = influence - influence.mean()
    size = math.sqrt(float((spread**2).sum()))
    return float((spread**3).sum()) / (6 * size**3) if size else 0.0


def _influence(
    terms: Terms, columns_KU: Floats, points: Mapping[MetricName, float]
) -> dict[MetricName, Floats]:
    """Return what each unit adds to each metric: the value less the value without the unit."""
    num_units = columns_KU.shape[1]
    ranks_UR2 = np.empty((num_units, len(terms.rankings), 2))
    for number, ranking in enumerate(terms.rankings):
        ranks_UR2[:, number] = rank_once(ranking, num_units) - rank_influence(ranking, num_units)
    sums_UK = columns_KU.sum(axis=1) - columns_KU.T
    without = combine(terms.task, sums_UK, ranks_UR2)
    return {name: points[name] - values for name, values in without.items()}


def _correlations(pair: RankPair, units: Units, resampling: Resampling) -> Floats:
    """Return the rank correlation of every resample, (B,)."""

    def run(first: int) -> Floats:
        num_resamples = min(_CHUNK, resampling.num_resamples - first)
        drawn = counts(units, resampling, first=first, num_resamples=num_resamples)
        return rank_correlations(pair, drawn)

    with ThreadPoolExecutor(resampling.threads) as pool:
        return np.concatenate(list(pool.map(run, range(0, resampling.num_resamples, _CHUNK))))


def _without(value: float, reason: str) -> Interval:
    return Interval(value if math.isfinite(value) else None, None, None, reason=reason)


def _minus(value: float | None) -> float | None:
    return None if value is None else -value
