"""Column kernels of the encoder: scale one numeric column, remap one column of dictionary codes.

Both read an Arrow column's own buffers (values and validity bits; nothing is copied first) and
write one column of row-major packed rows. Callers cut the rows into tiles, so that a tile stays in
the second-level cache while column after column is written into it: 1.5 to 2 times faster than
whole columns of a 65,536-row batch, whose lines leave the cache each time.

Legend: B rows, one column at a time. ``valid`` is an Arrow validity bitmap whose bit ``first`` is
row 0; it is empty where no value is null.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

TILE_ROWS = 4096

_compiled: Any = numba.njit  # untyped upstream
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@_compiled(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def standardise(
    x_B: npt.NDArray[Any],
    valid: npt.NDArray[np.uint8],
    first: int,
    mean: float,
    std: float,
    out_B: npt.NDArray[np.float32],
) -> int:
    """Write ``(x - mean) / std`` to ``out_B`` and return how many values became NaN by it.

    The difference and the quotient are float64, so a large mean costs no digits. A null and NaN
    become NaN; what float32 cannot hold (infinities above all) becomes NaN and is counted.

    Shape: ``x_B`` any number type; ``out_B`` may be a strided column.
    """
    num_outside = 0
    has_null = len(valid) > 0
    for i in range(len(x_B)):
        z: Any = (np.float64(x_B[i]) - mean) / std
        if abs(z) > _FLOAT32_MAX:
            z = np.nan
            if not has_null or (valid[(first + i) >> 3] >> ((first + i) & 7)) & 1:
                num_outside += 1
        if has_null and not (valid[(first + i) >> 3] >> ((first + i) & 7)) & 1:
            z = np.nan
        out_B[i] = z
    return num_outside


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def remap(
    index_B: npt.NDArray[Any],
    valid: npt.NDArray[np.uint8],
    first: int,
    table: npt.NDArray[Any],
    out_B: npt.NDArray[Any],
) -> None:
    """Write ``table[index_B]`` to ``out_B``: dictionary indices of a batch to codes of the fit.

    The last entry of ``table`` is the code of null. An index beyond the dictionary, which only a
    damaged file can hold, counts as null.

    Shape: ``index_B`` whole numbers; ``out_B`` may be a strided column.
    """
    null = len(table) - 1
    has_null = len(valid) > 0
    for i in range(len(index_B)):
        index: Any = np.int64(index_B[i])
        if index < 0 or index > null:
            index = null
        if has_null and not (valid[(first + i) >> 3] >> ((first + i) & 7)) & 1:
            index = null
        out_B[i] = table[index]


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
