"""Compiled order arithmetic: which row stands at a place, for a batch of places at a time.

``walked`` is the keyed bijection behind every shuffle. It runs each round over a short chunk, so
that the compiler uses the vector unit, and then again over those that fell outside.

All arrays are contiguous and writable: one compiled version of each kernel, kept on disk.
"""

from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

GUIDE_ROWS = 1024  # set bits from one entry of a selection's guide to the next
WEIGHT_ROWS = 64  # rows whose weights are summed up

_compiled: Any = numba.njit  # untyped upstream
_intrinsic: Any = intrinsic
Places: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]
_CHUNK = 512
_U = np.uint64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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


@_compiled(inline="always")  # type: ignore[untyped-decorator]
def _find(starts: Any, values: Any, where: Words, span: int) -> None:
    """Move each of ``where`` to the last of ``span`` ``starts`` from there that its value reaches.

    All of them exist.
    """
    # Halving without a jump, one level for a whole chunk: which half is a coin toss, and a guess
    # that fails costs more than all the rest (so does a clamp). Unsigned: a signed index is checked
    # for its sign.
    count = _U(span)
    while count > _U(1):
        half = count >> _U(1)
        for i in range(len(values)):
            low = where[i]
            where[i] = low + half * _U(starts[low + half] <= values[i])
        count -= half


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def in_windows(
    places: Places, begins: Places, shifts: Places, first_slot: int, end_slot: int
) -> None:
    """Turn places of the epoch into rows, in place; all lie in the slots of one window.

    ``begins`` (S,) is the place where the shard in each slot of the epoch begins, ``shifts`` (S,)
    what to add to a place in that slot to get its row.
    """
    slots = np.empty(_CHUNK, np.uint64)
    for first in range(0, len(places), _CHUNK):
        part = places[first : first + _CHUNK]
        slots[:] = _U(first_slot)
        _find(begins, part, slots, end_slot - first_slot)
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

    Shapes: ``words`` (8 K,) the bits, lowest first; ``starts`` (K + 1 + span,) set bits before each
    block of 512, then the number of all; ``guide`` (G,) the block of each ``GUIDE_ROWS``-th set
    bit and of the last; ``span`` the most blocks from one of them to the next, both included.
    """
    # Each step for a whole chunk: the vector unit works, and many cache misses run at a time.
    where, word = np.empty(_CHUNK, np.uint64), np.empty(_CHUNK, np.uint64)
    rest, bits = np.empty(_CHUNK, np.uint64), np.empty(_CHUNK, np.uint64)
    for first in range(0, len(places), _CHUNK):
        part, found = places[first : first + _CHUNK], out[first : first + _CHUNK]
        for i in range(len(part)):
            where[i] = _U(guide[_U(part[i]) // _U(GUIDE_ROWS)])
        _find(starts, part, where, span)
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


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def rank(rows: Places, words: Words, starts: Places, out: Places) -> None:
    """Write how many set bits come before each of ``rows``; arrays as in ``select``."""
    for i in range(len(rows)):
        row = _U(rows[i])
        word, bit = row >> _U(6), row & _U(63)
        count = _U(starts[row >> _U(9)])
        for w in range(word & ~_U(7), word):
            count += _ones(words[_U(w)])
        out[i] = np.int64(count + _ones(words[word] & ((_U(1) << bit) - _U(1))))


@_compiled(inline="always")  # type: ignore[untyped-decorator]
def _mixed(word: Any) -> Any:
    # splitmix64's finaliser (Steele, Lea, Flood 2014): near numbers give unrelated ones.
    word = (word ^ (word >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> _U(27))) * _U(0x94D049BB133111EB)
    return word ^ (word >> _U(31))


@_intrinsic  # type: ignore[untyped-decorator]
def _float32_at(_context: Any, _address: Any) -> Any:
    def build(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.FloatType().as_pointer()))

    return types.float32(types.uint64), build


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _weight(address: Any, row: Any, place: Any, words: Words) -> Any:
    is_in = len(words) == 0 or (words[place >> _U(6)] >> (place & _U(63))) & _U(1) == _U(1)
    return np.float64(_float32_at(address + row * _U(4))) if is_in else 0.0


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def weight_sums(
    address: np.uint64, num_rows: int, first_row: int, words: Words, out: npt.NDArray[np.float64]
) -> None:
    """Write the sum of every ``WEIGHT_ROWS`` weights of a shard, of chosen rows only.

    ``address`` is of ``num_rows`` float32; ``words`` are the chosen rows of the split as bits, in
    which the shard begins at ``first_row``, or empty if all are.
    """
    for block in range(len(out)):
        total = 0.0
        for row in range(block * WEIGHT_ROWS, min((block + 1) * WEIGHT_ROWS, num_rows)):
            total += _weight(_U(address), _U(row), _U(first_row + row), words)
        out[block] = total


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def draw_weighted(
    places: Places,
    strata: Places,
    key: np.uint64,
    num_draws: int,
    sums: npt.NDArray[np.float64],
    blocks: Places,
    starts: Places,
    addresses: Words,
    words: Words,
    out: Places,
) -> None:
    """Write the row drawn at each of ``places``, from its stratum of the sum of all weights.

    Shapes: ``sums`` (K + 1,) of the weights before each block of ``WEIGHT_ROWS``, and all;
    ``blocks`` (S + 1,) number of the first block of each shard, and of all; ``starts`` (S + 1,) the
    same for rows; ``addresses`` (S,) of the shards' weights.
    """
    where, shard = np.empty(_CHUNK, np.uint64), np.empty(_CHUNK, np.uint64)
    target, number = np.empty(_CHUNK, np.float64), np.empty(_CHUNK, np.int64)
    step = sums[-1] / num_draws
    for first in range(0, len(places), _CHUNK):
        part, found = places[first : first + _CHUNK], out[first : first + _CHUNK]
        size = len(part)
        for i in range(size):
            word = _mixed(_U(key) + _U(part[i]) * _GOLDEN)
            share = np.float64(word >> _U(11)) * 2.0**-53
            target[i] = min((strata[first + i] + share) * step, np.nextafter(sums[-1], 0.0))
            where[i] = shard[i] = _U(0)
        _find(sums, target[:size], where, len(sums) - 1)
        for i in range(size):
            number[i] = np.int64(where[i])
        _find(blocks, number[:size], shard, len(blocks) - 1)
        for i in range(size):
            begin = (number[i] - blocks[shard[i]]) * WEIGHT_ROWS
            first_row = starts[shard[i]]
            end = min(begin + WEIGHT_ROWS, starts[shard[i] + _U(1)] - first_row)
            rest, chosen, total = target[i] - sums[where[i]], begin, 0.0
            for row in range(begin, end):
                weight = _weight(addresses[shard[i]], _U(row), _U(first_row + row), words)
                if weight > 0.0:
                    chosen = row  # the last of them, should rounding leave a crumb
                    total += weight
                    if total > rest:
                        break
            found[i] = first_row + chosen


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def cycled(first: int, num_rows: int, key: np.uint64, out: Places) -> None:
    """Write draws ``first`` and on from ``num_rows`` rows that come in a new order each time round.

    For few rows: each order is drawn as a whole.
    """
    rows = np.empty(num_rows, np.int64)
    known = -1
    for i in range(len(out)):
        cycle = (first + i) // num_rows
        if cycle != known:
            known = cycle
            state = _mixed(_U(key) + _U(cycle) * _GOLDEN)
            for j in range(num_rows):
                rows[j] = j
            for j in range(num_rows - 1, 0, -1):  # Fisher and Yates
                state += _GOLDEN
                k = np.int64(_mixed(state) % _U(j + 1))
                rows[j], rows[k] = rows[k], rows[j]
        out[i] = rows[first + i - cycle * num_rows]
