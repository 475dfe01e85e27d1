"""Percentile intervals of metrics from resamples of units, and of differences between models.

Rows are often not independent: flights of one day share its weather, visits of one patient share
the patient. So what is drawn with replacement is the *unit* (row, group or time block), with all
its rows; a resample has as many units as the data (fewer would widen the interval for no reason).
Every interval says its unit and how many there are.

Two models are compared on the same resamples: their difference has an interval of its own, often
far narrower than either model's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.metrics import (
    METRICS,
    MetricName,
    Sample,
    combine,
    point_values,
    prepare,
)
from headrace.kernels.bootstrap import resample

Floats: TypeAlias = npt.NDArray[np.float64]

# With fewer units a percentile interval covers the truth clearly less often than it says.
FEW_UNITS = 20
# With more undefined resamples the rest no longer stands for the data.
MAX_UNDEFINED_SHARE = 0.2


@dataclass(frozen=True)
class Units:
    """What is drawn with replacement: ``name`` of one unit, and the unit of each row, from 0."""

    name: str
    of_row: npt.NDArray[np.int64]  # (N,)
    count: int

    def of(self, keep: npt.NDArray[np.bool_]) -> "Units":
        """Return the units of the rows to keep; a unit that loses all its rows is gone."""
        present, of_row = np.unique(self.of_row[keep], return_inverse=True)
        return Units(self.name, of_row.astype(np.int64), len(present))


@dataclass(frozen=True)
class Resampling:
    """How to draw: number of resamples, share of them inside an interval, seed, threads."""

    num_resamples: int
    confidence: float
    seed: int
    threads: int = 1


@dataclass(frozen=True)
class Interval:
    """A value and its percentile interval; None where there is none, and then ``reason`` says why.

    ``num_undefined`` resamples had no value (one class only); they are left out of the interval.
    """

    value: float | None
    low: float | None
    high: float | None
    num_undefined: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Scored:
    """One model's metrics: point values, and the value of every resample (B,)."""

    points: Mapping[MetricName, float]
    resamples: Mapping[MetricName, Floats]


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
    sums_BK, ranks_BR = resample(
        sums_per_unit(terms.columns_KN, units),
        terms.rankings,
        num_resamples=resampling.num_resamples,
        seed=resampling.seed,
        threads=resampling.threads,
    )
    points = point_values(terms, units.count)
    resamples = combine(terms.task, sums_BK, ranks_BR)
    names = [metric.name for metric in METRICS[sample.task] if only in (None, metric.name)]
    return Scored({n: points[n] for n in names}, {n: resamples[n] for n in names})


def interval(value: float, resamples: Floats, units: Units, resampling: Resampling) -> Interval:
    """Return ``value`` with the percentile interval of its resamples."""
    if not math.isfinite(value):
        return Interval(None, None, None, reason="undefined")
    if units.count < 2:
        return Interval(
            value, None, None, reason=f"{units.count} {units.name}: an interval needs at least 2"
        )
    defined = resamples[np.isfinite(resamples)]
    num_undefined = len(resamples) - len(defined)
    if num_undefined > MAX_UNDEFINED_SHARE * len(resamples):
        reason = f"undefined in {num_undefined} of {len(resamples)} resamples"
        return Interval(value, None, None, num_undefined, reason)
    tail = (1 - resampling.confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(value, float(low), float(high), num_undefined)


def difference(
    metric: MetricName, model: Scored, reference: Scored, units: Units, resampling: Resampling
) -> Interval:
    """Return model − reference of one metric, on the same resamples."""
    return interval(
        model.points[metric] - reference.points[metric],
        model.resamples[metric] - reference.resamples[metric],
        units,
        resampling,
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


def bytes_needed(num_rows: int, num_outputs: int) -> int:
    """Return about how many bytes one call of ``bootstrap`` holds at its peak."""
    columns = 6 if num_outputs == 1 else 4 + 3 * num_outputs
    # Terms and their sums in unit order; per ranking its unit and two weights; a sort's scratch.
    # Measured at 2M rows: 25 words a row (binary), 61 (five classes), 14 (regression).
    return num_rows * 8 * (2 * columns + 4 * num_outputs + 10)
