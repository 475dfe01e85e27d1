"""Compiled order arithmetic: which row stands at a place, for a batch of places at a time.

``walked`` is the keyed bijection behind every shuffle. It runs each round over a short chunk, so
that the compiler uses the vector unit, and then again over those that fell outside.

All arrays are contiguous and writable: one compiled version of each kernel, kept on disk.
"""

from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import intrinsic

GUIDE_ROWS = 1024  # set bits from one entry of a selection's guide to the next

_compiled: Any = numba.njit  # untyped upstream
_intrinsic: Any = intrinsic
Places: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]
_CHUNK = 512
_U = np.uint64


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def walked(places: Places, words: Words, bits: int, num_rows: int, out: Places) -> None:
    """Write where ``places`` go under a permutation of ``num_rows`` rows, each below 2**``bits``.

    ``words`` (2R,) are for each of R rounds the number to add and the odd number to multiply by.
    Only their lower ``bits`` count, so 32-bit words give the same result, twice as many at a time.
    """
    if bits > 32:
        _walk(places, words, bits, num_rows, out, np.empty(_CHUNK, np.uint64))
    else:
        _walk(places, words, bits, num_rows, out, np.empty(_CHUNK, np.uint32))


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _walk(
    places: Places, words: Words, bits: int, num_rows: int, out: Places, chunk: npt.NDArray[Any]
) -> None:
    word = chunk.dtype.type
    where = np.empty(_CHUNK, np.int64)
    mask = word((_U(1) << _U(bits)) - _U(1))
    shift = word((bits + 1) // 2)
    for first in range(0, len(places), _CHUNK):
        size = min(_CHUNK, len(places) - first)
        for i in range(size):
            chunk[i] = word(places[first + i])
            where[i] = first + i
        while size:
            for r in range(0, len(words), 2):
                add, multiply = word(words[r]), word(words[r + 1])
                for i in range(size):
                    x = word(word(word(chunk[i] + add) * multiply) & mask)
                    chunk[i] = word(x ^ word(x >> shift))
            outside = 0
            for i in range(size):
                x, place = chunk[i], where[i]
                out[place] = np.int64(x)
                chunk[outside] = x
                where[outside] = place
                outside += int(np.int64(x) >= num_rows)
            size = outside


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def in_windows(
    places: Places, begins: Places, shifts: Places, first_slot: int, end_slot: int
) -> None:
    """Turn places of the epoch into rows, in place; all lie in the slots of one window.

    ``begins`` (S,) is the place where the shard in each slot of the epoch begins, ``shifts`` (S,)
    what to add to a place in that slot to get its row.
    """
    # Halving without a jump, one level for a whole chunk: which half is a coin toss, and a guess
    # that fails costs more than all the rest. Unsigned: signed indices are checked for their sign.
    slots = np.empty(_CHUNK, np.uint64)
    for first in range(0, len(places), _CHUNK):
        part = places[first : first + _CHUNK]
        slots[:] = _U(first_slot)
        count = _U(end_slot - first_slot)
        while count > _U(1):
            half = count >> _U(1)
            for i in range(len(part)):
                slot = slots[i]
                slots[i] = slot + half * _U(begins[slot + half] <= part[i])
            count -= half
        for i in range(len(part)):
            part[i] += shifts[slots[i]]


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def in_blocks(
    blocks: Places, block_rows: int, start: int, offset: int, num_rows: int, out: Places
) -> None:
    """Write the rows of consecutive places, the first of them ``start`` rows into its block.

    ``blocks`` are the numbers of the blocks that come, one after the other, on a ring of
    ``num_rows`` rows that is cut at ``offset``.
    """
    done = 0
    for number in blocks:
        row = number * block_rows + start + offset
        row -= num_rows * np.int64(row >= num_rows)
        for _ in range(min(block_rows - start, len(out) - done)):
            out[done] = row
            done += 1
            row += 1
            row -= num_rows * np.int64(row == num_rows)
        start = 0


@_intrinsic  # type: ignore[untyped-decorator]
def _ones(_context: Any, _word: Any) -> Any:
    def build(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), build


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def select(
    places: Places, words: Words, starts: Places, guide: Places, span: int, out: Places
) -> None:
    """Write the numbers of the set bits that stand at ``places`` among all set bits.

    Shapes: ``words`` (8 K,) the bits, lowest first; ``starts`` (K + 1,) set bits before each block
    of 512, and all; ``guide`` (G,) the block of each ``GUIDE_ROWS``-th set bit, of the last twice;
    ``span`` the most blocks between two of them, both included.
    """
    # Each step for a whole chunk: the vector unit works, and many cache misses run at a time.
    where, word = np.empty(_CHUNK, np.uint64), np.empty(_CHUNK, np.uint64)
    rest, bits = np.empty(_CHUNK, np.uint64), np.empty(_CHUNK, np.uint64)
    last = _U(len(starts) - 2)
    for first in range(0, len(places), _CHUNK):
        part, found = places[first : first + _CHUNK], out[first : first + _CHUNK]
        for i in range(len(part)):
            where[i] = _U(guide[_U(part[i]) // _U(GUIDE_ROWS)])
        count = _U(span)
        while count > _U(1):  # the last block that begins at the place or before
            half = count >> _U(1)
            for i in range(len(part)):
                block = min(where[i] + half, last)
                where[i] += (block - where[i]) * _U(starts[block] <= part[i])
            count -= half
        for i in range(len(part)):
            rest[i] = _U(part[i] - starts[where[i]])
            where[i] *= _U(8)
            word[i] = words[where[i]] ^ words[where[i] + _U(7)]  # only to have them at hand
        for i in range(len(part)):  # the word of the block that holds the bit
            base, number, before, ones = where[i], _U(0), _U(0), _U(0)
            for w in range(7):
                ones += _ones(words[base + _U(w)])
                is_past = _U(ones <= rest[i])
                number += is_past
                before += (ones - before) * is_past
            where[i] += number
            rest[i] -= before
        for i in range(len(part)):
            word[i] = words[where[i]]
            bits[i] = _U(0)
        half = _U(32)
        while half:
            mask = (_U(1) << half) - _U(1)
            for i in range(len(part)):
                ones = _ones(word[i] & mask)
                is_past = _U(ones <= rest[i])
                rest[i] -= ones * is_past
                word[i] >>= half * is_past
                bits[i] += half * is_past
            half >>= _U(1)
        for i in range(len(part)):
            found[i] = np.int64(where[i] * _U(64) + bits[i])
