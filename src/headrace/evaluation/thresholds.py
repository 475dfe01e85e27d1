"""At which probability a class is predicted: tuned on valid rows, kept at 0.5 where luck may do it.

Rows are sorted once; the counts of hits, misses and false alarms at every threshold are then sums
from one end, so a sweep costs O(n), and so does a resample of it. Thresholds lie halfway between
neighbouring probabilities; of equally good ones the nearest to 0.5 is taken.

A threshold that is best on some rows looks better there than it is. So its gain over 0.5 is judged
cross-fitted: the rows of a part get the threshold that is best on the other parts. Only if the
interval of that gain excludes 0 does the tuned threshold, from all rows, replace 0.5. Its own
interval is that of the best threshold over resamples: often wide, for curves are flat at the top.

Of several classes with costs no number is tuned: the class of least expected cost is predicted.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.bootstrap import (
    Interval,
    Resampling,
    Units,
    counts,
    interval,
    resampled_sums,
    sums_per_unit,
)
from headrace.evaluation.metrics import Sample, combine, metric_of
from headrace.evaluation.rules import DEFAULT, Codes, Costs
from headrace.evaluation.selection import NUM_PARTS

Floats: TypeAlias = npt.NDArray[np.float64]
ThresholdMetric = Literal["f1", "balanced_accuracy", "mcc", "accuracy"]

_CHUNK = 16  # resamples that one thread takes at a time
_DRAWN = 200  # points of the curve that is written
_SWEPT = 2000  # thresholds that a resample tries at most


@dataclass(frozen=True)
class Objective:
    """What decisions are judged by: a metric of a binary target, or costs, which are to be low."""

    metric: ThresholdMetric | None
    costs: Costs | None

    @property
    def title(self) -> str:
        """Its name in texts."""
        return "mean cost" if self.metric is None else metric_of("binary", self.metric).title

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1."""
        return -1 if self.metric is None else 1

    def of_confusion(self, weight: Any) -> Any:
        """Return the value from weights of rows by class, (..., true, predicted); NaN if undefined.

        F1 and MCC where a class is predicted for all rows or none are as the metrics have them.
        """
        if self.costs is not None:
            with np.errstate(invalid="ignore", divide="ignore"):
                return (weight * np.array(self.costs)).sum(axis=(-2, -1)) / weight.sum(
                    axis=(-2, -1)
                )
        zero = np.zeros(weight.shape[:-2])
        sums = np.stack(
            [
                weight.sum(axis=(-2, -1)), zero, zero, weight[..., 1, 1], weight[..., 0, 1],
                weight[..., 1, 0], weight[..., 0, 0],
            ],
            axis=-1,
        )  # fmt: skip
        assert self.metric is not None
        return combine("binary", sums, np.empty((*weight.shape[:-2], 0, 2)))[self.metric]


@dataclass(frozen=True)
class Tuned:
    """The threshold that is best on valid rows beside 0.5, and which of them is used.

    ``value`` is that of the tuned threshold, cross-fitted; ``gain`` of it over 0.5, positive is
    better. ``curve`` is (threshold, value) on the valid rows.
    """

    threshold: float  # to use
    best: Interval
    value: Interval
    at_default: Interval
    gain: Interval
    reason: str
    curve: tuple[tuple[float, float], ...]


def tune(sample: Sample, units: Units, resampling: Resampling, objective: Objective) -> Tuned:
    """Return the threshold for the probabilities of a binary ``sample``.

    Raises:
        ValueError: if the objective has no value at any threshold.
    """
    sweep = Sweep(sample, units, objective)
    best = sweep.best(sweep.weight)
    if best is None:
        raise ValueError(f"{objective.title} has no value at any threshold")
    found = interval(best, sweep.resampled(resampling), units, resampling)
    is_default = sample.prediction >= DEFAULT
    honest = _cross_fitted(sample, units, objective)
    value, at_default, gain = compare(
        sample, honest, is_default.astype(np.int64), units, resampling, objective
    )
    is_used, told = verdict(gain, objective, units, resampling)
    reason = (
        f"{best:.4g}: {told}" if is_used else f"0.5 is kept; the tuned threshold {best:.4g}: {told}"
    )
    return Tuned(
        threshold=best if is_used else DEFAULT,
        best=found,
        value=value,
        at_default=at_default,
        gain=gain,
        reason=reason,
        curve=sweep.curve(),
    )


def compare(
    sample: Sample,
    decided: Codes,
    reference: Codes,
    units: Units,
    resampling: Resampling,
    objective: Objective,
) -> tuple[Interval, Interval, Interval]:
    """Return the values of two ways to decide the same rows, and the gain of the first."""
    num_classes = 2 if sample.prediction.ndim == 1 else sample.prediction.shape[1]
    cells = [confusion_cells(sample, way, num_classes) for way in (decided, reference)]
    columns_KU = sums_per_unit(np.concatenate(cells), units)
    sums_BK = resampled_sums(columns_KU, units, resampling)

    def values(sums: Floats) -> tuple[Any, Any]:
        shape = (*sums.shape[:-1], 2, num_classes, num_classes)
        both = objective.of_confusion(sums.reshape(shape))
        return both[..., 0], both[..., 1]

    points, drawn = values(columns_KU.sum(axis=1)), values(sums_BK)
    first, second = (
        interval(float(point), of, units, resampling)
        for point, of in zip(points, drawn, strict=True)
    )
    sign = objective.sign
    gain = interval(
        sign * float(points[0] - points[1]), sign * (drawn[0] - drawn[1]), units, resampling
    )
    return first, second, gain


