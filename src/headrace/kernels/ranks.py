"""Spearman's rank correlation of every bootstrap resample, compiled; rows are sorted once.

A resample changes how often a row counts, not the order of the values. So the ranks of a resample
come from one walk down the sorted rows that adds up counts, twice: by truth and by prediction. Rows
of equal value get the middle of their ranks. Cost, 100,000 rows on one core of 2025: 10 ns a row.

Legend: N rows, U units, B resamples.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
_compiled: Any = numba.njit  # untyped upstream


@dataclass(frozen=True)
class RankPair:
    """Rows sorted by each of two values.

    Shapes: ``unit`` (2, N) uint32 and ``weight`` (2, N), of the rows in both orders; ``ends`` of
    their groups of equal values (groups,) each; ``place`` (N,) where the rows in the first order
    stand in the second.
    """

    unit: npt.NDArray[np.uint32]
    weight: Floats
    ends: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    place: npt.NDArray[np.int64]


def rank_pair(
    first: Floats, second: Floats, weight: Floats | None, unit: npt.NDArray[np.int64]
) -> RankPair:
    """Sort rows once for all resamples; ``weight`` None means that every row weighs 1."""
    if weight is None:
        weight = np.ones(len(first))
    orders = [np.argsort(values, kind="stable") for values in (first, second)]
    ends = tuple(
        np.flatnonzero(np.append(np.diff(values[order]) != 0, True)) + 1
        for values, order in zip((first, second), orders, strict=True)
    )
    position = np.empty(len(first), np.int64)
    position[orders[1]] = np.arange(len(first))
    return RankPair(
        unit=np.stack([unit[order] for order in orders]).astype(np.uint32),
        weight=np.stack([weight[order] for order in orders]),
        ends=(ends[0], ends[1]),
        place=position[orders[0]],
    )


def rank_correlations(pair: RankPair, counts_BU: npt.NDArray[np.uint8]) -> Floats:
    """Return Spearman's correlation of each resample, (B,); NaN where a value is constant."""
    out_B = np.empty(len(counts_BU))
    _correlations(counts_BU, pair.unit, pair.weight, *pair.ends, pair.place, out_B)
    return out_B


@_compiled(nogil=True, cache=True)
def _correlations(  # type: ignore[no-untyped-def]
    counts_BU, unit, weight, first_ends, second_ends, place, out_B
):
    rank = np.empty(place.shape[0])  # by the first value, of the rows in the second order
    for number in range(counts_BU.shape[0]):
        counts = counts_BU[number]
        above = 0.0
        i = 0
        for g in range(first_ends.shape[0]):
            total = 0.0
            for j in range(i, first_ends[g]):
                total += counts[unit[0, j]] * weight[0, j]
            middle = above + 0.5 * total
            for j in range(i, first_ends[g]):
                rank[place[j]] = middle
            i = first_ends[g]
            above += total
        # Ranks about their mean, which is half of all weights.
        center = 0.5 * above
        above = 0.0
        both = 0.0
        first = 0.0
        second = 0.0
        i = 0
        for g in range(second_ends.shape[0]):
            total = 0.0
            of_first = 0.0
            for j in range(i, second_ends[g]):
                w = counts[unit[1, j]] * weight[1, j]
                a = rank[j] - center
                total += w
                of_first += w * a
                first += w * a * a
            b = above + 0.5 * total - center
            both += of_first * b
            second += total * b * b
            i = second_ends[g]
            above += total
        spread = first * second
        out_B[number] = both / np.sqrt(spread) if spread > 0.0 else np.nan
