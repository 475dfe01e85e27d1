"""What every figure is drawn on: the same bytes for the same numbers, on white and on black.

Figures are drawn once with a stand-in for ink. A file of its own gets dark ink on white paper; in
the report the ink is ``currentColor``, so it follows the page, light or dark. Text stays text: it
is crisp, can be searched, and no font outlines depend on what is installed.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

WIDE, NARROW = 9.6, 4.8  # inches; a page is one wide or two narrow figures across
INK = "#010203"  # stands for the colour of text and lines; no other element uses it
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
        return f"{head}>{paper}{body}".replace(INK, "#1b1f24") + "\n"

    def inline_text(self) -> str:
        """Return the SVG for a page: ink of the page, ids unlike those of other figures."""
        svg = self.svg.replace(INK, "currentColor")
        svg = re.sub(r'\bid="', f'id="{self.name}-', svg)
        svg = re.sub(r"url\(#", f"url(#{self.name}-", svg)
        svg = re.sub(r'href="#', f'href="#{self.name}-', svg)
        return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


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
    # Sizes come from the page; the view box keeps the shape.
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    # Fonts of the page in the report, of the viewer elsewhere.
    return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", svg)


def legend(ax: "Axes", **place: Any) -> None:
    """Draw a legend where there is something to tell apart."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**place)


def colour(number: int) -> str:
    """Return the colour of the line or model with this number."""
    return COLOURS[number % len(COLOURS)]
