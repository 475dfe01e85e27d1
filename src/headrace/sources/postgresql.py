"""Rows of a PostgreSQL query as Arrow batches, over the optional driver psycopg2.

One read-only transaction with a repeatable snapshot and a server-side cursor: memory stays at one
batch. Exact numbers keep their declared precision; a ``numeric`` without one becomes a double,
because Arrow needs a scale: cast it in the query where digits count. The password never stands in
params.yaml: it comes from PGPASSWORD or ~/.pgpass.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from headrace.errors import DataError, DependencyError

BATCH_ROWS = 50_000

_TYPES: dict[int, pa.DataType] = {  # by type oid
    16: pa.bool_(),
    17: pa.binary(),
    20: pa.int64(),
    21: pa.int16(),
    23: pa.int32(),
    26: pa.int64(),
    700: pa.float32(),
    701: pa.float64(),
    1082: pa.date32(),
    1083: pa.time64("us"),
    1114: pa.timestamp("us"),
    1184: pa.timestamp("us", tz="UTC"),
}
_NUMERIC = 1700


@contextlib.contextmanager
def read_postgresql(
    url: str, *, table: str | None = None, query: str | None = None
) -> Iterator[pa.RecordBatchReader]:
    """Yield a reader over the rows of one table (``schema.table``), or of one SELECT.

    Raises:
        DependencyError: the driver is not installed or the server does not answer.
        DataError: the table or query is wrong.
    """
    with _connection(url) as connection:
        cursor = connection.cursor(name="headrace")
        cursor.itersize = BATCH_ROWS
        cursor.execute(_select(table, query))
        rows = cursor.fetchmany(BATCH_ROWS)  # the description exists after the first fetch
        schema = pa.schema([pa.field(c.name, _arrow_type(c)) for c in cursor.description])
        yield pa.RecordBatchReader.from_batches(schema, _batches(cursor, rows, schema))


def read_watermark(
    url: str,
    *,
    table: str | None = None,
    query: str | None = None,
    watermark: str | None = None,
) -> list[list[str | None]]:
    """Return a small value that changes when the rows do.

    Without ``watermark`` it is the number of rows and the sum of a hash of each: exact, in any
    order, but a scan of the whole table in the server.
    """
    whole = (
        f"SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) "
        f"FROM ({_select(table, query)}) t"
    )
    with _connection(url) as connection:
        cursor = connection.cursor()
        cursor.execute(watermark or whole)
        rows = cursor.fetchmany(100)
    return [[None if value is None else str(value) for value in row] for row in rows]


@contextlib.contextmanager
def _connection(url: str) -> Iterator[Any]:
    try:
        import psycopg2
    except ImportError as error:
        raise DependencyError(
            "a PostgreSQL source needs the driver psycopg2; install it with "
            "`pip install headrace[postgresql]`"
        ) from error
    try:
        connection = psycopg2.connect(url, connect_timeout=10, application_name="headrace")
    except psycopg2.OperationalError as error:
        raise DependencyError(f"PostgreSQL does not answer: {_line(error)}") from error
    try:
        connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
        with connection.cursor() as cursor:
            cursor.execute("SET TIME ZONE 'UTC'")
        yield connection
    except psycopg2.Error as error:
        raise DataError(f"PostgreSQL refused the query: {_line(error)}") from error
    finally:
        connection.close()


def _select(table: str | None, query: str | None) -> str:
    if query:
        return query.rstrip().rstrip(";")
    parts = ['"' + part.replace('"', '""') + '"' for part in str(table).split(".")]
    return f"SELECT * FROM {'.'.join(parts)}"


def _arrow_type(column: Any) -> pa.DataType:
    if column.type_code == _NUMERIC:
        is_exact = column.precision is not None and column.precision <= 38
        return pa.decimal128(column.precision, column.scale) if is_exact else pa.float64()
    return _TYPES.get(column.type_code, pa.string())


def _batches(
    cursor: Any, rows: list[tuple[Any, ...]], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    while rows:
        columns = zip(*rows, strict=True)
        arrays = [
            pa.array([_value(v, field.type) for v in values], field.type)
            for values, field in zip(columns, schema, strict=True)
        ]
        yield pa.record_batch(arrays, schema=schema)
        rows = cursor.fetchmany(BATCH_ROWS)


def _value(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_floating(kind):
        return float(value)
    if pa.types.is_string(kind) and not isinstance(value, str):
        return str(value)
    return bytes(value) if pa.types.is_binary(kind) else value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
