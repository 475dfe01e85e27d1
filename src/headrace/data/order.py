"""Which rows come when: a pure function of (seed, epoch, rank, worker, position).

Nothing here reads a file, keeps a state or draws from a shared generator, so a stream can be
restarted at any batch, with any number of workers, at no cost, and two processes never need to
talk to agree who reads what.

An epoch is an order of all rows. ``Cut`` divides it into global batches of ``batch_size`` rows
times ``num_ranks``, and each of those into slices for the ranks; workers of one rank take whole
batches in turn. ``RowOrder`` says which row stands at a place of the order:

- ``exact``: one permutation of all rows.
- ``window``: pieces (short runs of rows) in random order, rows permuted within a window of many
  pieces, so that only that much is being read at any time and all of it is used. The pieces of a
  window come from anywhere, so it mixes well even if the rows lie sorted.
- ``block``: runs of consecutive rows in random order, cut at other places each epoch: reads at
  copying speed, mixes least.
- ``sequential``: as stored, every epoch; for prediction.

Permutations of many rows are not stored: a keyed bijection of the whole numbers below n is
evaluated where it is needed, so 60 million rows cost no memory and no start-up, in any worker.
Cost: 1 to 4 ns a row.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.kernels.order import in_blocks, in_windows, walked

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
    of under ``least_tail`` rows joins the batch before it: by default two rows per rank, for a
    slice of one row has no spread to normalise by. Every rank takes a slice of every global batch,
    so all have the same number of steps; slices differ by at most one row.

    Where a slice may be empty or of one row, ``least_tail`` of 2 makes the cut the same for any
    number of ranks that divides the global batch.
    """

    num_rows: int
    batch_size: int
    num_ranks: int = 1
    least_tail: int | None = None

    @property
    def global_rows(self) -> int:
        """Rows of a full global batch."""
        return self.batch_size * self.num_ranks

    @property
    def num_batches(self) -> int:
        """Global batches of one epoch: the steps of each rank."""
        full, tail = divmod(self.num_rows, self.global_rows)
        least = 2 * self.num_ranks if self.least_tail is None else self.least_tail
        has_own = tail >= least or (full == 0 and tail > 0)
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

    ``sizes`` are the rows of each piece; rows are numbered through over the pieces.
    ``block_rows`` and ``window_pieces`` matter to the kinds ``block`` and ``window`` only.
    """

    kind: Kind
    sizes: tuple[int, ...]
    seed: int
    window_pieces: int
    block_rows: int

    @cached_property
    def num_rows(self) -> int:
        """Number of rows of an epoch."""
        return sum(self.sizes)

    def rows(self, epoch: int, start: int, stop: int) -> Places:
        """Return the rows that stand at the places ``start`` to ``stop`` of an epoch."""
        if self.kind == "exact":
            places = np.arange(start, stop, dtype=np.int64)
            return permuted(places, self.num_rows, (self.seed, epoch, 0))
        if self.kind == "window":
            return self._window_rows(epoch, start, stop)
        if self.kind == "block":
            return self._block_rows(epoch, start, stop)
        return np.arange(start, stop, dtype=np.int64)

    def _block_rows(self, epoch: int, start: int, stop: int) -> Places:
        # The ring of rows is cut from another offset each epoch, so the short block that comes
        # last holds other rows each time, and all other blocks are full: plain arithmetic.
        if stop <= start:
            return np.empty(0, np.int64)
        key = (self.seed, epoch, 0)
        num_full = self.num_rows // self.block_rows
        first, within = divmod(start, self.block_rows)
        blocks = np.arange(first, (stop - 1) // self.block_rows + 1, dtype=np.int64)
        full = blocks[: num_full - first]  # all but the short one
        full[:] = permuted(full, num_full, key)
        offset = int(key_word(key)) % self.num_rows
        out = np.empty(stop - start, np.int64)
        in_blocks(blocks, self.block_rows, within, offset, self.num_rows, out)
        return out

    def _window_rows(self, epoch: int, start: int, stop: int) -> Places:
        slots = self._slots(epoch)
        out = np.arange(start, stop, dtype=np.int64)
        window = int(np.searchsorted(slots.bounds, start, side="right")) - 1
        done = start
        while done < stop:
            first, end = slots.bounds[window : window + 2].tolist()
            part = out[done - start : min(end, stop) - start]
            if len(part):
                key = (self.seed, epoch, 2 + window)
                part[:] = permuted(part - first, end - first, key)
                part += first
                slot = window * self.window_pieces
                end_slot = min(slot + self.window_pieces, len(self.sizes))
                in_windows(part, slots.begins, slots.shifts, slot, end_slot)
                done += len(part)
            window += 1
        return out

    def _slots(self, epoch: int) -> "_Slots":
        known = self._known_slots.get(epoch)
        if known is None:
            known = _slots(self.sizes, self.window_pieces, self.seed, epoch)
            self._known_slots.clear()  # of one epoch only: there may be many pieces
            self._known_slots[epoch] = known
        return known

    @cached_property
    def _known_slots(self) -> "dict[int, _Slots]":
        return {}


class _Slots(NamedTuple):
    """How the S pieces follow each other in one epoch."""

    begins: Places  # (S,) place where the piece in each slot begins
    shifts: Places  # (S,) from a place in the slot to its row
    bounds: Places  # (windows + 1,) first place of each window, and the end


def _slots(sizes: tuple[int, ...], window_pieces: int, seed: int, epoch: int) -> _Slots:
    pieces = np.random.default_rng((seed, epoch, 1)).permutation(len(sizes))
    rows = np.array(sizes, np.int64)
    begins = np.cumsum(rows[pieces]) - rows[pieces]
    shifts = (np.cumsum(rows) - rows)[pieces] - begins
    return _Slots(begins, shifts, np.append(begins[::window_pieces], rows.sum()))


def permuted(places: Places, num_rows: int, key: tuple[int, ...]) -> Places:
    """Return where ``places`` go under the permutation of ``num_rows`` rows that ``key`` names.

    For many rows: rounds of add, multiply by an odd number and xor with the upper half, each a
    bijection of the b-bit numbers, repeated until the result is below ``num_rows`` (under two
    times on average, since 2**b is less than twice the rows).
    """
    if num_rows <= _TABLE_ROWS:
        return np.take(_table(num_rows, key), places)
    out = np.empty(len(places), np.int64)
    words = _round_words(key)
    walked(np.ascontiguousarray(places), words, (num_rows - 1).bit_length(), num_rows, out)
    return out


def key_word(key: tuple[int, ...]) -> np.uint64:
    """Return 64 random bits that ``key`` names."""
    return np.uint64(_words(key, 1)[0])


@lru_cache(maxsize=256)
def _round_words(key: tuple[int, ...]) -> Words:
    words = _words(key, 2 * _ROUNDS).copy()
    words[1::2] |= np.uint64(1)  # only an odd factor can be undone
    return words


@lru_cache(maxsize=256)
def _words(key: tuple[int, ...], count: int) -> Words:
    return np.asarray(np.random.SeedSequence(key).generate_state(count, np.uint64), np.uint64)


@lru_cache(maxsize=64)
def _table(num_rows: int, key: tuple[int, ...]) -> Places:
    return np.random.default_rng(key).permutation(num_rows)
