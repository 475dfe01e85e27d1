"""A few rows of a table by their ids, for people to look at."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.data.table import Table
from headrace.errors import DataError
from headrace.schema import ROW_ID


def rows_by_id(
    table: Table, split: str, row_id: npt.NDArray[np.int64], columns: Sequence[str]
) -> pa.Table:
    """Return ``columns`` of the rows of ``split`` with these ids, in their order.

    One pass over the split, one batch in memory.

    Raises:
        DataError: if the split lacks some of the rows, with the count and the first ids.
    """
    parts = []
    for batch in table.batches(split, [ROW_ID, *columns]):
        is_wanted = np.isin(batch.column(ROW_ID).to_numpy(), row_id)
        if is_wanted.any():
            parts.append(pa.Table.from_batches([batch.filter(pa.array(is_wanted))]))
    found = np.concatenate([part[ROW_ID].to_numpy() for part in parts] or [np.empty(0, np.int64)])
    absent = row_id[~np.isin(row_id, found)]
    if len(absent):
        raise DataError(
            f"{table.folder} lacks {len(absent)} {split} rows that are asked for; first row ids: "
            f"{[str(one) for one in absent[:5]]}"
        )
    order = np.argsort(found, kind="stable")
    places = order[np.searchsorted(found, row_id, sorter=order)]
    return pa.concat_tables(parts).unify_dictionaries().select(list(columns)).take(pa.array(places))
