"""A column of a table as numbers, for checks that compare its values between groups of rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.schema import label_text

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Coded:
    """A column: numbers, moments in microseconds since 1970, or codes of a category.

    Shapes: ``values`` (N,), NaN where missing; codes stand for ``labels``, the most frequent first.
    """

    name: str
    kind: Literal["number", "time", "category"]
    values: Floats
    labels: tuple[str, ...] = ()

    def where(self, rows: npt.NDArray[np.int64]) -> "Coded":
        """Return the rows at these places."""
        return replace(self, values=self.values[rows])

    def codes(self) -> npt.NDArray[np.int64]:
        """Return the codes of a category, 0 where missing, from 1 on."""
        return np.where(np.isnan(self.values), 0, self.values + 1).astype(np.int64)


def coded_columns(
    rows: pa.Table, names: Sequence[str], *, categories: Sequence[str]
) -> list[Coded]:
    """Return the columns ``names`` of ``rows``; numbers in ``categories`` are codes, too."""
    return [_coded(name, rows[name].combine_chunks(), name in categories) for name in names]


def is_codable(kind: pa.DataType) -> bool:
    """Whether a column of this type can be cut into groups of rows."""
    return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_null(kind))


def _coded(name: str, column: pa.Array, is_category: bool) -> Coded:
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        moments = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
        return Coded(name, "time", _floats(moments))
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if is_number and not is_category:
        values = _floats(column)
        return Coded(name, "number", np.where(np.isfinite(values), values, np.nan))
    text = label_text(column).cast(pa.string())
    counts = {
        one["values"]: one["counts"]
        for one in pc.value_counts(text).to_pylist()
        if one["values"] is not None
    }
    labels = sorted(counts, key=lambda label: (-counts[label], label))
    codes = pc.index_in(text, value_set=pa.array(labels, pa.string()))
    return Coded(name, "category", _floats(codes), tuple(labels))


def _floats(column: pa.Array) -> Floats:
    values: Floats = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values
