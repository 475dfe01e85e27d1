"""What one streaming pass over a table learns about each column before its type is chosen.

Batches come in, one at a time, from every split: the narrow type must hold for all of them, since
a type that fits the train rows alone would change under the test rows. Memory stays at one batch
and the distinct texts of the columns that may become categories, which are counted up to a cap.
"""

from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Number: TypeAlias = int | float | Decimal
NarrowFloat: TypeAlias = Literal["float16", "float32"]

BLOCK_ROWS = 65_536  # a block of float64 stays in the second-level cache between two looks at it
COUNTED_ROWS = 65_536  # however they come in batches and files
_MAX_CATEGORY_BYTES = 32 << 20


@dataclass(frozen=True)
class ColumnRange:
    """What was seen of one column over all its rows.

    For a list column ``is_whole``, ``is_float32`` and the range speak of the items.
    """

    name: str
    dtype: pa.DataType
    num_rows: int
    num_nulls: int
    low: Number | None = None  # None without a value, or where order means nothing
    high: Number | None = None
    num_nans: int = 0
    is_whole: bool = False  # every value but NaN is a whole number an integer can hold
    is_float32: bool = False  # float32 holds every value exactly
    errors: tuple[tuple[NarrowFloat, float], ...] = ()  # worst relative error, where it was asked
    categories: pa.Array | None = None  # sorted distinct texts; None when they are too many
    text_bytes: int = 0
    num_items: int = 0  # of all lists
    other_bytes: int = 0  # of types whose size only Arrow knows
    rows_per_value: float = 1.0  # rows over distinct values, among the first COUNTED_ROWS rows

    @property
    def num_values(self) -> int:
        """Rows that hold a value: neither null nor NaN."""
        return self.num_rows - self.num_nulls - self.num_nans

    @property
    def is_infinite(self) -> bool:
        """Whether an infinity was seen."""
        return any(isinstance(x, float) and np.isinf(x) for x in (self.low, self.high))

    def num_missing(self, dtype: pa.DataType) -> int:
        """Return the nulls that the column has as ``dtype``: a NaN is one among integers."""
        return self.num_nulls + (self.num_nans if pa.types.is_integer(dtype) else 0)

    def bytes_as(self, dtype: pa.DataType) -> int:
        """Return the bytes all values take in memory as ``dtype``, texts and nulls included."""
        validity = -(-self.num_rows // 8) if self.num_missing(dtype) else 0
        if pa.types.is_dictionary(dtype):
            texts = self.categories.nbytes if self.categories is not None else self.text_bytes
            return validity + self.num_rows * int(dtype.index_type.bit_width) // 8 + int(texts)
        if pa.types.is_primitive(dtype):
            return validity + -(-self.num_rows * int(dtype.bit_width) // 8)
        if is_text(dtype):
            return validity + 4 * self.num_rows + self.text_bytes
        if is_list(dtype) and pa.types.is_primitive(dtype.value_type):
            offsets = 0 if pa.types.is_fixed_size_list(dtype) else 4 * self.num_rows
            return validity + offsets + -(-self.num_items * int(dtype.value_type.bit_width) // 8)
        return self.other_bytes

    def error(self, dtype: NarrowFloat) -> float:
        """Return the worst relative error that ``dtype`` would bring; measured only if asked."""
        if dtype == "float32" and self.is_float32:
            return 0.0
        return dict(self.errors)[dtype]


class ColumnScan:
    """Takes the batches of one column and keeps what ``ColumnRange`` says.

    Args:
        name: Name of the column.
        dtype: Its Arrow type.
        measure: Narrow floats whose worst relative error is to be measured. It costs about as
            much as the rest of the pass, and a lossless plan does not ask.
        max_categories: Distinct texts that are kept; 0 keeps none.
    """

    def __init__(
        self,
        name: str,
        dtype: pa.DataType,
        *,
        measure: Collection[NarrowFloat] = (),
        max_categories: int = 0,
    ) -> None:
        self.name = name
        self._dtype = dtype
        self._max_categories = max_categories
        self._num_rows = self._num_nulls = self._num_nans = 0
        self._text_bytes = self._num_items = self._other_bytes = 0
        self._low: Number | None = None
        self._high: Number | None = None
        self._is_whole = self._is_float32 = True
        self._errors: dict[NarrowFloat, float] = dict.fromkeys(measure, 0.0)
        self._texts: pa.Array | None = pa.array([], pa.string()) if max_categories else None
        self._first_values: pa.Array | None = None  # distinct, until COUNTED_ROWS were seen
        self._rows_per_value = 1.0

    def add(self, array: pa.Array) -> None:
        """Take the next batch of the column."""
        if self._num_rows < COUNTED_ROWS and pa.types.is_primitive(array.type):
            self._count_values(array[: COUNTED_ROWS - self._num_rows])
        self._num_rows += len(array)
        self._num_nulls += array.null_count
        kind = array.type
        if is_text(kind):
            self._add_text(array)
            return
        self._other_bytes += array.nbytes
        if is_list(kind):
            array = array.flatten()  # leaves out what null lists hide
            kind = array.type
            self._num_items += len(array)
        if pa.types.is_floating(kind):
            self._add_floats(_to_numpy(array))
        elif pa.types.is_integer(kind):
            self._widen(*_min_max(array))
        elif pa.types.is_decimal(kind):
            self._add_decimals(array)

    def add_numpy(self, values: npt.NDArray[Any]) -> None:
        """Take a column of integers or floats that is in memory, shape (rows,), any stride."""
        self._num_rows += len(values)
        if values.dtype.kind == "f":
            self._add_floats(values)
            return
        for start in range(0, len(values), BLOCK_ROWS):
            block = values[start : start + BLOCK_ROWS]
            self._widen(int(block.min()), int(block.max()))

    def result(self) -> ColumnRange:
        """Return what was seen so far."""
        texts = self._texts
        if texts is not None:
            texts = texts.take(pc.array_sort_indices(texts))
        return ColumnRange(
            name=self.name,
            dtype=self._dtype,
            num_rows=self._num_rows,
            num_nulls=self._num_nulls,
            low=self._low,
            high=self._high,
            num_nans=self._num_nans,
            is_whole=self._is_whole,
            is_float32=self._is_float32,
            errors=tuple(sorted(self._errors.items())),
            categories=texts,
            text_bytes=self._text_bytes,
            num_items=self._num_items,
            other_bytes=self._other_bytes,
            rows_per_value=self._rows_per_value,
        )

    def _count_values(self, array: pa.Array) -> None:
        values = array.unique()
        if self._first_values is not None:
            values = pa.concat_arrays([self._first_values, values]).unique()
        num_rows = self._num_rows + len(array)
        self._rows_per_value = num_rows / max(1, len(values))
        self._first_values = values if num_rows < COUNTED_ROWS else None

    def _widen(self, low: Number | None, high: Number | None) -> None:
        if low is None or high is None:
            return
        self._low = low if self._low is None else min(self._low, low)
        self._high = high if self._high is None else max(self._high, high)

    def _add_floats(self, values: npt.NDArray[np.floating[Any]]) -> None:
        from headrace.kernels.ranges import float_facts

        for start in range(0, len(values), BLOCK_ROWS):
            block = np.ascontiguousarray(values[start : start + BLOCK_ROWS], dtype=np.float64)
            facts = float_facts(block)
            self._num_nans += facts.num_nans
            if facts.num_nans < len(block):
                self._widen(facts.low, facts.high)
            self._is_float32 &= facts.num_inexact == 0
            self._is_whole &= facts.num_fractional + facts.num_negative_zeros == 0
            if facts.num_inexact or "float16" in self._errors:
                self._measure(block)

    def _add_decimals(self, values: pa.Array) -> None:
        self._widen(*_min_max(values))
        self._is_float32 = False
        if self._is_whole:
            self._is_whole = pc.all(pc.equal(values, pc.floor(values))).as_py() is not False
        if self._errors:
            self._measure(_to_numpy(values.cast(pa.float64())).astype(np.float64))

    def _measure(self, values: npt.NDArray[np.float64]) -> None:
        for dtype, worst in self._errors.items():
            self._errors[dtype] = max(worst, worst_error(values, dtype))

    def _add_text(self, array: pa.Array) -> None:
        if pa.types.is_dictionary(array.type):
            lengths = pc.binary_length(array.dictionary).fill_null(0)
            num_bytes = pc.sum(lengths.take(array.indices)).as_py() or 0
        else:
            num_bytes = pc.sum(pc.binary_length(array)).as_py() or 0
        self._text_bytes += num_bytes
        if self._texts is None:
            return
        found = array.unique()
        if pa.types.is_dictionary(found.type):
            found = found.dictionary_decode()
        found = pa.concat_arrays([self._texts, found.drop_null().cast(pa.string())]).unique()
        too_many = len(found) > self._max_categories or found.nbytes > _MAX_CATEGORY_BYTES
        self._texts = None if too_many else found


def worst_error(values: npt.NDArray[np.float64], dtype: NarrowFloat) -> float:
    """Return the largest ``|narrow(x) - x| / |x|`` over finite values other than 0.

    A value that becomes infinite has the error infinity, one that becomes 0 the error 1.

    >>> worst_error(np.array([1.0, 2049.0, 0.0]), "float16") == 1 / 2049
    True
    """
    if dtype == "float32":
        from headrace.kernels.ranges import float32_error

        return float32_error(values)
    x = values[np.isfinite(values) & (values != 0)]
    with np.errstate(over="ignore", under="ignore"):
        narrow = x.astype(np.float16).astype(np.float64)
        return float(np.max(np.abs(narrow - x) / np.abs(x), initial=0.0))


def is_text(dtype: pa.DataType) -> bool:
    """Whether a column holds texts, spelled out or as codes of a dictionary."""
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype))


def is_list(dtype: pa.DataType) -> bool:
    """Whether a column holds a list of items per row."""
    is_one = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(dtype) for check in is_one)


def _to_numpy(array: pa.Array) -> npt.NDArray[np.floating[Any]]:
    """The values without the nulls, which would hide whatever the buffer holds in their place."""
    values: npt.NDArray[np.floating[Any]] = array.drop_null().to_numpy(zero_copy_only=False)
    return values


def _min_max(array: pa.Array) -> tuple[Number | None, Number | None]:
    both = pc.min_max(array)
    return both["min"].as_py(), both["max"].as_py()
