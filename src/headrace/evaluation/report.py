"""The report: one HTML file that opens from disk and needs nothing else, no network either.

The template ``report.html.jinja`` beside this module holds all markup; here numbers become text.
Nothing that differs between identical runs is written: no time, host, path, commit or run id.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from headrace.evaluation.blend import blend_of
from headrace.evaluation.bootstrap import FEW_UNITS, Interval
from headrace.evaluation.canvas import Figure
from headrace.evaluation.comparison import Comparison, Judged
from headrace.evaluation.metrics import METRICS, Metric

_MARKS = {
    "chosen": ("◆", "chosen without test rows"),
    "tied": ("≈", "tied with the chosen model: the interval of their difference includes 0"),
    "better": ("▲", "better than the chosen model here; test rows do not choose"),
    "worse": ("▽", "worse than the chosen model: the interval of their difference excludes 0"),
    "unknown": ("?", "the difference to the chosen model has no interval"),
}
# What a profile usually says first; other keys follow in their own order.
_PROFILE_ORDER = (
    "role", "dtype", "rows", "nulls", "distinct", "histogram", "min", "mean", "median", "max",
    "std",
)  # fmt: skip
_LISTED = 4  # of a column's commonest values


@dataclass(frozen=True)
class TargetSection:
    """What the report shows of one target."""

    comparison: Comparison
    selection: Mapping[str, Any]  # its entry of selection.json
    figures: Sequence[Figure]


@dataclass(frozen=True)
class ReportInputs:
    """All the report is made from."""

    targets: Sequence[TargetSection]
    settings: Mapping[str, Any]  # the stage's parameters
    digests: Mapping[str, str]  # what was evaluated, by name
    profile: Mapping[str, Any] | None  # column → whatever the data profile says of it


def render_report(inputs: ReportInputs) -> str:
    """Return the whole HTML page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("headrace", "evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.jinja").render(
        targets=[_target_view(section, inputs) for section in inputs.targets],
        settings=inputs.settings,
        digests=inputs.digests,
        profile=_profile_view(inputs.profile) if inputs.profile else None,
        marks=_MARKS,
        confidence=f"{inputs.settings['confidence']:.0%}",
    )


def interval_text(found: Interval) -> tuple[str, str]:
    """Return value and interval as text, rounded to two figures of the interval's half width.

    >>> interval_text(Interval(0.69823, 0.6621, 0.7334))
    ('0.698', '[0.662, 0.733]')
    """
    if found.value is None:
        return "–", found.reason
    if found.low is None or found.high is None:
        return f"{found.value:.4g}".replace("-", "−"), found.reason
    style = _style((found.high - found.low) / 2)
    value, low, high = (
        f"{number:{style}}".replace("-", "−") for number in (found.value, found.low, found.high)
    )
    return value, f"[{low}, {high}]"


def _target_view(section: TargetSection, inputs: ReportInputs) -> dict[str, Any]:
    comparison = section.comparison
    metrics = METRICS[comparison.task]
    primary = next(metric for metric in metrics if metric.name == comparison.primary)
    leader = comparison.of(comparison.chosen, primary.name)
    tied = [
        model
        for model in comparison.models
        if model != comparison.chosen and comparison.of(model, primary.name).is_tied
    ]
    return {
        "name": comparison.target,
        "comparison": comparison,
        "primary": primary,
        "metrics": sorted(metrics, key=lambda metric: metric != primary),
        "headline": interval_text(leader.estimate),
        "tied": tied,
        "is_few": comparison.num_units < FEW_UNITS,
        "few": FEW_UNITS,
        "models": [_model_view(model, comparison, metrics, primary) for model in comparison.models],
        "selection": section.selection,
        "blend": str(blend_of(section.selection["blend"])),
        "figures": [_figure_view(figure) for figure in section.figures],
        "num_resamples": inputs.settings["num_resamples"],
    }


