"""The stage as a whole: identity, joins, recipe, contract on disk, determinism, limits."""

import datetime
import hashlib
import itertools
import json
import os
import signal
import struct
import threading
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.data.engine import open_engine
from headrace.data.table import open_table
from headrace.errors import (
    ConfigError,
    DataError,
    ResourceError,
    SchemaError,
    SecurityError,
    Stopped,
)
from headrace.params import Resources
from headrace.schema import read_contract
from headrace.stages.extract import survey
from headrace.storage import digest_file
from tests.extract_case import Case


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def canonical_id(*key: str) -> int:
    """The documented row id, in plain Python."""
    text = "".join(f"{len(part.encode())}:{part}" for part in key)
    (first,) = struct.unpack("<Q", hashlib.md5(text.encode()).digest()[:8])
    return first - 2**63


# --- what comes out ------------------------------------------------------------------------------


def test_the_table_has_the_layout_that_later_stages_read(case):
    case.table()
    result = case.run()

    table = open_table(case.out)
    schema = pq.read_schema(case.out / "train" / "part-00000.parquet")
    assert schema.names == ["row_id", "fold", "id", "x", "kind", "y"]
    assert [str(schema.field(i).type) for i in (0, 1)] == ["int64", "int8"]
    assert schema.metadata[b"contract"].decode() == table.contract.digest
    assert sum(table.num_rows(split) for split in ("train", "valid", "test")) == 200
    ids = table.read("train", ["row_id"])["row_id"].to_pylist()
    assert ids == sorted(ids)
    group = pq.read_metadata(case.out / "train" / "part-00000.parquet").row_group(0)
    assert group.column(0).compression == "LZ4"
    path = str(case.out / "train" / "part-00000.parquet")
    with duckdb.connect() as connection:
        filters = connection.execute(
            "SELECT bloom_filter_offset FROM parquet_metadata(?)", [path]
        ).fetchall()
    assert set(filters) == {(None,)}, "no reader of this table looks rows up by value"
    assert result.num_rows == {k: table.num_rows(k) for k in ("train", "valid", "test", "gap")}
    assert case.report()["split_digest"] == result.split_digest
    assert str(result).startswith("train ")


def test_row_id_is_the_documented_hash_of_the_key(case):
    case.table()
    case.run(key=["id", "kind"], columns={"kind": {"role": "category"}})
    rows = case.rows()
    expected = [
        canonical_id(str(i), kind) for i, kind in zip(rows["id"], rows["kind"], strict=True)
    ]
    assert rows["row_id"] == expected


def test_text_and_bytes_beyond_ascii_come_through(case):
    names = ["café", "naïve", "東京"]
    lines = "".join(f"{i},{i / 7},{names[i % 3]},{i % 2}\n" for i in range(90))
    case.write("rows.csv", f"id,x,name,y\n{lines}")
    case.write("r.sql", "SELECT id, x, name, encode(name) AS raw, y FROM rows")
    case.run(recipe="r.sql", key=["id"], columns={"raw": {"role": "ignore"}})
    rows = case.rows()
    assert set(rows["name"]) == set(names)
    assert {raw.decode() for raw in rows["raw"]} == set(names)


def test_composite_keys_do_not_run_together(case):
    more = "".join(f"k{i},v,{i % 5},{i % 2}\n" for i in range(60))
    case.write("rows.csv", f"a,b,x,y\nx,yz,1,1\nxy,z,2,0\n{more}")
    case.run(key=["a", "b"], split={"kind": "stratified"})  # would collide if simply joined
    assert len(set(case.rows()["row_id"])) == 62


def test_without_a_key_rows_are_known_by_file_and_line(case):
    case.table("data/a.csv")
    case.table("data/b.csv", num_rows=100, id=lambda i: 1000 + i)
    case.run(sources={"rows": "data/*.csv"}, key=[], targets=["y"], split={"kind": "stratified"})
    rows = case.rows()
    assert len(set(rows["row_id"])) == 300
    digest = case.report()["sources"]["rows"]["files"][1]["digest"]
    found = dict(zip(rows["id"], rows["row_id"], strict=True))
    assert found[1005] == canonical_id(digest, "5")


def test_identity_assigned_at_the_scan_survives_a_join(case):
    case.table()
    case.write("names.csv", "kind,name\na,Ada\nb,Bob\nc,Cy\n")
    case.write("r.sql", "SELECT r.row_id, r.x, n.name, r.y FROM rows r JOIN names n USING (kind)")
    case.run(sources={"rows": "rows.csv", "names": "names.csv"}, recipe="r.sql", key=[])
    digest = case.report()["sources"]["rows"]["files"][0]["digest"]
    assert set(case.rows()["row_id"]) == {canonical_id(digest, str(i)) for i in range(200)}


