"""Bootstrap resamples of metrics, compiled: draw counts, then weigh what was prepared once.

A resample is a count per unit (row, group or day): how often the unit was drawn. A metric that is
a function of sums is then counts x per-unit sums, and a ranking metric is one walk over rows that
were sorted once. So a resample costs one pass and no sort, no copy of rows and no Python.

Resample ``number`` of ``seed`` has its own random stream, so the same resamples come for every
model (that is what pairs two models), in any order and on any number of threads.

Units may be drawn in strata, each of which keeps its number of units, or in blocks of units that
follow each other (a circular moving block: it may begin at any unit, and runs on from the last one
to the first).

Cost, 100,000 rows on one core of 2025: drawing 0.6 ns per row, a column of sums 0.1 ns, a ranking
0.8 ns for the area under the ROC curve and about as much again for average precision.

Legend: U units, N rows, K columns of sums, R rankings, B resamples.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]

_CHUNK = 16  # resamples one thread takes at a time
# Below this a 64-bit word gives two draws; a unit's chance is then off by less than 1 part in 4096.
_MAX_HALF_WORD = 1 << 20
_compiled: Any = numba.njit  # untyped upstream
_U = np.uint64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class Ranking:
    """Rows sorted by score, best first, positives first among equal scores; weighed per class.

    Shapes: ``unit`` (N,) uint32, the unit of each sorted row (unsigned: a signed index is checked
    for being negative, a third of the whole walk); ``positive`` and ``negative`` (N,), the row's
    weight if it is of that class, else 0: int8 if all weights are 1, else float64; ``mixed``
    (groups, 3) int64, start, first negative and end of each group of equal scores that holds both
    classes; ``ends`` (groups,) int64, ends of the groups that hold a positive row, or
    empty if average precision is not wanted.
    """

    unit: npt.NDArray[np.uint32]
    positive: npt.NDArray[Any]
    negative: npt.NDArray[Any]
    mixed: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


def rank(
    score: Floats,
    is_positive: npt.NDArray[np.bool_],
    weight: Floats | None,
    unit: npt.NDArray[np.int64],
    *,
    with_precision: bool,
) -> Ranking:
    """Sort rows once for all resamples; ``weight`` None means that every row weighs 1."""
    order = np.lexsort((~is_positive, -score))
    sorted_score, sorted_positive = score[order], is_positive[order]
    if weight is None:
        positive: npt.NDArray[Any] = sorted_positive.astype(np.int8)
        negative: npt.NDArray[Any] = 1 - positive
    else:
        positive = np.where(sorted_positive, weight[order], 0.0)
        negative = np.where(sorted_positive, 0.0, weight[order])
    ends = np.flatnonzero(np.append(np.diff(sorted_score) != 0, True)) + 1
    starts = np.insert(ends[:-1], 0, 0)
    middles = starts + np.add.reduceat(sorted_positive, starts, dtype=np.int64)
    is_mixed = (middles > starts) & (middles < ends)
    return Ranking(
        unit=unit[order].astype(np.uint32),
        positive=positive,
        negative=negative,
        mixed=np.column_stack([starts, middles, ends])[is_mixed],
        ends=ends[middles > starts] if with_precision else np.empty(0, np.int64),
    )


def rank_once(ranking: Ranking, num_units: int) -> Floats:
    """Return (area under ROC, average precision) of the rows themselves, each unit counted once."""
    counts = np.ones(num_units, np.uint8)
    return np.array(
        [_area(counts, *_area_of(ranking)), _precision(counts, *_precision_of(ranking))]
    )


def resample(
    columns_KU: Floats,
    rankings: Sequence[Ranking],
    *,
    num_resamples: int,
    seed: int,
    threads: int,
    strata: Sequence[int] = (),
    block: int = 1,
) -> tuple[Floats, Floats]:
    """Return the sums (B, K) and the rankings' metrics (B, R, 2) of every resample.

    The metrics of a ranking are area under the ROC curve and average precision, NaN in a resample
    where they are not defined (one class only), and NaN throughout if precision is not wanted.
    ``strata`` and ``block`` are as in ``draw_counts``.
    """
    sums_BK = np.empty((num_resamples, len(columns_KU)))
    ranks_BR = np.full((num_resamples, len(rankings), 2), np.nan)
    columns_KU = np.ascontiguousarray(columns_KU)

    def run(first: int) -> None:
        chunk = slice(first, min(first + _CHUNK, num_resamples))
        counts_BU = np.empty((chunk.stop - chunk.start, columns_KU.shape[1]), np.uint8)
        _fill(counts_BU, seed, first, strata, block)
        _sums(counts_BU, columns_KU, sums_BK[chunk])
        for number, ranking in enumerate(rankings):
            _areas(counts_BU, *_area_of(ranking), ranks_BR[chunk, number, 0])
            if len(ranking.ends):
                _precisions(counts_BU, *_precision_of(ranking), ranks_BR[chunk, number, 1])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(0, num_resamples, _CHUNK)))
    return sums_BK, ranks_BR


def draw_counts(
    num_units: int,
    *,
    num_resamples: int,
    seed: int,
    first: int = 0,
    strata: Sequence[int] = (),
    block: int = 1,
) -> npt.NDArray[np.uint8]:
    """Return how often each unit is drawn, (B, U), as ``resample`` draws it from ``first`` on.

    ``strata`` are the numbers of units that follow each other in one stratum, which keeps its
    number; none are one stratum of all. ``block`` units that follow each other are drawn together;
    then there are no strata. A count never passes 255: with more units than that its chance is
    below 1 in 10^500.
    """
    counts_BU = np.empty((num_resamples, num_units), np.uint8)
    _fill(counts_BU, seed, first, strata, block)
    return counts_BU


def rank_influence(ranking: Ranking, num_units: int) -> Floats:
    """Return how fast area and average precision grow with the weight of each unit, (U, 2).

    To first order, a ranking without one unit has its metric less this value: the infinitesimal
    jackknife. It costs two walks over the rows, where leaving units out costs a walk for each.
    """
    area, precision = rank_once(ranking, num_units)
    out_U2 = np.zeros((num_units, 2))
    _area_influence(*_area_of(ranking), area, out_U2[:, 0])
    if len(ranking.ends):
        _precision_influence(*_precision_of(ranking), precision, out_U2[:, 1])
    else:
        out_U2[:, 1] = np.nan
    return out_U2


def _fill(
    counts_BU: npt.NDArray[np.uint8], seed: int, first: int, strata: Sequence[int], block: int
) -> None:
    if block > 1:
        _draw_blocks(counts_BU, np.uint64(seed), np.uint64(first), block)
    else:
        bounds = np.cumsum([0, *(strata or [counts_BU.shape[1]])])
        _draw(counts_BU, np.uint64(seed), np.uint64(first), bounds)


def _area_of(ranking: Ranking) -> tuple[Any, ...]:
    return ranking.unit, ranking.positive, ranking.negative, ranking.mixed


def _precision_of(ranking: Ranking) -> tuple[Any, ...]:
    return ranking.unit, ranking.positive, ranking.negative, ranking.ends


@_compiled(inline="always")
def mix(word):  # type: ignore[no-untyped-def]
    """Return splitmix64's finaliser of a 64-bit word: near words give unrelated ones.

    Source: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    word = (word ^ (word >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> _U(27))) * _U(0x94D049BB133111EB)
    return word ^ (word >> _U(31))


