"""Figures as SVG text: the same bytes for the same numbers, readable on white and on black.

Figures are drawn once with a stand-in for ink. A file of its own gets dark ink on white paper; in
the report the ink is ``currentColor``, so it follows the page, light or dark. Text stays text: it
is crisp, can be searched, and no font outlines depend on what is installed.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.bootstrap import Interval
from headrace.evaluation.comparison import Comparison, Judged
from headrace.evaluation.curves import Calibration, Curve, Grid, Histogram, density
from headrace.evaluation.metrics import METRICS, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Floats: TypeAlias = npt.NDArray[np.float64]

_WIDE, _NARROW = 9.6, 4.8  # inches; a page is one wide or two narrow figures across
_INK = "#010203"  # stands for the colour of text and lines; no other element uses it
_COLOURS = ("#3f86c9", "#d9822b", "#3f9e63", "#b25aa0", "#937040", "#6a6fd8", "#c85250", "#188c9c")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "headrace",
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "font.size": 9.0,
    "font.family": "sans-serif",
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    **dict.fromkeys(
        (
            "text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color",
            "grid.color",
        ),
        _INK,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One figure: its SVG with stand-in ink, a title, and what it shows in words.

    ``name`` is the name of its file and part of its ids in a page.
    """

    name: str
    title: str
    alternative: str
    svg: str
    is_wide: bool = False  # as wide as the page

    def file_text(self) -> str:
        """Return the SVG as a file of its own: dark ink on white."""
        paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
        head, body = self.svg.split(">", 1)
        return f"{head}>{paper}{body}".replace(_INK, "#1b1f24") + "\n"

    def inline_text(self) -> str:
        """Return the SVG for a page: ink of the page, ids unlike those of other figures."""
        svg = self.svg.replace(_INK, "currentColor")
        svg = re.sub(r'\bid="', f'id="{self.name}-', svg)
        svg = re.sub(r"url\(#", f"url(#{self.name}-", svg)
        svg = re.sub(r'href="#', f'href="#{self.name}-', svg)
        return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def forest(comparison: Comparison, *, confidence: float) -> Figure:
    """Every model's interval, a panel per metric; the chosen model's value as a line."""
    panels = [
        (metric, [comparison.of(model, metric.name) for model in comparison.models])
        for metric in METRICS[comparison.task]
    ]
    rows = len(comparison.models)
    with _panels(len(panels), columns=3, width=_WIDE, height=0.7 + 0.24 * rows) as (fig, axs):
        for number, (ax, (metric, judged)) in enumerate(zip(axs, panels, strict=True)):
            _intervals(ax, judged, [one.estimate for one in judged], is_first=number % 3 == 0)
            ax.set_title(f"{metric.title} {_arrow(metric)}", loc="left")
        svg = _svg(fig)
    primary = _metric(comparison)
    values = "; ".join(
        f"{model} {_said(comparison.of(model, primary.name))}" for model in comparison.models
    )
    return Figure(
        "forest",
        f"{comparison.target}: metrics with {confidence:.0%} intervals",
        f"Diamond and dotted line: chosen on valid. Blue: tied with it; orange: worse; green: "
        f"better. {primary.title}: {values}",
        svg,
        is_wide=True,
    )


