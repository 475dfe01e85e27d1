"""Poisson resamples of a stream: counts from a hash of the unit, sums and histograms row by row.

How often resample ``b`` holds a unit is a Poisson number of mean 1 that follows from (seed, b, the
unit's key) alone. So rows may come in any parts and need not be held, and the rows of a unit need
not come together. Every sum is taken in the order of the rows, whatever the parts they come in, so
cutting them otherwise changes no bit, and neither do threads: each takes resamples of its own.

A ranking metric needs rows in the order of their scores, which a stream has not. What is kept is
the weight of each class in bins of the score. Rows of one bin count as equal if all their scores
are, else as in random order.

Source: Chamandy et al. 2012, "Estimating Uncertainty for Massive Data Streams".
Cost, on one core of 2025, per row and 1000 resamples: 0.5 µs for the counts, 0.2 µs for each column
of sums, 0.7 µs for each ranking.

Legend: N rows, K columns of sums, R rankings, C cells (two classes a bin), T bins, L resamples of
a lane.
"""

import math
from concurrent.futures import Executor
from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt

from headrace.kernels.bootstrap import mix

Floats: TypeAlias = npt.NDArray[np.float64]

LANE = 64  # resamples that are folded together
_compiled: Any = numba.njit  # untyped upstream
_U = np.uint64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LEVELS = 1 << 16  # 16 bits of a hash make a count
_MOST = 8  # a Poisson(1) number is larger once in a million


def _count_table() -> npt.NDArray[np.uint8]:
    """Return the count that each 16-bit number stands for: mean and variance 1 within 1e-4."""
    chances = [math.exp(-1) / math.factorial(count) for count in range(_MOST + 1)]
    ends = np.rint(np.cumsum(chances) * _LEVELS).astype(np.int64)
    return np.searchsorted(ends, np.arange(_LEVELS), side="right").astype(np.uint8)


_COUNTS = _count_table()


