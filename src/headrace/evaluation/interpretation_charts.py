"""Charts of what the stage ``interpret`` found, for the report: numbers to plotly's JSON."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.evaluation.canvas import COLOURS
from headrace.evaluation.page import Chart

Content = Mapping[str, Any]

_SHOWN = 12  # columns in a chart
_LOG_RANGE = 1000  # an axis whose largest value is so many times its smallest is logarithmic
_BINS = 40  # of SHAP values, in each of which points are laid side by side
_LOW_TO_HIGH = [[0, COLOURS[0]], [1, COLOURS[1]]]
_LESS_TO_MORE = [[0, COLOURS[1]], [0.5, "rgba(128,128,128,0.08)"], [1, COLOURS[0]]]


def importance_chart(
    found: Mapping[str, Content],
    names: Sequence[str],
    *,
    tones: Mapping[str, int],
    axis: str,
    confidence: float,
) -> Chart:
    """Points with intervals, of each model's importances of ``names``, the first on top.

    ``tones`` are the models' colours.
    """
    shown = list(names)[:_SHOWN]
    apart = 0.7 / len(found)
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": model,
            "tone": tones[model],
            "x": [of_model[name]["value"] for name in shown],
            "y": [place + apart * (number - (len(found) - 1) / 2) for place in range(len(shown))],
            "customdata": shown,
            "hovertemplate": "%{customdata}: %{x:.3g}",
            "error_x": {"type": "data", "symmetric": False, **_errors(of_model, shown)},
            "marker": {"size": 7},
        }
        for number, (model, of_model) in enumerate(found.items())
    ]
    first = next(iter(found))
    said = ", ".join(f"{name} {found[first][name]['value']:.3g}" for name in shown[:5])
    return Chart(
        name="permutation_importance",
        title=f"Permutation importance, {confidence:.0%} intervals",
        alternative=f"Growth of the loss when shuffled, {first}: {said}",
        traces=tuple(traces),
        layout={
            "xaxis": {"title": {"text": axis}, "zeroline": True},
            "yaxis": {
                "title": {"text": "column or group"},
                "tickvals": list(range(len(shown))),
                "ticktext": shown,
                "autorange": "reversed",
            },
            "height": 150 + len(shown) * (14 + 10 * len(found)),
        },
        is_wide=True,
    )


def _errors(found: Content, names: Sequence[str]) -> dict[str, list[float]]:
    """Return the interval's reach above and below the value; 0 where there is none."""

    def reach(name: str, bound: str) -> float:
        one = found[name]
        return 0.0 if one[bound] is None else abs(one[bound] - one["value"])

    return {
        "array": [reach(name, "ci_high") for name in names],
        "arrayminus": [reach(name, "ci_low") for name in names],
    }


def shap_chart(model: str, found: Content, *, unit: str) -> Chart | None:
    """A row of points per column; None where there are no points."""
    ranked = ranked_shares(found["mean_abs"])
    points = {name: found["points"][name] for name, _ in ranked if name in found["points"]}
    if not points:
        return None
    coloured: dict[str, list[Any]] = {"x": [], "y": [], "height": []}
    plain: dict[str, list[Any]] = {"x": [], "y": []}
    for place, one in enumerate(points.values()):
        offsets = _side_by_side(one["shap"])
        for x, offset, height in zip(one["shap"], offsets, one["height"], strict=True):
            into = plain if height is None else coloured
            into["x"].append(x)
            into["y"].append(round(place + offset, 4))
            if height is not None:
                coloured["height"].append(height)
    bar = {
        "title": {"text": "value of the column"},
        "tickvals": [0, 1],
        "ticktext": ["low", "high"],
    }
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "numbers",
            "x": coloured["x"],
            "y": coloured["y"],
            "marker": {
                "size": 4,
                "color": coloured["height"],
                "colorscale": _LOW_TO_HIGH,
                "cmin": 0,
                "cmax": 1,
                "showscale": True,
                "colorbar": bar,
            },
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "categories and missing values",
            "x": plain["x"],
            "y": plain["y"],
            "tone": "soft",
            "marker": {"size": 4},
        },
    ]
    said = ", ".join(f"{name} {value:.3g}" for name, value in ranked[:5])
    return Chart(
        name=f"shap_{model}",
        title=f"SHAP values, {model}",
        alternative=f"What each column adds to single predictions. Mean size: {said}",
        traces=tuple(trace for trace in traces if trace["x"]),
        layout={
            "xaxis": {"title": {"text": f"what the column adds, {unit}"}, "zeroline": True},
            "yaxis": {
                "title": {"text": "column"},
                "tickvals": list(range(len(points))),
                "ticktext": list(points),
                "autorange": "reversed",
            },
            "showlegend": False,
            "height": 160 + 48 * len(points),
        },
        is_wide=True,
    )