def _model_view(
    model: str, comparison: Comparison, metrics: Sequence[Metric], primary: Metric
) -> dict[str, Any]:
    return {
        "name": model,
        "is_chosen": model == comparison.chosen,
        "cells": [
            _cell_view(comparison.of(model, metric.name), metric == primary)
            for metric in sorted(metrics, key=lambda metric: metric != primary)
        ],
    }


def _cell_view(one: Judged, is_primary: bool) -> dict[str, Any]:
    value, limits = interval_text(one.estimate)
    change, change_limits = interval_text(one.difference)
    sign = "+" if (one.difference.value or 0) > 0 else ""
    return {
        "value": value,
        "limits": limits,
        "sort": "" if one.estimate.value is None else repr(one.estimate.value),
        "change": sign + change,
        "change_limits": change_limits,
        "verdict": one.verdict,
        "undefined": one.estimate.num_undefined,
        "is_primary": is_primary,
    }


def _figure_view(figure: Figure) -> dict[str, Any]:
    return {
        "name": figure.name,
        "title": figure.title,
        "alternative": figure.alternative,
        "wide": figure.is_wide,
        "svg": Markup(figure.inline_text()),
    }


def _profile_view(profile: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a profile of any form into a table: scalars as columns, counts as small bars."""
    columns = {name: _flat(said) for name, said in profile.items() if isinstance(said, Mapping)}
    counts = {said.get("rows") for said in columns.values()}
    num_rows = counts.pop() if len(counts) == 1 else None
    if num_rows is not None:  # the same for all columns: said once, above the table
        columns = {
            name: {key: value for key, value in said.items() if key != "rows"}
            for name, said in columns.items()
        }
    keys = list(dict.fromkeys(key for said in columns.values() for key in said))
    first = [key for key in _PROFILE_ORDER if key in keys]
    keys = first + [key for key in keys if key not in first]
    rows = [
        {"name": name, "cells": [said.get(key, "") for key in keys]}
        for name, said in columns.items()
    ]
    headings = [key.replace("_", " ") for key in keys]
    return {"headings": headings, "rows": rows, "num_rows": num_rows}


def _flat(said: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in said.items():
        name = f"{prefix}{key}"
        counts = _counts(value)
        if counts:
            flat[name] = _bars(counts)
        elif isinstance(value, Mapping):
            flat |= _flat(value, f"{name} ")
        elif isinstance(value, list | tuple):
            more = ["…"] if len(value) > _LISTED else []
            flat[name] = ", ".join([_item(item) for item in value[:_LISTED]] + more)
        else:
            flat[name] = _plain(value)
    return flat


def _counts(value: Any) -> list[float]:
    """The bar heights in ``value``, if it is a histogram: a list of counts, or one under a key."""
    if isinstance(value, Mapping):
        value = value.get("counts")
    is_list = isinstance(value, list) and len(value) > 1 and any(value)
    if is_list and all(isinstance(item, int | float) and item >= 0 for item in value):
        return [float(item) for item in value]
    return []


def _bars(counts: Sequence[float]) -> Markup:
    width, top = 96 / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{i * width:.1f}" y="{20 - 20 * count / top:.1f}" '
        f'width="{max(width - 0.5, 0.5):.1f}" height="{20 * count / top:.1f}"/>'
        for i, count in enumerate(counts)
        if count
    )
    return Markup(
        f'<svg class="bars" viewBox="0 0 96 20" role="img" aria-label="histogram">{bars}</svg>'
    )


def _item(item: Any) -> str:
    if isinstance(item, Mapping) and "value" in item and "count" in item:
        return f"{item['value']} ({item['count']:,})"
    return _plain(item)


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)  # a year stays a year
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _style(half_width: float) -> str:
    """The format that keeps two figures of an interval's half width."""
    if half_width <= 0 or not math.isfinite(half_width):
        return ".4g"
    return f".{max(0, min(10, 1 - math.floor(math.log10(half_width))))}f"