def test_output_is_byte_equal_at_any_number_of_threads(case):
    rng = np.random.default_rng(3)
    rows = 260_000  # several of DuckDB's row groups, so that two threads really share the work
    day = np.datetime64("2024-01-01") + rng.integers(0, 40, rows).astype("timedelta64[D]")
    table = pa.table(
        {
            "id": rng.permutation(rows),
            "x": rng.normal(size=rows) * 10.0 ** rng.integers(-9, 9, rows),
            "kind": pa.array([f"k{i % 321}" for i in range(rows)]),
            "day": day.astype("datetime64[us]"),
            "y": rng.normal(size=rows),
        }
    )
    pq.write_table(table, case.root / "rows.parquet")
    split = {"kind": "time", "column": "day", "valid_from": "2024-01-20", "test_from": "2024-01-30"}
    settings = {"sources": {"rows": "rows.parquet"}, "split": split | {"gap_days": 1.0}, "folds": 2}
    found = []
    for threads in (1, 2):
        out = case.root / f"out-{threads}"
        case.run(threads=threads, out=out, **settings)
        files = sorted(p for p in out.rglob("*") if p.is_file())
        found.append({p.relative_to(out).as_posix(): digest_file(p).digest for p in files})
    assert found[0] == found[1]
    assert len(found[0]) == 9  # 4 splits, contract, report, profile, rejects, manifest


def test_nothing_of_the_run_is_left_in_scratch_and_dead_runs_are_swept(case):
    case.table()
    dead = case.root / "scratch" / ".new-duckdb.999999999"
    dead.mkdir(parents=True)
    case.run()
    assert list((case.root / "scratch").iterdir()) == []


def test_a_failed_run_leaves_the_older_out_as_it_was(case):
    case.table()
    case.run()
    before = (case.out / "manifest.json").read_bytes()
    with pytest.raises(SchemaError):
        case.run(targets=["z"])
    assert (case.out / "manifest.json").read_bytes() == before


def test_whole_numbers_above_2_to_the_53_stay_exact(case):
    big = 2**53 + 1
    case.table(num_rows=100, big=lambda i: "" if i == 3 else big + i)
    case.run()
    found = case.rows()
    assert sorted(v for v in found["big"] if v is not None) == [
        big + i for i in range(100) if i != 3
    ]


def test_a_sample_keeps_a_share_of_the_rows_and_the_same_ones(case):
    case.table(num_rows=2000)
    case.run()
    whole = dict(zip(case.rows()["row_id"], case.rows()["split"], strict=True))
    case.run(sample=0.2)
    sample = dict(zip(case.rows()["row_id"], case.rows()["split"], strict=True))
    assert 300 < len(sample) < 500
    assert sample.items() <= whole.items()


def test_survey_tells_contract_reasons_types_and_profile_without_writing(case):
    case.table()
    found = survey(
        case.root, case.params(), scratch=case.root / "s", resources=Resources(threads=1)
    )
    assert found.contract.features == ("x", "kind")
    assert found.types == {
        "rows": {"id": "BIGINT", "x": "DOUBLE", "kind": "VARCHAR", "y": "BIGINT"}
    }
    assert found.num_rows == 200
    assert set(found.reasons) == set(found.profile) == {"id", "x", "kind", "y"}
    assert not case.out.exists()


# --- joins ---------------------------------------------------------------------------------------

JOINED = {
    "sources": {"rows": "rows.csv", "names": "names.csv"},
    "recipe": "r.sql",
    "joins": [{"left": "rows", "right": "names", "by": ["kind"], "kind": "many_to_one"}],
}


def test_declared_joins_are_counted_before_and_after(case):
    case.table()
    case.write("names.csv", "kind,name\na,Ada\nb,Bob\nz,Zoe\n")
    case.write("r.sql", "SELECT r.id, x, name, y FROM rows r LEFT JOIN names USING (kind)")
    case.run(**JOINED)
    (join,) = case.report()["joins"]
    assert (join["num_left"], join["num_right"], join["num_matched"]) == (200, 3, 134)
    assert (join["num_inner"], join["num_left_join"]) == (134, 200)