def verdict(
    gain: Interval, objective: Objective, units: Units, resampling: Resampling
) -> tuple[bool, str]:
    """Return whether a gain is beyond doubt, and what to say of it."""
    if gain.value is None or gain.low is None or gain.high is None:
        return False, f"its gain in {objective.title} has no interval ({gain.reason})"
    what = "excludes 0" if gain.low > 0 else "includes 0" if gain.high >= 0 else "is below 0"
    told = (
        f"its gain in {objective.title} {what}: {gain.value:.3g} [{gain.low:.3g}, {gain.high:.3g}],"
        f" {100 * resampling.confidence:.4g} % interval over {units}"
    )
    return gain.low > 0, told


def confusion_cells(sample: Sample, decided: Codes, num_classes: int) -> Floats:
    """Return the weight of each row in its cell of the confusion matrix, (C × C, N)."""
    weight = np.ones(len(decided)) if sample.weight is None else sample.weight
    cell = sample.truth.astype(np.int64) * num_classes + decided
    columns = np.zeros((num_classes**2, len(decided)))
    columns[cell, np.arange(len(decided))] = weight
    return columns


class Sweep:
    """A binary sample sorted by probability, for any weights of its rows."""

    def __init__(self, sample: Sample, units: Units, objective: Objective) -> None:
        order = np.argsort(sample.prediction, kind="stable")
        score = sample.prediction[order]
        self._objective, self._units = objective, units
        self._is_positive = sample.truth[order] == 1
        self._unit = units.of_row[order]
        weight = np.ones(len(order)) if sample.weight is None else sample.weight
        self.weight = weight[order]
        starts = np.flatnonzero(np.r_[True, np.diff(score) > 0])
        different = score[starts]
        # Candidate j predicts class 1 from the j-th different probability on; the last one never.
        self._starts = np.r_[starts, len(score)]
        self.thresholds = _between(np.r_[0.0, different], np.r_[different, 1.0])
        if different[-1] >= 1:  # no threshold is above it
            self._starts, self.thresholds = self._starts[:-1], self.thresholds[:-1]

    def values(self, weight: Floats, places: Codes | None = None) -> Floats:
        """Return the objective at every threshold, or at some; NaN where it is undefined."""
        starts = self._starts if places is None else self._starts[places]
        positive = np.r_[0.0, np.cumsum(weight * self._is_positive)]
        negative = np.r_[0.0, np.cumsum(weight * ~self._is_positive)]
        miss, rest = positive[starts], negative[starts]
        confusion = np.stack([rest, negative[-1] - rest, miss, positive[-1] - miss], axis=-1)
        found: Floats = self._objective.of_confusion(confusion.reshape(-1, 2, 2))
        return found

    def best(self, weight: Floats, places: Codes | None = None) -> float | None:
        """Return the best threshold, or of some; None if the objective has no value at any."""
        values = self._objective.sign * self.values(weight, places)
        values[np.isnan(values)] = -np.inf
        high = values.max()
        if high == -np.inf:
            return None
        # Equal but for rounding of sums.
        thresholds = self.thresholds if places is None else self.thresholds[places]
        ties = thresholds[values >= high - 1e-12 * max(1.0, abs(high))]
        return float(ties[np.argmin(np.abs(ties - DEFAULT))])

    def resampled(self, resampling: Resampling) -> Floats:
        """Return the best threshold of each resample (B,), NaN where there is none.

        Of more than ``_SWEPT`` thresholds every so many-th is tried: the interval of a threshold is
        far wider than the gaps between them.
        """
        places = _spread(len(self.thresholds), _SWEPT)
        found = np.full(resampling.num_resamples, np.nan)

        def run(first: int) -> None:
            size = min(_CHUNK, resampling.num_resamples - first)
            drawn = counts(self._units, resampling, first=first, num_resamples=size)
            for number, count in enumerate(drawn):
                best = self.best(self.weight * count[self._unit], places)
                found[first + number] = np.nan if best is None else best

        with ThreadPoolExecutor(resampling.threads) as pool:
            list(pool.map(run, range(0, resampling.num_resamples, _CHUNK)))
        return found

    def curve(self) -> tuple[tuple[float, float], ...]:
        """Return thresholds and values, at most ``_DRAWN`` of them, where there is a value."""
        values = self.values(self.weight)
        present = np.flatnonzero(~np.isnan(values))
        kept = present[_spread(len(present), _DRAWN)]
        return tuple(zip(self.thresholds[kept].tolist(), values[kept].tolist(), strict=True))


def _spread(count: int, most: int) -> Codes:
    """Return ``most`` places of ``count``, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _between(low: Floats, high: Floats) -> Floats:
    """Return a short number above ``low`` and not above ``high``; 0.5 where it lies there."""
    middle = np.round((low + high) / 2, 12)
    is_inside = (low < middle) & (middle <= high)
    middle = np.where(is_inside, middle, high)
    return np.where((low < DEFAULT) & (high >= DEFAULT), DEFAULT, middle)


def _cross_fitted(sample: Sample, units: Units, objective: Objective) -> Codes:
    """Return the class of each row at the threshold that is best on the other parts."""
    part = units.of_row % NUM_PARTS
    decided = (sample.prediction >= DEFAULT).astype(np.int64)
    for number in np.unique(part):
        is_own = part == number
        if is_own.all():
            break
        best = _fit(sample.where(~is_own), units.of(~is_own), objective)
        decided[is_own] = sample.prediction[is_own] >= (DEFAULT if best is None else best)
    return decided


def _fit(sample: Sample, units: Units, objective: Objective) -> float | None:
    sweep = Sweep(sample, units, objective)
    return sweep.best(sweep.weight)
