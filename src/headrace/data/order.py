"""Which rows come when: a pure function of (seed, epoch, rank, worker, position).

Nothing here reads a file, keeps a state or draws from a shared generator, so a stream can be
restarted at any batch, with any number of workers, at no cost, and two processes never need to
talk to agree who reads what.

An epoch is an order of all rows. ``Cut`` divides it into global batches of ``batch_size`` rows
times ``num_ranks``, and each of those into slices for the ranks; workers of one rank take whole
batches in turn. ``RowOrder`` says which row stands at a place of the order:

- ``exact``: one permutation of all rows.
- ``window``: shards in random order, rows permuted within a window of several shards, so that
  only that many shards are being read at any time.
- ``block``: runs of consecutive rows in random order, cut at other places each epoch: reads at
  copying speed, mixes least.
- ``sequential``: as stored, every epoch; for prediction.

Permutations of many rows are not stored: a keyed bijection of the whole numbers below n is
evaluated where it is needed, so 60 million rows cost no memory and no start-up, in any worker.
Cost: about 10 to 30 ns a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Kind: TypeAlias = Literal["exact", "window", "block", "sequential"]
KINDS: tuple[Kind, ...] = ("exact", "window", "block", "sequential")
Places: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]

_TABLE_ROWS = 1 << 14  # up to here a permutation is drawn and kept: small domains mix badly
_ROUNDS = 5


class Position(NamedTuple):
    """Where a stream is: the epoch, and the global batches of it that were handed out."""

    epoch: int = 0
    batches: int = 0


@dataclass(frozen=True)
class Cut:
    """How one epoch of ``num_rows`` rows is cut into global batches and these into rank slices.

    A global batch has ``batch_size * num_ranks`` rows; only the last may be shorter, and a tail
    of under two rows per rank joins the batch before it (a batch of one row has no spread to
    normalise by). Every rank takes a slice of every global batch, so all have the same number of
    steps; slices differ by at most one row.
    """

    num_rows: int
    batch_size: int
    num_ranks: int = 1

    @property
    def global_rows(self) -> int:
        """Rows of a full global batch."""
        return self.batch_size * self.num_ranks

    @property
    def num_batches(self) -> int:
        """Global batches of one epoch: the steps of each rank."""
        full, tail = divmod(self.num_rows, self.global_rows)
        has_own = tail >= 2 * self.num_ranks or (full == 0 and tail > 0)
        return full + has_own

    def bounds(self, batch: int, rank: int = 0) -> tuple[int, int]:
        """Return first and end place of the slice of ``rank`` in global batch ``batch``."""
        start = batch * self.global_rows
        is_last = batch == self.num_batches - 1
        rows = (self.num_rows if is_last else start + self.global_rows) - start
        share, extra = divmod(rows, self.num_ranks)
        first = start + rank * share + min(rank, extra)
        return first, first + share + (rank < extra)

    def share(self, used: int, worker: int = 0, num_workers: int = 1) -> range:
        """Return the batches a worker reads when ``used`` batches of the epoch are done."""
        return range(used + worker, self.num_batches, num_workers)


@dataclass(frozen=True)
class RowOrder:
    """The order of all rows in any epoch.

    ``sizes`` are the rows of each shard; rows are numbered through over the shards.
    ``block_rows`` and ``window_shards`` matter to the kinds ``block`` and ``window`` only.
    """

    kind: Kind
    sizes: tuple[int, ...]
    seed: int
    window_shards: int
    block_rows: int

    @property
    def num_rows(self) -> int:
        """Number of rows of an epoch."""
        return sum(self.sizes)

    def rows(self, epoch: int, start: int, stop: int) -> Places:
        """Return the rows that stand at the places ``start`` to ``stop`` of an epoch."""
        places = np.arange(start, stop, dtype=np.int64)
        if self.kind == "sequential":
            return places
        if self.kind == "exact":
            return permuted(places, self.num_rows, (self.seed, epoch, 0))
        if self.kind == "block":
            return self._block_rows(epoch, places)
        parts = [
            self._window_rows(epoch, window, places[(places >= first) & (places < end)] - first)
            for window, (first, end) in enumerate(self._windows(epoch))
            if first < stop and end > start
        ]
        return np.concatenate(parts) if parts else places

    def _block_rows(self, epoch: int, places: Places) -> Places:
        # The ring of rows is cut from another offset each epoch, so the short block that comes
        # last holds other rows each time, and all other blocks are full: plain arithmetic.
        key = (self.seed, epoch, 0)
        num_full = self.num_rows // self.block_rows
        block, within = np.divmod(places, self.block_rows)
        is_full = block < num_full
        block[is_full] = permuted(block[is_full], num_full, key)
        offset = int(_words(key, 1)[0] % np.uint64(max(1, self.num_rows)))
        return (block * self.block_rows + within + offset) % max(1, self.num_rows)

    def _windows(self, epoch: int) -> Iterator[tuple[int, int]]:
        first = 0
        for shards in _shard_windows(len(self.sizes), self.window_shards, self.seed, epoch):
            end = first + sum(self.sizes[shard] for shard in shards)
            yield first, end
            first = end

    def _window_rows(self, epoch: int, window: int, places: Places) -> Places:
        shards = _shard_windows(len(self.sizes), self.window_shards, self.seed, epoch)[window]
        ends = np.cumsum([self.sizes[shard] for shard in shards])
        local = permuted(places, int(ends[-1]), (self.seed, epoch, 2 + window))
        slot = np.searchsorted(ends, local, side="right")
        firsts = np.array([0, *accumulate(self.sizes)])[list(shards)]
        begins = np.concatenate([[0], ends[:-1]])
        return np.asarray(firsts[slot] + local - begins[slot], np.int64)


def permuted(places: Places, num_rows: int, key: tuple[int, ...]) -> Places:
    """Return where ``places`` go under the permutation of ``num_rows`` rows that ``key`` names.

    For many rows: rounds of add, multiply by an odd number and xor with the upper half, each a
    bijection of the b-bit numbers, repeated until the result is below ``num_rows`` (under two
    times on average, since 2**b is less than twice the rows).
    """
    if num_rows <= _TABLE_ROWS:
        return np.take(_table(num_rows, key), places)
    bits = (num_rows - 1).bit_length()
    words = _words(key, 2 * _ROUNDS)
    out = _mixed(places.astype(np.uint64), words, bits)
    while len(outside := np.flatnonzero(out >= num_rows)):
        out[outside] = _mixed(out[outside], words, bits)
    return out.astype(np.int64)


def _mixed(x: Words, words: Words, bits: int) -> Words:
    mask, shift = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    for add, multiply in words.reshape(-1, 2):
        x = (x + add) * (multiply | np.uint64(1))  # wraps at 2**64, which 2**bits divides
        x &= mask
        x ^= x >> shift
    return x


@lru_cache(maxsize=256)
def _words(key: tuple[int, ...], count: int) -> Words:
    return np.asarray(np.random.SeedSequence(key).generate_state(count, np.uint64), np.uint64)


@lru_cache(maxsize=64)
def _table(num_rows: int, key: tuple[int, ...]) -> Places:
    return np.random.default_rng(key).permutation(num_rows)


@lru_cache(maxsize=16)
def _shard_windows(
    num_shards: int, window_shards: int, seed: int, epoch: int
) -> tuple[tuple[int, ...], ...]:
    order = np.random.default_rng((seed, epoch, 1)).permutation(num_shards).tolist()
    return tuple(
        tuple(order[first : first + window_shards]) for first in range(0, num_shards, window_shards)
    )
