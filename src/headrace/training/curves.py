"""The curves of a training run, losses and metrics by epoch or tree: a figure, and JSON values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.evaluation.canvas import COLOURS, INK, WIDE, Figure, legend, panels, svg_of

_POINTS = 200  # of a curve in JSON, which says how it goes and is no record of every step


@dataclass(frozen=True)
class LearningCurves:
    """A figure per epoch on held-back rows and, for a loss, while learning."""

    title: str
    inner: Sequence[float]
    train: Sequence[float] | None = None


def learning_curves(parts: Sequence[LearningCurves], *, kept_epoch: int, verdict: str) -> Figure:
    """A panel for each of ``parts``, by epoch (from 1); the dotted line is the kept epoch."""
    with panels(len(parts), columns=3, width=WIDE, height=2.3) as (canvas, axes):
        for ax, part in zip(axes, parts, strict=True):
            epochs = range(1, len(part.inner) + 1)
            ax.axvline(kept_epoch, color=INK, linewidth=0.8, linestyle=":")
            if part.train is not None:
                ax.plot(epochs, part.train, color=COLOURS[1], label="while learning")
            ax.plot(epochs, part.inner, color=COLOURS[0], label="held back")
            ax.set_title(part.title, loc="left")
            ax.set_xlabel("epoch")
            ax.locator_params(axis="x", integer=True)
        legend(axes[0])
        svg = svg_of(canvas)
    kept = "; ".join(f"{part.title} {part.inner[kept_epoch - 1]:.4g}" for part in parts)
    return Figure(
        "learning_curves",
        f"Learning curves: {verdict}",
        f"Dotted line: epoch {kept_epoch}, whose weights were kept. Held-back rows there: {kept}",
        svg,
    )


def curves_json(parts: Sequence[LearningCurves], *, step: str, kept: int) -> list[dict[str, Any]]:
    """Return ``parts`` as the summary of a model holds them; ``kept`` counts ``step``s from 1."""
    return [_curve_json(part, step, kept) for part in parts]


def _curve_json(part: LearningCurves, step: str, kept: int) -> dict[str, Any]:
    last = len(part.inner)
    every = -(-last // _POINTS)
    at = sorted({*range(1, last + 1, every), kept, last})

    def values(of: Sequence[float]) -> list[float | None]:
        found = (of[number - 1] for number in at)
        return [float(f"{one:.6g}") if math.isfinite(one) else None for one in found]

    return {
        "title": part.title,
        "step": step,
        "kept": kept,
        "at": at,
        "held_back": values(part.inner),
        "learnt": None if part.train is None else values(part.train),
    }