class Folds:
    """The sums and histograms of resamples ``first`` to ``first + num_resamples``, growing.

    ``ranks`` has a histogram per ranking: cell 2 × bin + 1 is the weight of positive rows.
    """

    def __init__(
        self,
        num_resamples: int,
        *,
        first: int,
        seed: int,
        num_columns: int,
        num_rankings: int,
        num_bins: int,
    ) -> None:
        if first % LANE:
            raise ValueError(f"first is {first}, expected a multiple of {LANE}")
        self._num_resamples, self._first, self._seed = num_resamples, first, seed
        num_lanes = -(-num_resamples // LANE)
        self._sums = [np.zeros((num_columns, LANE)) for _ in range(num_lanes)]
        self._cells = [np.zeros((num_rankings, 2 * num_bins, LANE)) for _ in range(num_lanes)]

    def add(
        self,
        key: npt.NDArray[np.int64],
        columns_KN: Floats,
        cells_RN: npt.NDArray[np.int64],
        weight: Floats,
        pool: Executor,
    ) -> None:
        """Fold rows in: the key of each row's unit, its terms, its cells and their weight."""
        columns_NK = np.ascontiguousarray(columns_KN.T)
        cells_NR = np.ascontiguousarray(cells_RN.T)

        def run(lane: int) -> None:
            _fold(
                key.view(np.uint64), columns_NK, cells_NR, weight, _COUNTS, np.uint64(self._seed),
                np.uint64(self._first + lane * LANE), self._sums[lane], self._cells[lane],
            )  # fmt: skip

        list(pool.map(run, range(len(self._sums))))

    @property
    def sums_BK(self) -> Floats:
        """The sums of each resample."""
        return np.concatenate([sums.T for sums in self._sums])[: self._num_resamples]

    def ranks_BR2(self, is_tied_RT: npt.NDArray[np.bool_]) -> Floats:
        """Return area under the ROC curve and average precision of each resample.

        ``is_tied_RT`` says in which bins all scores are equal.
        """
        ranks = [_ranks(cells, is_tied_RT) for cells in self._cells]
        return np.concatenate(ranks)[: self._num_resamples]


def poisson_counts(
    key: npt.NDArray[np.int64], *, num_resamples: int, seed: int
) -> npt.NDArray[np.uint8]:
    """Return how often each resample holds the unit of each key, (B, N), as ``Folds`` has it."""
    num_lanes = -(-num_resamples // LANE)
    counts_NB = np.empty((len(key), num_lanes * LANE))
    _all_counts(key.view(np.uint64), _COUNTS, np.uint64(seed), counts_NB)
    return np.ascontiguousarray(counts_NB.T[:num_resamples]).astype(np.uint8)


def one_count(
    columns_KN: Floats, cells_RN: npt.NDArray[np.int64], weight: Floats, num_bins: int
) -> tuple[Floats, Floats]:
    """Return sums (K,) and histograms (R, C) of rows that each count once."""
    cells_RC = np.zeros((len(cells_RN), 2 * num_bins))
    for number, cells in enumerate(cells_RN):
        cells_RC[number] = np.bincount(cells, weights=weight, minlength=2 * num_bins)
    return columns_KN.sum(axis=1), cells_RC


def ranks_of(cells_RC: Floats, is_tied_RT: npt.NDArray[np.bool_]) -> Floats:
    """Return area and average precision of each histogram, (R, 2)."""
    ranks: Floats = _ranks(cells_RC[:, :, None], is_tied_RT)[0]
    return ranks


def rank_error(cells_RC: Floats, is_tied_RT: npt.NDArray[np.bool_]) -> Floats:
    """Return how far rows' true order within bins can move each of ``ranks_of``, (R, 2).

    Area: pairs of both classes in one bin count a half and are at most a whole. Precision within a
    bin lies between that of the rows above with all its negatives first, and all its positives.
    """
    negative, positive = (weights[..., 0] for weights in _down(cells_RC[:, :, None]))
    is_open = ~is_tied_RT[:, ::-1]
    above, below = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        area = 0.5 * (positive * negative * is_open).sum(axis=1) / (above[:, -1] * below[:, -1])
        middle = (above - positive / 2) / (above + below - (positive + negative) / 2)
        highest = above / (above + below - negative)
        lowest = np.nan_to_num((above - positive) / (above - positive + below))
        widest = np.maximum(highest - middle, middle - lowest)
        widest = np.where((positive > 0) & is_open, widest, 0)
        precision = (positive * widest).sum(axis=1) / above[:, -1]
    return np.stack([area, precision], axis=-1)


def _down(cells_RCL: Floats) -> tuple[Floats, Floats]:
    """Weights of negative and positive rows per bin, the highest score first, (R, T, L)."""
    return cells_RCL[:, ::2][:, ::-1], cells_RCL[:, 1::2][:, ::-1]


def _ranks(cells_RCL: Floats, is_tied_RT: npt.NDArray[np.bool_]) -> Floats:
    """Area and average precision of each resample, (L, R, 2)."""
    negative, positive = _down(cells_RCL)
    above, below = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    # Precision at a positive row: with its whole bin if that is tied, else with half of it.
    left = np.where(is_tied_RT[:, ::-1, None], 0.0, 0.5)
    with np.errstate(divide="ignore", invalid="ignore"):
        pairs = (negative * (above - 0.5 * positive)).sum(axis=1)
        area = pairs / (above[:, -1] * below[:, -1])
        found = (above - left * positive) / (above + below - left * (positive + negative))
        gained = np.where(positive > 0, positive * found, 0.0)
        precision = gained.sum(axis=1) / above[:, -1]
    return np.stack([area.T, precision.T], axis=-1)


@_compiled(inline="always")
def _draw_lane(key, table, seed, first, counts_L):  # type: ignore[no-untyped-def]
    # Four resamples to a word; word number b // 4 of the unit's own splitmix64 stream.
    start = mix(key ^ mix(seed * _GOLDEN + _U(1)))
    for word in range(counts_L.shape[0] // 4):
        draw = mix(start + _GOLDEN * (first // _U(4) + _U(word) + _U(1)))
        for part in range(4):
            counts_L[4 * word + part] = table[(draw >> _U(16 * part)) & _U(0xFFFF)]


@_compiled(nogil=True, cache=True)
def _fold(  # type: ignore[no-untyped-def]
    key, columns_NK, cells_NR, weight, table, seed, first, sums_KL, cells_RCL
):
    num_lanes = sums_KL.shape[1]
    counts = np.empty(num_lanes)
    for i in range(key.shape[0]):
        if i == 0 or key[i] != key[i - 1]:
            _draw_lane(key[i], table, seed, first, counts)
        for k in range(columns_NK.shape[1]):
            term = columns_NK[i, k]
            sums = sums_KL[k]
            for b in range(num_lanes):
                sums[b] += counts[b] * term
        for r in range(cells_NR.shape[1]):
            cell = cells_RCL[r, cells_NR[i, r]]
            for b in range(num_lanes):
                cell[b] += counts[b] * weight[i]


@_compiled(nogil=True, cache=True)
def _all_counts(key, table, seed, counts_NB):  # type: ignore[no-untyped-def]
    for i in range(key.shape[0]):
        _draw_lane(key[i], table, seed, _U(0), counts_NB[i])