def differences(comparison: Comparison, *, confidence: float) -> Figure:
    """Paired differences to the chosen model, a panel per metric; the line is no difference."""
    others = [model for model in comparison.models if model != comparison.chosen]
    panels = [
        (metric, [comparison.of(model, metric.name) for model in others])
        for metric in METRICS[comparison.task]
    ]
    with _panels(len(panels), columns=3, width=_WIDE, height=0.9 + 0.24 * len(others)) as (
        fig,
        axs,
    ):
        for number, (ax, (metric, judged)) in enumerate(zip(axs, panels, strict=True)):
            ax.axvline(0, color=_INK, linewidth=1)
            found = [one.difference for one in judged]
            _intervals(ax, judged, found, is_first=number % 3 == 0, with_line=False)
            ax.set_title(f"{metric.title} {_arrow(metric)}", loc="left")
            ax.set_xlabel(f"model − {comparison.chosen}")
        svg = _svg(fig)
    primary = _metric(comparison)
    verdicts = "; ".join(f"{m} {comparison.of(m, primary.name).verdict}" for m in others)
    return Figure(
        "differences",
        f"{comparison.target}: difference to {comparison.chosen}, {confidence:.0%} intervals",
        f"Each model minus {comparison.chosen} on the same resamples. {primary.title}: {verdicts}",
        svg,
        is_wide=True,
    )


def densities(comparison: Comparison, resamples: Mapping[str, Floats]) -> Figure:
    """Distribution of the primary metric over the resamples, a line per model."""
    metric = _metric(comparison)
    with _panels(1, columns=1, width=_NARROW, height=2.4) as (fig, (ax,)):
        for number, model in enumerate(comparison.models):
            curve, colour = density(resamples[model]), _colour(number)
            value = comparison.of(model, metric.name).estimate.value
            if len(curve.x):
                ax.plot(curve.x, curve.y, color=colour, label=model)
                ax.fill_between(curve.x, curve.y, color=colour, alpha=0.08, linewidth=0)
            elif value is not None:
                ax.axvline(value, color=colour, label=f"{model} (constant)")
        ax.set_xlabel(f"{metric.title} {_arrow(metric)}")
        ax.set_ylabel("density")
        ax.set_ylim(bottom=0)
        _legend(ax)
        svg = _svg(fig)
    return Figure(
        "density",
        f"{comparison.target}: {metric.title} over the resamples",
        f"Density of {metric.title} over resamples of {comparison.num_units} {comparison.unit}s, "
        f"one line per model: {', '.join(comparison.models)}.",
        svg,
    )


def binary_curves(
    target: str,
    roc: Mapping[str, Curve],
    precision_recall: Mapping[str, Curve],
    *,
    base_rate: float,
) -> Figure:
    """ROC and precision-recall curves side by side, a line per model."""
    with _panels(2, columns=2, width=_WIDE, height=3.4) as (fig, (left, right)):
        left.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":")
        right.axhline(base_rate, color=_INK, linewidth=0.8, linestyle=":")
        for number, model in enumerate(roc):
            style: dict[str, Any] = {"color": _colour(number), "linewidth": 1.4, "label": model}
            left.plot(roc[model].x, roc[model].y, **style)
            curve = precision_recall[model]
            right.plot(curve.x, curve.y, drawstyle="steps-pre", **style)
        left.set(
            xlabel="share of negatives taken (false positive rate)",
            ylabel="share of positives found (recall)",
            title="ROC",
        )
        right.set(
            xlabel="share of positives found (recall)",
            ylabel="share of taken that are positive (precision)",
            title="precision and recall",
        )
        for ax in (left, right):
            ax.set(xlim=(0, 1), ylim=(0, 1.02))
        _legend(left, loc="lower right")
        svg = _svg(fig)
    return Figure(
        "curves",
        f"{target}: ROC and precision-recall curves",
        f"One line per model ({', '.join(roc)}). Dotted: guessing, and the base rate "
        f"{base_rate:.3f} of positives.",
        svg,
        is_wide=True,
    )


def class_curves(target: str, model: str, roc: Mapping[str, Curve]) -> Figure:
    """ROC curve of each class against all others, of one model."""
    with _panels(1, columns=1, width=_NARROW, height=3.2) as (fig, (ax,)):
        ax.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":")
        for number, (label, curve) in enumerate(roc.items()):
            ax.plot(curve.x, curve.y, color=_colour(number), linewidth=1.4, label=label)
        ax.set(
            xlim=(0, 1),
            ylim=(0, 1.02),
            xlabel="share of other classes taken (false positive rate)",
            ylabel="share of the class found (recall)",
        )
        _legend(ax, loc="lower right")
        svg = _svg(fig)
    return Figure(
        "curves",
        f"{target}: ROC of each class against the others, {model}",
        f"One line per class: {', '.join(roc)}. Dotted: guessing.",
        svg,
    )


