"""A set of row numbers in little memory: which rows of a split a stream reads.

Sixty million row numbers are 480 MB as whole numbers and 8 MB as a mask of bits, and every worker
process holds its own. So a set is bits, with a count every 512 to find the row at a place, or,
where under one row in 64 is chosen, the numbers themselves.
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Self

import numpy as np
import numpy.typing as npt

from headrace.errors import ConfigError
from headrace.kernels.order import GUIDE_ROWS, rank, select

_BLOCK = 512  # bits from one count to the next
_WORDS = _BLOCK // 64


class Selection:
    """Ascending row numbers below ``num_rows``; ``len()`` says how many.

    It does not change and it pickles. Equal sets have equal digests, however they were given.

    >>> Selection.from_mask(np.array([False, True, True])).rows(np.array([1, 0])).tolist()
    [2, 1]
    """

    def __init__(self, mask: npt.NDArray[np.bool_]) -> None:
        self.num_rows = len(mask)
        self._len = int(np.count_nonzero(mask))
        self._numbers = np.empty(0, np.int64)
        self._words: npt.NDArray[np.uint64] | None = None  # none where the numbers take less
        if self._len * 64 <= self.num_rows:
            self._numbers = np.flatnonzero(mask).astype(np.int64)
            return
        self._words = _packed(mask)
        ones = np.bitwise_count(self._words).reshape(-1, _WORDS).sum(axis=1, dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(ones)])
        guided = np.append(np.arange(0, self._len, GUIDE_ROWS), self._len - 1)
        self._guide = np.searchsorted(starts, guided, side="right") - 1
        self._span = int(np.diff(self._guide).max()) + 1
        self._starts = np.concatenate([starts, np.full(self._span, self._len)])  # for the search

    @classmethod
    def from_mask(cls, mask: npt.NDArray[np.bool_]) -> Self:
        """Return the rows where ``mask`` (rows of the split,) is set."""
        return cls(mask)

    @classmethod
    def from_rows(cls, rows: npt.ArrayLike, num_rows: int) -> Self:
        """Return the given ascending rows of ``num_rows``.

        Raises:
            ConfigError: if they are not ascending whole numbers from 0 to ``num_rows - 1``.
        """
        numbers = np.asarray(rows)
        is_whole = not len(numbers) or np.issubdtype(numbers.dtype, np.integer)
        if numbers.ndim != 1 or not is_whole:
            raise ConfigError(
                f"rows have shape {numbers.shape} and type {numbers.dtype}; give one list of "
                f"whole row numbers"
            )
        steps = np.diff(numbers.astype(np.int64), prepend=-1)
        if (steps <= 0).any() or (len(numbers) and numbers[-1] >= num_rows):
            raise ConfigError(
                f"rows must be ascending row numbers of the split, each once, from 0 to "
                f"{num_rows - 1}; they are {numbers[:3].tolist()} … {numbers[-3:].tolist()}"
            )
        mask = np.zeros(num_rows, bool)
        mask[numbers.astype(np.int64)] = True
        return cls(mask)

    def __len__(self) -> int:
        """How many rows are chosen."""
        return self._len

    @property
    def num_bytes(self) -> int:
        """Memory of the set."""
        if self._words is None:
            return self._numbers.nbytes
        return self._words.nbytes + self._starts.nbytes + self._guide.nbytes

    def rows(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the row numbers at ``places``, each from 0 to ``len() - 1``, among the chosen."""
        if len(places) and (places.min() < 0 or places.max() >= self._len):
            raise IndexError(f"places must be in 0..{self._len - 1}")
        if self._words is None:
            return np.take(self._numbers, places)
        out = np.empty(len(places), np.int64)
        where = np.ascontiguousarray(places)
        select(where, self._words, self._starts, self._guide, self._span, out)
        return out

    def places(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return where chosen ``rows`` stand among the chosen: undoes ``rows``."""
        if self._words is None:
            return np.searchsorted(self._numbers, rows)
        out = np.empty(len(rows), np.int64)
        rank(np.ascontiguousarray(rows), self._words, self._starts, out)
        return out

    def counts(self, sizes: Iterable[int]) -> tuple[int, ...]:
        """Return how many of the chosen rows lie in each shard, given the shards' rows."""
        below = [self._below(end) for end in accumulate(sizes, initial=0)]
        return tuple(after - before for before, after in pairwise(below))

    def words(self) -> npt.NDArray[np.uint64]:
        """Return the set as bits, lowest first, in whole blocks of 512."""
        if self._words is not None:
            return self._words
        mask = np.zeros(self.num_rows, bool)
        mask[self._numbers] = True
        return _packed(mask)

    def mask(self, first: int, stop: int) -> npt.NDArray[np.bool_]:
        """Return for each row from ``first`` to ``stop`` whether it is chosen."""
        if self._words is None:
            is_in = np.zeros(stop - first, bool)
            low, high = np.searchsorted(self._numbers, [first, stop])
            is_in[self._numbers[low:high] - first] = True
            return is_in
        skip = first % 64
        part = self._words[first // 64 : -(-stop // 64)].view(np.uint8)
        return np.unpackbits(part, count=skip + stop - first, bitorder="little")[skip:].view(bool)

    @cached_property
    def digest(self) -> str:
        """Digest of the chosen rows and of the number they are chosen from."""
        content = self._numbers if self._words is None else self._words
        digest = hashlib.sha256(f"{self.num_rows} {self._words is None} ".encode())
        digest.update(np.ascontiguousarray(content).data)
        return digest.hexdigest()

    def _below(self, row: int) -> int:
        if self._words is None:
            return int(np.searchsorted(self._numbers, row))
        block = row // _BLOCK
        whole = np.bitwise_count(self._words[block * _WORDS : row // 64]).sum()
        rest = int(self._words[row // 64]) & ((1 << row % 64) - 1) if row % 64 else 0
        return int(self._starts[block]) + int(whole) + rest.bit_count()


def _packed(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    words = np.zeros(-(-len(mask) // _BLOCK) * _WORDS, np.uint64)
    words.view(np.uint8)[: -(-len(mask) // 8)] = np.packbits(mask, bitorder="little")
    return words
