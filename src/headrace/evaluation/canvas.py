"""What every figure is drawn on: the same bytes for the same numbers.

Text stays text: it is crisp, can be searched, and no font outlines depend on what is installed.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

WIDE = 9.6  # inches
INK = "#1b1f24"  # of text and lines
COLOURS = ("#3f86c9", "#d9822b", "#3f9e63", "#b25aa0", "#937040", "#6a6fd8", "#c85250", "#188c9c")
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
        INK,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One figure: its SVG, a title, and what it shows in words.

    ``name`` is the name of its file.
    """

    name: str
    title: str
    alternative: str
    svg: str

    def file_text(self) -> str:
        """Return the SVG as a file: on white, with its title and words for who cannot see it."""
        paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
        words = f"<title>{escape(self.title)}</title><desc>{escape(self.alternative)}</desc>"
        head, body = self.svg.split(">", 1)
        return f"{head}>{words}{paper}{body}\n"


@contextmanager
def panels(
    count: int, *, columns: int, width: float, height: float
) -> Iterator[tuple["Canvas", list["Axes"]]]:
    """Yield a canvas with ``count`` axes in rows of ``columns``; sizes in inches, one row high."""
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


def svg_of(figure: "Canvas") -> str:
    """Return the SVG of a canvas, without all that differs between identical runs."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML head and its document type
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # Sizes come from the viewer; the view box keeps the shape.
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    # Fonts come from the viewer too.
    return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)


def legend(ax: "Axes", **place: Any) -> None:
    """Draw a legend where there is something to tell apart."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**place)
