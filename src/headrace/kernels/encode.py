"""Kernels of the encoder: scale numeric columns, remap dictionary codes, count and measure both.

``fill_numeric`` and ``fill_codes`` read the columns of an Arrow batch where they lie and write them
into row-major packed rows. One call does all columns of a batch, a tile of some hundred rows at a
time, which stays in the cache while column after column is written. Numbers are scaled into a
buffer of a few columns first, by vector instructions, and go from there into the rows: with one
column at a time, each number written would wait for another line of the cache.

Legend: B rows, N numeric inputs, C categories, G columns of a group, F facts of a column.
``columns`` is the table of a ``ColumnTable``. In the kernels of one column, ``valid`` is an Arrow
validity bitmap whose bit ``first`` is row 0; it is empty where no value is null.
"""

from collections.abc import Mapping
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import carray  # type: ignore[attr-defined]

from headrace.kernels.arrow import pointer

TILE_ROWS = 512
GROUP = 16  # numeric columns that are written together: a cache line of float32
# How ``kinds`` name the type of a column's values.
KINDS: Mapping[str, int] = {
    name: kind
    for kind, name in enumerate(
        (
            "float",
            "double",
            "int8",
            "int16",
            "int32",
            "int64",
            "uint8",
            "uint16",
            "uint32",
            "uint64",
        )
    )
}