def test_duplicate_keys_in_a_join_are_refused_by_name_before_joining(case):
    case.table()
    case.write("names.csv", "kind,name\na,Ada\na,Abe\na,Al\nb,Bob\nb,Ben\nc,Cy\n")
    case.write("r.sql", "SELECT r.id, x, name, y FROM rows r LEFT JOIN names USING (kind)")
    with pytest.raises(
        DataError, match=r"many_to_one, but names has 2 keys \['kind'\] .*kind=a \(3 rows\); kind=b"
    ):
        case.run(**JOINED)


def test_a_join_that_duplicates_rows_undeclared_is_caught_by_the_key(case):
    case.table()
    case.write("names.csv", "kind,name\na,Ada\na,Abe\nb,Bob\nc,Cy\n")
    case.write("r.sql", "SELECT r.id, x, name, y FROM rows r LEFT JOIN names USING (kind)")
    with pytest.raises(DataError, match=r"267 rows but only 200 different keys \['id'\].*id=0 \(2"):
        case.run(**{**JOINED, "joins": []})


@pytest.mark.parametrize(
    ("join", "message"),
    [
        ({"left": "row", "right": "names", "by": ["kind"], "kind": "many_to_one"},
         "source 'row'.*nearest name: rows"),
        ({"left": "rows", "right": "names", "by": {"kind": "kin"}, "kind": "many_to_one"},
         "source names does not have; nearest name: kind"),
    ],
)  # fmt: skip
def test_a_join_over_what_is_not_there_names_the_nearest(case, join, message):
    case.table()
    case.write("names.csv", "kind,name\na,Ada\n")
    case.write("r.sql", "SELECT r.id, x, name, y FROM rows r LEFT JOIN names USING (kind)")
    with pytest.raises((ConfigError, SchemaError), match=message):
        case.run(**{**JOINED, "joins": [join]})


