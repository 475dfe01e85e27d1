"""Read an Arrow record batch where it lies: addresses of its columns, by the C data interface.

One call hands over a whole batch; asking Arrow's Python objects column by column costs microseconds
for each, more than encoding the column of a small batch. The batch must be kept for as long as the
addresses are used. Layout: https://arrow.apache.org/docs/format/CDataInterface.html
"""

import ctypes
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

# Columns of the table; from DICTIONARY on they tell one dictionary from another.
VALUES, VALID, FIRST, DICTIONARY, TEXT, DICTIONARY_VALID, DICTIONARY_FIRST, DICTIONARY_LENGTH = (
    range(8)
)
NUM_FACTS = 8

_compiled: Any = numba.njit  # untyped upstream
_intrinsic: Any = intrinsic
_POINTER_OF: Any = ctypes.pythonapi.PyCapsule_GetPointer
_POINTER_OF.restype, _POINTER_OF.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
# Where these stand in struct ArrowArray, whose first word is the length.
_NULL_COUNT, _OFFSET, _NUM_BUFFERS, _BUFFERS, _CHILDREN, _DICTIONARY = 8, 16, 24, 40, 48, 56


class ColumnTable:
    """Where columns of a record batch lie; holds the batch's memory for as long as it lives.

    ``table`` (K, F) int64, for each column: address of its values (of the indices, if it is a
    dictionary) and of its validity bits (0 where no value is null), the first row in both; then of
    its dictionary the addresses of the values (for text, of its offsets), of the text and of the
    validity bits, the first value in them, and the length. What there is none of is 0.
    """

    def __init__(self, batch: pa.RecordBatch, places: npt.NDArray[np.int64]) -> None:
        self._capsules = batch.__arrow_c_array__()
        self.table = np.empty((len(places), NUM_FACTS), np.int64)
        if len(places):
            column_table(_POINTER_OF(self._capsules[1], b"arrow_array"), places, self.table)


@_intrinsic  # type: ignore[untyped-decorator]
def _load(_context: Any, address: Any) -> Any:  # noqa: ARG001 - numba reads the signature
    def build(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()))

    return types.int64(types.int64), build


@_intrinsic  # type: ignore[untyped-decorator]
def pointer(_context: Any, address: Any) -> Any:  # noqa: ARG001 - as above
    """Return an address as a pointer, for ``numba.carray``."""

    def build(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def column_table(batch: int, places: npt.NDArray[np.int64], out_KF: npt.NDArray[np.int64]) -> None:
    """Fill the table of the columns at ``places`` of the batch whose struct is at ``batch``."""
    children = _load(batch + _CHILDREN)
    for k in range(len(places)):
        column = _load(children + 8 * places[k])
        buffers = _load(column + _BUFFERS)
        out_KF[k, VALUES] = _load(buffers + 8)
        out_KF[k, VALID] = 0 if _load(column + _NULL_COUNT) == 0 else _load(buffers)
        out_KF[k, FIRST] = _load(column + _OFFSET)
        out_KF[k, DICTIONARY:] = 0
        dictionary = _load(column + _DICTIONARY)
        if dictionary:
            of_values = _load(dictionary + _BUFFERS)
            num_buffers = _load(dictionary + _NUM_BUFFERS)
            if num_buffers > 1:
                out_KF[k, DICTIONARY] = _load(of_values + 8)
                out_KF[k, DICTIONARY_VALID] = _load(of_values)
            if num_buffers > 2:
                out_KF[k, TEXT] = _load(of_values + 16)
            out_KF[k, DICTIONARY_FIRST] = _load(dictionary + _OFFSET)
            out_KF[k, DICTIONARY_LENGTH] = _load(dictionary)
