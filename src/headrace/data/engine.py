"""A DuckDB connection that spills, stays inside its limits and can reach only what was declared.

Why a class around the connection: every failure of DuckDB must become one of our errors with its
place and remedy, and the spill folder needs a watch of our own, because DuckDB did not hold its
own cap for a sort (388 MB spilled under ``max_temp_directory_size='1MB'``).

Everything lives in one private folder below the scratch folder: the database file that holds
intermediate tables and DuckDB's spill files. It is removed at the end, and what a killed run left
is removed at the start of the next. The connection reads the declared files and writes the one
output folder; other paths, attaching, extensions and changes of the configuration are refused.
The time zone is UTC, so that no result depends on the machine.

Sources are views in the schema ``main``, by the names a recipe uses; the tables that headrace makes
of its own are in a schema that is looked up first, so that no source can have the name of one.
"""

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from headrace.errors import (
    ConfigError,
    DataError,
    HeadraceError,
    ResourceError,
    SecurityError,
)
from headrace.memory import format_bytes
from headrace.storage import sweep

ENGINE_SHARE = 0.5  # of the memory budget; Python, Arrow and the flow's own processes have the rest
RESERVED_BYTES = 192 << 20  # what this process holds besides DuckDB's buffers
MIN_ENGINE_BYTES = 128 << 20  # with one thread: scans, a join and a sorted COPY of 32 MB row groups
MIN_THREAD_BYTES = 64 << 20  # what every further thread holds at the least
_POLL_S = 0.2
_OWN = "headrace own"  # the schema of tables that are not sources
_BATCHES = "headrace batches"

_CONFIG_KINDS = {"Parser", "Binder", "Catalog"}
_MEMORY_KINDS = {"Out of Memory"}
_ACCESS_KINDS = {"Permission"}


@dataclass(frozen=True)
class Place:
    """Where a piece of SQL came from, so that an error can point into the user's own file."""

    name: str  # recipe file, or what made the SQL
    text: str  # the user's SQL
    prefix: int = 0  # bytes of our own SQL before it


