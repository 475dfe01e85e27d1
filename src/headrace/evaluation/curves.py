"""The points behind the figures: curves, calibration, residuals, densities. Numbers only.

Curves are thinned to a few hundred points that lie on the full curve, so figures and plot files
stay small however many rows there are.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.bootstrap import Units
from headrace.evaluation.metrics import Sample

Floats: TypeAlias = npt.NDArray[np.float64]
_CURVE_POINTS = 200
_MAX_BINS = 200
FINER = 4  # bins that histograms hold per bin of the rule, so that a reader may look closer
_DECADES = 3  # an axis that spans more is logarithmic


@dataclass(frozen=True)
class Curve:
    """Points of a line."""

    x: Floats
    y: Floats


@dataclass(frozen=True)
class Calibration:
    """Rows binned by prediction: means per bin, and the interval of the observed mean.

    ``low`` and ``high`` are NaN where the units are too few for an interval.
    """

    predicted: Floats
    observed: Floats
    low: Floats
    high: Floats
    share: Floats  # of the rows' weight


@dataclass(frozen=True)
class Histogram:
    """Weighted shares of rows between edges."""

    edges: Floats
    share: Floats


@dataclass(frozen=True)
class Grid:
    """Weighted shares of rows in cells; ``share[j, i]`` lies between x edges i and y edges j."""

    x_edges: Floats
    y_edges: Floats
    share: Floats


def roc(score: Floats, is_positive: npt.NDArray[np.bool_], weight: Floats | None) -> Curve:
    """Return the ROC curve: share of negatives taken (x) and of positives taken (y)."""
    positives, negatives = _taken(score, is_positive, weight)
    x, y = negatives / negatives[-1], positives / positives[-1]
    keep = _spread(x + y)
    return Curve(np.insert(x[keep], 0, 0), np.insert(y[keep], 0, 0))


def precision_recall(
    score: Floats, is_positive: npt.NDArray[np.bool_], weight: Floats | None
) -> Curve:
    """Return recall (x) and precision (y) from the highest threshold down."""
    positives, negatives = _taken(score, is_positive, weight)
    is_used = positives > 0  # above the first positive row precision is 0 at recall 0
    recall = positives[is_used] / positives[-1]
    precision = positives[is_used] / (positives + negatives)[is_used]
    keep = _spread(recall)
    return Curve(recall[keep], precision[keep])


def calibration(
    prediction: Floats,
    observed: Floats,
    weight: Floats | None,
    units: Units,
    *,
    confidence: float,
    max_bins: int = 10,
) -> Calibration:
    """Return mean prediction and mean outcome in bins that hold about equally many rows.

    The interval is normal, from the spread of the units' own sums, so rows of one day or group
    count together as they do in every other interval.
    """
    from scipy.special import ndtri

    weights = np.ones_like(prediction) if weight is None else weight
    edges = np.unique(np.quantile(prediction, np.linspace(0, 1, max_bins + 1)[1:-1]))
    bin_of_row = np.searchsorted(edges, prediction, side="left")
    half_width = float(ndtri((1 + confidence) / 2))
    rows: list[tuple[float, float, float, float]] = []
    for number in np.unique(bin_of_row[weights > 0]):
        is_in = bin_of_row == number
        mass, of_bin = weights[is_in], units.of_row[is_in]
        mean = float(np.average(observed[is_in], weights=mass))
        sums = np.bincount(of_bin, weights=mass * (observed[is_in] - mean))
        is_enough = len(np.unique(of_bin)) >= 2
        error = float(np.sqrt((sums**2).sum())) / mass.sum() if is_enough else np.nan
        rows.append(
            (np.average(prediction[is_in], weights=mass), mean, error, mass.sum() / weights.sum())
        )
    predicted, mean_observed, errors, share = np.array(rows).T
    return Calibration(
        predicted=predicted,
        observed=mean_observed,
        low=mean_observed - half_width * errors,
        high=mean_observed + half_width * errors,
        share=share,
    )


def confidence_of(sample: Sample) -> tuple[Floats, Floats]:
    """Return the likeliest class's probability and whether it was right, per row (N,)."""
    is_right = sample.prediction.argmax(axis=1) == sample.truth
    return sample.prediction.max(axis=1), is_right.astype(np.float64)


def spans_decades(values: Floats) -> bool:
    """Tell whether ``values`` are positive and span so much that small ones would not be seen."""
    if not len(values) or values.min() <= 0:
        return False
    return bool(values.max() > 10**_DECADES * values.min())


