"""The report: one HTML file that opens from disk and needs nothing else, no network either.

The template ``report.html.jinja`` beside this module holds the markup, ``report.css`` the looks and
``report.js`` what answers to the pointer; here numbers become text. Plotly's own library, 5 MB of
JavaScript, is part of the file. Nothing that differs between identical runs is written: no time,
host, path, commit or run id. What a copy may know of its run goes in later, see ``identity``.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from headrace.evaluation.blend import blend_of
from headrace.evaluation.bootstrap import FEW_UNITS, Interval
from headrace.evaluation.charts import best_first
from headrace.evaluation.comparison import Comparison, Judged
from headrace.evaluation.curves import FINER
from headrace.evaluation.identity import EMPTY
from headrace.evaluation.metrics import Metric
from headrace.evaluation.page import Cell, Chart, Section, Table
from headrace.evaluation.profile_table import profile_table

_MARKS = {
    "chosen": ("◆", "chosen without test rows"),
    "tied": ("≈", "tied with the chosen model: the interval of their difference includes 0"),
    "better": ("▲", "better than the chosen model here; test rows do not choose"),
    "worse": ("▽", "worse than the chosen model: the interval of their difference excludes 0"),
    "unknown": ("?", "the difference to the chosen model has no interval"),
}
_FITTING = 7  # columns of values that fit beside the names, on a screen and on paper


@dataclass(frozen=True)
class TargetSection:
    """What the report shows of one target."""

    comparison: Comparison
    selection: Mapping[str, Any]  # its entry of selection.json
    charts: Sequence[Chart]
    sections: Sequence[Section] = ()


@dataclass(frozen=True)
class ReportInputs:
    """All the report is made from; ``sections`` are about the whole run."""

    targets: Sequence[TargetSection]
    settings: Mapping[str, Any]  # the stage's parameters
    digests: Mapping[str, str]  # what was evaluated, by name
    profile: Mapping[str, Any] | None  # column → whatever the data profile says of it
    sections: Sequence[Section] = ()


def render_report(inputs: ReportInputs) -> str:
    """Return the whole HTML page.

    Raises:
        ValueError: if two charts or sections would have the same id, or a chart's JSON holds
            something that is no JSON.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("headrace", "evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    drawn: dict[str, Chart] = {}
    targets = [
        _target_view(section, f"target-{number}", inputs, drawn)
        for number, section in enumerate(inputs.targets, 1)
    ]
    sections = _section_views(inputs.sections, "run", drawn)
    anchors = [one["anchor"] for one in [*sections, *(s for t in targets for s in t["sections"])]]
    _require_unique(anchors, "sections")
    return environment.get_template("report.html.jinja").render(
        targets=targets,
        sections=sections,
        settings=inputs.settings,
        digests=inputs.digests,
        profile=profile_table(inputs.profile) if inputs.profile else None,
        marks=_MARKS,
        confidence=f"{inputs.settings['confidence']:.0%}",
        identity=Markup(EMPTY),
        finer=FINER,
        charts=_script_json({name: _chart_json(chart) for name, chart in drawn.items()}),
        plotly=Markup(_plotly()) if drawn else "",
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


def _target_view(
    section: TargetSection, anchor: str, inputs: ReportInputs, drawn: dict[str, Chart]
) -> dict[str, Any]:
    comparison = section.comparison
    metrics = sorted(comparison.metrics, key=lambda one: one.name != comparison.primary)
    primary = metrics[0]
    names = best_first(comparison)
    return {
        "name": comparison.target,
        "anchor": anchor,
        "comparison": comparison,
        "units": _units_text(comparison),
        "primary": primary,
        "metrics": metrics,
        "headline": interval_text(comparison.of(comparison.chosen, primary.name).estimate),
        "surety": _surety(comparison),
        "next_steps": _next_steps(comparison),
        "is_few": comparison.num_units < FEW_UNITS,
        "few": FEW_UNITS,
        "models": [
            {
                "name": model,
                "is_chosen": model == comparison.chosen,
                "cell": _cell_view(comparison.of(model, primary.name)),
            }
            for model in names
        ],
        "all_metrics": _grid_view(names, metrics, comparison),
        "differences": _grid_view(
            [model for model in names if model != comparison.chosen], metrics, comparison
        ),
        "bars": _bars([comparison.of(m, primary.name).estimate for m in names]),
        "selection": section.selection,
        "blend": str(blend_of(section.selection["blend"])),
        "charts": _chart_views(section.charts, anchor, drawn),
        "sections": _section_views(section.sections, anchor, drawn),
        "num_resamples": inputs.settings["num_resamples"],
    }


def _grid_view(
    models: Sequence[str], metrics: Sequence[Metric], comparison: Comparison
) -> dict[str, Any]:
    """Return models by metrics: models down, or across where the metrics would not fit."""
    of_models: list[dict[str, Any]] = [
        {"text": model, "note": "", "meaning": "", "is_chosen": model == comparison.chosen}
        for model in models
    ]
    of_metrics: list[dict[str, Any]] = [
        {
            "text": f"{metric.title}\N{NO-BREAK SPACE}{'↑' if metric.higher_is_better else '↓'}",
            "note": "chosen by" if metric.name == comparison.primary else "",
            "meaning": metric.meaning,
            "is_chosen": False,
        }
        for metric in metrics
    ]
    cells = [
        [_cell_view(comparison.of(model, metric.name)) for metric in metrics] for model in models
    ]
    if len(metrics) <= max(_FITTING, len(models)):
        rows = zip(of_models, cells, strict=True)
        what, heads = "model", of_metrics
    else:
        rows = zip(of_metrics, map(list, zip(*cells, strict=True)), strict=True)
        what, heads = "metric", of_models
    shown = [{"head": head, "cells": of_row} for head, of_row in rows] if models else []
    return {"what": what, "heads": heads, "rows": shown}


def _cell_view(one: Judged) -> dict[str, Any]:
    value, limits = interval_text(one.estimate)
    change, change_limits = interval_text(one.difference)
    sign = "+" if (one.difference.value or 0) > 0 else ""
    return {
        "value": value,
        "limits": limits,
        "sort": _sort_text(one.estimate.value),
        "change": sign + change,
        "change_limits": change_limits,
        "change_sort": _sort_text(one.difference.value),
        "verdict": one.verdict,
        "undefined": one.estimate.num_undefined,
    }


def _bars(found: Sequence[Interval]) -> list[dict[str, str] | None]:
    """Where each interval lies between the lowest and the highest bound of all, in percent."""
    ends = [end for one in found for end in (one.low, one.value, one.high) if end is not None]
    if not ends or min(ends) == max(ends):
        return [None] * len(found)

    def place(value: float) -> float:
        return 100 * (value - min(ends)) / (max(ends) - min(ends))

    return [
        None
        if one.value is None or one.low is None or one.high is None
        else {
            "left": f"{place(one.low):.1f}",
            "width": f"{place(one.high) - place(one.low):.1f}",
            "value": f"{place(one.value):.1f}",
        }
        for one in found
    ]


def _others(comparison: Comparison, verdict: str) -> list[str]:
    return [
        model
        for model in comparison.models
        if comparison.of(model, comparison.primary).verdict == verdict
    ]


def _units_text(comparison: Comparison) -> str:
    plural = "" if comparison.num_units == 1 else "s"
    return f"{comparison.num_units:,} {comparison.unit}{plural}"


def _surety(comparison: Comparison) -> str:
    """Say how far the chosen model stands from the others."""
    others = len(comparison.models) - 1
    tied, worse = _others(comparison, "tied"), _others(comparison, "worse")
    better = _others(comparison, "better")
    parts = []
    if worse:
        number = "all others" if len(worse) == others > 1 else _listed(worse)
        parts.append(
            f"ahead of {number}: {comparison.confidence:.0%} intervals of the differences exclude 0"
        )
    if tied:
        parts.append(f"tied with {_listed(tied)}")
    if better:
        parts.append(f"behind {_listed(better)} on these rows")
    return "; ".join(parts) or "compared with no other model"


def _next_steps(comparison: Comparison) -> list[str]:
    """Say what a careful reader would do now; the rules are few and stated in full."""
    tied, better = _others(comparison, "tied"), _others(comparison, "better")
    unit = comparison.unit
    steps = []
    if comparison.num_units < FEW_UNITS:
        steps.append(
            f"Test on more {unit}s: {_units_text(comparison)} are too few to trust an interval."
        )
    if better:
        steps.append(
            f"{_listed(better)} did better here. Test rows do not choose: see whether valid rows "
            f"agree once there are more of them."
        )
    if tied:
        steps.append(
            f"{_listed(tied)} cannot be told from {comparison.chosen} on these {unit}s: take the "
            f"cheapest of them, or test on more {unit}s."
        )
    if len(comparison.models) == 1:
        steps.append("Train another kind of model beside it, to see how much there is to gain.")
    if not steps:
        steps.append("The choice is clear. Look at where it still errs: its worst rows and slices.")
    return steps


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _section_views(
    sections: Sequence[Section], prefix: str, drawn: dict[str, Chart]
) -> list[dict[str, Any]]:
    return [
        {
            "anchor": f"{prefix}-{section.anchor}",
            "title": section.title,
            "brief": section.brief,
            "text": section.text,
            "tables": [
                _table_view(table, f"{prefix}-{section.anchor}-table-{number}")
                for number, table in enumerate(section.tables, 1)
            ],
            "charts": _chart_views(section.charts, f"{prefix}-{section.anchor}", drawn),
        }
        for section in sections
    ]


def _table_view(table: Table, name: str) -> dict[str, Any]:
    columns = zip(*table.rows, strict=True) if table.rows else [()] * len(table.headings)
    is_number = [all(not isinstance(cell, str) for cell in column) for column in columns]
    return {
        "id": name,
        "title": table.title,
        "note": table.note,
        "headings": list(zip(table.headings, is_number, strict=True)),
        "rows": [
            [
                {"text": _cell_text(cell), "sort": _sort_text(cell), "is_number": numeric}
                for cell, numeric in zip(row, is_number, strict=True)
            ]
            for row in table.rows
        ],
    }


def _chart_views(
    charts: Sequence[Chart], prefix: str, drawn: dict[str, Chart]
) -> list[dict[str, Any]]:
    names = [f"{prefix}-{chart.name}" for chart in charts]
    _require_unique([*drawn, *names], "charts")
    drawn |= dict(zip(names, charts, strict=True))
    return [
        {
            "id": name,
            "title": chart.title,
            "alternative": chart.alternative,
            "is_wide": chart.is_wide,
            "height": chart.layout.get("height", _HEIGHT),
            "choices": list(dict.fromkeys(t["choice"] for t in chart.traces if "choice" in t)),
            "has_bins": any("bins" in trace for trace in chart.traces),
        }
        for name, chart in zip(names, charts, strict=True)
    ]


_HEIGHT = 380  # pixels of a chart that asks for no height
# Templates have tags of their own; the others are no texts that Plotly shows.
_NOT_ESCAPED = {"hovertemplate", "texttemplate", "choice", "tone"}


def _chart_json(chart: Chart) -> dict[str, Any]:
    layout = {"height": _HEIGHT, **chart.layout}
    return {"traces": _thinned(chart.traces), "layout": _thinned(layout)}


def _thinned(value: Any, key: str = "") -> Any:
    """Return JSON's own types: six digits of a number are more than a screen shows.

    Plotly reads tags in texts; a name that looks like one is escaped.
    """
    if isinstance(value, Mapping):
        return {str(name): _thinned(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_thinned(item, key) for item in value]
    if isinstance(value, str) and key not in _NOT_ESCAPED:
        return html.escape(value, quote=False)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _script_json(content: Any) -> Markup:
    """Return JSON that no text within can end the script element of."""
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except TypeError as error:
        raise ValueError(
            f"a chart holds what JSON does not: {error}; give lists and numbers"
        ) from error
    return Markup(text.replace("<", "\\u003c"))


def _plotly() -> str:
    return resources.files("plotly").joinpath("package_data/plotly.min.js").read_text("utf-8")


def _require_unique(names: Sequence[str], what: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the report has several {what} called {', '.join(twice)}; rename them")


def _sort_text(cell: Cell) -> str:
    if cell is None:
        return ""
    return cell if isinstance(cell, str) else repr(cell)


def _cell_text(cell: Cell) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}".replace("-", "−")
    return cell if isinstance(cell, str) else f"{cell:.4g}".replace("-", "−")


def _style(half_width: float) -> str:
    """The format that keeps two figures of an interval's half width."""
    if half_width <= 0 or not math.isfinite(half_width):
        return ".4g"
    return f".{max(0, min(10, 1 - math.floor(math.log10(half_width))))}f"
