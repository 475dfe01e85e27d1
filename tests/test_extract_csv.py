"""CSV files, whole and broken: each fault has its own message, or the right result."""

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.data.delimited import load_files
from headrace.data.dialect import Dialect, File, Loaded
from headrace.data.engine import open_engine
from headrace.data.propose import propose_dialect
from headrace.errors import ConfigError, DataError, SchemaError
from tests.extract_case import Case

GOOD = b"id,x,s\n1,2.5,a\n2,,b\n3,1e3,c\n"


def load(
    folder: Path, *contents: bytes, name: str = "f.csv", unify: bool = False, **dialect: object
) -> tuple[Loaded, list[tuple[object, ...]]]:
    """Write the contents as files of one source and load them; return what is kept, in order."""
    files = []
    for position, content in enumerate(contents):
        path = folder / (f"{position}-{name}" if len(contents) > 1 else name)
        path.write_bytes(content)
        files.append(File(path, path.name))
    with open_engine(
        folder / "scratch",
        memory_budget=512 << 20,
        threads=2,
        max_spill=1 << 30,
        readable=[file.path for file in files],
    ) as engine:
        loaded = load_files(engine, "t", files, Dialect.model_validate(dialect), unify=unify)
        kept = engine.rows(
            'SELECT * EXCLUDE ("headrace fault", "headrace file") FROM t '
            'WHERE "headrace fault" IS NULL ORDER BY rowid'
        )
    return loaded, kept


def test_a_good_file_is_read_by_name_with_types_from_all_values(tmp_path):
    loaded, rows = load(tmp_path, GOOD)
    assert loaded.types == {"id": "BIGINT", "x": "DOUBLE", "s": "VARCHAR"}
    assert rows == [(1, 2.5, "a"), (2, None, "b"), (3, 1000.0, "c")]
    assert (loaded.files[0].num_rows_in, loaded.rejects) == (3, [])