def bin_edges(values: Floats) -> Floats:
    """Return equal bins over all of ``values``, ``FINER`` per bin of Freedman and Diaconis' width.

    The rule's own bins are at most 200, however far the farthest value lies.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.array([low - 0.5, high + 0.5])
    quartiles = np.quantile(values, [0.25, 0.75])
    width = 2 * float(quartiles[1] - quartiles[0]) / len(values) ** (1 / 3)
    num_bins = int(np.clip(np.ceil((high - low) / width), 1, _MAX_BINS)) if width else _MAX_BINS
    return np.linspace(low, high, FINER * num_bins + 1)


def histogram(values: Floats, edges: Floats, weight: Floats | None) -> Histogram:
    """Return the share of rows between ``edges``, the last edge included."""
    counts, _ = np.histogram(values, edges, weights=weight)
    return Histogram(edges, counts / counts.sum())


def coarse(found: Histogram) -> Histogram:
    """Return the histogram in the rule's own bins."""
    edges = np.append(found.edges[:-1:FINER], found.edges[-1])
    return Histogram(edges, np.add.reduceat(found.share, np.arange(0, len(found.share), FINER)))


def grid(x: Floats, y: Floats, weight: Floats | None, *, num_bins: int = 40) -> Grid:
    """Return the share of rows in cells over all of ``x`` and all of ``y``.

    Cells are equally wide, by their ratio where a logarithmic axis will show them.
    """
    edges = [_cell_edges(values, num_bins) for values in (x, y)]
    counts, _, _ = np.histogram2d(y, x, (edges[1], edges[0]), weights=weight)
    return Grid(edges[0], edges[1], counts / counts.sum())


def confusion(
    truth: Floats, predicted: npt.NDArray[Any], weight: Floats | None, *, num_classes: int
) -> Floats:
    """Return the share of rows per true class (row) and predicted class (column), (C, C)."""
    cell = truth.astype(np.int64) * num_classes + predicted.astype(np.int64)
    counts = np.bincount(cell, weights=weight, minlength=num_classes**2)
    shares: Floats = counts.reshape(num_classes, num_classes) / counts.sum()
    return shares


def density(values: Floats) -> Curve:
    """Return a Gaussian kernel density of ``values`` (Silverman's width); empty if constant."""
    defined = values[np.isfinite(values)]
    if len(defined) < 2 or np.ptp(defined) <= 1e-12 * np.abs(defined).max():
        return Curve(np.empty(0), np.empty(0))
    quartiles = np.quantile(defined, [0.25, 0.75])
    spread = min(defined.std(), (quartiles[1] - quartiles[0]) / 1.349) or defined.std()
    width = 0.9 * spread * len(defined) ** -0.2
    x = np.linspace(defined.min() - 3 * width, defined.max() + 3 * width, _CURVE_POINTS)
    y = np.exp(-0.5 * ((x[:, None] - defined) / width) ** 2).mean(axis=1)
    return Curve(x, y / (width * np.sqrt(2 * np.pi)))


def _cell_edges(values: Floats, num_bins: int) -> Floats:
    low, high = float(values.min()), float(values.max())
    if spans_decades(values):
        edges = np.geomspace(low, high, num_bins + 1)
        edges[0], edges[-1] = low, high  # to the bit, so that no row falls outside
        return edges
    return np.linspace(low, high if high > low else low + 1, num_bins + 1)


def _taken(
    score: Floats, is_positive: npt.NDArray[np.bool_], weight: Floats | None
) -> tuple[Floats, Floats]:
    """Weight of positives and of negatives at or above each distinct score, highest first."""
    weights = np.ones_like(score) if weight is None else weight
    order = np.argsort(-score, kind="stable")
    is_last = np.append(np.diff(score[order]) != 0, True)
    positives = np.cumsum(np.where(is_positive, weights, 0)[order])[is_last]
    negatives = np.cumsum(np.where(is_positive, 0, weights)[order])[is_last]
    return positives, negatives


def _spread(position: Floats) -> npt.NDArray[np.int64]:
    """Indices of about 200 points, equally spaced along the never falling ``position``."""
    wanted = np.linspace(position[0], position[-1], _CURVE_POINTS)
    found = np.searchsorted(position, wanted, side="left")
    return np.unique(np.append(found, len(position) - 1))