@_compiled(inline="always")
def _start(seed, number):  # type: ignore[no-untyped-def]
    # The state of xoshiro256++ (Blackman, Vigna 2019) from seed and resample number.
    start = mix(seed * _GOLDEN + mix(number + _U(1)))
    return (
        mix(start + _GOLDEN),
        mix(start + _GOLDEN * _U(2)),
        mix(start + _GOLDEN * _U(3)),
        mix(start + _GOLDEN * _U(4)),
    )


@_compiled(inline="always")
def _next(s0, s1, s2, s3):  # type: ignore[no-untyped-def]
    mixed = s0 + s3
    draw = ((mixed << _U(23)) | (mixed >> _U(41))) + s0
    shifted = s1 << _U(17)
    s2 ^= s0
    s3 ^= s1
    s1 ^= s2
    s0 ^= s3
    s2 ^= shifted
    s3 = (s3 << _U(45)) | (s3 >> _U(19))
    return draw, s0, s1, s2, s3


@_compiled(inline="always")
def _below(draw, size):  # type: ignore[no-untyped-def]
    share = np.float64(draw >> _U(11)) * 1.1102230246251565e-16  # in [0, 1)
    return min(np.int64(share * size), size - 1)


@_compiled(nogil=True, cache=True)
def _draw(counts_BU, seed, first, bounds):  # type: ignore[no-untyped-def]
    for number in range(counts_BU.shape[0]):
        s0, s1, s2, s3 = _start(seed, first + _U(number))
        for stratum in range(bounds.shape[0] - 1):
            counts = counts_BU[number, bounds[stratum] : bounds[stratum + 1]]
            counts[:] = 0
            num_units = counts.shape[0]
            size = _U(num_units)
            is_half = num_units <= _MAX_HALF_WORD
            num_words = (num_units + 1) // 2 if is_half else num_units
            for word in range(num_words):
                draw, s0, s1, s2, s3 = _next(s0, s1, s2, s3)
                if is_half:
                    counts[((draw & _LOW) * size) >> _U(32)] += np.uint8(1)
                    if 2 * word + 1 < num_units:
                        counts[((draw >> _U(32)) * size) >> _U(32)] += np.uint8(1)
                else:
                    counts[_below(draw, num_units)] += np.uint8(1)