class Engine:
    """One open connection; see ``open_engine``."""

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, watch: "_SpillWatch", *, need: str
    ) -> None:
        self._connection = connection
        self._watch = watch
        self._need = need
        self._worker = futures.ThreadPoolExecutor(1, thread_name_prefix="duckdb")

    def execute(self, sql: str, *, place: Place | None = None) -> None:
        """Run ``sql`` for its effect.

        Raises:
            HeadraceError: any failure, as the kind of ours that fits, with place and remedy.
        """
        self.rows(sql, place=place)

    def rows(self, sql: str, *, place: Place | None = None) -> list[tuple[Any, ...]]:
        """Run ``sql`` and return its rows; for results that are small by construction."""
        if self._watch.excess:
            raise ResourceError(self._watch.excess)
        try:
            found: list[tuple[Any, ...]] = self._run(
                lambda: self._connection.execute(sql).fetchall()
            )
            return found
        except duckdb.Error as error:
            raise self._ours(error, place) from error

    def row(self, sql: str) -> tuple[Any, ...]:
        """Run ``sql`` and return its only row."""
        (row,) = self.rows(sql)
        return row

    def describe(self, query: str, *, place: Place | None = None) -> list[tuple[str, str]]:
        """Return name and DuckDB type of each column that ``query`` would return."""
        shift = Place(place.name, place.text, place.prefix + len("DESCRIBE ")) if place else None
        return [(row[0], row[1]) for row in self.rows(f"DESCRIBE {query}", place=shift)]

    def load(self, table: str, reader: pa.RecordBatchReader) -> None:
        """Create ``table`` (quoted already) from Arrow record batches, one batch at a time."""
        self._connection.register(_BATCHES, reader)
        try:
            self.execute(f"CREATE TABLE {table} AS SELECT * FROM {identifier(_BATCHES)}")
        finally:
            self._connection.unregister(_BATCHES)

    def statements(self, sql: str, *, place: Place) -> list[str]:
        """Return the kind of each statement in ``sql``, like SELECT or COPY."""
        try:
            found = self._connection.extract_statements(sql)
        except duckdb.Error as error:
            raise self._ours(error, place) from error
        return [str(statement.type).rpartition(".")[2] for statement in found]

    def close(self) -> None:
        """Stop what still runs and close the connection."""
        self._worker.shutdown()
        self._connection.close()

    def _run(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` in a thread of its own, so that signals reach Python while it runs.

        Inside a query DuckDB turns what a signal's handler raises into "Query interrupted", and a
        second time it does not notice at all; here the query is stopped and the error passed on.
        """
        running = self._worker.submit(work)
        try:
            return running.result()
        except BaseException:
            while not running.done():
                self._connection.interrupt()
                futures.wait([running], timeout=_POLL_S)
            raise

    def _ours(self, error: duckdb.Error, place: Place | None) -> HeadraceError:
        if excess := self._watch.excess:
            return ResourceError(excess)
        kind, message, position = _parts(error)
        where = _position(place, position) if place else ""
        if kind in _MEMORY_KINDS or isinstance(error, duckdb.OutOfMemoryException):
            return ResourceError(
                f"DuckDB's share of resources.memory_budget was too small ({message}); {self._need}"
            )
        if "No space left on device" in message:
            return ResourceError(f"the disk is full: {message}; free some space and run again")
        if kind in _ACCESS_KINDS:
            return SecurityError(
                f"{where}{message}; only what `sources` declares can be read, nothing written"
            )
        if place and kind in _CONFIG_KINDS:
            return ConfigError(f"{where}{message}")
        return DataError(f"{where}{message}")


@contextlib.contextmanager
def open_engine(
    scratch: Path,
    *,
    memory_budget: int,
    threads: int,
    max_spill: int,
    readable: Iterable[Path] = (),
    writable: Path | None = None,
    attached: Mapping[str, Path] | None = None,
) -> Iterator[Engine]:
    """Open a locked-down engine whose files lie below ``scratch``; they are gone afterwards.

    Args:
        scratch: Folder for the private database and spill files; swept of dead runs' leftovers.
        memory_budget: ``resources.memory_budget``; DuckDB gets half of it, or less if it is small.
        threads: Threads of DuckDB; fewer are used if the budget is too small for them.
        max_spill: Bytes that intermediate tables and spill files may take together.
        readable: The files that SQL may read.
        writable: The one folder that COPY may write to.
        attached: DuckDB files, attached read-only under these names.

    Raises:
        ResourceError: if the budget cannot suffice, with the figure that would.
    """
    memory, threads = _within(memory_budget, threads)
    scratch.mkdir(parents=True, exist_ok=True)
    sweep(scratch)
    private = scratch / f".new-duckdb.{os.getpid()}"
    shutil.rmtree(private, ignore_errors=True)
    private.mkdir()
    connection = duckdb.connect(
        str(private / "work.duckdb"),
        config={
            "memory_limit": f"{memory}B",
            "threads": threads,
            "temp_directory": str(private / "spill"),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
        },
    )
    watch = _SpillWatch(private, max_spill, connection)
    try:
        _lock(connection, readable, writable, attached or {})
        need = (
            f"it had {format_bytes(memory)} with {threads} threads: set resources.memory_budget "
            f"to {format_bytes(2 * memory_budget)} or more, or resources.threads to 1"
        )
        with watch, contextlib.closing(Engine(connection, watch, need=need)) as engine:
            yield engine
    finally:
        connection.close()
        shutil.rmtree(private, ignore_errors=True)


def identifier(name: str) -> str:
    """Quote ``name`` as an SQL identifier.

    >>> identifier("order")
    '"order"'
    """
    return '"' + name.replace('"', '""') + '"'


def source_view(name: str) -> str:
    """Return the quoted name of the view or table that a source is."""
    return f"main.{identifier(name)}"


def literal(value: str) -> str:
    """Quote ``value`` as an SQL string.

    >>> literal("it's")
    "'it''s'"
    """
    return "'" + value.replace("'", "''") + "'"


def literals(values: Iterable[str]) -> str:
    """Return an SQL list of strings."""
    return "[" + ", ".join(literal(value) for value in values) + "]"


def identity_hash(parts: Sequence[str], *, salt: str = "") -> str:
    """Return SQL of a 64-bit hash (UBIGINT) of the expressions ``parts``, in their order.

    The hash is the first eight bytes, little-endian, of the MD5 of the parts' text, each preceded
    by its length, so that ("a", "bc") and ("ab", "c") differ, and null differs from "". MD5 and not
    DuckDB's own ``hash``: that one changes between its releases, and a row must keep its id.
    """
    # One flat concat, which skips nulls: nested || and CASE took four times as long.
    text = [
        f"coalesce(strlen(({part})::VARCHAR)::VARCHAR, 'n'), "
        f"CASE WHEN ({part}) IS NOT NULL THEN ':' END, ({part})::VARCHAR"
        for part in parts
    ]
    salted = [literal(f"{salt}|"), *text] if salt else text
    return f"md5_number_upper(concat({', '.join(salted)}))"


def as_signed(unsigned: str) -> str:
    """Return SQL that maps a UBIGINT one to one onto BIGINT: minus 2**63."""
    return f"CAST(({unsigned})::HUGEINT - 9223372036854775808 AS BIGINT)"


def _within(memory_budget: int, threads: int) -> tuple[int, int]:
    memory = min(int(memory_budget * ENGINE_SHARE), memory_budget - RESERVED_BYTES)
    if memory < MIN_ENGINE_BYTES:
        raise ResourceError(
            f"resources.memory_budget is {format_bytes(memory_budget)}; extract needs "
            f"{format_bytes(RESERVED_BYTES)} for itself and {format_bytes(MIN_ENGINE_BYTES)} for "
            f"DuckDB: set it to {format_bytes(RESERVED_BYTES + MIN_ENGINE_BYTES)} or more"
        )
    fitting = 1 + (memory - MIN_ENGINE_BYTES) // MIN_THREAD_BYTES
    return memory, min(threads, fitting)


def _lock(
    connection: duckdb.DuckDBPyConnection,
    readable: Iterable[Path],
    writable: Path | None,
    attached: Mapping[str, Path],
) -> None:
    for name, path in attached.items():
        try:
            connection.execute(
                f"ATTACH {literal(str(path))} AS {identifier(name)} (TYPE duckdb, READ_ONLY)"
            )
        except duckdb.Error as error:
            raise DataError(f"{path} cannot be read as a DuckDB file: {error}") from error
    connection.execute(f"CREATE SCHEMA {identifier(_OWN)}")
    folders = [str(writable) + "/"] if writable else []
    for setting in (
        f"search_path = {literal(identifier(_OWN) + ',main')}",
        "python_enable_replacements = false",  # a mistyped table must not find a Python variable
        "TimeZone = 'UTC'",
        "errors_as_json = true",
        "enable_progress_bar = false",
        f"allowed_paths = {literals(str(path) for path in readable)}",
        f"allowed_directories = {literals(folders)}",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")


def _parts(error: duckdb.Error) -> tuple[str, str, int | None]:
    text = str(error)
    start = text.find("{")
    try:
        content = json.loads(text[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        content = {}
    kind = str(content.get("exception_type", text.partition(" Error:")[0]))
    message = str(content.get("exception_message", text)).strip()
    if nested := re.search(
        r'\{"exception_type".*?"exception_message":"((?:[^"\\]|\\.)*)"', message
    ):
        message = nested[1].replace('\\"', '"')  # a thread's error inside another
    message = re.sub(r"\s*\n\s*", "; ", re.split(r"\n+(?:Possible solutions|LINE \d+)", message)[0])
    position = content.get("position")
    return kind, message, int(position) if position is not None else None


def _position(place: Place, position: int | None) -> str:
    if position is None or position < place.prefix:
        return f"{place.name}: "
    before = place.text.encode()[: position - place.prefix].decode(errors="replace")
    line = before.count("\n") + 1
    column = len(before) - (before.rfind("\n") + 1) + 1
    return f"{place.name}:{line}:{column}: "


class _SpillWatch:
    """Stops the query when the private folder outgrows its cap."""

    def __init__(self, folder: Path, max_bytes: int, connection: duckdb.DuckDBPyConnection) -> None:
        self.excess = ""
        self._folder = folder
        self._max_bytes = max_bytes
        self._connection = connection
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="spill-watch", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            held = _folder_bytes(self._folder)
            if held > self._max_bytes and not self.excess:
                self.excess = (
                    f"intermediate data took {format_bytes(held)} of disk, more than "
                    f"extract.max_spill = {format_bytes(self._max_bytes)}; raise it, or let the "
                    f"recipe return fewer rows or columns"
                )
            if self.excess:
                self._connection.interrupt()


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
