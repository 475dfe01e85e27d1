"""How many rows the sources hold, told from file sizes, footers and a few samples.

Parquet says it exactly. Of a text file sixteen windows all over it are looked at, and the rows per
byte found there stand for the whole; of a compressed file and of JSON only the start can be looked
at. A database tells its own estimate. What it costs is some milliseconds, whatever the size.
"""

import contextlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.data.dialect import File
from headrace.data.scan import Found, Source, find_files
from headrace.errors import DataError

_WINDOW_BYTES = 64 << 10
_NUM_WINDOWS = 16
_MAX_FILES = 100  # of a source that are looked at; they stand for the others by their bytes
_FIRST_BYTES = 256 << 10  # of a file that can be looked at from its start only
_GZIP = 31  # zlib's window bits for gzip


@dataclass(frozen=True)
class SourceSize:
    """What one source holds; ``num_rows`` is None where it cannot be told without asking it."""

    name: str
    num_files: int
    num_bytes: int
    num_rows: int | None
    text_bytes: int  # what is read: of compressed files the bytes they unpack to
    is_exact: bool

    @property
    def rows_text(self) -> str:
        """The number of rows, marked as an estimate where it is one."""
        if self.num_rows is None:
            return "rows unknown"
        return f"{'' if self.is_exact else '~'}{self.num_rows:,} rows"


@dataclass(frozen=True)
class _Measured:
    num_rows: int
    text_bytes: int
    is_exact: bool


def measure_sources(root: Path, sources: dict[str, Source]) -> list[SourceSize]:
    """Estimate the rows of every source of a project.

    Raises:
        DataError: a source has no file, or one that cannot be opened as what it is declared.
    """
    return [_measure(found) for found in find_files(root, sources)]


def _measure(found: Found) -> SourceSize:
    num_bytes = sum(file.path.stat().st_size for file in found.files)
    kind = found.source.kind
    if kind in ("sqlite", "postgresql", "duckdb"):
        num_rows = _rows_of_database(found)
        return SourceSize(found.name, len(found.files), num_bytes, num_rows, num_bytes, False)
    looked_at = found.files[:: -(-len(found.files) // _MAX_FILES)]
    parts = [_measure_file(file, found.source) for file in looked_at]
    share = num_bytes / max(1, sum(file.path.stat().st_size for file in looked_at))
    return SourceSize(
        found.name,
        len(found.files),
        num_bytes,
        round(share * sum(part.num_rows for part in parts)),
        round(share * sum(part.text_bytes for part in parts)),
        len(looked_at) == len(found.files) and all(part.is_exact for part in parts),
    )


def _measure_file(file: File, source: Source) -> _Measured:
    if source.kind == "parquet":
        try:
            footer = pq.read_metadata(file.path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{file.name} is not a whole Parquet file ({error}); get it again"
            ) from error
        groups = (footer.row_group(i) for i in range(footer.num_row_groups))
        return _Measured(footer.num_rows, sum(group.total_byte_size for group in groups), True)
    windows, text_bytes, is_whole = _windows(file.path, is_spread=source.kind == "csv")
    looked_at = sum(len(window) for window in windows)
    if not looked_at:
        return _Measured(0, 0, True)
    if source.kind == "json":
        num_objects, counted = _count_objects(windows[0])
        share = 1.0 if is_whole else text_bytes / counted
        return _Measured(round(num_objects * share), text_bytes, is_whole)
    num_lines = sum(window.count(b"\n") or window.count(b"\r") for window in windows)
    if is_whole:
        num_lines += not windows[-1].endswith((b"\n", b"\r"))
    else:
        num_lines = round(num_lines * text_bytes / looked_at)
    return _Measured(max(0, num_lines - source.skip - (not source.names)), text_bytes, is_whole)


def _windows(path: Path, *, is_spread: bool) -> tuple[list[bytes], int, bool]:
    """Return samples of the text, the bytes of all of it, and whether the samples are all."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix == ".gz":
            packed = file.read(_FIRST_BYTES)
            unpacker = zlib.decompressobj(_GZIP)
            try:
                text = unpacker.decompress(packed)
            except zlib.error as error:
                raise DataError(f"{path} is not a whole gzip file ({error}); get it again") from (
                    error
                )
            if unpacker.eof and not unpacker.unused_data:
                return [text], len(text), True
            return [text], round(len(text) * size / max(1, len(packed))), False
        if size <= _NUM_WINDOWS * _WINDOW_BYTES:
            return [file.read()], size, True
        if not is_spread:
            return [file.read(_FIRST_BYTES)], size, False
        windows = []
        for number in range(_NUM_WINDOWS):  # in the middle of equal parts
            file.seek((2 * number + 1) * size // (2 * _NUM_WINDOWS) - _WINDOW_BYTES // 2)
            windows.append(file.read(_WINDOW_BYTES))
        return windows, size, False


def _count_objects(window: bytes) -> tuple[int, int]:
    """Return the whole JSON objects that ``window`` begins with, and the bytes up to their end."""
    text = window.decode("utf-8", errors="replace")
    decoder = json.JSONDecoder()
    num_objects, end = 0, 0
    position = text.find("{")
    while position >= 0:
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            break
        num_objects += 1
        position = text.find("{", end)
    if not num_objects:  # one object longer than the window
        return 1, len(window)
    return num_objects, len(text[:end].encode())


def _rows_of_database(found: Found) -> int | None:
    """Ask a database file for its own estimate; None where it would have to run a query."""
    source = found.source
    if not found.files or not source.table:
        return None
    path, table = found.files[0].path, source.table.rpartition(".")[2]
    if source.kind == "duckdb":
        import duckdb

        try:
            with duckdb.connect(str(path), read_only=True) as connection:
                rows = connection.execute(
                    "SELECT estimated_size FROM duckdb_tables() WHERE table_name = ?", [table]
                ).fetchall()
        except duckdb.Error as error:
            raise DataError(f"{path} cannot be read as a DuckDB file: {error}") from error
        return _first_number(rows)
    import sqlite3

    quoted = table.replace('"', '""')
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
        ) as connection:
            rows = connection.execute(f'SELECT max(rowid) FROM "{quoted}"').fetchall()
            return _first_number(rows)
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} cannot be read as a SQLite file: {error}") from error


def _first_number(rows: Sequence[tuple[object, ...]]) -> int | None:
    value = rows[0][0] if rows else None
    return int(value) if isinstance(value, int) else None
