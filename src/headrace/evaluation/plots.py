"""Two figures as files of their own, for places that show pictures beside a run, such as MLflow.

The report draws its own charts, see ``charts``; these are drawn on a ``canvas``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headrace.evaluation.bootstrap import Interval
from headrace.evaluation.canvas import COLOURS, INK, WIDE, Figure, panels, svg_of
from headrace.evaluation.comparison import Comparison, Judged
from headrace.evaluation.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pictures(comparison: Comparison, *, confidence: float) -> list[Figure]:
    """Return the figures of one target."""
    figures = [forest(comparison, confidence=confidence)]
    if len(comparison.models) > 1:
        figures.append(differences(comparison, confidence=confidence))
    return figures


def forest(comparison: Comparison, *, confidence: float) -> Figure:
    """Every model's interval, a panel per metric; the chosen model's value as a line."""
    shown = [
        (metric, [comparison.of(model, metric.name) for model in comparison.models])
        for metric in comparison.metrics
    ]
    rows = len(comparison.models)
    with panels(len(shown), columns=3, width=WIDE, height=0.7 + 0.24 * rows) as (fig, axs):
        for number, (ax, (metric, judged)) in enumerate(zip(axs, shown, strict=True)):
            _intervals(ax, judged, [one.estimate for one in judged], is_first=number % 3 == 0)
            ax.set_title(f"{metric.title} {_arrow(metric)}", loc="left")
        svg = svg_of(fig)
    primary = comparison.primary_metric
    values = "; ".join(
        f"{model} {_said(comparison.of(model, primary.name))}" for model in comparison.models
    )
    return Figure(
        "forest",
        f"{comparison.target}: metrics with {confidence:.0%} intervals",
        f"Diamond and dotted line: chosen. Blue: tied with it; orange: worse; green: "
        f"better. {primary.title}: {values}",
        svg,
    )


def differences(comparison: Comparison, *, confidence: float) -> Figure:
    """Paired differences to the chosen model, a panel per metric; the line is no difference."""
    others = [model for model in comparison.models if model != comparison.chosen]
    shown = [
        (metric, [comparison.of(model, metric.name) for model in others])
        for metric in comparison.metrics
    ]
    with panels(len(shown), columns=3, width=WIDE, height=0.9 + 0.24 * len(others)) as (
        fig,
        axs,
    ):
        for number, (ax, (metric, judged)) in enumerate(zip(axs, shown, strict=True)):
            ax.axvline(0, color=INK, linewidth=1)
            found = [one.difference for one in judged]
            _intervals(ax, judged, found, is_first=number % 3 == 0, with_line=False)
            ax.set_title(f"{metric.title} {_arrow(metric)}", loc="left")
            ax.set_xlabel(f"model − {comparison.chosen}")
        svg = svg_of(fig)
    primary = comparison.primary_metric
    verdicts = "; ".join(f"{m} {comparison.of(m, primary.name).verdict}" for m in others)
    return Figure(
        "differences",
        f"{comparison.target}: difference to {comparison.chosen}, {confidence:.0%} intervals",
        f"Each model minus {comparison.chosen} on the same resamples. {primary.title}: {verdicts}",
        svg,
    )


def _intervals(
    ax: "Axes",
    judged: Sequence[Judged],
    intervals: Sequence[Interval],
    *,
    is_first: bool,
    with_line: bool = True,
) -> None:
    for place, (one, found) in enumerate(zip(judged, intervals, strict=True)):
        if found.value is None:
            ax.text(
                0.02, place, f" {found.reason}", transform=ax.get_yaxis_transform(), va="center"
            )
            continue
        is_chosen = one.verdict == "chosen"
        if is_chosen and with_line:
            ax.axvline(found.value, color=INK, linewidth=0.8, linestyle=":")
        tint = _VERDICT_COLOURS[one.verdict]
        if found.low is not None and found.high is not None:
            ax.plot([found.low, found.high], [place, place], color=tint, linewidth=2)
        ax.plot(found.value, place, marker="D" if is_chosen else "o", markersize=5, color=tint)
    # Names once a row: panels beside each other have the same models.
    ax.set_yticks(range(len(judged)), [one.model if is_first else "" for one in judged])
    ax.set_ylim(len(judged) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.locator_params(axis="x", nbins=4)


_VERDICT_COLOURS = {
    "chosen": COLOURS[0],
    "tied": COLOURS[0],
    "better": COLOURS[2],
    "worse": COLOURS[1],
    "unknown": COLOURS[4],
}


def _arrow(metric: Metric) -> str:
    return "↑" if metric.higher_is_better else "↓"


def _said(one: Judged) -> str:
    found = one.estimate
    if found.value is None or found.low is None or found.high is None:
        return found.reason if found.value is None else f"{found.value:.4g}"
    return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"
