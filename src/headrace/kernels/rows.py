"""Gather packed rows from mapped shards: the inner loop of every shuffled epoch.

A random row is a chain of cache misses. ``gather_rows`` asks for the lines of rows some way ahead
while it copies, so that many misses are under way at once: about twice as fast as ``np.take`` on
the same bytes. Rows that follow each other are copied in one run.

Addresses instead of arrays: a set has as many maps as shards, and numba takes no list of them. The
caller keeps the maps open and has checked that every row exists.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_compiled: Any = numba.njit  # untyped upstream
_intrinsic: Any = intrinsic
_cgutils: Any = cgutils
_U = np.uint64
_LINE = 64  # bytes of a cache line
_AHEAD_BYTES = 6144  # of rows asked for before they are copied; beyond, lines are dropped again


@_intrinsic  # type: ignore[untyped-decorator]
def _prefetch(_context: Any, address: Any) -> Any:  # noqa: ARG001 - numba reads the signature
    def build(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        word = ir.IntType(32)
        function = _cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte, word, word, word]),
            "llvm.prefetch.p0i8",
        )
        read, keep, data = (ir.Constant(word, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(args[0], byte), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.uint64), build


@_intrinsic  # type: ignore[untyped-decorator]
def _copy(_context: Any, target: Any, source: Any, num_bytes: Any) -> Any:  # noqa: ARG001 - as above
    def build(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(address, byte) for address in args[:2])
        _cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.int64), build


@_compiled(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def gather_rows(
    addresses: npt.NDArray[np.uint64],
    starts: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    out_BR: npt.NDArray[np.uint8],
) -> None:
    """Copy ``rows`` into ``out_BR``, in their order.

    Shapes: ``addresses`` (S,) of the first byte of each shard; ``starts`` (S + 1,) number of the
    first row of each, and of all rows; ``rows`` (B,) below ``starts[S]``; ``out_BR`` contiguous.
    """
    num_rows, row_bytes = out_BR.shape
    num_shards = len(addresses)
    per_shard = max(1, starts[min(1, num_shards)])
    width = _U(row_bytes)
    source = np.empty(num_rows, np.uint64)
    for i in range(num_rows):
        row = rows[i]
        shard = min(row // per_shard, num_shards - 1)  # exact where shards have equal lengths
        while row >= starts[shard + 1]:
            shard += 1
        while row < starts[shard]:
            shard -= 1
        source[i] = addresses[shard] + _U(row - starts[shard]) * width
    ahead = max(1, _AHEAD_BYTES // row_bytes)
    lines = (row_bytes + _LINE - 1) // _LINE
    for i in range(min(ahead, num_rows)):
        for line in range(lines):
            _prefetch(source[i] + _U(line * _LINE))
    target = _U(out_BR.ctypes.data)
    i = 0
    while i < num_rows:
        run = 1
        while i + run < num_rows and source[i + run] == source[i + run - 1] + width:
            run += 1
        for j in range(i + ahead, min(i + ahead + run, num_rows)):
            if source[j] != source[j - 1] + width:  # the hardware sees runs by itself
                for line in range(lines):
                    _prefetch(source[j] + _U(line * _LINE))
        _copy(target + _U(i) * width, source[i], run * row_bytes)
        i += run
