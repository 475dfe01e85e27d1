"""Rows of a SQLite file as Arrow batches, read with Python's own driver and never written.

SQLite types values, not columns, so the type of a column is taken from all its values, in a first
pass. Whole numbers stay 64-bit integers; mixed whole numbers and decimals become doubles only
where that loses nothing; numbers mixed with text are refused.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrace.errors import DataError, SchemaError, nearest
from headrace.storage import digest_file

BATCH_ROWS = 50_000
_EXACT_DOUBLE = 1 << 53
_TYPES = {"integer": pa.int64(), "real": pa.float64(), "text": pa.string(), "blob": pa.binary()}


@contextlib.contextmanager
def read_sqlite(
    path: Path, *, table: str | None = None, query: str | None = None
) -> Iterator[pa.RecordBatchReader]:
    """Yield a reader over the rows of one table, or of one SELECT.

    Raises:
        DataError: the file is no SQLite file, is locked, or the SELECT is wrong.
        SchemaError: no such table (nearest named), or a column that mixes kinds of values.
    """
    connection = _connect(path)
    try:
        select = query or f"SELECT * FROM {_known_table(connection, path, str(table))}"
        schema = _schema(connection, path, select)
        cursor = connection.execute(select)
        yield pa.RecordBatchReader.from_batches(schema, _batches(cursor, schema))
    except sqlite3.Error as error:
        raise DataError(f"{path.name} cannot be read: {error}") from error
    finally:
        connection.close()


def read_watermark(path: Path, *, watermark: str | None = None) -> list[list[str | None]]:
    """Return a small value that changes when the rows do.

    Without ``watermark`` it is the digest of the file, and of the log beside it that holds what
    was written last.
    """
    if watermark is None:
        log = path.with_name(f"{path.name}-wal")
        present = [file for file in (path, log) if file.is_file() and file.stat().st_size]
        return [[digest_file(file).digest for file in present]]
    connection = _connect(path)
    try:
        rows = connection.execute(watermark).fetchmany(100)
    except sqlite3.Error as error:
        raise DataError(f"the watermark of {path.name} cannot be read: {error}") from error
    finally:
        connection.close()
    return [[None if value is None else str(value) for value in row] for row in rows]


def table_names(path: Path) -> list[str]:
    """Return the names of the tables and views of a SQLite file."""
    connection = _connect(path)
    try:
        return _tables(connection)
    except sqlite3.Error as error:
        raise DataError(f"{path.name} cannot be read: {error}") from error
    finally:
        connection.close()


def _connect(path: Path) -> sqlite3.Connection:
    # The engine pulls the batches from a thread of its own, one at a time.
    address = f"{path.resolve().as_uri()}?mode=ro"
    connection = sqlite3.connect(address, uri=True, timeout=10, check_same_thread=False)
    connection.execute("PRAGMA query_only = true")
    return connection


def _tables(connection: sqlite3.Connection) -> list[str]:
    rows = connection.execute(
        "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') "
        "AND name NOT LIKE 'sqlite_%' ORDER BY name"
    )
    return [name for (name,) in rows]


def _known_table(connection: sqlite3.Connection, path: Path, table: str) -> str:
    names = _tables(connection)
    if table not in names:
        raise SchemaError(
            f"{path.name} has no table {table!r}{nearest(table, names)}; found: {names}"
        )
    return '"' + table.replace('"', '""') + '"'


def _schema(connection: sqlite3.Connection, path: Path, select: str) -> pa.Schema:
    inner = select.rstrip().rstrip(";")
    cursor = connection.execute(f"SELECT * FROM (\n{inner}\n) LIMIT 0")
    names = [description[0] for description in cursor.description]
    fields = []
    for name in names:
        column = '"' + name.replace('"', '""') + '"'
        rows = connection.execute(
            f"SELECT typeof({column}), max(abs({column})) FROM (\n{inner}\n) GROUP BY 1"
        )
        found = {kind: largest for kind, largest in rows if kind != "null"}
        fields.append(pa.field(name, _one_type(path, name, found)))
    return pa.schema(fields)


def _one_type(path: Path, name: str, found: dict[str, Any]) -> pa.DataType:
    if len(found) <= 1:
        return _TYPES[next(iter(found), "text")]
    if set(found) == {"integer", "real"} and found["integer"] <= _EXACT_DOUBLE:
        return pa.float64()
    raise SchemaError(
        f"column {name!r} of {path.name} mixes {' and '.join(sorted(found))} values; give a "
        f"`query` that casts it to one type"
    )


def _batches(cursor: sqlite3.Cursor, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    while rows := cursor.fetchmany(BATCH_ROWS):
        columns = zip(*rows, strict=True)
        arrays = [
            pa.array(list(values), field.type)
            for values, field in zip(columns, schema, strict=True)
        ]
        yield pa.record_batch(arrays, schema=schema)