@pytest.mark.parametrize(
    ("content", "dialect", "rows"),
    [
        (b"\xef\xbb\xbf" + GOOD, {}, 3),
        (GOOD.replace(b"\n", b"\r\n"), {}, 3),
        (GOOD.replace(b"\n", b"\r"), {}, 3),
        (GOOD.rstrip(), {}, 3),
        (GOOD + b"\n\n", {}, 3),
        (b'id,x,s\n1,2,"a\nb,""c"""\n2,3,d\n', {}, 2),
        (b'id,x,s\n1,2,5" pipe\n2,3,a "b" c\n', {}, 2),
        (b"id;x;s\n1;2;a\n", {"delimiter": ";"}, 1),
        (b"id,x,s\n1,2,caf\xe9\n", {"encoding": "latin-1"}, 1),
        ("id,x,s\n1,2,é\n".encode("utf-16"), {"encoding": "utf-16"}, 1),
        (b"1,2,a\n2,3,b\n", {"names": ["id", "x", "s"]}, 2),
        (b"# a comment\n# more\n" + GOOD, {"skip": 2}, 3),
        (b"id , x, s\n1, 2 , a \n2, ?, b\n", {"trim": True, "nulls": ["?"]}, 2),
        (b"id,x,s\n1,2,'a,b'\n", {"quote": "'"}, 1),
        (b'id,x,s\n1,2,"a\n', {"quote": ""}, 1),
    ],
    ids=["bom", "crlf", "cr", "no last newline", "blank lines", "quoted newline", "inner quotes",
         "semicolon", "latin-1", "utf-16", "no header", "comments", "blanks", "other quote",
         "no quote"],
)  # fmt: skip
def test_files_that_are_right_are_read_right(tmp_path, content, dialect, rows):
    loaded, kept = load(tmp_path, content, **dialect)
    assert list(loaded.types) == ["id", "x", "s"]
    assert len(kept) == rows == loaded.files[0].num_rows_in
    assert loaded.types["id"] == "BIGINT"
    assert kept[0][0] == 1
    assert loaded.rejects == []


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    loaded, _ = load(tmp_path, b"\xef\xbb\xbf" + GOOD)
    assert next(iter(loaded.types)) == "id"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", DataError, "f.csv is empty"),
        (b"\n\n", DataError, "has no header line"),
        (b"id,x,s\n", DataError, r"has a header \(id, x, s\) but no row"),
        (b"id;x;s\n1;2;a\n", DataError, "f.csv:1: the header 'id;x;s' has no ',', but ';'"),
        (b"id,x\n1,a\n2,\xe9\n", DataError, "f.csv:3: the byte 0xe9 is not utf-8.*latin-1"),
        (b"id,x,s\n1,2,a\xe9", DataError, "f.csv:2: the byte 0xe9 is not utf-8"),
        ("id,x\n1,2\n".encode("utf-16"), DataError, "is UTF-16 text; set `encoding: utf-16`"),
        (b"id,x,s\n1,2,a\0b\n", DataError, "f.csv:2: holds a NUL byte"),
        (b'id,x,s\n1,2,a\n2,3,"b\n3,4,c\n', DataError, "f.csv:3: a quote is opened and never"),
        (b"id,x,s\n1,2,a\r\n2,3,b\n", DataError, "mixes line ends"),
        (b"id,x,s\n1,2,a\n2,3,b\r3,4,c\n", DataError, "mixes line ends"),
        (b"id,x,ID\n1,2,3\n", SchemaError, r"same name more than once: \['id', 'ID'\]"),
        (b"id,,s\n1,2,3\n", SchemaError, r"no name for the columns \[2\]"),
        (b"1,2,a\n2,3,b\n", DataError, "header holds the numbers .* give its columns as `names`"),
    ],
    ids=["empty", "only blanks", "header only", "wrong delimiter", "latin-1", "cut utf-8", "utf-16",
         "nul", "unterminated quote", "mixed ends", "mixed ends 2", "duplicate header", "nameless",
         "no header"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused_with_its_own_message(
    tmp_path, content, error, message
):
    with pytest.raises(error, match=message):
        load(tmp_path, content)


def test_rows_that_do_not_split_are_rejected_with_their_physical_line(tmp_path):
    content = b'id,x,s\n1,2,"a\n\nb"\n\n2,3\n3,4,c,d\n4,5,e\n6,7,"f"g\n'
    loaded, rows = load(tmp_path, content)
    assert [(one.line, one.reason.split(":")[0]) for one in loaded.rejects] == [
        (6, "missing columns"),
        (7, "too many columns"),
        (9, "unquoted value"),
    ]
    assert [row[0] for row in rows] == [1, 4]
    assert loaded.files[0].num_rows_in == len(rows) + len(loaded.rejects) == 5


def test_rows_that_do_not_cast_are_rejected_with_column_line_and_text(tmp_path):
    content = b'id,x,s\n1,2,"a\nb"\n2.7,3,b\n3,4\nx,4,c\n9007199254740993,5,d\n'
    loaded, rows = load(tmp_path, content, types={"id": "BIGINT", "x": "DECIMAL(6,1)"})
    assert [(one.line, one.column, one.text) for one in loaded.rejects] == [
        (4, "id", "2.7,3,b"),  # DuckDB by itself reads 3
        (5, "s", "3,4"),
        (6, "id", "x,4,c"),
    ]
    assert [row[0] for row in rows] == [1, 9007199254740993]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("BIGINT", "2.7"), ("BIGINT", "1e3"), ("BIGINT", "1_000"), ("SMALLINT", "40000"),
        ("DECIMAL(6,1)", "1.25"), ("DOUBLE", "1_000"), ("DATE", "2024-01-01 10:00"),
        ("DATE", "2024-02-30"), ("TIMESTAMP", "2024-01-01 10:00+02"),
        ("TIMESTAMPTZ", "2024-01-01 10:00"), ("BOOLEAN", "maybe"), ("UTINYINT", "-1"),
    ],
)  # fmt: skip
def test_casts_never_round_or_drop_anything(tmp_path, kind, text):
    loaded, rows = load(tmp_path, f"a,b\n{text},1\n".encode(), types={"a": kind})
    assert rows == []
    assert loaded.rejects[0].reason == f"not {kind}"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "+2", "-3"], "BIGINT"), (["1", "2.5"], "DOUBLE"), (["00123", "00124"], "VARCHAR"),
        (["true", "False"], "BOOLEAN"), (["2024-01-31", "2024-1-1"], "DATE"),
        (["2024-01-31 10:00", "2024-01-31T10:00:00.5"], "TIMESTAMP"),
        (["2024-01-31T10:00:00Z", "2024-01-31 10:00+01:00"], "TIMESTAMPTZ"),
        (["", ""], "VARCHAR"), (["99999999999999999999", "1"], "VARCHAR"),
        (["9007199254740992", "0.5"], "DOUBLE"), (["1", "a", "2", "b"], "VARCHAR"),
    ],
)  # fmt: skip
def test_the_type_fits_every_value_exactly(tmp_path, values, kind):
    content = "a,b\n" + "".join(f"{value},1\n" for value in values)
    loaded, rows = load(tmp_path, content.encode())
    assert loaded.types["a"] == kind
    assert len(rows) == len(values)


