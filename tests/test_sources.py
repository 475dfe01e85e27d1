"""Databases as sources: SQLite, DuckDB files, PostgreSQL; and the watermark."""

import datetime
import json
import os
import pwd
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest

from headrace.errors import ConfigError, DataError, DependencyError, SchemaError
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.schema import read_contract
from headrace.sources.postgresql import read_postgresql
from headrace.sources.sqlite import read_sqlite, table_names
from headrace.stages.watermark import read_watermarks, watermark
from tests.extract_case import Case

BIG = 2**53 + 1


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def fill_sqlite(path: Path, num_rows: int = 300) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE orders (id INTEGER, price REAL, note TEXT, raw BLOB, y INT)")
    connection.executemany(
        "INSERT INTO orders VALUES (?, ?, ?, ?, ?)",
        [(BIG + i, None if i == 5 else i / 3, "ab"[i % 2], b"\0x", i % 2) for i in range(num_rows)],
    )
    connection.commit()
    connection.close()


# --- SQLite --------------------------------------------------------------------------------------

SQLITE = {"sources": {"orders": {"path": "shop.sqlite", "table": "orders"}}}


def test_a_sqlite_table_is_read_exactly(case):
    fill_sqlite(case.root / "shop.sqlite")
    case.run(**SQLITE)
    rows = case.rows()
    assert sorted(rows["id"]) == [BIG + i for i in range(300)]
    assert sum(value is None for value in rows["price"]) == 1
    dtypes = {c.name: c.dtype for c in read_contract(case.out).columns}
    assert dtypes == {
        "id": "int64", "price": "double", "note": "string", "raw": "binary", "y": "int64"
    }  # fmt: skip


def test_a_sqlite_query_is_read_and_the_file_not_touched(case):
    path = case.root / "shop.sqlite"
    fill_sqlite(path)
    before = path.read_bytes()
    query = "SELECT id, price * 2 AS twice, note, id % 7 AS seven FROM orders WHERE id % 2 = 0;"
    case.run(
        sources={"orders": {"path": "shop.sqlite", "query": query}},
        targets=["twice"],
        split={"kind": "grouped", "column": "seven"},
    )
    assert len(case.rows()["id"]) == 149  # one of 150 has no price, so no target
    assert path.read_bytes() == before


def test_sqlite_comes_in_batches(case, monkeypatch):
    monkeypatch.setattr("headrace.sources.sqlite.BATCH_ROWS", 7)
    path = case.root / "shop.sqlite"
    fill_sqlite(path, 30)
    with read_sqlite(path, table="orders") as reader:
        assert [batch.num_rows for batch in reader] == [7, 7, 7, 7, 2]


def test_what_is_wrong_with_a_sqlite_source_is_named(case):
    path = case.root / "shop.sqlite"
    fill_sqlite(path)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE mixed (id INTEGER, v)")
    connection.executemany("INSERT INTO mixed VALUES (?, ?)", [(1, 2), (2, "x"), (3, 4)])
    connection.execute("CREATE TABLE wide (id INTEGER, v)")
    connection.executemany("INSERT INTO wide VALUES (?, ?)", [(1, 0.5), (2, BIG)])
    connection.commit()
    connection.close()
    assert table_names(path) == ["mixed", "orders", "wide"]
    for source, error, message in (
        ({"table": "order"}, SchemaError, "no table 'order'; nearest name: orders"),
        ({"query": "SELEC 1"}, DataError, "shop.sqlite cannot be read: near"),
        ({"table": "mixed"}, SchemaError, "'v' of shop.sqlite mixes integer and text values"),
        ({"table": "wide"}, SchemaError, "'v' of shop.sqlite mixes integer and real values"),
    ):
        with pytest.raises(error, match=message):
            case.run(sources={"orders": {"path": "shop.sqlite"} | source})
    case.write("text.sqlite", "no database at all, but text that is long enough to be read")
    with pytest.raises(DataError, match=r"text.sqlite cannot be read"):
        case.run(sources={"orders": {"path": "text.sqlite", "table": "t"}})


def test_a_database_has_no_row_numbers_so_it_needs_a_key(case):
    fill_sqlite(case.root / "shop.sqlite")
    with pytest.raises(ConfigError, match="databases need a key"):
        case.run(**SQLITE, key=[])


def test_sqlite_and_csv_join_in_one_recipe(case):
    fill_sqlite(case.root / "shop.sqlite")
    case.write("names.csv", "note,name\na,Ada\nb,Bob\n")
    case.write("r.sql", "SELECT o.id, o.price, n.name, o.y FROM orders o JOIN names n USING (note)")
    case.run(
        sources=SQLITE["sources"] | {"names": "names.csv"},
        recipe="r.sql",
        joins=[{"left": "orders", "right": "names", "by": ["note"], "kind": "many_to_one"}],
    )
    assert set(case.rows()["name"]) == {"Ada", "Bob"}