# --- the recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "error", "message"),
    [
        ("SELECT id,\n  xx, y FROM rows", ConfigError, r'r\.sql:2:3: .*"xx" not found.*"x"'),
        ("SELEC id FROM rows", ConfigError, r"r\.sql:1:1: syntax error"),
        ("SELECT * FROM rowz", ConfigError, r"r\.sql:1:15: Table with name rowz"),
        ("SELECT *\nFROM rows WHERE x > 1e9", DataError, "r.sql returns no row"),
        ("SELECT id, CAST(kind AS INTEGER) AS k, y FROM rows", DataError, "Could not convert"),
        ("COPY rows TO 'x.csv'", ConfigError, r"must be one SELECT, found \['COPY'\]"),
        ("SELECT 1; SELECT 2", ConfigError, r"found \['SELECT', 'SELECT'\]"),
        ("-- nothing", ConfigError, "must be one SELECT, found nothing"),
        ("SELECT id, x, x, y FROM rows", SchemaError, r"columns \['x'\] more than once"),
        ("SELECT id, 1 AS fold, y FROM rows", SchemaError, "rename yours with AS"),
        ("SELECT x, y FROM rows", SchemaError, r"`extract.key` names the columns \['id'\]"),
        ("SELECT NULLIF(id, 3) AS id, x, y FROM rows", DataError, r"key is missing.*\{'id': 1\}"),
        ("SELECT * FROM read_text('/etc/hostname')", SecurityError, "only what `sources`"),
        ("SELECT id, {'a': x} AS s, y FROM rows", SchemaError, r"cannot be stored: s \(STRUCT"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_ends_in_one_clear_message(case, sql, error, message):
    case.table()
    case.write("r.sql", sql)
    with pytest.raises(error, match=message):
        case.run(recipe="r.sql")


def test_a_trailing_semicolon_and_comment_are_no_fault(case):
    case.table()
    case.write("r.sql", "SELECT * FROM rows; -- all of it\n")
    assert sum(case.run(recipe="r.sql").num_rows.values()) == 200


def test_a_missing_recipe_and_several_sources_without_one_are_refused(case):
    case.table()
    with pytest.raises(ConfigError, match=r"names nosuch.sql, which does not exist"):
        case.run(recipe="nosuch.sql")
    with pytest.raises(ConfigError, match=r"2 sources \(a, b\) and `extract.recipe` is not set"):
        case.run(sources={"a": "rows.csv", "b": "rows.csv"})


def test_rows_without_identity_are_refused_with_the_remedy(case):
    case.table()
    case.write("r.sql", "SELECT x, y FROM rows")
    with pytest.raises(ConfigError, match=r"set `extract.key` .* select the row_id"):
        case.run(recipe="r.sql", key=[])


@pytest.mark.parametrize("kind", ["VARCHAR", "DOUBLE", "INTEGER", "UBIGINT"])
def test_a_row_id_of_the_recipe_that_is_no_bigint_is_refused(case, kind):
    case.table()
    case.write("r.sql", f"SELECT id::{kind} AS row_id, x, y FROM rows")
    with pytest.raises(ConfigError, match=rf"row_id of its own, of type {kind}.*`extract.key`"):
        case.run(recipe="r.sql", key=[])


def test_a_recipe_cannot_reach_python_or_other_files(case):
    case.table()
    secret = case.write("secret.csv", "a\n1\n")
    for sql in (f"SELECT * FROM '{case.root / secret}'", "SELECT * FROM case"):
        case.write("r.sql", sql)
        with pytest.raises((ConfigError, SecurityError)):
            case.run(recipe="r.sql")


def test_a_source_that_is_not_there_is_named(case):
    with pytest.raises(DataError, match=r"no file for the sources \['rows: rows.csv'\]"):
        case.run()


def test_exotic_types_are_cast_exactly_or_named(case):
    case.table(num_rows=60)
    case.write(
        "r.sql",
        """SELECT id, y, sum(id) OVER () AS total, x::DECIMAL(8, 2) AS price, kind::JSON AS j,
           [x, 1.0]::FLOAT[2] AS pair, uuid() IS NULL AS b, DATE '2024-01-01' + id::INT AS day,
           id::UTINYINT AS small, kind::ENUM('a', 'b', 'c') AS e
           FROM (SELECT id, y, x, '1' AS k2, kind FROM rows) r""".replace("kind::JSON", "k2::JSON"),
    )
    case.run(recipe="r.sql")
    dtypes = {c.name: (c.role, c.dtype) for c in read_contract(case.out).columns}
    assert dtypes["total"] == ("ignore", "int64")
    assert dtypes["price"] == ("numeric", "decimal128(8, 2)")
    assert dtypes["pair"] == ("vector", "list<element: float>")
    assert dtypes["day"] == ("ignore", "date32[day]")
    assert dtypes["small"][1] == "uint8"
    assert dtypes["e"] == ("category", "string")
    assert set(case.rows()["total"]) == {sum(range(60))}


# --- limits --------------------------------------------------------------------------------------


def test_a_memory_budget_that_cannot_suffice_is_refused_with_the_figure(case):
    case.table()
    with pytest.raises(ResourceError, match=r"is 64.0 MiB.*to 320.0 MiB or more"):
        case.run(budget=64 << 20)


def test_memory_that_runs_out_names_the_setting_and_a_figure(tmp_path):
    with (
        open_engine(tmp_path, memory_budget=320 << 20, threads=1, max_spill=1 << 30) as engine,
        pytest.raises(ResourceError, match=r"resources.memory_budget.*to 640.0 MiB or more"),
    ):
        engine.rows("SELECT length(string_agg(repeat('x', 1000), '')) FROM range(1000000)")


def test_the_spill_cap_is_held_by_our_own_watch(tmp_path):
    with (
        open_engine(tmp_path, memory_budget=320 << 20, threads=2, max_spill=20 << 20) as engine,
        pytest.raises(ResourceError, match=r"more than extract.max_spill = 20.0 MiB"),
    ):
        engine.execute(
            "CREATE TABLE t AS SELECT i, md5(i::VARCHAR) AS h FROM range(8000000) r(i) ORDER BY h"
        )


def test_what_a_signal_raises_stops_the_query_and_arrives_unchanged(tmp_path):
    """Twice, because DuckDB by itself notices only the first, and as an error of its own."""

    def handler(*_: object) -> None:
        raise Stopped("stopped on request")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        for _ in range(2):
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
            timer.start()
            started = time.monotonic()
            with (
                pytest.raises(Stopped, match="on request"),
                open_engine(
                    tmp_path, memory_budget=1 << 30, threads=2, max_spill=1 << 30
                ) as engine,
            ):
                engine.rows("SELECT count(*) FROM range(10000000000) r(i) WHERE md5(i::TEXT) = ''")
            timer.join()
            assert time.monotonic() - started < 10
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []


def test_the_engine_is_locked_down(tmp_path):
    (tmp_path / "other.csv").write_text("a\n1\n")
    with open_engine(tmp_path, memory_budget=1 << 30, threads=1, max_spill=1 << 30) as engine:
        for sql in (
            f"SELECT * FROM read_csv('{tmp_path}/other.csv')",
            f"COPY (SELECT 1) TO '{tmp_path}/evil.csv'",
            f"ATTACH '{tmp_path}/evil.duckdb'",
            "SELECT * FROM glob('/etc/*')",
        ):
            with pytest.raises(SecurityError):
                engine.execute(sql)
        for sql in ("SET memory_limit = '9GB'", "SET enable_external_access = true"):
            with pytest.raises(DataError, match="locked"):
                engine.execute(sql)
    assert not (tmp_path / "evil.csv").exists()


# --- targets and columns -------------------------------------------------------------------------


def test_a_label_missing_in_one_of_two_targets_is_kept_and_in_both_is_dropped(case):
    case.table(
        num_rows=300,
        y=lambda i: "" if i < 20 else i % 2,
        z=lambda i: "" if 10 <= i < 30 else i / 7,
    )
    result = case.run(targets=["y", "z"])
    rows = case.rows()
    assert result.num_without_target == 10
    assert sorted(rows["id"]) == [i for i in range(300) if not 10 <= i < 20]
    assert sum(v is None for v in rows["y"]) == 10
    assert case.report()["rows"] == {"recipe": 300, "without_target": 10, "kept": 290}


@pytest.mark.parametrize(
    ("values", "settings", "error", "message"),
    [
        (lambda _: "", {}, DataError, r"targets \['y'\] are missing in every row"),
        (lambda _: "yes", {}, DataError, "single class 'yes'"),
        (lambda _: 1, {}, DataError, "single class '1'"),
        (lambda _: 2.5, {}, DataError, "2.5 in every row"),
        (lambda i: "abc"[i % 3], {"task": "binary"}, DataError, "3 classes.*task is binary"),
        (lambda i: "ab"[i % 2], {"task": "regression"}, SchemaError, "string, but its task is reg"),
        (lambda i: "ab"[i % 2], {"labels": ["a", "c"]}, DataError, r"labels` says \['a', 'c'\]"),
        (lambda i: f"2024-01-{i % 28 + 1:02}", {}, SchemaError, "target y is date32"),
    ],
)
def test_a_target_that_cannot_be_learned_is_refused(case, values, settings, error, message):
    case.table(y=values)
    with pytest.raises(error, match=message):
        case.run(targets={"y": settings})


def test_a_target_missing_in_one_of_two_columns_entirely_is_refused(case):
    case.table(z=lambda _: "")
    with pytest.raises(DataError, match="target z is missing in every row"):
        case.run(targets=["y", "z"])


def test_an_infinite_target_is_refused(case):
    case.table(y=lambda i: "inf" if i == 7 else i / 3)
    with pytest.raises(DataError, match=r"targets are infinite in some rows \(\{'y': 1\}\)"):
        case.run()


def test_what_is_asked_for_and_not_there_names_the_nearest(case):
    case.table()
    for settings, message in (
        ({"targets": ["yy"]}, r"`extract.targets` names the columns \['yy'\].*nearest name: y"),
        ({"key": ["idd"]}, r"`extract.key` names the columns \['idd'\].*nearest name: id"),
        ({"columns": {"kin": {}}}, r"`extract.columns` names the columns \['kin'\].*name: kind"),
        ({"split": {"kind": "grouped", "column": "kint"}}, r"column` names kint.*name: kind"),
    ):
        with pytest.raises(SchemaError, match=message):
            case.run(**settings)


def test_a_changed_type_names_both_sides(case):
    case.table(x=lambda i: f"n{i % 7}")
    with pytest.raises(SchemaError, match="x is declared double, the recipe returns string"):
        case.run(columns={"x": {"dtype": "double"}})


def test_columns_without_information_are_named_and_put_aside(case):
    case.table(
        none=lambda _: "",
        same=lambda _: 4,
        huge=lambda i: "inf" if i == 1 else "-inf" if i == 2 else i / 3,
        only=lambda i: "" if i % 2 else "x",  # a value or nothing: that can tell something
    )
    case.run()
    contract = read_contract(case.out)
    assert contract.column("none").role == "ignore"
    assert contract.column("same").role == "ignore"
    assert contract.column("same").note == "the same value in every train row"
    assert contract.column("only").role == "category"
    assert case.report()["infinite_as_missing"] == {"huge": 2}
    assert sum(v is None for v in case.rows()["huge"]) == 2
    assert any("{'huge': 2}" in text for text in case.recorder.warnings)
    assert any("same (the same value" in text for text in case.recorder.warnings)


def test_values_outside_a_declared_range_are_counted_and_warned_of(case):
    case.table()
    case.run(columns={"x": {"range": [0, 20]}})
    found = case.report("profile.json")["x"]["outside_range"]
    expected = sum((i * 37) % 101 / 4 > 20 for i in range(200))
    assert found == {"low": 0.0, "high": 20.0, "count": expected}
    assert any(f"{{'x': {expected}}}" in text for text in case.recorder.warnings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"columns": {"y": {"role": "numeric"}}}, ConfigError, "makes y the target.*says numeric"),
        ({"columns": {"x": {"role": "target"}}}, ConfigError, "`extract.targets` does not have x"),
        ({"columns": {"x": {"role": "key"}}}, ConfigError, "`extract.key` does not have x"),
        ({"columns": {"kind": {"role": "numeric"}}}, SchemaError, "declared numeric.*string"),
        ({"columns": {"x": {"role": "time"}}}, SchemaError, "declared time.*double"),
        ({"columns": {"kind": {"range": [0, 1]}}}, SchemaError,
         r"`range` of columns that are no numbers: kind \(string\)"),
        ({"key": ["y"]}, ConfigError, "in `extract.key` and in `extract.targets`"),
        ({"columns": {"kind": {"role": "category"}}, "max_categories": 2}, DataError,
         "3 different values, more than `extract.max_categories` = 2"),
        ({"columns": {"x": {"role": "weight"}, "kind": {"role": "ignore"}}}, DataError,
         "no column is left to learn from"),
    ],
)  # fmt: skip
def test_declarations_that_contradict_are_refused(case, settings, error, message):
    case.table()
    if settings.get("key") == ["y"]:
        case.table(num_rows=2)
    with pytest.raises(error, match=message):
        case.run(**settings)