def ranked_shares(found: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return names and values, the largest first: JSON has them by name."""
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))


def _side_by_side(values: Sequence[float]) -> list[float]:
    """Return by how much each point is moved off its line, at most .4, so that points show.

    >>> _side_by_side([1.0, 1.0, 1.0, 9.0])
    [0.0, 0.4, -0.4, 0.0]
    """
    low, width = min(values), (max(values) - min(values)) / _BINS or 1.0
    bins = [int((value - low) / width) for value in values]
    step = 0.4 / max(1, max(Counter(bins).values()) // 2)
    seen: Counter[int] = Counter()
    offsets = []
    for one in bins:
        side = 1 if seen[one] % 2 else -1
        offsets.append(round(side * step * ((seen[one] + 1) // 2), 4) + 0.0)
        seen[one] += 1
    return offsets


def mask_chart(model: str, found: Content) -> Chart:
    """A heat map per step, to choose from: attention shared among columns in the first rows."""
    ranked = ranked_shares(found["shares"])[:5]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in ranked)
    return Chart(
        name=f"masks_{model}",
        title=f"Attention of {model} in single rows",
        alternative=f"Share of a step's attention by column and row. Over all steps: {shares}",
        traces=tuple(
            {
                "type": "heatmap",
                "choice": f"step {step}",
                "z": mask,
                "x": list(range(1, len(mask[0]) + 1)),
                "y": found["columns"],
                "zmin": 0,
                "zmax": 1,
                "colorbar": {"title": {"text": "share"}},
            }
            for step, mask in enumerate(found["masks"], start=1)
        ),
        layout=_heat_layout("row (the first of the sample)", found["columns"]),
    )


def correlation_chart(model: str, found: Content) -> Chart | None:
    """A heat map per predicted number, to choose from: how attention goes with it, by step.

    None where all attention or all predictions are the same.
    """
    traces: list[dict[str, Any]] = []
    said = []
    for name, values in found["correlations"].items():
        known = [
            (value, column, step)
            for column, of_column in zip(found["columns"], values, strict=True)
            for step, value in enumerate(of_column, start=1)
            if value is not None
        ]
        if not known:
            continue
        value, column, step = max(known, key=lambda item: abs(item[0]))
        said.append(f"{name}: most with {column} in step {step} ({value:+.2f})")
        traces.append(
            {
                "type": "heatmap",
                "choice": name,
                "z": values,
                "x": [str(one) for one in range(1, len(values[0]) + 1)],
                "y": found["columns"],
                "zmin": -1,
                "zmax": 1,
                "colorscale": _LESS_TO_MORE,
                "colorbar": {"title": {"text": "correlation"}},
            }
        )
    if not traces:
        return None
    layout = _heat_layout("step", found["columns"])
    layout["xaxis"]["type"] = "category"
    return Chart(
        name=f"attention_{model}",
        title=f"Correlation of {model}'s attention with the prediction",
        alternative="; ".join(said),
        traces=tuple(traces),
        layout=layout,
    )


def _heat_layout(axis: str, columns: Sequence[str]) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": axis}},
        "yaxis": {"title": {"text": "column"}, "autorange": "reversed"},
        "height": 160 + 24 * len(columns),
    }


def dependence_chart(number: int, entry: Content, labels: Sequence[str], *, axis: str) -> Chart:
    """Mean curves over one column's values, one per label, and the lines of some rows."""
    column, note = entry["column"], entry["note"]
    grid = entry["grid"] if entry["is_numeric"] else [_shown(value) for value in entry["grid"]]
    mode = "lines+markers" if entry["is_numeric"] else "markers"
    lines = [
        {
            "type": "scatter",
            "mode": mode,
            "name": "single rows",
            "legendgroup": "rows",
            "showlegend": place == 0,
            "x": grid,
            "y": line,
            "opacity": 0.35,
            "tone": "soft",
            "line": {"width": 1},
            "marker": {"size": 3 if entry["is_numeric"] else 5},
        }
        for place, line in enumerate(entry["lines"])
    ]
    means = [
        {
            "type": "scatter",
            "mode": mode,
            "name": label,
            "x": grid,
            "y": curve,
            "tone": place,
            "line": {"width": 3},
            "marker": {"size": 7},
        }
        for place, (label, curve) in enumerate(zip(labels, entry["means"], strict=True))
    ]
    title = f"{column} ({note})" if note else column
    x_axis: dict[str, Any] = {"title": {"text": title}}
    if not entry["is_numeric"]:
        x_axis["type"] = "category"
    elif entry["grid"][0] > 0 and entry["grid"][-1] / entry["grid"][0] > _LOG_RANGE:
        x_axis["type"] = "log"
    return Chart(
        name=f"dependence_{number}",
        title=f"Partial dependence on {column}",
        alternative=_dependence_said(entry, grid, labels),
        traces=(*lines, *means),
        layout={"xaxis": x_axis, "yaxis": {"title": {"text": axis}}},
    )


def _dependence_said(entry: Content, grid: Sequence[Any], labels: Sequence[str]) -> str:
    said = []
    for label, curve in zip(labels, entry["means"], strict=True):
        low, high = min(curve), max(curve)
        said.append(
            f"{label}: from {low:.4g} at {_shown(grid[curve.index(low)])} "
            f"to {high:.4g} at {_shown(grid[curve.index(high)])}"
        )
    return "; ".join(said)


def _shown(value: Any) -> str:
    if value is None:
        return "(missing)"
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else str(value)
