"""The packed row: all that is encoded of one row, side by side in as many bytes for every row.

One row is one run of bytes, so a batch in random order costs one cache miss chain per row, one copy
to the device and one buffer, where an array per kind of value would cost each of these several
times. Fields stand by falling width of their type, so every value is aligned; a row is padded with
zeros to a multiple of 8 bytes.

Legend: B rows, R bytes of a row, T targets, N numeric inputs, C categories.
"""

import sys
from functools import cached_property
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from headrace.params import Section

Packed: TypeAlias = npt.NDArray[np.uint8]
NumericDtype: TypeAlias = Literal["<f4", "<f2"]

_ALIGNMENT = 8
_KEPT_BUFFERS = 4


class RowField(Section):
    """One field of a packed row: NumPy type, first byte, and width (none: one value per row)."""

    name: str
    dtype: str
    offset: int
    width: int | None = None

    @cached_property
    def num_bytes(self) -> int:
        """Bytes the field takes in a row."""
        return np.dtype(self.dtype).itemsize * (1 if self.width is None else self.width)


class RowLayout(Section):
    """The fields of a packed row and its length in bytes."""

    row_bytes: int
    fields: Annotated[tuple[RowField, ...], Field(strict=False)]

    def split(self, packed_BR: Packed) -> dict[str, npt.NDArray[Any]]:
        """Return the fields of packed rows as views of them: (B,), or (B, width)."""
        views = {}
        for field in self.fields:
            part = packed_BR[:, field.offset : field.offset + field.num_bytes]
            if field.width == 0:  # NumPy cannot view no bytes as another type
                views[field.name] = np.empty((len(packed_BR), 0), field.dtype)
                continue
            view = part.view(field.dtype)
            views[field.name] = view[:, 0] if field.width is None else view
        return views

    def field(self, name: str) -> RowField:
        """Return the field called ``name``."""
        return next(field for field in self.fields if field.name == name)

    def empty(self, num_rows: int) -> Packed:
        """Return rows for all fields to be written; what pads them is zero."""
        packed_BR = np.empty((num_rows, self.row_bytes), np.uint8)
        last = self.fields[-1]
        packed_BR[:, last.offset + last.num_bytes :] = 0
        return packed_BR


class Buffers:
    """Buffers of packed rows, used again when nothing refers to one any more.

    A fresh buffer of some megabytes costs page faults, up to as much as filling it.
    """

    def __init__(self, layout: RowLayout) -> None:
        self._layout = layout
        self._kept: list[Packed] = []

    def take(self, num_rows: int) -> Packed:
        """Return a buffer of ``num_rows`` rows that nobody else holds; what pads rows is zero."""
        for buffer in self._kept:
            if len(buffer) >= num_rows and sys.getrefcount(buffer) == _OWN_REFERENCES:
                return buffer[:num_rows]
        buffer = self._layout.empty(num_rows)
        self._kept = [*self._kept[-(_KEPT_BUFFERS - 1) :], buffer]
        return buffer[:num_rows]

    def __getstate__(self) -> dict[str, Any]:
        return {"_layout": self._layout, "_kept": []}


def _own_references() -> int:
    """Return the count of a buffer in ``Buffers`` that nobody else holds; -1 if it says nothing.

    Python versions differ in what they count (some borrow the reference of a local name), so it is
    measured, in a loop like that of ``take``, with a buffer held by a view and without.
    """
    kept = [np.empty((2, 8), np.uint8)]
    alone = held = 0
    for buffer in kept:
        alone = sys.getrefcount(buffer)
    view = kept[0][:1]
    for buffer in kept:
        held = sys.getrefcount(buffer)
    del view
    return alone if held > alone else -1


_OWN_REFERENCES = _own_references()


def row_layout(
    *, num_targets: int, num_numeric: int, num_codes: int, codes: str, numeric: NumericDtype
) -> RowLayout:
    """Return the layout of rows with so many targets, numeric inputs and categories.

    ``codes`` and ``numeric`` are the NumPy types of the category codes and numeric inputs.

    >>> layout = row_layout(num_targets=1, num_numeric=3, num_codes=2, codes="|u1", numeric="<f4")
    >>> layout.row_bytes, [field.offset for field in layout.fields]
    (40, [0, 8, 16, 28, 32, 34])
    """
    wanted: list[tuple[str, str, int | None]] = [
        ("row_id", "<i8", None),
        ("targets", "<f8", num_targets),
        ("numeric", numeric, num_numeric),
        ("weight", "<f4", None),
        ("codes", codes, num_codes),
        ("fold", "|i1", None),
    ]
    wanted.sort(key=lambda field: -np.dtype(field[1]).itemsize)
    fields, offset = [], 0
    for name, dtype, width in wanted:
        field = RowField(name=name, dtype=dtype, offset=offset, width=width)
        fields.append(field)
        offset += field.num_bytes
    return RowLayout(row_bytes=-(-offset // _ALIGNMENT) * _ALIGNMENT, fields=tuple(fields))
