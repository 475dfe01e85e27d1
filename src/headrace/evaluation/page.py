"""What the report is made of: plain tables, charts and sections, whoever makes them.

A chart is Plotly's own JSON, so that makers need neither Plotly nor a browser; ``report`` turns
sections into the page. Nothing here may differ between identical runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Cell: TypeAlias = str | float | int | None  # None: there is no value; it sorts last


@dataclass(frozen=True)
class Table:
    """A table that the reader can sort; each row has a cell per heading.

    Raises:
        ValueError: if a row is longer or shorter than the headings.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse rows that do not fit the headings."""
        unfit = [i for i, row in enumerate(self.rows) if len(row) != len(self.headings)]
        if unfit:
            raise ValueError(
                f"table {self.title!r} has {len(self.headings)} headings; its rows {unfit[:5]} "
                f"(of {len(unfit)} such rows) have another number of cells"
            )


@dataclass(frozen=True)
class Chart:
    """A chart as Plotly's JSON; axis titles, with units, stand in ``layout``.

    ``name`` is unlike any other in its section and becomes part of an id; ``alternative`` says in
    words what the picture shows. Margins, fonts, grid and height (``layout.height`` if it is
    given) are the page's. Tags work in ``hovertemplate`` and ``texttemplate``; other texts are
    plain. Beside Plotly's own keys a trace may have:
    - ``tone``: its colour, light or dark, instead of colours of its own. A number is the colour of
      that model, class or column; a verdict (chosen, tied, better, worse, unknown), ``ink`` or
      ``soft`` is what it says. Without it colours follow the order of the traces.
    - ``choice``: a name by which the reader picks it; of several names one is drawn at a time, the
      first at first. ``layout.choices`` maps a name to what it changes in the layout.
    - ``bins``: {"edges": [...], "share": [...]} in place of x and y: a histogram whose bins the
      reader may make wider or narrower; see ``curves.bin_edges``.
    """

    name: str
    title: str
    alternative: str
    traces: tuple[Mapping[str, Any], ...]
    layout: Mapping[str, Any]
    is_wide: bool = False  # as wide as the page


@dataclass(frozen=True)
class Section:
    """A part of the page; ``anchor`` is its address, ``text`` its paragraphs.

    ``brief`` is what the first screen says of it, if it says anything.
    """

    anchor: str
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    brief: str = ""