_compiled: Any = numba.njit  # untyped upstream
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@_compiled(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def scale(x_B: npt.NDArray[Any], mean: float, rate: float, out_B: npt.NDArray[np.float32]) -> int:
    """Write ``(x - mean) * rate`` to ``out_B`` and return how many values float32 cannot hold.

    Those (infinities above all) become NaN, and NaN stays. In float64, so a large mean costs no
    digits; ``rate`` is 1 / std, for a division takes four times as long.
    """
    num_outside = 0
    for i in range(len(x_B)):
        z: Any = (np.float64(x_B[i]) - mean) * rate
        is_outside = abs(z) > _FLOAT32_MAX
        num_outside += is_outside
        out_B[i] = np.nan if is_outside else z
    return num_outside


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _fill_nulls(
    valid: npt.NDArray[np.uint8], first: int, out_B: npt.NDArray[Any], value: Any
) -> None:
    """Write ``value`` where the validity bits say null; eight rows at a time, mostly all valid."""
    for place in range(first >> 3, (first + len(out_B) + 7) >> 3):
        if valid[place] == 0xFF:
            continue
        row = 8 * place - first
        for i in range(max(row, 0), min(row + 8, len(out_B))):
            if not (valid[place] >> (i - row)) & 1:
                out_B[i] = value


@_compiled(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _scale_at(
    address: int, kind: int, num_rows: int, mean: float, rate: float, out_B: npt.NDArray[np.float32]
) -> Any:
    at = pointer(address)
    if kind == 0:
        return scale(carray(at, num_rows, np.float32), mean, rate, out_B)
    if kind == 1:
        return scale(carray(at, num_rows, np.float64), mean, rate, out_B)
    if kind == 2:
        return scale(carray(at, num_rows, np.int8), mean, rate, out_B)
    if kind == 3:
        return scale(carray(at, num_rows, np.int16), mean, rate, out_B)
    if kind == 4:
        return scale(carray(at, num_rows, np.int32), mean, rate, out_B)
    if kind == 5:
        return scale(carray(at, num_rows, np.int64), mean, rate, out_B)
    if kind == 6:
        return scale(carray(at, num_rows, np.uint8), mean, rate, out_B)
    if kind == 7:
        return scale(carray(at, num_rows, np.uint16), mean, rate, out_B)
    if kind == 8:
        return scale(carray(at, num_rows, np.uint32), mean, rate, out_B)
    return scale(carray(at, num_rows, np.uint64), mean, rate, out_B)


@_compiled(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _num_outside_valid(
    address: int,
    kind: int,
    num_rows: int,
    mean: float,
    rate: float,
    valid: npt.NDArray[np.uint8],
    first: int,
) -> Any:
    """Count values beyond float32 among those that are not null; only floats can be."""
    num_outside = 0
    one = np.empty(1, np.float32)
    width = 4 if kind == 0 else 8
    for i in range(num_rows):
        if (valid[(first + i) >> 3] >> ((first + i) & 7)) & 1:
            num_outside += _scale_at(address + i * width, kind, 1, mean, rate, one)
    return num_outside


@_compiled(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _scale_column(
    values: int,
    bits: int,
    first: int,
    kind: int,
    width: int,
    mean: float,
    rate: float,
    out_B: npt.NDArray[np.float32],
) -> Any:
    """Scale the rows of one column from ``first`` on; nulls become NaN and do not count."""
    count = len(out_B)
    address = values + first * width
    num_outside = _scale_at(address, kind, count, mean, rate, out_B)
    if bits:
        valid = carray(pointer(bits), (first + count + 7) // 8, np.uint8)
        if num_outside:  # what lies where a value is null can be anything
            num_outside = _num_outside_valid(address, kind, count, mean, rate, valid, first)
        _fill_nulls(valid, first, out_B, np.float32(np.nan))
    return num_outside


@_compiled(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def fill_numeric(
    columns_NF: npt.NDArray[np.int64],
    kinds_N: npt.NDArray[np.int64],
    widths_N: npt.NDArray[np.int64],
    scales_N2: npt.NDArray[np.float64],
    out_BN: npt.NDArray[np.float32],
    num_outside_N: npt.NDArray[np.int64],
) -> None:
    """Write the scaled numbers of a batch, and add to ``num_outside_N`` how many became NaN.

    Shapes: ``kinds_N`` and ``widths_N`` type and bytes of the values; ``scales_N2`` mean and
    1 / std; ``out_BN`` the numeric field of packed rows. Nulls become NaN and do not count.
    """
    num_rows = out_BN.shape[0]
    tile_GB = np.empty((GROUP, TILE_ROWS), np.float32)
    for start in range(0, num_rows, TILE_ROWS):
        count = min(TILE_ROWS, num_rows - start)
        for group in range(0, len(columns_NF), GROUP):
            width = min(GROUP, len(columns_NF) - group)
            for g in range(width):
                j = group + g
                num_outside_N[j] += _scale_column(
                    columns_NF[j, 0],
                    columns_NF[j, 1],
                    columns_NF[j, 2] + start,
                    kinds_N[j],
                    widths_N[j],
                    scales_N2[j, 0],
                    scales_N2[j, 1],
                    tile_GB[g, :count],
                )
            if width == GROUP:  # the same loop, but of known length: a quarter faster
                for i in range(count):
                    for g in range(GROUP):
                        out_BN[start + i, group + g] = tile_GB[g, i]
            else:
                for i in range(count):
                    for g in range(width):
                        out_BN[start + i, group + g] = tile_GB[g, i]


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _remap(
    index_B: npt.NDArray[Any],
    valid: npt.NDArray[np.uint8],
    first: int,
    table: npt.NDArray[Any],
    start: int,
    place: int,
    out_BC: npt.NDArray[Any],
) -> None:
    null = np.uint64(len(table) - 1)
    out_B = out_BC[start : start + len(index_B), place]
    for i in range(len(index_B)):
        # An index beyond the dictionary, which only a damaged file can hold, counts as null.
        out_B[i] = table[min(np.uint64(index_B[i]), null)]
    if len(valid):
        _fill_nulls(valid, first, out_B, table[null])


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def fill_codes(
    columns_CF: npt.NDArray[np.int64],
    kinds_C: npt.NDArray[np.int64],
    widths_C: npt.NDArray[np.int64],
    tables: npt.NDArray[Any],
    starts_C1: npt.NDArray[np.int64],
    out_BC: npt.NDArray[Any],
) -> None:
    """Write the codes of a batch: its dictionary indices, looked up in a table per column.

    Shapes: ``tables`` the look-up tables one after the other, each with the code of null as its
    last entry; ``starts_C1`` where each begins, and the end; ``out_BC`` the codes of packed rows.
    """
    num_rows = out_BC.shape[0]
    for start in range(0, num_rows, TILE_ROWS):
        count = min(TILE_ROWS, num_rows - start)
        for j in range(len(columns_CF)):
            first = columns_CF[j, 2] + start
            at = pointer(columns_CF[j, 0] + first * widths_C[j])
            num_bytes = (first + count + 7) // 8 if columns_CF[j, 1] else 0
            valid = carray(pointer(columns_CF[j, 1]), num_bytes, np.uint8)
            table = tables[starts_C1[j] : starts_C1[j + 1]]
            kind = kinds_C[j]
            if kind == 2:
                _remap(carray(at, count, np.int8), valid, first, table, start, j, out_BC)
            elif kind == 3:
                _remap(carray(at, count, np.int16), valid, first, table, start, j, out_BC)
            elif kind == 4:
                _remap(carray(at, count, np.int32), valid, first, table, start, j, out_BC)
            elif kind == 5:
                _remap(carray(at, count, np.int64), valid, first, table, start, j, out_BC)
            elif kind == 6:
                _remap(carray(at, count, np.uint8), valid, first, table, start, j, out_BC)
            elif kind == 7:
                _remap(carray(at, count, np.uint16), valid, first, table, start, j, out_BC)
            elif kind == 8:
                _remap(carray(at, count, np.uint32), valid, first, table, start, j, out_BC)
            else:
                _remap(carray(at, count, np.uint64), valid, first, table, start, j, out_BC)


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def count_indices(
    index_B: npt.NDArray[Any], valid: npt.NDArray[np.uint8], first: int, size: int
) -> npt.NDArray[np.int64]:
    """Return how often each of the ``size`` values of a dictionary comes; nulls do not count."""
    counts = np.zeros(size, np.int64)
    has_null = len(valid) > 0
    for i in range(len(index_B)):
        index = np.int64(index_B[i])
        if index < 0 or index >= size:
            continue
        if not has_null or (valid[(first + i) >> 3] >> ((first + i) & 7)) & 1:
            counts[index] += 1
    return counts


@_compiled(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def moments(
    x_B: npt.NDArray[Any], valid: npt.NDArray[np.uint8], first: int
) -> tuple[int, int, float, float, float, float]:
    """Return of one column: finite values, infinite ones, mean, squares, smallest and largest.

    ``squares`` is the sum of squared distances from the mean; without a finite value the mean and
    squares are 0 and the bounds infinite. Two walks over the batch, in float64 and in row order,
    so the bits do not depend on how many threads work on other batches.
    """
    has_null = len(valid) > 0
    num_finite, num_infinite = 0, 0
    origin, total = 0.0, 0.0  # summed from the first value on: a large mean costs no digits
    low, high = np.inf, -np.inf
    for i in range(len(x_B)):
        if has_null and not (valid[(first + i) >> 3] >> ((first + i) & 7)) & 1:
            continue
        x = np.float64(x_B[i])
        if np.isfinite(x):
            if num_finite == 0:
                origin = x
            num_finite += 1
            total += x - origin
            low, high = min(low, x), max(high, x)
        elif not np.isnan(x):
            num_infinite += 1
    if num_finite == 0:
        return 0, num_infinite, 0.0, 0.0, low, high
    mean, squares = origin + total / num_finite, 0.0
    for i in range(len(x_B)):
        if has_null and not (valid[(first + i) >> 3] >> ((first + i) & 7)) & 1:
            continue
        x = np.float64(x_B[i])
        if np.isfinite(x):
            squares += (x - mean) * (x - mean)
    return num_finite, num_infinite, mean, squares, low, high
