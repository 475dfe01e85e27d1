"""Which charts a target gets, by its task, and the points that go into its plot files."""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation import charts, curves
from headrace.evaluation.bootstrap import Scored, Units
from headrace.evaluation.comparison import Comparison
from headrace.evaluation.metrics import Sample
from headrace.evaluation.page import Chart
from headrace.schema import Target

Floats: TypeAlias = npt.NDArray[np.float64]
Points: TypeAlias = dict[str, dict[str, Floats]]  # kind of line → model (or class) → (points, 2)


def interval_charts(
    comparison: Comparison, scored: Mapping[str, Scored], *, confidence: float
) -> list[Chart]:
    """Return the charts that need no rows, only what came of the resamples."""
    drawn = [charts.forest(comparison, confidence=confidence)]
    if len(comparison.models) > 1:
        drawn.append(charts.differences(comparison, confidence=confidence))
    resamples = {model: found.resamples for model, found in scored.items()}
    return [*drawn, charts.densities(comparison, resamples)]


def draw(
    target: Target,
    chosen: str,
    samples: Mapping[str, Sample],
    units: Units,
    *,
    confidence: float,
    threshold: float,
) -> tuple[list[Chart], Points]:
    """Return the charts of one target's predictions, and the points of its curves."""
    calibrations = _calibrations(target, samples, units, confidence)
    # The chosen model is what a chart of one model at a time shows first.
    first = {chosen: samples[chosen]} | dict(samples)
    if target.task == "regression":
        drawn, points = _regression(target, first, samples)
    elif target.task == "binary":
        drawn, points = _binary(target, first, samples, threshold)
    else:
        drawn, points = _multiclass(target, first)
    predicted, observed = _calibration_axes(target)
    drawn.append(charts.calibrations(calibrations, predicted=predicted, observed=observed))
    points["calibration"] = {
        model: np.column_stack([c.predicted, c.observed]) for model, c in calibrations.items()
    }
    return drawn, points


def _calibrations(
    target: Target, samples: Mapping[str, Sample], units: Units, confidence: float
) -> dict[str, curves.Calibration]:
    found = {}
    for model, sample in samples.items():
        stated, observed = (
            curves.confidence_of(sample)
            if target.task == "multiclass"
            else (sample.prediction, sample.truth)
        )
        found[model] = curves.calibration(
            stated, observed, sample.weight, units, confidence=confidence
        )
    return found


def _calibration_axes(target: Target) -> tuple[str, str]:
    if target.task == "regression":
        return f"mean prediction of {target.name} in the bin", "mean truth in the bin"
    if target.task == "binary":
        positive = target.labels[1]
        return f"mean predicted probability of {positive}", f"share of rows that are {positive}"
    return "mean probability of the likeliest class", "share of rows where it is right"


def _regression(
    target: Target, first: Mapping[str, Sample], samples: Mapping[str, Sample]
) -> tuple[list[Chart], Points]:
    unit = f"unit of {target.name}"
    errors = {model: s.prediction - s.truth for model, s in samples.items()}
    edges = curves.bin_edges(np.concatenate(list(errors.values())))
    histograms = {m: curves.histogram(errors[m], edges, s.weight) for m, s in samples.items()}
    drawn = [
        charts.cells(
            {m: curves.grid(s.prediction, s.truth, s.weight) for m, s in first.items()},
            name="predicted",
            title="Truth against prediction",
            y="truth",
            unit=unit,
            is_diagonal=True,
        ),
        charts.cells(
            {m: curves.grid(s.prediction, errors[m], s.weight) for m, s in first.items()},
            name="residual_cells",
            title="Residual against prediction",
            y="prediction − truth",
            unit=unit,
            is_diagonal=False,
        ),
        charts.residuals(histograms, unit=unit),
    ]
    return drawn, {"residuals": {m: _bin_points(h) for m, h in histograms.items()}}


def _binary(
    target: Target, first: Mapping[str, Sample], samples: Mapping[str, Sample], threshold: float
) -> tuple[list[Chart], Points]:
    drawn: list[Chart] = []
    points: Points = {}
    sample = next(iter(samples.values()))
    if len(np.unique(sample.truth)) == 2:  # with one class there is no curve
        roc = {m: curves.roc(s.prediction, s.truth == 1, s.weight) for m, s in samples.items()}
        precision_recall = {
            m: curves.precision_recall(s.prediction, s.truth == 1, s.weight)
            for m, s in samples.items()
        }
        base_rate = float(np.average(sample.truth, weights=sample.weight))
        drawn = [
            charts.roc(roc),
            charts.precision_recall(precision_recall, base_rate=base_rate),
        ]
        points = {"roc": _points(roc), "precision_recall": _points(precision_recall)}
    shares = {
        m: curves.confusion(s.truth, s.prediction >= threshold, s.weight, num_classes=2)
        for m, s in first.items()
    }
    how = f"{target.labels[1]} from a probability of {threshold:g}"
    drawn.append(charts.confusions(shares, target.labels, how=how))
    return drawn, points


def _multiclass(target: Target, first: Mapping[str, Sample]) -> tuple[list[Chart], Points]:
    shares = {
        m: curves.confusion(
            s.truth, s.prediction.argmax(axis=1), s.weight, num_classes=len(target.labels)
        )
        for m, s in first.items()
    }
    roc = {
        model: {
            label: curves.roc(sample.prediction[:, code], sample.truth == code, sample.weight)
            for code, label in enumerate(target.labels)
            if 0 < (sample.truth == code).sum() < len(sample.truth)
        }
        for model, sample in first.items()
    }
    drawn = [charts.confusions(shares, target.labels, how="the likeliest class")]
    chosen = next(iter(roc.values()))
    if chosen:  # with one class there is no curve
        drawn.append(charts.class_roc(roc))
    return drawn, {"class_roc": _points(chosen)}


def _bin_points(found: curves.Histogram) -> Floats:
    bins = curves.coarse(found)
    return np.column_stack([(bins.edges[:-1] + bins.edges[1:]) / 2, bins.share])


def _points(found: Mapping[str, curves.Curve]) -> dict[str, Floats]:
    return {name: np.column_stack([curve.x, curve.y]) for name, curve in found.items()}