def test_a_time_of_day_is_no_category_and_the_remedy_is_named(case):
    case.table()
    case.write("r.sql", "SELECT *, TIME '10:00' + to_minutes(id % 3) AS clock FROM rows")
    case.run(recipe="r.sql")
    with pytest.raises(SchemaError, match=r"clock is declared category.*time64\[us\].*to minutes"):
        case.run(recipe="r.sql", columns={"clock": {"role": "category"}})


def test_a_negative_weight_is_refused(case):
    case.table(w=lambda i: -1 if i == 5 else 2)
    with pytest.raises(DataError, match="weight w is missing or negative in 1 rows"):
        case.run(columns={"w": {"role": "weight"}})


def test_roles_are_inferred_with_a_reason(case):
    words = ["the quick brown fox jumps over dog number", "a lazy cat sleeps in the warm sun at"]
    case.table(
        num_rows=400,
        code=lambda i: f"K-{i:05d}",
        serial=lambda i: 7000 + i,
        user_id=lambda i: i % 9,
        remark=lambda i: f"{words[i % 2]} {i}",
        day=lambda i: f"2024-02-{1 + i % 28:02d}",
        stamp=lambda i: f"2024-02-{1 + i % 28:02d}T10:00:00Z",
        sample_weight=lambda i: 1 + i % 3,
        flag=lambda i: "true" if i % 3 else "false",
        zip=lambda i: f"{i % 50:05d}",
    )
    case.run()
    roles = {c.name: c.role for c in read_contract(case.out).columns}
    assert roles == {
        "id": "key", "x": "numeric", "kind": "category", "y": "target", "code": "ignore",
        "serial": "ignore", "user_id": "category", "remark": "text", "day": "ignore",
        "stamp": "ignore", "sample_weight": "weight", "flag": "category", "zip": "category",
    }  # fmt: skip
    reasons = case.report()["reasons"]
    assert "identifier" in reasons["code"]
    assert "free text" in reasons["remark"]
    assert "derive features" in reasons["day"]
    assert case.rows()["zip"][0].startswith("0")
    assert any("split is random, but the table has dates" in t for t in case.recorder.warnings)