def test_whole_numbers_that_a_double_rounds_are_refused_in_one_file_and_between_files(tmp_path):
    message = r"'x' has whole numbers above 2\^53 \(9007199254740993\).*`types: {x: VARCHAR}`"
    with pytest.raises(DataError, match=message):
        load(tmp_path, b"id,x\n1,9007199254740993\n2,0.5\n")
    parts = (b"id,x\n1,9007199254740993\n", b"id,x\n2,0.5\n")
    with pytest.raises(DataError, match=f"0-f.csv: column {message}"):
        load(tmp_path, *parts, unify=True)
    with pytest.raises(DataError, match=f"1-f.csv: column {message}"):
        load(tmp_path, *reversed(parts), unify=True)
    _, rows = load(tmp_path, *parts, unify=True, types={"x": "VARCHAR"})
    assert rows == [(1, "9007199254740993"), (2, "0.5")]
    loaded, _ = load(tmp_path, parts[0].replace(b"3\n", b"2\n"), parts[1], unify=True)
    assert loaded.types["x"] == "DOUBLE"


def test_a_column_that_nearly_fits_a_type_is_refused_with_line_and_remedy(tmp_path):
    rows = "".join(f"{i},{i}\n" for i in range(30))
    with pytest.raises(DataError, match=r"BIGINT in 30 of 31 rows.*'oops' \(1 times\).*line 32"):
        load(tmp_path, f"id,x\n{rows}31,oops\n".encode())
    with pytest.raises(DataError, match=r"'NA' \(1 times\).*line 32.*set `nulls: \['NA'\]`"):
        load(tmp_path, f"id,x\n{rows}31,NA\n".encode())
    loaded, _ = load(tmp_path, f"id,x\n{rows}31,NA\n".encode(), nulls=["NA"])
    assert loaded.types["x"] == "BIGINT"


def test_a_line_that_is_too_long_is_rejected_and_can_be_allowed(tmp_path):
    content = b"id,s\n1," + b"z" * 3_000_000 + b"\n2,b\n"
    loaded, rows = load(tmp_path, content)
    (reject,) = loaded.rejects
    assert (reject.line, len(rows)) == (2, 1)
    assert "longer than max_line = 2.0 MiB; raise `max_line`" in reject.reason
    assert len(reject.text) <= 300
    _, rows = load(tmp_path, content, max_line=4 << 20)
    assert len(rows) == 2


def test_gzip_is_read_and_a_cut_one_refused(tmp_path):
    packed = gzip.compress(GOOD)
    assert load(tmp_path, packed, name="f.csv.gz")[1][0] == (1, 2.5, "a")
    with pytest.raises(DataError, match="not a whole gzip file"):
        load(tmp_path, packed[:-9], name="f.csv.gz")


def test_files_of_a_source_are_matched_by_name_never_by_position(tmp_path):
    _, rows = load(tmp_path, b"id,amount\n1,10\n", b"amount,id\n20,2\n")
    assert rows == [(1, 10), (2, 20)]


def test_other_headers_and_types_between_files_are_refused_unless_unified(tmp_path):
    with pytest.raises(
        SchemaError, match=r"1-f.csv has another header.*lacks \['x'\], adds \['y'\]"
    ):
        load(tmp_path, b"id,x\n1,2\n", b"id,y\n1,2\n")
    with pytest.raises(SchemaError, match=r"'x' is BIGINT in 0-f.csv and DOUBLE in 1-f.csv"):
        load(tmp_path, b"id,x\n1,2\n", b"id,x\n1,2.7\n")
    loaded, rows = load(tmp_path, b"id,x\n1,2\n", b"x,id,z\n2.7,2,q\n", unify=True)
    assert loaded.types == {"id": "BIGINT", "x": "DOUBLE", "z": "VARCHAR"}
    assert rows == [(1, 2.0, None), (2, 2.7, "q")]


def test_types_of_columns_that_are_not_there_or_do_not_exist_are_refused(tmp_path):
    with pytest.raises(SchemaError, match=r"columns \['idd'\].*nearest name: id"):
        load(tmp_path, GOOD, types={"idd": "BIGINT"})
    with pytest.raises(ConfigError, match="'NOSUCH' is no SQL type"):
        load(tmp_path, GOOD, types={"id": "NOSUCH"})
    with pytest.raises(ValueError, match="not an SQL type"):
        Dialect(types={"id": "INT); DROP TABLE t; --"})