def confusions(target: str, model: str, labels: Sequence[str], share_CC: Floats) -> Figure:
    """Confusion matrix of one model: share of each true class given each class."""
    from matplotlib.patches import Rectangle

    of_class = share_CC.sum(axis=1, keepdims=True)
    recall = np.divide(share_CC, of_class, out=np.zeros_like(share_CC), where=of_class > 0)
    size = len(labels)
    with _panels(1, columns=1, width=_NARROW, height=1.2 + 0.34 * size) as (fig, (ax,)):
        for i in range(size):
            for j in range(size):
                square = Rectangle(
                    (j - 0.5, i - 0.5), 1, 1, facecolor=_COLOURS[0], alpha=0.05 + 0.7 * recall[i, j]
                )
                ax.add_patch(square)
                if size <= 12:
                    ax.text(j, i, f"{recall[i, j]:.0%}", ha="center", va="center", fontsize=8)
        ax.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        ax.set_xticks(range(size), labels, rotation=30 if size > 5 else 0)
        ax.set_yticks(range(size), labels)
        ax.set(xlabel="predicted class (likeliest)", ylabel="true class")
        ax.grid(visible=False)
        svg = _svg(fig)
    return Figure(
        "confusion",
        f"{target}: confusion of {model}, share of each true class",
        "; ".join(f"{label}: {recall[i, i]:.0%} found" for i, label in enumerate(labels)),
        svg,
    )


def calibrations(
    target: str, curves: Mapping[str, Calibration], *, predicted: str, observed: str
) -> Figure:
    """Mean outcome against mean prediction in bins, with intervals; the diagonal is perfect."""
    with _panels(1, columns=1, width=_NARROW, height=3.2) as (fig, (ax,)):
        values = np.concatenate([np.r_[c.predicted, c.observed] for c in curves.values()])
        ends = [float(values.min()), float(values.max())]
        ax.plot(ends, ends, color=_INK, linewidth=0.8, linestyle=":")
        for number, (model, curve) in enumerate(curves.items()):
            errors = np.nan_to_num(
                np.stack([curve.observed - curve.low, curve.high - curve.observed])
            )
            ax.errorbar(
                curve.predicted,
                curve.observed,
                yerr=errors,
                color=_colour(number),
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                elinewidth=1,
                capsize=0,
                label=model,
            )
        ax.set(xlabel=predicted, ylabel=observed)
        _legend(ax, loc="upper left")
        svg = _svg(fig)
    return Figure(
        "calibration",
        f"{target}: calibration",
        "Rows in ten bins by prediction; bars: interval of the mean outcome by unit. "
        f"Dotted: perfect. Models: {', '.join(curves)}.",
        svg,
    )


def residuals(target: str, histograms: Mapping[str, Histogram]) -> Figure:
    """Distribution of prediction − truth, a line per model; share of rows on a log scale."""
    with _panels(1, columns=1, width=_NARROW, height=2.6) as (fig, (ax,)):
        ax.axvline(0, color=_INK, linewidth=0.8, linestyle=":")
        for number, (model, found) in enumerate(histograms.items()):
            ax.stairs(found.share, found.edges, color=_colour(number), linewidth=1.3, label=model)
        shares = np.concatenate([found.share for found in histograms.values()])
        if shares.max() > 1000 * shares[shares > 0].min():
            ax.set_yscale("log")
            # The default labels of a log axis are formulas, and formulas are not parsed here.
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_minor_formatter(lambda *_: "")
        ax.set_xlabel("prediction − truth")
        ax.set_ylabel("share of rows per bin")
        _legend(ax)
        svg = _svg(fig)
    return Figure(
        "residuals",
        f"{target}: residuals",
        f"Histogram of prediction minus truth over its whole range; models: "
        f"{', '.join(histograms)}.",
        svg,
    )