def test_tasks_and_labels_are_inferred_canonically(case):
    case.table(
        num_rows=600,
        price=lambda i: i / 7,
        grade=lambda i: [10, 9, 2][i % 3],
        late=lambda i: "true" if i % 4 else "false",
        part=lambda i: "yes" if i % 5 else "no",
    )
    case.run(targets=["price", "grade", "late", "part", "y"], split={"kind": "stratified"})
    targets = {t.name: (t.task, t.labels) for t in read_contract(case.out).targets}
    assert targets == {
        "price": ("regression", ()),
        "grade": ("multiclass", ("2", "9", "10")),
        "late": ("binary", ("false", "true")),
        "part": ("binary", ("no", "yes")),
        "y": ("binary", ("0", "1")),
    }


@pytest.mark.parametrize("step", [0.5, 1.25])
def test_classes_that_are_fractions_are_counted_by_their_value(case, step):
    case.table(y=lambda i: (i % 3 + 1) * step)
    case.run(targets={"y": {"task": "multiclass"}})
    labels = read_contract(case.out).targets[0].labels
    counts = case.report()["classes"]["y"]
    assert [float(label) for label in labels] == [step, 2 * step, 3 * step]
    rows = case.rows("train")
    assert counts["train"] == {label: rows["y"].count(float(label)) for label in labels}