# --- DuckDB --------------------------------------------------------------------------------------


def test_a_duckdb_file_is_attached_read_only(case):
    path = case.root / "shop.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute(f"CREATE TABLE orders AS SELECT i + {BIG} AS id, i / 3 AS x, i % 2 AS y "
                           "FROM range(200) t(i)")  # fmt: skip
        connection.execute(
            "CREATE SCHEMA more; CREATE VIEW more.half AS FROM main.orders LIMIT 100"
        )
    before = path.read_bytes()
    case.run(sources={"orders": {"path": "shop.duckdb", "table": "orders"}})
    assert sorted(case.rows()["id"]) == [BIG + i for i in range(200)]
    case.run(sources={"orders": {"path": "shop.duckdb", "table": "more.half"}})
    assert len(case.rows()["id"]) == 100
    assert path.read_bytes() == before
    with pytest.raises(SchemaError, match=r"no table 'order'; nearest name: orders; found"):
        case.run(sources={"orders": {"path": "shop.duckdb", "table": "order"}})


def test_what_is_no_duckdb_file_is_named(case):
    case.write("shop.duckdb", "text")
    with pytest.raises(DataError, match=r"shop.duckdb cannot be read as a DuckDB file"):
        case.run(sources={"orders": {"path": "shop.duckdb", "table": "orders"}})


# --- watermark -----------------------------------------------------------------------------------


def test_the_watermark_changes_with_the_rows_and_only_then(case):
    path = case.root / "shop.sqlite"
    fill_sqlite(path)
    params = case.params(**SQLITE)
    recorder = MemoryRecorder()
    out = case.root / "data" / "watermark"
    first = watermark(case.root, out, params, resources=Resources(), recorder=recorder)
    assert json.loads((out / "watermark.json").read_text()) == first.values
    again = watermark(case.root, out, params, resources=Resources(), recorder=recorder)
    assert first == again
    assert str(first).startswith("orders: ")
    connection = sqlite3.connect(path)
    connection.execute("UPDATE orders SET price = -5 WHERE rowid = 9")
    connection.commit()
    connection.close()
    assert read_watermarks(case.root, params) != first.values


def test_a_declared_watermark_is_used(case):
    fill_sqlite(case.root / "shop.sqlite")
    source = SQLITE["sources"]["orders"] | {"watermark": "SELECT count(*), max(id) FROM orders"}
    params = case.params(sources={"orders": source})
    assert read_watermarks(case.root, params) == {"orders": [["300", str(BIG + 299)]]}
    wrong = case.params(sources={"orders": source | {"watermark": "SELECT nope"}})
    with pytest.raises(DataError, match=r"the watermark of shop.sqlite cannot be read"):
        read_watermarks(case.root, wrong)


def test_files_need_no_watermark(case):
    case.table()
    assert read_watermarks(case.root, case.params()) == {}


# --- PostgreSQL ----------------------------------------------------------------------------------


def _postgres_tools() -> Path | None:
    if found := shutil.which("initdb"):
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