def test_lines_of_rejects_are_right_in_a_file_read_in_parallel(tmp_path):
    rows = [f"{i},{i % 7},name{i}" for i in range(400_000)]
    rows[100_000] = '100000,1,"x\ny\nz"'
    for bad in (150_000, 399_000):
        rows[bad] = "bad,1"
    rows[300_000] = "nope,1,name"
    content = ("id,x,s\n" + "\n".join(rows) + "\n").encode()
    loaded, kept = load(tmp_path, content, types={"id": "BIGINT"})
    assert [one.line for one in loaded.rejects] == [150_004, 300_004, 399_004]
    assert len(kept) == 399_997
    assert [row[0] for row in kept] == sorted(row[0] for row in kept)


# --- through the stage ---------------------------------------------------------------------------


def test_bad_rows_above_the_budget_stop_the_stage_and_name_their_lines(tmp_path):
    case = Case(tmp_path)
    case.table()
    case.write("rows.csv", (tmp_path / "rows.csv").read_text() + "7,1\n8,2,a,1,9\n")
    with pytest.raises(
        DataError,
        match=r"2 rows cannot be read, more than extract.rejects_budget = 0: rows.csv:202",
    ):
        case.run()
    assert not case.out.exists()


def test_bad_rows_within_the_budget_are_listed_and_counted(tmp_path):
    case = Case(tmp_path)
    case.table()
    case.write("rows.csv", (tmp_path / "rows.csv").read_text() + "7,1\noops,2,a,1\n")
    result = case.run(
        rejects_budget=2, sources={"rows": {"path": "rows.csv", "types": {"id": "BIGINT"}}}
    )
    assert result.num_rejects == 2
    assert [(r["file"], r["line"], r["column"], r["text"]) for r in case.rejects()] == [
        ("rows.csv", "202", "kind", "7,1"),
        ("rows.csv", "203", "id", "oops,2,a,1"),
    ]
    (file,) = case.report()["sources"]["rows"]["files"]
    assert (file["rows_in"], file["rows_kept"]) == (202, 200)
    assert case.report()["sources"]["rows"]["rejected"] == 2


# --- proposals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (GOOD, {}),
        (GOOD.replace(b",", b";"), {"delimiter": ";"}),
        (b"a\tb\n1\tNA\n2\t3\n", {"delimiter": "\t", "nulls": ("NA",)}),
        (b"a,b\n1,caf\xe9\n", {"encoding": "latin-1"}),
        (b"39, x, ?\n40, y, 2\n", {"names": ("column_1", "column_2", "column_3"), "trim": True,
                                   "nulls": ("?",)}),
        (b"only\n1\n2\n", {}),
    ],
)  # fmt: skip
def test_a_dialect_is_proposed_from_the_first_rows(tmp_path, content, expected):
    path = tmp_path / "f.csv"
    path.write_bytes(content)
    assert propose_dialect(path) == Dialect(**expected)


# --- for any content -----------------------------------------------------------------------------

FIELD = st.text(st.sampled_from('ab1.,"\n ;é'), max_size=6)


def written(value: str) -> str:
    """A field as a careful writer writes it."""
    needs_quotes = any(mark in value for mark in ',"\n') or value != value.strip()
    return '"' + value.replace('"', '""') + '"' if needs_quotes else value


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=12))
def test_what_a_careful_writer_wrote_is_read_back(tmp_path, rows):
    """Every field comes back, whatever it holds; an empty one as missing; no row is lost."""
    lines = [f"k,{written(a)},{written(b)}" for a, b in rows]
    content = ("key,a,b\n" + "\n".join(lines) + "\n").encode()
    loaded, kept = load(tmp_path, content, types={"a": "VARCHAR", "b": "VARCHAR"})
    assert [row[1:] for row in kept] == [(a or None, b or None) for a, b in rows]
    assert loaded.files[0].num_rows_in == len(rows)
    assert loaded.rejects == []


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=st.binary(max_size=60).filter(lambda b: b"\0" not in b))
def test_arbitrary_bytes_are_refused_or_every_record_is_accounted_for(tmp_path, body):
    """No content makes rows vanish: kept + rejected = the records that Python's reader finds."""
    try:
        loaded, kept = load(tmp_path, b"a,b\n" + body)
    except (DataError, SchemaError):
        return
    text = io.StringIO(body.decode(), newline="")
    records = [row for row in csv.reader(text) if row]
    assert len(kept) + len(loaded.rejects) == loaded.files[0].num_rows_in == len(records)


def test_a_column_without_a_value_in_the_first_rows_is_typed_by_the_later_ones(tmp_path):
    rows = "".join(f"{i},,\n" for i in range(25_000)) + "25000,2.5,2024-01-31\n"
    loaded, _ = load(tmp_path, f"id,late,day\n{rows}".encode())
    assert loaded.types == {"id": "BIGINT", "late": "DOUBLE", "day": "DATE"}