def test_declared_labels_set_the_positive_class(case):
    case.table(y=lambda i: "good" if i % 2 else "bad")
    case.run(targets={"y": {"labels": ["good", "bad"]}})
    assert read_contract(case.out).target("y").labels == ("good", "bad")


def test_a_class_that_no_train_row_has_is_refused(case):
    case.table(
        num_rows=100,
        y=lambda i: i % 3 if i > 80 else i % 2,
        part=lambda i: "train" if i < 70 else "test",
    )
    with pytest.raises(DataError, match=r"classes \['2'\] in no train row"):
        case.run(targets={"y": {"task": "multiclass"}}, split={"kind": "given", "column": "part"})


# --- other kinds of files ------------------------------------------------------------------------


def test_parquet_globs_keep_exact_types_or_refuse(case):
    (case.root / "p").mkdir()
    one = pa.table({"id": list(range(100)), "x": [i % 9 for i in range(100)], "y": [0, 1] * 50})
    two = pa.table(
        {"id": list(range(100, 200)), "x": [i + 0.7 for i in range(100)], "y": [1, 0] * 50}
    )
    pq.write_table(one, case.root / "p" / "a.parquet")
    pq.write_table(two, case.root / "p" / "b.parquet")
    source = {"path": "p/*.parquet"}
    with pytest.raises(SchemaError, match=r"'x' is BIGINT in p/a.parquet and DOUBLE in p/b.parq"):
        case.run(sources={"rows": source})
    case.run(sources={"rows": source | {"unify": True}})
    assert 2.7 in case.rows()["x"]  # DuckDB by itself reads it as 3


def test_parquet_rows_without_a_key_are_known_by_file_and_row(case):
    table = pa.table({"x": [i * 0.5 for i in range(100)], "y": [0, 1] * 50})
    pq.write_table(table, case.root / "a.parquet", row_group_size=30)
    case.run(sources={"rows": "a.parquet"}, key=[])
    digest = case.report()["sources"]["rows"]["files"][0]["digest"]
    rows = case.rows()
    found = dict(zip(rows["x"], rows["row_id"], strict=True))
    assert found == {i * 0.5: canonical_id(digest, str(i)) for i in range(100)}


def test_twin_files_are_refused_without_a_key(case):
    case.table("d/a.csv")
    case.table("d/b.csv")
    with pytest.raises(DataError, match=r"d/a.csv and d/b.csv have the same content"):
        case.run(sources={"rows": "d/*.csv"}, key=[])