def _as_server(command: list[str | Path]) -> subprocess.CompletedProcess[bytes]:
    """Run a command of the server, which refuses to run as root."""
    user = {}
    if os.getuid() == 0:
        user = {"user": pwd.getpwnam("postgres").pw_uid, "group": pwd.getpwnam("postgres").pw_gid}
    return subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user
    )


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    tools = _postgres_tools()
    if tools is None:
        tell = pytest.fail if os.environ.get("CI") else pytest.skip  # CI installs it
        tell("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp(prefix="hr-pg-"))
    if os.getuid() == 0:
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _as_server([tools / "initdb", "-D", folder / "db", "-U", "me", "-A", "trust", "--no-sync"])
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    _as_server([tools / "pg_ctl", "-D", folder / "db", "-w", "-o", options, "-l",
                folder / "log", "start"])  # fmt: skip
    try:
        yield f"postgresql://me@127.0.0.1:{port}/postgres"
    finally:
        _as_server([tools / "pg_ctl", "-D", folder / "db", "-m", "immediate", "stop"])
        shutil.rmtree(folder, ignore_errors=True)


def _fill_postgres(url: str) -> None:
    import psycopg2

    connection = psycopg2.connect(url)
    with connection, connection.cursor() as cursor:
        cursor.execute(
            f"""DROP TABLE IF EXISTS orders; CREATE TABLE orders AS
            SELECT {BIG}::bigint + i AS id, i::numeric(10, 2) / 4 AS loose,
              (i + 0.25)::numeric(10, 2) AS price, (i % 3)::smallint AS small,
              i / 7.0::float8 AS x, 'k' || i % 4 AS kind, i % 2 = 0 AS y,
              DATE '2024-01-01' + i % 30 AS day, TIMESTAMPTZ '2024-01-01 10:00+02' AS at,
              CASE WHEN i > 3 THEN i END AS gappy, '{{"a": 1}}'::jsonb AS doc
            FROM generate_series(0, 299) i"""
        )
    connection.close()


@pytest.mark.system
def test_a_postgresql_table_is_read_exactly_and_in_batches(case, postgres, monkeypatch):
    monkeypatch.setattr("headrace.sources.postgresql.BATCH_ROWS", 64)
    _fill_postgres(postgres)
    case.run(sources={"orders": {"url": postgres, "table": "public.orders"}})
    rows = case.rows()
    assert sorted(rows["id"]) == [BIG + i for i in range(300)]
    dtypes = {c.name: c.dtype for c in read_contract(case.out).columns}
    assert dtypes["price"] == "decimal128(10, 2)"
    assert dtypes["loose"] == "double"
    assert dtypes["small"] == "int16"
    assert dtypes["at"] == "timestamp[us, tz=UTC]"
    by_id = dict(zip(rows["id"], rows["price"], strict=True))
    assert by_id[BIG + 7] == Decimal("7.25")
    assert set(rows["at"]) == {datetime.datetime(2024, 1, 1, 8, tzinfo=datetime.UTC)}
    assert sum(value is None for value in rows["gappy"]) == 4
    assert set(rows["doc"]) == {'{"a": 1}'} or set(rows["doc"]) == {"{'a': 1}"}


@pytest.mark.system
def test_a_postgresql_watermark_and_its_faults(case, postgres):
    _fill_postgres(postgres)
    params = case.params(sources={"orders": {"url": postgres, "table": "orders"}})
    first = read_watermarks(case.root, params)
    assert first == read_watermarks(case.root, params)
    assert first["orders"][0][0] == "300"
    import psycopg2

    connection = psycopg2.connect(postgres)
    with connection, connection.cursor() as cursor:
        cursor.execute(f"UPDATE orders SET x = -1 WHERE id = {BIG}")
    connection.close()
    assert read_watermarks(case.root, params) != first
    for source, message in (
        ({"table": "nope"}, 'relation "nope" does not exist'),
        ({"query": "DELETE FROM orders RETURNING id"}, "PostgreSQL refused"),
    ):
        with pytest.raises(DataError, match=message):
            case.run(sources={"orders": {"url": postgres} | source})


def test_a_server_that_does_not_answer_is_a_dependency_error():
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.monotonic()
    with (
        pytest.raises(DependencyError, match="PostgreSQL does not answer"),
        read_postgresql(f"postgresql://me@127.0.0.1:{port}/x", table="t"),
    ):
        pass
    assert time.monotonic() - started < 15


def test_a_missing_driver_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psycopg2", None)
    with (
        pytest.raises(DependencyError, match=r"pip install headrace\[postgresql\]"),
        read_postgresql("postgresql://h/d", table="t"),
    ):
        pass


@pytest.mark.parametrize(
    "name",
    ["recipe", "recipe_result", "tidied", "labelled", "rows_placed", "rows_train", "placed",
     "hashed", "folding", "folded", "unplaced", "reject_errors", "reject_scans", "arrow_batches",
     "scanned", "dated", "groups"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["csv", "sqlite"])
def test_a_source_may_have_any_name(case, name, kind):
    case.table()
    source: object = "rows.csv"
    if kind == "sqlite":
        fill_sqlite(case.root / "a.sqlite")
        source = {"path": "a.sqlite", "table": "orders"}
    case.table("more.csv")
    case.write("r.sql", f"SELECT r.* FROM {name} r LEFT JOIN more m USING (id)")
    join = {"left": name, "right": "more", "by": ["id"], "kind": "one_to_one"}
    sources = {name: source, "more": "more.csv"}
    case.run(sources=sources, recipe="r.sql", joins=[join])
    assert len(case.rows()["id"]) == (200 if kind == "csv" else 300)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("groups", {"kind": "grouped", "column": "g"}),
        (
            "dated",
            {
                "kind": "time",
                "column": "day",
                "valid_from": "2024-08-01",
                "test_from": "2024-10-01",
            },
        ),
        ("hashed", {"kind": "stratified", "column": "kind"}),
    ],
)
def test_a_source_may_have_the_name_of_a_table_of_its_split(case, name, split):
    case.table(day=lambda i: f"2024-{1 + i % 12:02d}-{1 + i % 28:02d}", g=lambda i: i % 40)
    case.run(sources={name: "rows.csv"}, split=split)
    assert len(case.rows()["id"]) == 200
