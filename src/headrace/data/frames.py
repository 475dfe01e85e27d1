"""pandas frames in the narrowest dtypes: from Arrow tables, and from frames that came otherwise.

The rules are those of the dtype plan (dtypes.py); what is added here is what pandas has of its
own: NaN for missing numbers, nullable and Arrow dtypes, three kinds of text, objects. A caller's
frame is never changed: columns that stay are shared with it by copy-on-write (copied before
pandas 3), all others are new.

A narrow dtype belongs to the rows it was chosen for. Parts of one table that are reduced one by
one get types that differ; the stage ``reduce`` looks at all rows first for that reason.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.data.dtypes import ColumnPlan, cast_column, narrowest
from headrace.data.ranges import BLOCK_ROWS, ColumnRange, ColumnScan, NarrowFloat
from headrace.data.table import Table
from headrace.schema import FOLD, ROW_ID, SPLITS

if TYPE_CHECKING:
    import pandas as pd

_MAX_CATEGORIES = 65_536
_NULLABLE = {
    pa.int8(): "Int8",
    pa.int16(): "Int16",
    pa.int32(): "Int32",
    pa.int64(): "Int64",
    pa.uint8(): "UInt8",
    pa.uint16(): "UInt16",
    pa.uint32(): "UInt32",
    pa.uint64(): "UInt64",
    pa.float32(): "Float32",
    pa.float64(): "Float64",
}


def reduce_frame(
    frame: pd.DataFrame, *, max_rel_error: float = 0.0, threads: int = 1
) -> pd.DataFrame:
    """Return ``frame`` with each column in its narrowest dtype; the caller's frame stays as it is.

    Index, column names (repeated ones too) and order stay. Integers and texts are kept exactly,
    missing values stay missing; a column of a kind that is not known to be safe (mixed objects,
    complex, sparse, periods, times) comes back as it is.

    Args:
        frame: Any frame.
        max_rel_error: Worst relative error a float may suffer; 0 keeps every bit.
        threads: Columns that are worked on at a time.
    """
    import pandas as pd

    columns = [frame.iloc[:, i] for i in range(frame.shape[1])]  # by position: names may repeat
    if not columns:
        return frame.copy()
    with ThreadPoolExecutor(threads) as pool:
        work = pool.map if threads > 1 else map
        reduced = list(work(lambda column: _reduce_column(column, max_rel_error), columns))
    result = pd.concat(reduced, axis=1)
    result.columns = frame.columns
    return result


def read_frame(table: Table, split: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return rows of a split as a frame, in row order; columns are read one by one.

    Dtypes are those of the table: a column that has a null in any split is nullable in all.

    Args:
        table: A verified table.
        split: One of train, valid, test, gap; one without rows gives an empty frame.
        columns: Names, in the order they shall have; None for all, row_id and fold included.

    Raises:
        SchemaError: if a name is not a split or not a column of the table, with the nearest name.
    """
    import pandas as pd

    names = list(columns) if columns is not None else [ROW_ID, FOLD, *_names(table)]
    nullable = _nullable_columns(table)
    series = []
    for name in names:
        column = table.read(split, [name]).column(0)
        series.append(to_series(column, name=name, is_nullable=name in nullable))
    return pd.concat(series, axis=1) if series else pd.DataFrame()


def to_series(column: pa.ChunkedArray, *, name: str, is_nullable: bool) -> pd.Series:
    """Return an Arrow column as pandas holds it without loss.

    Integers and booleans that may be null become nullable dtypes instead of floats or objects,
    dictionaries become categories, dates become times. Two have no narrow form that computes:
    float16, which is for storage, becomes float32, and a decimal float64.
    """
    import pandas as pd

    kind = column.type
    if pa.types.is_float16(kind):
        column = column.cast(pa.float32())
    elif pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    mapper: Any = None
    if is_nullable and pa.types.is_integer(kind):
        mapper = {kind: pd.api.types.pandas_dtype(_NULLABLE[kind])}.get
    elif is_nullable and pa.types.is_boolean(kind):
        mapper = {kind: pd.BooleanDtype()}.get
    series = column.to_pandas(types_mapper=mapper, date_as_object=False).rename(name)
    if isinstance(series.dtype, np.dtype) and not series.to_numpy().flags.owndata:
        return series.copy()  # else it is Arrow's memory, in which nothing may be assigned
    return series


def _names(table: Table) -> list[str]:
    return [column.name for column in table.contract.columns]


def _nullable_columns(table: Table) -> set[str]:
    """Columns with a null in any split, by the statistics in the files' footers."""
    found = set()
    for path in [path for split in SPLITS for path in table.files(split)]:
        footer = pq.read_metadata(path)
        for i in range(footer.num_row_groups):
            for j in range(footer.num_columns):
                chunk = footer.row_group(i).column(j)
                seen = chunk.statistics
                if seen is None or not seen.has_null_count or seen.null_count:
                    found.add(chunk.path_in_schema)
    return found


def _reduce_column(column: pd.Series, max_rel_error: float) -> pd.Series:
    import pandas as pd

    dtype = column.dtype
    if isinstance(dtype, np.dtype):
        if dtype.kind in "iuf":
            return _reduce_numpy(column, max_rel_error)
        return _reduce_objects(column, max_rel_error) if dtype.kind == "O" else column
    if isinstance(dtype, pd.StringDtype):
        return _reduce_texts(column)
    if isinstance(dtype, pd.ArrowDtype):
        return _reduce_arrow(column, max_rel_error)
    if isinstance(column.array, pd.arrays.IntegerArray | pd.arrays.FloatingArray):
        return _reduce_nullable(column, max_rel_error)
    return column