def test_a_broken_or_empty_parquet_file_is_named(case):
    case.write("a.parquet", b"PAR1 but no more")
    with pytest.raises(DataError, match=r"a.parquet is not a whole Parquet file"):
        case.run(sources={"rows": "a.parquet"})
    pq.write_table(pa.table({"id": pa.array([], pa.int64())}), case.root / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet holds no row"):
        case.run(sources={"rows": "a.parquet"})


def test_json_lines_are_typed_by_every_row(case):
    rows = [{"id": i, "x": i, "y": i % 2} for i in range(30_000)]
    rows[-1]["x"] = 0.5  # beyond DuckDB's sample
    case.write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    case.run(sources={"rows": "a.jsonl"})
    assert read_contract(case.out).column("x").dtype == "double"
    assert 0.5 in case.rows()["x"]


@pytest.mark.parametrize("num_files", [1, 2])
@pytest.mark.parametrize("big", [2**53 + 1, 10**25])
def test_json_whole_numbers_that_a_double_rounds_are_refused(case, big, num_files):
    rows = [{"id": i, "x": big if i < 100 else 0.5, "z": i % 41, "y": i % 2} for i in range(200)]
    for part in range(num_files):
        some = rows if num_files == 1 else rows[part * 100 : part * 100 + 100]
        case.write(f"{part}.jsonl", "".join(json.dumps(row) + "\n" for row in some))
    source = {"path": "*.jsonl", "unify": True}
    with pytest.raises(DataError, match=rf"0.jsonl: column 'x' has whole .*\({big}\).*x: VARCHAR"):
        case.run(sources={"rows": source})
    case.run(sources={"rows": source | {"types": {"x": "VARCHAR"}}})
    assert set(case.rows()["x"]) == {str(big), "0.5"}


def test_parquet_whole_numbers_that_a_double_rounds_are_refused(case):
    y = [0, 1] * 50
    one = pa.table({"id": list(range(100)), "x": [2**53 + 1] * 100, "y": y})
    two = pa.table({"id": list(range(100, 200)), "x": [0.5] * 100, "y": y})
    pq.write_table(one, case.root / "a.parquet")
    pq.write_table(two, case.root / "b.parquet")
    with pytest.raises(DataError, match=r"a.parquet: column 'x' is BIGINT with 9007199254740993"):
        case.run(sources={"rows": {"path": "*.parquet", "unify": True}})


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_declared_types_of_json_are_cast_exactly_or_refused(case, layout):
    def write(last):
        rows = [{"id": i, "x": float(i % 7), "z": i % 41, "y": i % 2} for i in range(5000)]
        rows[-1]["x"] = last
        lines = [json.dumps(row) for row in rows]
        text = "\n".join(lines) if layout == "lines" else "[" + ",\n".join(lines) + "]"
        case.write("a.json", text)

    source = {"path": "a.json", "types": {"x": "BIGINT", "id": "INTEGER"}}
    for bad in (2.7, True, "a"):
        write(bad)
        with pytest.raises(DataError, match=r"'x' is declared BIGINT.* 1 rows .*row 5000 has"):
            case.run(sources={"rows": source})
    write(None)
    case.run(sources={"rows": source})
    rows = case.rows()
    found = sorted(zip(rows["id"], rows["x"], rows["z"], strict=True))
    assert found == [(i, None if i == 4999 else i % 7, i % 41) for i in range(5000)]


def test_the_settings_of_a_source_must_be_able_to_take_effect(case):
    for source, message in (
        ({"path": "a.parquet", "delimiter": ";"}, "delimiter cannot take effect"),
        ({"path": "a.csv", "table": "t"}, "`table` and `query` cannot take effect"),
        ({"path": "a.sqlite"}, "needs one of `table` and `query`"),
        ({"path": "a.xyz"}, "set `format`"),
        ({"url": "postgresql://me:secret@h/d", "table": "t"}, "the url holds a password"),
        ({"path": "a.csv", "delimter": ";"}, "nearest name: delimiter"),
    ):
        with pytest.raises(ConfigError, match=message):
            case.params(sources={"rows": source})


def test_progress_and_data_sets_reach_the_recorder(case):
    case.table()
    case.run()
    assert case.recorder.last_progress[:2] == (7, 7)
    contexts = [one["context"] for one in case.recorder.datasets]
    assert contexts == ["source", "train", "valid", "test"]


def test_dates_of_the_report_do_not_depend_on_the_machine(case, monkeypatch):
    """The time zone of the machine reaches neither values nor the split."""
    case.table(num_rows=400, at=lambda i: f"2024-03-{1 + i % 28:02d}T23:30:00Z")
    settings = {"split": {"kind": "time", "column": "at", "valid_from": "2024-03-15",
                          "test_from": "2024-03-20"}, "folds": 2}  # fmt: skip
    digests = []
    for zone in ("America/New_York", "Asia/Tokyo"):
        monkeypatch.setenv("TZ", zone)
        digests.append(case.run(**settings).split_digest)
    assert digests[0] == digests[1]
    test = [
        at
        for at, split in zip(case.rows()["at"], case.rows()["split"], strict=True)
        if split == "test"
    ]
    assert min(test) == datetime.datetime(2024, 3, 20, 23, 30, tzinfo=datetime.UTC)


def test_every_exit_leaves_no_private_folder(case):
    case.table()
    for settings in itertools.chain([{"targets": ["nope"]}], [{"recipe": "nope.sql"}]):
        with pytest.raises((ConfigError, SchemaError)):
            case.run(**settings)
    assert not any(case.root.rglob(".new-*"))
