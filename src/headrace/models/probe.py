"""Asking a fitted model about rows of the reduced table, and about rows that never were.

Importance, dependence and attention all change rows and ask again. They do it on raw rows,
whatever the model reads: a network's rows are encoded after the change, so a shuffled or a set
value goes the way of any value, and what is shown is in the table's own units.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.models.protocol import FittedModel, Values

if TYPE_CHECKING:
    from headrace.data.encoder import Encoder

Floats: TypeAlias = npt.NDArray[np.float64]
Predict: TypeAlias = Callable[[pa.Table], Values]


def asked_with_tables(model: FittedModel, encoder: "Encoder") -> Predict:
    """Return how to ask ``model`` with input columns of the reduced table."""
    if model.inputs == "table":
        return model.predict
    return lambda rows: model.predict(encoder.transform(rows))


def with_rows_of(rows: pa.Table, columns: Sequence[str], order: npt.NDArray[np.int64]) -> pa.Table:
    """Return ``rows`` whose ``columns`` are those of the rows in ``order``, all from one row."""
    taken = pa.array(order)
    for name in columns:
        place = rows.column_names.index(name)
        # With the field as it is: by its name alone a column without nulls would become nullable.
        rows = rows.set_column(place, rows.schema.field(place), rows[name].take(taken))
    return rows


def numbers(values: pa.ChunkedArray) -> Floats:
    """Return a numeric column as float64, NaN where null."""
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    found: Floats = values.cast(pa.float64()).combine_chunks().to_numpy(zero_copy_only=False)
    return found


def in_parts(values: Values, count: int) -> list[Mapping[str, Floats]]:
    """Divide what was said of ``count`` tables of equal length, one below the other."""
    parts = {target: np.split(found, count) for target, found in values.items()}
    return [{target: parts[target][place] for target in parts} for place in range(count)]