def _reduce_numpy(column: pd.Series, max_rel_error: float) -> pd.Series:
    values = column.to_numpy()
    kind = pa.from_numpy_dtype(values.dtype)
    scan = ColumnScan(str(column.name), kind, measure=_measures(max_rel_error))
    scan.add_numpy(values)
    seen = scan.result()
    after = narrowest(seen, "numeric", max_rel_error=max_rel_error)
    if after == kind:
        return column
    if seen.num_nans and pa.types.is_integer(after):
        return _series(_masked(values, after), column)
    return _series(values.astype(after.to_pandas_dtype()), column)


def _reduce_nullable(column: pd.Series, max_rel_error: float) -> pd.Series:
    plan = _planned(column, _chunks(column), max_rel_error, max_categories=0)
    return column if plan.after == plan.before else column.astype(_NULLABLE[plan.after])


def _reduce_arrow(column: pd.Series, max_rel_error: float) -> pd.Series:
    import pandas as pd

    chunks = _chunks(column)
    plan = _planned(column, chunks, max_rel_error, max_categories=_MAX_CATEGORIES)
    if plan.after == plan.before:
        return column
    cast = pa.chunked_array([cast_column(chunk, plan) for chunk in chunks], plan.after)
    return _series(pd.arrays.ArrowExtensionArray(cast), column)


def _reduce_texts(column: pd.Series) -> pd.Series:
    import pandas as pd

    try:
        chunks = _chunks(column)
    except (pa.ArrowException, UnicodeError):  # half a surrogate pair is text only for Python
        return column
    plan = _planned(column, chunks, 0.0, max_categories=_MAX_CATEGORIES)
    if not pa.types.is_dictionary(plan.after):
        return column
    codes = np.concatenate([_codes(cast_column(chunk, plan)) for chunk in chunks])
    categories = pd.Index(plan.categories.to_pylist(), dtype=column.dtype)
    dtype = pd.CategoricalDtype(categories)
    return _series(pd.Categorical.from_codes(codes, dtype=dtype), column)


def _reduce_objects(column: pd.Series, max_rel_error: float) -> pd.Series:
    """Objects that are all of one plain kind become that kind; all others stay objects."""
    import pandas as pd

    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind == "string":
        return _reduce_texts(column)
    if kind == "boolean":
        return column.astype("boolean" if column.isna().any() else bool)
    if kind == "floating":
        return _reduce_numpy(column.astype(np.float64), max_rel_error)
    if kind == "integer":
        try:
            values = pd.Series(
                pa.array(column, from_pandas=True).to_pandas(
                    types_mapper={pa.int64(): pd.Int64Dtype(), pa.uint64(): pd.UInt64Dtype()}.get
                )
            )
        except (pa.ArrowException, OverflowError):  # beyond 64 bits only Python holds them
            return column
        values = _series(values.array, column)
        if values.isna().any():
            return _reduce_nullable(values, max_rel_error)
        return _reduce_numpy(values.astype(values.dtype.numpy_dtype), max_rel_error)
    return column


def _planned(
    column: pd.Series, chunks: Collection[pa.Array], max_rel_error: float, *, max_categories: int
) -> ColumnPlan:
    kind = next(iter(chunks)).type if chunks else pa.null()
    scan = ColumnScan(
        str(column.name), kind, measure=_measures(max_rel_error), max_categories=max_categories
    )
    for chunk in chunks:
        scan.add(chunk)
    seen = _with_nan_kept(scan.result())
    return ColumnPlan(seen, narrowest(seen, "numeric", max_rel_error=max_rel_error))


def _with_nan_kept(seen: ColumnRange) -> ColumnRange:
    """These dtypes tell NaN from a missing value, which an integer does not."""
    return replace(seen, is_whole=False) if seen.num_nans else seen


def _measures(max_rel_error: float) -> tuple[NarrowFloat, ...]:
    return ("float32",) if max_rel_error > 0 else ()


def _chunks(column: pd.Series) -> list[pa.Array]:
    """The column as Arrow arrays of a few ten thousand rows: what a scan takes at a time."""
    values = pa.array(column, from_pandas=column.dtype.kind == "O" or None)
    arrays = values.chunks if isinstance(values, pa.ChunkedArray) else [values]
    return [
        array.slice(start, BLOCK_ROWS)
        for array in arrays
        for start in range(0, max(1, len(array)), BLOCK_ROWS)
    ]


def _masked(values: npt.NDArray[Any], after: pa.DataType) -> Any:
    import pandas as pd

    is_missing = np.isnan(values)
    with np.errstate(invalid="ignore"):  # NaN becomes any integer, and then 0 below the mask
        integers = values.astype(after.to_pandas_dtype())
    integers[is_missing] = 0
    return pd.arrays.IntegerArray(integers, is_missing)


def _codes(array: pa.DictionaryArray) -> npt.NDArray[np.signedinteger[Any]]:
    codes: npt.NDArray[np.signedinteger[Any]] = pc.fill_null(array.indices, -1).to_numpy()
    return codes


def _series(values: Any, like: pd.Series) -> pd.Series:
    import pandas as pd

    return pd.Series(values, index=like.index, name=like.name, copy=False)
