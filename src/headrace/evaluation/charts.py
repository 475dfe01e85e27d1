"""The charts of one target as Plotly's JSON: see ``page.Chart``, and ``report.js`` that draws.

A trace names no colour but a ``tone``: a number is the colour of that model or class everywhere, a
word the colour of a verdict. Traces with a ``choice`` are drawn only when the reader picks it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.bootstrap import Interval
from headrace.evaluation.comparison import Comparison, Judged
from headrace.evaluation.curves import (
    Calibration,
    Curve,
    Grid,
    Histogram,
    density,
    spans_decades,
)
from headrace.evaluation.metrics import Metric, MetricName
from headrace.evaluation.page import Chart

Floats: TypeAlias = npt.NDArray[np.float64]
Json: TypeAlias = dict[str, Any]
_FULL_ROWS = 20  # of a confusion matrix; of more each is lower
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross", "x", "star", "hexagon")


def forest(comparison: Comparison, *, confidence: float) -> Chart:
    """Every model's interval, one metric at a time; the chosen model's value as a line."""
    models = best_first(comparison)
    traces: list[Json] = []
    layout = _rows_layout(comparison, models, lambda metric: f"{metric.title} {_arrow(metric)}")
    for metric in _metrics(comparison):
        judged = [comparison.of(model, metric.name) for model in models]
        traces += _intervals(judged, [one.estimate for one in judged], metric)
        ends = [end for one in judged for end in _ends(one.estimate)]
        layout["choices"][metric.title]["xaxis"] |= _scale(np.array(ends))
        value = comparison.of(comparison.chosen, metric.name).estimate.value
        if value is not None:
            traces.append(_line([value, value], [0, 1], metric.title) | {"yaxis": "y2"})
    return Chart(
        "forest",
        f"Models with {confidence:.0%} intervals",
        f"Dotted line: the chosen model, {comparison.chosen}. {_primary(comparison).title}: "
        f"{_said(comparison, models)}.",
        tuple(traces),
        layout,
    )


def differences(comparison: Comparison, *, confidence: float) -> Chart:
    """Paired differences to the chosen model, one metric at a time; the line is no difference."""
    models = [model for model in best_first(comparison) if model != comparison.chosen]
    traces: list[Json] = []
    for metric in _metrics(comparison):
        judged = [comparison.of(model, metric.name) for model in models]
        traces += _intervals(judged, [one.difference for one in judged], metric)
    traces.append(_line([0, 0], [0, 1]) | {"yaxis": "y2"})
    primary = _primary(comparison)
    verdicts = "; ".join(f"{m} {comparison.of(m, primary.name).verdict}" for m in models)
    return Chart(
        "differences",
        f"Difference to {comparison.chosen}, {confidence:.0%} intervals",
        f"Each model minus {comparison.chosen} on the same resamples; an interval that includes 0 "
        f"is a tie. {primary.title}: {verdicts}.",
        tuple(traces),
        _rows_layout(
            comparison,
            models,
            lambda metric: f"{metric.title} {_arrow(metric)}, model − {comparison.chosen}",
        ),
    )


def densities(
    comparison: Comparison, resamples: Mapping[str, Mapping[MetricName, Floats]]
) -> Chart:
    """Distribution of a metric over the resamples, a line per model."""
    traces: list[Json] = []
    choices: Json = {}
    for metric in _metrics(comparison):
        choices[metric.title] = {"xaxis": _axis(f"{metric.title} {_arrow(metric)}")}
        for number, model in enumerate(comparison.models):
            curve = density(resamples[model][metric.name])
            value = comparison.of(model, metric.name).estimate.value
            shared = {"name": model, "tone": number, "choice": metric.title}
            if len(curve.x):
                traces.append(_drawn(curve) | shared | {"fill": "tozeroy"})
            elif value is not None:
                name = f"{model} (the same in every resample)"
                traces.append(_line([value, value], [0, 1]) | shared | {"name": name})
                traces[-1]["yaxis"] = "y2"
    return Chart(
        "density",
        "Metrics over the resamples",
        f"Gaussian kernel density over resamples of {comparison.num_units} {comparison.unit}s, one "
        f"line per model ({', '.join(comparison.models)}). Humps that overlap may still differ: "
        f"models are compared on the same resamples, in the chart of differences.",
        tuple(traces),
        {"yaxis": _axis("density") | {"rangemode": "tozero"}, "yaxis2": _OVERLAY}
        | {"choices": choices},
    )


def roc(curves: Mapping[str, Curve]) -> Chart:
    """ROC curves, a line per model."""
    return Chart(
        "roc",
        "ROC curves",
        f"One line per model ({', '.join(curves)}). Dotted: guessing.",
        (*_lines(curves, "ROC"), _line([0, 1], [0, 1])),
        {
            "xaxis": _share("share of negatives taken (false positive rate)"),
            "yaxis": _share("share of positives found (recall)"),
        },
    )


def precision_recall(curves: Mapping[str, Curve], *, base_rate: float) -> Chart:
    """Precision by recall, a line per model."""
    return Chart(
        "precision_recall",
        "Precision and recall",
        f"One line per model ({', '.join(curves)}). Dotted: the base rate {base_rate:.3f}.",
        (
            *_lines(curves, "precision", shape="vh"),
            _line([0, 1], [base_rate, base_rate]),
        ),
        {
            "xaxis": _share("share of positives found (recall)"),
            "yaxis": _share("share of taken that are positive (precision)"),
        },
    )


def class_roc(curves: Mapping[str, Mapping[str, Curve]]) -> Chart:
    """ROC curve of each class against all others, of one model at a time, the first one first."""
    traces = [
        _drawn(curve) | {"name": label, "tone": number, "choice": model}
        for model, of_class in curves.items()
        for number, (label, curve) in enumerate(of_class.items())
    ]
    return Chart(
        "class_roc",
        "ROC of each class against the others",
        f"One line per class: {', '.join(next(iter(curves.values())))}. Dotted: guessing.",
        (*traces, _line([0, 1], [0, 1])),
        {
            "xaxis": _share("share of other classes taken (false positive rate)"),
            "yaxis": _share("share of the class found (recall)"),
        },
    )


def confusions(shares: Mapping[str, Floats], labels: Sequence[str], *, how: str) -> Chart:
    """Confusion matrix of one model at a time: share of each true class given each class."""
    traces: list[Json] = []
    said = ""
    for model, share_CC in shares.items():
        of_class = share_CC.sum(axis=1, keepdims=True)
        recall = np.divide(share_CC, of_class, out=np.zeros_like(share_CC), where=of_class > 0)
        said = said or f"{model}: " + "; ".join(
            f"{label} {recall[i, i]:.0%} found" for i, label in enumerate(labels)
        )
        traces.append(
            {
                "type": "heatmap",
                "x": list(labels),
                "y": list(labels),
                "z": recall.tolist(),
                "zmin": 0,
                "zmax": 1,
                "customdata": share_CC.tolist(),
                "texttemplate": "%{z:.0%}" if len(labels) <= 12 else "",
                "hovertemplate": "true %{y}, predicted %{x}<br>%{z:.2%} of the true class<br>"
                "%{customdata:.2%} of all rows<extra></extra>",
                "colorbar": {"title": {"text": "share of the true class"}, "tickformat": ".0%"},
                "choice": model,
            }
        )
    square = {"type": "category", "showgrid": False}
    return Chart(
        "confusion",
        "Confusion",
        f"Share of each true class (row) given each class (column), {how}. {said}.",
        tuple(traces),
        {
            "xaxis": _axis("predicted class") | square,
            "yaxis": _axis("true class") | square | {"autorange": "reversed"},
            "height": 220 + 34 * min(len(labels), _FULL_ROWS),
        },
    )


def calibrations(curves: Mapping[str, Calibration], *, predicted: str, observed: str) -> Chart:
    """Mean outcome against mean prediction in bins, with intervals; the diagonal is perfect."""
    traces: list[Json] = []
    for number, (model, curve) in enumerate(curves.items()):
        errors = {
            "type": "data",
            "symmetric": False,
            "array": (curve.high - curve.observed).tolist(),
            "arrayminus": (curve.observed - curve.low).tolist(),
        }
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": curve.predicted.tolist(),
                "y": curve.observed.tolist(),
                "error_y": errors,
                "customdata": curve.share.tolist(),
                "hovertemplate": "predicted %{x:.4g}, observed %{y:.4g}<br>"
                "%{customdata:.1%} of the rows<extra>%{fullData.name}</extra>",
                "name": model,
                "tone": number,
                "marker": {"symbol": _SYMBOLS[number % len(_SYMBOLS)]},
            }
        )
    values = np.concatenate([np.r_[c.predicted, c.observed] for c in curves.values()])
    ends = [float(values.min()), float(values.max())]
    scale = _scale(np.concatenate([values, *(c.low for c in curves.values())]))
    return Chart(
        "calibration",
        "Calibration",
        "Rows in ten bins of equally many by prediction; bars: interval of the mean outcome by "
        f"unit. Dotted: perfect. Models: {', '.join(curves)}.",
        (*traces, _line(ends, ends)),
        {"xaxis": _axis(predicted) | scale, "yaxis": _axis(observed) | scale},
    )


def residuals(histograms: Mapping[str, Histogram], *, unit: str) -> Chart:
    """Distribution of prediction − truth, a line per model."""
    first = next(iter(histograms.values()))
    shares = np.concatenate([found.share for found in histograms.values()])
    traces: list[Json] = [
        {
            "type": "scatter",
            "mode": "lines",
            "bins": {"edges": found.edges.tolist(), "share": found.share.tolist()},
            "line": {"shape": "hv"},
            "hovertemplate": "from %{x:.4g}: %{y:.3%} of the rows<extra>%{fullData.name}</extra>",
            "name": model,
            "tone": number,
        }
        for number, (model, found) in enumerate(histograms.items())
    ]
    is_log = spans_decades(shares[shares > 0])
    return Chart(
        "residuals",
        "Residuals",
        f"Prediction minus truth from {_plain(first.edges[0])} to {_plain(first.edges[-1])}: all "
        f"rows. Bin width by the rule of Freedman and Diaconis, adjustable"
        f"{'; share on a log scale' if is_log else ''}. Models: {', '.join(histograms)}.",
        tuple(traces),
        {
            "xaxis": _axis(f"prediction − truth, {unit}"),
            "yaxis": _axis("share of rows per bin")
            | ({"type": "log", "exponentformat": "power"} if is_log else {"rangemode": "tozero"}),
        },
    )


def cells(
    grids: Mapping[str, Grid],
    *,
    name: str,
    title: str,
    y: str,
    unit: str,
    is_diagonal: bool,
) -> Chart:
    """Where the rows lie in two dimensions, one model at a time; darker cells hold more rows."""
    traces: list[Json] = []
    filled = np.concatenate([grid.share[grid.share > 0] for grid in grids.values()])
    low, high = float(filled.min()), float(filled.max())
    for model, grid in grids.items():
        share = np.where(grid.share > 0, grid.share, np.nan)
        traces.append(
            {
                "type": "heatmap",
                "x": grid.x_edges.tolist(),
                "y": grid.y_edges.tolist(),
                "z": np.log10(share).tolist(),
                "zmin": float(np.log10(low)),
                "zmax": float(np.log10(high)),
                "customdata": share.tolist(),
                "hovertemplate": f"prediction %{{x:.4g}}<br>{y} %{{y:.4g}}<br>"
                "%{customdata:.3%} of the rows<extra></extra>",
                "hoverongaps": False,
                "colorbar": {"title": {"text": "share of rows, log scale"}}
                | _share_ticks(low, high),
                "choice": model,
            }
        )
        ends = [float(grid.x_edges[0]), float(grid.x_edges[-1])]
        traces.append(_line(ends, ends if is_diagonal else [0, 0], model))
    first = next(iter(grids.values()))
    return Chart(
        name,
        title,
        f"40 by 40 cells over all rows, prediction from {_plain(first.x_edges[0])} to "
        f"{_plain(first.x_edges[-1])}, {y} from {_plain(first.y_edges[0])} to "
        f"{_plain(first.y_edges[-1])}; the more rows, the stronger the colour. Dotted: no error.",
        tuple(traces),
        {
            "xaxis": _axis(f"prediction, {unit}") | _scale(first.x_edges),
            "yaxis": _axis(f"{y}, {unit}") | _scale(first.y_edges),
        },
    )


def best_first(comparison: Comparison) -> list[str]:
    """Return the models by their metric, those without a value last."""
    primary = _primary(comparison)
    sign = -1 if primary.higher_is_better else 1
    values = {m: comparison.of(m, primary.name).estimate.value for m in comparison.models}
    return sorted(values, key=lambda m: np.inf if values[m] is None else sign * (values[m] or 0))


# The axis of vertical lines over the whole height, whatever the scale of the one beside it.
_OVERLAY: Json = {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True}


def _intervals(
    judged: Sequence[Judged], intervals: Sequence[Interval], metric: Metric
) -> Iterator[Json]:
    """Yield a trace per verdict, so that the legend explains the colours."""
    for verdict in dict.fromkeys(one.verdict for one in judged):
        found = [
            (one.model, interval)
            for one, interval in zip(judged, intervals, strict=True)
            if one.verdict == verdict and interval.value is not None
        ]
        if not found:
            continue
        bounds = [_bounds(interval) for _, interval in found]
        yield {
            "type": "scatter",
            "mode": "markers",
            "x": [interval.value for _, interval in found],
            "y": [model for model, _ in found],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [high for _, high in bounds],
                "arrayminus": [low for low, _ in bounds],
                "thickness": 2.5,
                "width": 0,
            },
            "customdata": [
                "no interval: " + interval.reason
                if interval.low is None
                else f"[{interval.low:.4g}, {interval.high:.4g}]"
                for _, interval in found
            ],
            "hovertemplate": "%{y}: %{x:.4g} %{customdata}<extra></extra>",
            "marker": {"size": 10, "symbol": "diamond" if verdict == "chosen" else "circle"},
            "name": verdict,
            "tone": verdict,
            "choice": metric.title,
        }


def _bounds(interval: Interval) -> tuple[float, float]:
    """How far the interval reaches below and above its value; 0 where there is none."""
    if interval.value is None or interval.low is None or interval.high is None:
        return 0.0, 0.0
    return max(interval.value - interval.low, 0.0), max(interval.high - interval.value, 0.0)


def _rows_layout(comparison: Comparison, models: Sequence[str], axis_title: Any) -> Json:
    """A line per model, the first on top."""
    return {
        "xaxis": {},
        "yaxis": _axis("model")
        | {"type": "category", "categoryorder": "array", "categoryarray": list(models)[::-1]}
        | {"range": [-0.6, len(models) - 0.4], "showgrid": False},
        "yaxis2": _OVERLAY,
        "height": 170 + 30 * len(models),
        "choices": {m.title: {"xaxis": _axis(axis_title(m))} for m in _metrics(comparison)},
    }


def _lines(curves: Mapping[str, Curve], name: str, *, shape: str = "linear") -> list[Json]:
    hover = f"%{{x:.3f}}, %{{y:.3f}}<extra>{name} %{{fullData.name}}</extra>"
    return [
        _drawn(curve)
        | {"name": model, "tone": number, "line": {"shape": shape}, "hovertemplate": hover}
        for number, (model, curve) in enumerate(curves.items())
    ]


def _drawn(curve: Curve) -> Json:
    return {"type": "scatter", "mode": "lines", "x": curve.x.tolist(), "y": curve.y.tolist()}


def _line(x: Sequence[float], y: Sequence[float], choice: str = "") -> Json:
    """A thin dotted line that explains nothing when pointed at."""
    line: Json = {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": list(y),
        "line": {"dash": "dot", "width": 1.2},
        "hoverinfo": "skip",
        "showlegend": False,
        "tone": "soft",
    }
    return line | ({"choice": choice} if choice else {})


def _axis(title: str) -> Json:
    return {"title": {"text": title}}


def _scale(values: Floats) -> Json:
    """A logarithmic axis where ``values`` need one; NaN counts for nothing."""
    return {"type": "log"} if spans_decades(values[~np.isnan(values)]) else {}


def _ends(interval: Interval) -> list[float]:
    return [end for end in (interval.low, interval.value, interval.high) if end is not None]


def _share(title: str) -> Json:
    return _axis(title) | {"range": [-0.01, 1.02]}


def _share_ticks(low: float, high: float) -> Json:
    """Ticks at 1, 2 and 5 times powers of 10 on an axis of log10 of a share."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 100 * low else (1,)
    ticks = [step * 10.0**power for power in powers for step in steps]
    return {
        "tickvals": [math.log10(tick) for tick in ticks],
        "ticktext": [f"{100 * tick:.4g}%" for tick in ticks],
    }


def _plain(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


def _metrics(comparison: Comparison) -> list[Metric]:
    """All metrics, the one the choice was made by first."""
    return sorted(comparison.metrics, key=lambda metric: metric.name != comparison.primary)


def _primary(comparison: Comparison) -> Metric:
    return _metrics(comparison)[0]


def _arrow(metric: Metric) -> str:
    return "↑" if metric.higher_is_better else "↓"


def _said(comparison: Comparison, models: Sequence[str]) -> str:
    said = []
    for model in models:
        found = comparison.of(model, comparison.primary).estimate
        if found.value is None or found.low is None:
            said.append(f"{model} {found.reason if found.value is None else f'{found.value:.4g}'}")
        else:
            said.append(f"{model} {found.value:.4g} [{found.low:.4g}, {found.high:.4g}]")
    return "; ".join(said)