@_compiled(nogil=True, cache=True)
def _draw_blocks(counts_BU, seed, first, block):  # type: ignore[no-untyped-def]
    num_units = counts_BU.shape[1]
    for number in range(counts_BU.shape[0]):
        counts = counts_BU[number]
        counts[:] = 0
        s0, s1, s2, s3 = _start(seed, first + _U(number))
        left = num_units
        while left > 0:
            draw, s0, s1, s2, s3 = _next(s0, s1, s2, s3)
            start = _below(draw, num_units)
            for step in range(min(block, left)):  # the last block is cut to the size of the data
                counts[(start + step) % num_units] += np.uint8(1)
            left -= block


@_compiled(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _sums(counts_BU, columns_KU, out_BK):  # type: ignore[no-untyped-def]
    for number in range(counts_BU.shape[0]):
        counts = counts_BU[number]
        for k in range(columns_KU.shape[0]):
            column = columns_KU[k]
            total = 0.0
            for u in range(column.shape[0]):
                total += counts[u] * column[u]
            out_BK[number, k] = total


@_compiled(nogil=True, cache=True)
def _area(counts, unit, positive, negative, mixed):  # type: ignore[no-untyped-def]
    # Pairs (positive, negative) in which the positive is ranked first; no branch per row.
    above = positive[0] * 0
    below = negative[0] * 0
    pairs = above * below
    for i in range(unit.shape[0]):
        count = np.int64(counts[unit[i]])
        above += count * positive[i]
        weight = count * negative[i]
        below += weight
        pairs += weight * above
    if above == 0 or below == 0:
        return np.nan
    tied = 0.0  # in a group of equal scores all pairs were taken as won; half of them are
    for g in range(mixed.shape[0]):
        start, middle, end = mixed[g]
        group_above = positive[0] * 0
        group_below = negative[0] * 0
        for i in range(start, middle):
            group_above += np.int64(counts[unit[i]]) * positive[i]
        for i in range(middle, end):
            group_below += np.int64(counts[unit[i]]) * negative[i]
        tied += np.float64(group_above) * np.float64(group_below)
    return (np.float64(pairs) - 0.5 * tied) / (np.float64(above) * np.float64(below))


@_compiled(nogil=True, cache=True)
def _precision(counts, unit, positive, negative, ends):  # type: ignore[no-untyped-def]
    # Sum over groups of equal scores of (recall gained) x (precision down to this group).
    above = positive[0] * 0
    all_rows = above + negative[0] * 0
    total = 0.0
    i = 0
    for g in range(ends.shape[0]):
        before = above
        while i < ends[g]:
            count = np.int64(counts[unit[i]])
            weight = count * positive[i]
            above += weight
            all_rows += weight + count * negative[i]
            i += 1
        if above > before:
            total += np.float64(above - before) * (np.float64(above) / np.float64(all_rows))
    return total / np.float64(above) if above > 0 else np.nan


@_compiled(nogil=True, cache=True)
def _areas(counts_BU, unit, positive, negative, mixed, out_B):  # type: ignore[no-untyped-def]
    for number in range(counts_BU.shape[0]):
        out_B[number] = _area(counts_BU[number], unit, positive, negative, mixed)


@_compiled(nogil=True, cache=True)
def _precisions(counts_BU, unit, positive, negative, ends, out_B):  # type: ignore[no-untyped-def]
    for number in range(counts_BU.shape[0]):
        out_B[number] = _precision(counts_BU[number], unit, positive, negative, ends)


@_compiled(nogil=True, cache=True)
def _area_influence(unit, positive, negative, mixed, area, out_U):  # type: ignore[no-untyped-def]
    above_all, below_all = 0.0, 0.0
    for i in range(unit.shape[0]):
        above_all += positive[i]
        below_all += negative[i]
    above, below = 0.0, 0.0
    half_above, half_below = 0.0, 0.0  # half the weights of the mixed group that row i is in
    group, until = 0, 0
    for i in range(unit.shape[0]):
        if i == until:
            half_above, half_below = 0.0, 0.0
        if group < mixed.shape[0] and i == mixed[group, 0]:
            middle, until = mixed[group, 1], mixed[group, 2]
            for j in range(i, middle):
                half_above += 0.5 * positive[j]
            for j in range(middle, until):
                half_below += 0.5 * negative[j]
            group += 1
        above += positive[i]
        won = positive[i] * (below_all - below - half_below) + negative[i] * (above - half_above)
        below += negative[i]
        lost = area * (positive[i] / above_all + negative[i] / below_all)
        out_U[unit[i]] += won / (above_all * below_all) - lost


@_compiled(nogil=True, cache=True)
def _precision_influence(  # type: ignore[no-untyped-def]
    unit, positive, negative, ends, precision, out_U
):
    num_groups = ends.shape[0]
    gained = np.empty(num_groups)  # positive weight of the group, and of all rows down to its end
    above = np.empty(num_groups)
    taken = np.empty(num_groups)
    above_all, all_rows = 0.0, 0.0
    i = 0
    for g in range(num_groups):
        before = above_all
        while i < ends[g]:
            above_all += positive[i]
            all_rows += positive[i] + negative[i]
            i += 1
        gained[g], above[g], taken[g] = above_all - before, above_all, all_rows
    raised, lowered = 0.0, 0.0  # by one more positive, or row, above this group and all below it
    for g in range(num_groups - 1, -1, -1):
        if taken[g] > 0:
            raised += gained[g] / taken[g]
            lowered += gained[g] * above[g] / taken[g] ** 2
            own = above[g] / taken[g]
        else:
            own = 0.0
        for i in range(ends[g - 1] if g else 0, ends[g]):
            change = (
                positive[i] * (own + raised - precision) - (positive[i] + negative[i]) * lowered
            )
            out_U[unit[i]] += change / above_all