def predicted_actual(target: str, model: str, cells: Grid) -> Figure:
    """Where the rows lie by prediction and truth, one model; darker cells hold more rows."""
    from matplotlib.patches import Rectangle

    with _panels(1, columns=1, width=_NARROW, height=3.4) as (fig, (ax,)):
        shares = np.where(cells.share > 0, cells.share, np.nan)
        least, most = float(np.nanmin(shares)), float(np.nanmax(shares))
        depth = np.log(shares / least) / np.log(most / least) if most > least else shares * 0 + 1
        x, y = cells.x_edges, cells.y_edges
        for j, i in zip(*np.nonzero(cells.share), strict=True):
            ax.add_patch(
                Rectangle(
                    (x[i], y[j]),
                    x[i + 1] - x[i],
                    y[j + 1] - y[j],
                    facecolor=_COLOURS[0],
                    alpha=round(0.15 + 0.85 * float(depth[j, i]), 2),
                )
            )
        ends = [max(x[0], y[0]), min(x[-1], y[-1])]
        if ends[0] < ends[1]:
            ax.plot(ends, ends, color=_INK, linewidth=0.8, linestyle=":")
        ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel="prediction", ylabel="truth")
        svg = _svg(fig)
    return Figure(
        "predicted",
        f"{target}: truth against prediction, {model}",
        f"Cells hold shares of rows from {least:.2g} (light) to {most:.2g} (dark), log scale. "
        f"Dotted: truth equals prediction.",
        svg,
    )


@contextmanager
def _panels(
    count: int, *, columns: int, width: float, height: float
) -> Iterator[tuple["Canvas", list["Axes"]]]:
    # Here, not at the top: to read params.yaml is to import this module, and matplotlib takes 1 s.
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    columns = min(columns, count)
    rows = -(-count // columns)
    with mpl.rc_context(_STYLE):
        figure = Canvas(figsize=(width, height * rows), layout="constrained")
        axes = list(np.atleast_1d(figure.subplots(rows, columns)).ravel())
        for ax in axes[count:]:
            ax.set_axis_off()
        for ax in axes[:count]:
            ax.grid(visible=True)
        yield figure, axes[:count]


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
            ax.axvline(found.value, color=_INK, linewidth=0.8, linestyle=":")
        colour = _VERDICT_COLOURS[one.verdict]
        if found.low is not None and found.high is not None:
            ax.plot([found.low, found.high], [place, place], color=colour, linewidth=2)
        ax.plot(found.value, place, marker="D" if is_chosen else "o", markersize=5, color=colour)
    # Names once a row: panels beside each other have the same models.
    ax.set_yticks(range(len(judged)), [one.model if is_first else "" for one in judged])
    ax.set_ylim(len(judged) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.locator_params(axis="x", nbins=4)


_VERDICT_COLOURS = {
    "chosen": _COLOURS[0],
    "tied": _COLOURS[0],
    "better": _COLOURS[2],
    "worse": _COLOURS[1],
    "unknown": _COLOURS[4],
}


def _svg(figure: "Canvas") -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML head and its document type
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # Sizes come from the page; the view box keeps the shape.
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    # Fonts of the page in the report, of the viewer elsewhere.
    return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)


def _legend(ax: "Axes", **place: Any) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**place)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _metric(comparison: Comparison) -> Metric:
    return next(m for m in METRICS[comparison.task] if m.name == comparison.primary)


def _arrow(metric: Metric) -> str:
    return "↑" if metric.higher_is_better else "↓"


def _said(one: Judged) -> str:
    found = one.estimate
    if found.value is None or found.low is None or found.high is None:
        return found.reason if found.value is None else f"{found.value:.4g}"
    return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"
