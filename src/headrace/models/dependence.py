"""Partial dependence: the mean prediction when one column has the same value in all rows.

A curve per predicted number over the column's quantiles, or over its most frequent categories, and
some single rows' curves (individual conditional expectation), which show where rows do not follow
the mean. The values are the column's own, taken from rows that have them, so they keep its type and
unit; no label is needed. It says what the model does, not what the world would: it is asked about
rows that may not exist, such as a short flight to a far airport. Source: Friedman 2001, "Greedy
Function Approximation"; Goldstein et al. 2015, "Peeking Inside the Black Box".

Legend: N rows, G values on the grid, O predicted numbers, L single rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.models.probe import Floats, Predict, in_parts, numbers, with_rows_of
from headrace.schema import label_text


@dataclass(frozen=True)
class Dependence:
    """One column: its values, and per target the curves.

    Shapes: ``means`` (G, O); ``lines`` (L, G), of targets with one predicted number only. A None in
    ``grid`` is a missing category.
    """

    column: str
    is_numeric: bool
    grid: tuple[float | str | None, ...]
    means: dict[str, Floats]
    lines: dict[str, Floats]


def partial_dependence(
    predict: Predict,
    rows: pa.Table,
    column: str,
    *,
    is_numeric: bool,
    grid_size: int,
    num_lines: int,
) -> Dependence | None:
    """Return what ``predict`` says of ``rows`` with each value of ``column``; None if all miss it.

    The lines are those of the first rows.
    """
    grid = _numeric_grid if is_numeric else _category_grid
    places, values = grid(rows[column], grid_size)
    if not values:
        return None
    copies = [
        with_rows_of(rows, [column], np.full(rows.num_rows, place, np.int64)) for place in places
    ]
    parts = in_parts(predict(pa.concat_tables(copies)), len(copies))
    told = {target: np.stack([part[target] for part in parts]) for target in parts[0]}
    return Dependence(
        column=column,
        is_numeric=is_numeric,
        grid=values,
        means={
            target: found.reshape(len(values), rows.num_rows, -1).mean(axis=1)
            for target, found in told.items()
        },
        lines={target: found[:, :num_lines].T for target, found in told.items() if found.ndim == 2},
    )


def _numeric_grid(
    column: pa.ChunkedArray, size: int
) -> tuple[npt.NDArray[np.int64], tuple[float, ...]]:
    """Return rows whose values are the column's quantiles, and those values, each once."""
    found = numbers(column)
    known = np.flatnonzero(~np.isnan(found))
    if not len(known):
        return known, ()
    ordered = known[np.argsort(found[known], kind="stable")]
    places = ordered[np.round(np.linspace(0, len(ordered) - 1, size)).astype(np.int64)]
    values, first = np.unique(found[places], return_index=True)
    return places[first], tuple(values.tolist())


def _category_grid(
    column: pa.ChunkedArray, size: int
) -> tuple[npt.NDArray[np.int64], tuple[str | None, ...]]:
    """Return a row of each of the most frequent categories, missing among them, and their texts."""
    coded = label_text(column.combine_chunks()).dictionary_encode(null_encoding="encode")
    labels = coded.dictionary.to_pylist()
    codes = coded.indices.to_numpy(zero_copy_only=False)
    counts = np.bincount(codes, minlength=len(labels))
    most = sorted(range(len(labels)), key=lambda k: (-counts[k], labels[k] or ""))[:size]
    return np.array([np.flatnonzero(codes == k)[0] for k in most], np.int64), tuple(
        labels[k] for k in most
    )
