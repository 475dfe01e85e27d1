"""The figures of the report, one function each; see ``canvas`` for how they are drawn."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.bootstrap import Interval
from headrace.evaluation.canvas import (
    COLOURS,
    INK,
    NARROW,
    WIDE,
    Figure,
    colour,
    legend,
    panels,
    svg_of,
)
from headrace.evaluation.comparison import Comparison, Judged
from headrace.evaluation.curves import Calibration, Curve, Grid, Histogram, density
from headrace.evaluation.metrics import METRICS, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats: TypeAlias = npt.NDArray[np.float64]


def forest(comparison: Comparison, *, confidence: float) -> Figure:
    """Every model's interval, a panel per metric; the chosen model's value as a line."""
    shown = [
        (metric, [comparison.of(model, metric.name) for model in comparison.models])
        for metric in METRICS[comparison.task]
    ]
    rows = len(comparison.models)
    with panels(len(shown), columns=3, width=WIDE, height=0.7 + 0.24 * rows) as (fig, axs):
        for number, (ax, (metric, judged)) in enumerate(zip(axs, shown, strict=True)):
            _intervals(ax, judged, [one.estimate for one in judged], is_first=number % 3 == 0)
            ax.set_title(f"{metric.title} {_arrow(metric)}", loc="left")
        svg = svg_of(fig)
    primary = _metric(comparison)
    values = "; ".join(
        f"{model} {_said(comparison.of(model, primary.name))}" for model in comparison.models
    )
    return Figure(
        "forest",
        f"{comparison.target}: metrics with {confidence:.0%} intervals",
        f"Diamond and dotted line: chosen. Blue: tied with it; orange: worse; green: "
        f"better. {primary.title}: {values}",
        svg,
        is_wide=True,
    )


def differences(comparison: Comparison, *, confidence: float) -> Figure:
    """Paired differences to the chosen model, a panel per metric; the line is no difference."""
    others = [model for model in comparison.models if model != comparison.chosen]
    shown = [
        (metric, [comparison.of(model, metric.name) for model in others])
        for metric in METRICS[comparison.task]
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
    with panels(1, columns=1, width=NARROW, height=2.4) as (fig, (ax,)):
        for number, model in enumerate(comparison.models):
            curve, tint = density(resamples[model]), colour(number)
            value = comparison.of(model, metric.name).estimate.value
            if len(curve.x):
                ax.plot(curve.x, curve.y, color=tint, label=model)
                ax.fill_between(curve.x, curve.y, color=tint, alpha=0.08, linewidth=0)
            elif value is not None:
                ax.axvline(value, color=tint, label=f"{model} (constant)")
        ax.set_xlabel(f"{metric.title} {_arrow(metric)}")
        ax.set_ylabel("density")
        ax.set_ylim(bottom=0)
        legend(ax)
        svg = svg_of(fig)
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
    with panels(2, columns=2, width=WIDE, height=3.4) as (fig, (left, right)):
        left.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        right.axhline(base_rate, color=INK, linewidth=0.8, linestyle=":")
        for number, model in enumerate(roc):
            style: dict[str, Any] = {"color": colour(number), "linewidth": 1.4, "label": model}
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
        legend(left, loc="lower right")
        svg = svg_of(fig)
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
    with panels(1, columns=1, width=NARROW, height=3.2) as (fig, (ax,)):
        ax.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        for number, (label, curve) in enumerate(roc.items()):
            ax.plot(curve.x, curve.y, color=colour(number), linewidth=1.4, label=label)
        ax.set(
            xlim=(0, 1),
            ylim=(0, 1.02),
            xlabel="share of other classes taken (false positive rate)",
            ylabel="share of the class found (recall)",
        )
        legend(ax, loc="lower right")
        svg = svg_of(fig)
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
    with panels(1, columns=1, width=NARROW, height=1.2 + 0.34 * size) as (fig, (ax,)):
        for i in range(size):
            for j in range(size):
                square = Rectangle(
                    (j - 0.5, i - 0.5), 1, 1, facecolor=COLOURS[0], alpha=0.05 + 0.7 * recall[i, j]
                )
                ax.add_patch(square)
                if size <= 12:
                    ax.text(j, i, f"{recall[i, j]:.0%}", ha="center", va="center", fontsize=8)
        ax.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        ax.set_xticks(range(size), labels, rotation=30 if size > 5 else 0)
        ax.set_yticks(range(size), labels)
        ax.set(xlabel="predicted class (likeliest)", ylabel="true class")
        ax.grid(visible=False)
        svg = svg_of(fig)
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
    with panels(1, columns=1, width=NARROW, height=3.2) as (fig, (ax,)):
        values = np.concatenate([np.r_[c.predicted, c.observed] for c in curves.values()])
        ends = [float(values.min()), float(values.max())]
        ax.plot(ends, ends, color=INK, linewidth=0.8, linestyle=":")
        for number, (model, curve) in enumerate(curves.items()):
            errors = np.nan_to_num(
                np.stack([curve.observed - curve.low, curve.high - curve.observed])
            )
            ax.errorbar(
                curve.predicted,
                curve.observed,
                yerr=errors,
                color=colour(number),
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                elinewidth=1,
                capsize=0,
                label=model,
            )
        ax.set(xlabel=predicted, ylabel=observed)
        legend(ax, loc="upper left")
        svg = svg_of(fig)
    return Figure(
        "calibration",
        f"{target}: calibration",
        "Rows in ten bins by prediction; bars: interval of the mean outcome by unit. "
        f"Dotted: perfect. Models: {', '.join(curves)}.",
        svg,
    )


def residuals(target: str, histograms: Mapping[str, Histogram]) -> Figure:
    """Distribution of prediction − truth, a line per model; share of rows on a log scale."""
    with panels(1, columns=1, width=NARROW, height=2.6) as (fig, (ax,)):
        ax.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        for number, (model, found) in enumerate(histograms.items()):
            ax.stairs(found.share, found.edges, color=colour(number), linewidth=1.3, label=model)
        shares = np.concatenate([found.share for found in histograms.values()])
        if shares.max() > 1000 * shares[shares > 0].min():
            ax.set_yscale("log")
            # The default labels of a log axis are formulas, and formulas are not parsed here.
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.yaxis.set_minor_formatter(lambda *_: "")
        ax.set_xlabel("prediction − truth")
        ax.set_ylabel("share of rows per bin")
        legend(ax)
        svg = svg_of(fig)
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

    with panels(1, columns=1, width=NARROW, height=3.4) as (fig, (ax,)):
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
                    facecolor=COLOURS[0],
                    alpha=round(0.15 + 0.85 * float(depth[j, i]), 2),
                )
            )
        ends = [max(x[0], y[0]), min(x[-1], y[-1])]
        if ends[0] < ends[1]:
            ax.plot(ends, ends, color=INK, linewidth=0.8, linestyle=":")
        ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel="prediction", ylabel="truth")
        svg = svg_of(fig)
    return Figure(
        "predicted",
        f"{target}: truth against prediction, {model}",
        f"Cells hold shares of rows from {least:.2g} (light) to {most:.2g} (dark), log scale. "
        f"Dotted: truth equals prediction.",
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


def _metric(comparison: Comparison) -> Metric:
    return next(m for m in METRICS[comparison.task] if m.name == comparison.primary)


def _arrow(metric: Metric) -> str:
    return "↑" if metric.higher_is_better else "↓"


def _said(one: Judged) -> str:
    found = one.estimate
    if found.value is None or found.low is None or found.high is None:
        return found.reason if found.value is None else f"{found.value:.4g}"
    return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"
