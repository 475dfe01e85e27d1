"""Precision, recall and F1 of each class, with intervals, from the sums that metrics are made of.

A mean over classes hides the one that is never found. Values equal scikit-learn's per-class ones;
where a class has no row in truth or prediction there is none, and the reason says which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.blend import rounded
from headrace.evaluation.bootstrap import UNDEFINED, Interval, Resampling, Scored, Units, interval
from headrace.evaluation.comparison import Comparison
from headrace.evaluation.page import Cell, Chart, Section, Table
from headrace.evaluation.report import interval_text
from headrace.schema import Target

Floats: TypeAlias = npt.NDArray[np.float64]

# Name: title, meaning, when it is undefined.
_METRICS = {
    "f1": (
        "F1",
        "harmonic mean of precision and recall",
        "no row is of the class, in truth or prediction",
    ),
    "precision": (
        "precision",
        "share of rows predicted to be of the class that are",
        "no row is predicted to be of the class",
    ),
    "recall": ("recall", "share of rows of the class that are found", "no row is of the class"),
}


@dataclass(frozen=True)
class ClassScores:
    """One class as one model tells it; shares are of the rows' weight, metrics by their name."""

    model: str
    label: str
    true_share: float
    predicted_share: float
    metrics: Mapping[str, Interval]


def score_classes(
    scored: Mapping[str, Scored], target: Target, units: Units, resampling: Resampling
) -> tuple[ClassScores, ...]:
    """Return every class of every model; none of a target without classes."""
    return tuple(
        _scores(model, code, one, target, units, resampling)
        for model, one in scored.items()
        if one.classes is not None
        for code in range(len(target.labels))
    )


def classes_json(scores: Sequence[ClassScores]) -> dict[str, Any]:
    """Return label → its share of the rows, and model → what it makes of the class."""
    found: dict[str, Any] = {}
    for one in scores:
        entry = found.setdefault(one.label, {"share": rounded(one.true_share), "models": {}})
        entry["models"][one.model] = {"predicted_share": rounded(one.predicted_share)} | {
            name: {
                "value": rounded(told.value),
                "ci_low": rounded(told.low),
                "ci_high": rounded(told.high),
                "standard_error": rounded(told.standard_error),
                "num_undefined": told.num_undefined,
                "reason": told.reason,
            }
            for name, told in one.metrics.items()
        }
    return found


def classes_section(comparison: Comparison, scores: Sequence[ClassScores]) -> Section | None:
    """Return the part of the report about the chosen model's classes; None without classes."""
    of_chosen = [one for one in scores if one.model == comparison.chosen]
    if not of_chosen:
        return None
    percent = f"{100 * comparison.confidence:.4g} %"
    told = [
        heading for title, *_ in _METRICS.values() for heading in (title, f"{percent} interval")
    ]
    is_binary = comparison.task == "binary"
    rule = f"{of_chosen[1].label} from the threshold on" if is_binary else "the likeliest one"
    table = Table(
        title=f"Classes as {comparison.chosen} tells them",
        headings=("class", "share of rows", "share predicted", *told),
        rows=tuple(_row(one) for one in of_chosen),
        note=(
            f"The predicted class is {rule}. Intervals are from resamples of "
            f"{comparison.num_units:,} {comparison.unit}s."
        ),
    )
    return Section(
        anchor="classes",
        title="Each class",
        text=(_sentence(comparison.chosen, of_chosen),),
        tables=(table,),
        charts=(_chart(comparison.chosen, of_chosen, percent),),
    )


def _scores(
    model: str,
    code: int,
    scored: Scored,
    target: Target,
    units: Units,
    resampling: Resampling,
) -> ClassScores:
    assert scored.classes is not None  # the caller has looked
    sums_3C, sums_B3C = scored.classes
    points, resamples = _values(sums_3C[:, code]), _values(sums_B3C[..., code])
    total = sums_3C[1].sum()
    metrics = {}
    for name, (*_, undefined) in _METRICS.items():
        found = interval(float(points[name]), resamples[name], units, resampling)
        metrics[name] = replace(found, reason=undefined) if found.reason == UNDEFINED else found
    _, true, predicted = (float(value) for value in sums_3C[:, code] / total)
    return ClassScores(model, target.labels[code], true, predicted, metrics)


def _values(sums: Floats) -> dict[str, Floats]:
    """Turn hits, true and predicted weight (..., 3) into each metric (...); NaN where undefined."""
    hit, true, predicted = (sums[..., i] for i in range(3))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "precision": hit / predicted,
            "recall": hit / true,
            "f1": 2 * hit / (true + predicted),
        }


def _row(one: ClassScores) -> tuple[Cell, ...]:
    found = [
        cell
        for told in one.metrics.values()
        for cell in (rounded(told.value), interval_text(told)[1])
    ]
    return (one.label, rounded(one.true_share), rounded(one.predicted_share), *found)


def _sentence(chosen: str, scores: Sequence[ClassScores]) -> str:
    known = [(told.value, one) for one in scores if (told := one.metrics["f1"]).value is not None]
    if not known:
        return f"No class has an F1 of {chosen}."
    value, worst = min(known, key=lambda pair: pair[0] or 0.0)
    return (
        f"{chosen} tells {worst.label} least well: F1 {value:.3g}, with {worst.true_share:.2%} of "
        f"the rows in truth and {worst.predicted_share:.2%} in prediction."
    )


def _chart(chosen: str, scores: Sequence[ClassScores], percent: str) -> Chart:
    traces: list[dict[str, Any]] = []
    choices: dict[str, Any] = {}
    for name, (title, meaning, _) in _METRICS.items():
        known = [(one.label, one.metrics[name]) for one in scores]
        known = [(label, told) for label, told in known if told.value is not None]
        axis_title = {"text": f"{title}: {meaning}"}
        choices[title] = {"xaxis": {"title": axis_title, "range": [-0.02, 1.02]}}
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [told.value for _, told in known],
                "y": [label for label, _ in known],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [_gap(told.value, told.high) for _, told in known],
                    "arrayminus": [_gap(told.low, told.value) for _, told in known],
                    "thickness": 2.5,
                    "width": 0,
                },
                "marker": {"size": 10},
                "name": title,
                "tone": 0,
                "choice": title,
                "showlegend": False,
            }
        )
    labels = [one.label for one in scores]
    said = "; ".join(
        f"{one.label} {'–' if (value := one.metrics['f1'].value) is None else f'{value:.3g}'}"
        for one in scores
    )
    return Chart(
        name="classes",
        title=f"Classes as {chosen} tells them, {percent} intervals",
        alternative=f"F1 of each class: {said}.",
        traces=tuple(traces),
        layout={
            "xaxis": {},
            "yaxis": {
                "title": {"text": "class"},
                "type": "category",
                "categoryorder": "array",
                "categoryarray": labels[::-1],
                "range": [-0.6, len(labels) - 0.4],
                "showgrid": False,
            },
            "height": 170 + 26 * len(labels),
            "choices": choices,
        },
    )


def _gap(low: float | None, high: float | None) -> float:
    return 0.0 if low is None or high is None else max(high - low, 0.0)
