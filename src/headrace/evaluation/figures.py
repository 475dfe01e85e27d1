"""Which figures a target gets, by its task, and the points that go into its plot files."""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation import curves, plots
from headrace.evaluation.bootstrap import Scored, Units
from headrace.evaluation.canvas import Figure
from headrace.evaluation.comparison import Comparison
from headrace.evaluation.metrics import Sample
from headrace.schema import Target

Floats: TypeAlias = npt.NDArray[np.float64]
Points: TypeAlias = dict[str, dict[str, Floats]]  # kind of line → model (or class) → (points, 2)


def draw(
    target: Target,
    comparison: Comparison,
    samples: Mapping[str, Sample],
    scored: Mapping[str, Scored],
    units: Units,
    *,
    confidence: float,
) -> tuple[list[Figure], Points]:
    """Return the figures of one target, and the points of its curves."""
    figures = [plots.forest(comparison, confidence=confidence)]
    if len(comparison.models) > 1:
        figures.append(plots.differences(comparison, confidence=confidence))
    resamples = {model: found.resamples[comparison.primary] for model, found in scored.items()}
    figures.append(plots.densities(comparison, resamples))
    by_task = {"regression": _regression, "binary": _binary, "multiclass": _multiclass}
    more, points = by_task[target.task](
        target, comparison.chosen, samples, _calibrations(target, samples, units, confidence)
    )
    return figures + more, points


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


def _regression(
    target: Target,
    chosen: str,
    samples: Mapping[str, Sample],
    calibrations: Mapping[str, curves.Calibration],
) -> tuple[list[Figure], Points]:
    errors = {model: s.prediction - s.truth for model, s in samples.items()}
    edges = curves.bin_edges(np.concatenate(list(errors.values())))
    histograms = {m: curves.histogram(errors[m], edges, s.weight) for m, s in samples.items()}
    best = samples[chosen]
    figures = [
        plots.predicted_actual(
            target.name, chosen, curves.grid(best.prediction, best.truth, best.weight)
        ),
        plots.residuals(target.name, histograms),
        plots.calibrations(
            target.name,
            calibrations,
            predicted=f"mean prediction of {target.name} in the bin",
            observed="mean truth in the bin",
        ),
    ]
    middles = (edges[:-1] + edges[1:]) / 2
    return figures, {
        "calibration": _calibration_points(calibrations),
        "residuals": {m: np.column_stack([middles, h.share]) for m, h in histograms.items()},
    }


def _binary(
    target: Target,
    chosen: str,  # noqa: ARG001 - one shape for all tasks; these figures show every model
    samples: Mapping[str, Sample],
    calibrations: Mapping[str, curves.Calibration],
) -> tuple[list[Figure], Points]:
    positive = target.labels[1]
    figures = [
        plots.calibrations(
            target.name,
            calibrations,
            predicted=f"mean predicted probability of {positive}",
            observed=f"share of rows that are {positive}",
        )
    ]
    points = {"calibration": _calibration_points(calibrations)}
    first = next(iter(samples.values()))
    if len(np.unique(first.truth)) == 2:  # with one class there is no curve
        roc = {m: curves.roc(s.prediction, s.truth == 1, s.weight) for m, s in samples.items()}
        precision_recall = {
            m: curves.precision_recall(s.prediction, s.truth == 1, s.weight)
            for m, s in samples.items()
        }
        base_rate = float(np.average(first.truth, weights=first.weight))
        figures.insert(
            0, plots.binary_curves(target.name, roc, precision_recall, base_rate=base_rate)
        )
        points |= {"roc": _points(roc), "precision_recall": _points(precision_recall)}
    return figures, points


def _multiclass(
    target: Target,
    chosen: str,
    samples: Mapping[str, Sample],
    calibrations: Mapping[str, curves.Calibration],
) -> tuple[list[Figure], Points]:
    best = samples[chosen]
    roc = {
        label: curves.roc(best.prediction[:, code], best.truth == code, best.weight)
        for code, label in enumerate(target.labels)
        if 0 < (best.truth == code).sum() < len(best.truth)
    }
    figures = [
        plots.confusions(target.name, chosen, target.labels, curves.confusion(best)),
        plots.class_curves(target.name, chosen, roc),
        plots.calibrations(
            target.name,
            calibrations,
            predicted="mean probability of the likeliest class",
            observed="share of rows where it is right",
        ),
    ]
    return figures, {"calibration": _calibration_points(calibrations), "class_roc": _points(roc)}


def _calibration_points(found: Mapping[str, curves.Calibration]) -> dict[str, Floats]:
    return {model: np.column_stack([c.predicted, c.observed]) for model, c in found.items()}


def _points(found: Mapping[str, curves.Curve]) -> dict[str, Floats]:
    return {name: np.column_stack([curve.x, curve.y]) for name, curve in found.items()}
