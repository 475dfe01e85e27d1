"""Record batches of any table: all rows, exact values, flat memory, one clear refusal."""

import gzip
import os
import subprocess
import sys
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.data.batches import batches
from headrace.errors import DataError, IntegrityError, SchemaError
from tests.encode_tables import example_columns, write_table


def read(path: Path | str, **kwargs: object) -> pa.Table:
    return pa.Table.from_batches(batches(path, **kwargs))


def csv_file(folder: Path, content: str | bytes, name: str = "x.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def types(table: pa.Table) -> dict[str, str]:
    return {field.name: str(field.type) for field in table.schema}


# --- stage tables, Parquet, Arrow


def test_a_stages_table_gives_its_splits_one_after_the_other(tmp_path):
    splits = {name: example_columns(250) for name in ("train", "test")}
    table = write_table(tmp_path / "reduce", splits)

    both = list(batches(table.folder, batch_rows=100, columns=["row_id", "seats"]))
    assert [row_id.as_py() for batch in both for row_id in batch["row_id"]] == list(range(500))
    assert max(batch.num_rows for batch in both) == 100
    assert both[0].schema.names == ["row_id", "seats"]
    only = list(batches(table.folder, split="test", columns=["row_id"]))
    assert only[0]["row_id"][0].as_py() == 250

    with pytest.raises(SchemaError, match="'tset' is not a split; nearest name: test"):
        batches(table.folder, split="tset")
    with pytest.raises(SchemaError, match="nearest name: seats"):
        list(batches(table.folder, columns=["seat"]))


def test_a_damaged_stage_table_is_refused(tmp_path):
    table = write_table(tmp_path / "reduce", {"train": example_columns(50)})
    path = table.files("train")[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="damaged"):
        batches(table.folder)


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / "parts"
    (folder / "deep").mkdir(parents=True)
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), folder / "1.parquet")
    pq.write_table(pa.table({"a": [3], "b": ["z"]}), folder / "deep" / "2.parquet")
    (folder / "_tmp.parquet").write_bytes(b"unfinished")
    (folder / ".new-3.parquet.1").write_bytes(b"unfinished")
    return folder


def test_parquet_files_folders_and_globs(parts, monkeypatch):
    assert read(parts / "1.parquet")["a"].to_pylist() == [1, 2]
    assert read(parts)["a"].to_pylist() == [1, 2, 3]
    assert read(str(parts / "*.parquet"))["a"].to_pylist() == [1, 2]
    assert read(parts, columns=["b", "a"]).column_names == ["b", "a"]
    monkeypatch.chdir(parts)
    assert read("**/*.parquet")["a"].to_pylist() == [1, 2, 3]


def test_files_of_other_types_are_never_read_as_one_table(parts):
    pq.write_table(pa.table({"a": [2.7], "b": ["x"]}), parts / "3.parquet")
    pq.write_table(pa.table({"a": [2], "c": ["x"]}), parts / "4.parquet")
    with pytest.raises(SchemaError) as error:
        batches(parts)
    for words in ("1.parquet", "3.parquet (a is double, not int64)", "lacks ['b']", "also ['c']"):
        assert words in str(error.value)


def test_columns_that_are_not_there_name_the_nearest(parts):
    pq.write_table(pa.table({"distance": [1]}), parts / "x.pq")
    with pytest.raises(SchemaError, match=r"lacks the columns \['distanse'\]; nearest name: dist"):
        batches(parts / "x.pq", columns=["distanse"])


def test_what_is_no_parquet_is_named(parts):
    (parts / "1.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"1\.parquet cannot be read as Parquet"):
        batches(parts / "1.parquet")


@pytest.mark.parametrize(
    "name", ["gone.parquet", "gone.csv", "gone.arrow", "gone*.parquet", "gone"]
)
def test_a_path_that_leads_nowhere_is_named(tmp_path, name):
    with pytest.raises(DataError, match="gone"):
        batches(tmp_path / name)


def test_a_split_of_something_without_splits_is_refused(parts):
    with pytest.raises(SchemaError, match="split='train'"):
        batches(parts, split="train")


@pytest.mark.parametrize("is_stream", [False, True])
def test_arrow_files_and_streams(tmp_path, is_stream):
    table = pa.table({"a": range(250), "b": ["x"] * 250})
    path = tmp_path / "x.arrow"
    new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=120)
    assert read(path).equals(table)
    assert [b.num_rows for b in batches(path, batch_rows=100)] == [100, 20, 100, 20, 10]
    assert read(path, columns=["b"]).column_names == ["b"]


def test_what_is_no_arrow_is_named(tmp_path):
    with pytest.raises(DataError, match=r"x\.arrow cannot be read as Arrow IPC"):
        batches(csv_file(tmp_path, "a,b\n1,2\n", "x.arrow"))


# --- CSV


def test_csv_types_are_those_that_keep_every_value(tmp_path):
    path = csv_file(
        tmp_path,
        "i,big,zip,f,late,flag,day,bad,when,na,empty,neg,exp,huge,mixed\n"
        "1,9007199254740993,00123,1,1,true,2024-02-28,2024-02-28,2024-02-28 10:00:00,NA,,-0,1e3,"
        "1e400,1\n"
        "-20,,00456,,2,FALSE,2024-02-29,2024-02-30,2024-02-28T10:00:00.25,3,,0,2.5,1,x\n",
    )
    table = read(path)
    assert types(table) == {
        "i": "int64", "big": "int64", "zip": "string", "f": "int64", "late": "int64",
        "flag": "bool", "day": "date32[day]", "bad": "string", "when": "timestamp[us]",
        "na": "string", "empty": "string", "neg": "double", "exp": "double", "huge": "string",
        "mixed": "string",
    }  # fmt: skip
    rows = table.to_pylist()
    assert rows[0]["big"] == 9007199254740993
    assert rows[1]["big"] is None
    assert rows[0]["zip"] == "00123"
    assert rows[0]["na"] == "NA"
    assert [row["empty"] for row in rows] == [None, None]
    assert rows[1]["day"] == date(2024, 2, 29)
    assert rows[1]["when"] == datetime(2024, 2, 28, 10, 0, 0, 250_000)
    assert np.signbit(rows[0]["neg"])


def test_a_value_far_down_decides_the_type_of_all(tmp_path):
    """A reader that infers from the first rows would make 2.7 an error, or 3."""
    lines = ["a,b"] + [f"{i},{i}" for i in range(300_000)] + ["2.7,x"]
    table = read(csv_file(tmp_path, "\n".join(lines)))
    assert types(table) == {"a": "double", "b": "string"}
    assert table["a"][-1].as_py() == 2.7
    assert table.num_rows == 300_001


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.none()
            | st.integers(-(2**70), 2**70).map(str)
            | st.sampled_from(["007", "-0", "+1"]),
            st.none()
            | st.floats(allow_nan=False).map(str)
            | st.sampled_from(["1.", ".5", "1e5", "nan", "inf", "0x1", "1_0"]),
            st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_no_value_of_a_csv_changes(tmp_path_factory, rows):
    quoted = [["" if v is None else '"' + v.replace('"', '""') + '"' for v in row] for row in rows]
    plain = [[a.replace('"', ""), b.replace('"', ""), c] for a, b, c in quoted]
    text = "a,b,c\n" + "".join(",".join(row) + "\n" for row in plain)
    folder = tmp_path_factory.mktemp("csv")
    table = read(csv_file(folder, text))

    assert table.num_rows == len(rows)
    for name, written in zip("abc", zip(*rows, strict=True), strict=True):
        for value, was in zip(table[name].to_pylist(), written, strict=True):
            if isinstance(value, float):
                assert value == float(was) and np.signbit(value) == was.startswith("-")  # noqa: PT018
            elif isinstance(value, int):
                assert str(value) == was
            elif not isinstance(value, date):
                assert value == was


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty"]),
        ("a,b\n1,2\n3\n", ["Expected 2 columns, got 1"]),
        ("a,b\n1,2,3\n", ["Expected 2 columns, got 3"]),
        ('a,b\n1,"2\n3,4\n', ["odd number of quotes", "close it"]),
        ("a,a\n1,2\n", ["['a'] more than once"]),
        ("a,,b\n1,2,3\n", ["no name for column 2"]),
        ("a;b\n1;2\n", ["semicolon", "delimiter="]),
        (b"a,b\n1,\xe9\n", ["not UTF-8"]),
        (b"a,b\n" + b"1,2\n" * 9000 + b"1,\xe9\n", ["invalid UTF8"]),
        (b"\xe9,b\n1,2\n", ["not UTF-8"]),
        ("a,b\n1,2\n".encode("utf-16"), ["not UTF-8"]),
        ("a,b\n1," + "x" * 3_000_000 + "\n", ["record is longer than 1.0 MiB"]),
    ],
)
def test_a_csv_that_is_not_whole_is_refused(tmp_path, content, words):
    path = csv_file(tmp_path, content)
    with pytest.raises(DataError) as error:
        batches(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_forms_a_csv_may_take(tmp_path):
    assert read(csv_file(tmp_path, b"\xef\xbb\xbfa,b\r\n1,2\r\n")).to_pylist() == [{"a": 1, "b": 2}]
    assert read(csv_file(tmp_path, "a,b\n1,2")).to_pylist() == [{"a": 1, "b": 2}]
    assert read(csv_file(tmp_path, 'a,b\n1,"x\ny ""z"""\n'))["b"].to_pylist() == ['x\ny "z"']
    assert read(csv_file(tmp_path, "a;b\n1;2\n"), delimiter=";").to_pylist() == [{"a": 1, "b": 2}]
    assert read(csv_file(tmp_path, "a\n1\n\n3\n"))["a"].to_pylist() == [1, None, 3]
    assert read(csv_file(tmp_path, 'a,b\n"",\n')).to_pylist() == [{"a": "", "b": None}]
    assert list(batches(csv_file(tmp_path, "a,b\n"))) == []
    packed = csv_file(tmp_path, gzip.compress(b"a,b\n1,x\n"), "x.csv.gz")
    assert read(packed, columns=["b"]).to_pylist() == [{"b": "x"}]


def test_line_ends_within_quotes_survive_the_ends_of_blocks(tmp_path):
    text = "one\ntwo\r\nthree, four " * 3
    rows = "".join(f'{i},"{text}"\n' for i in range(40_000))  # 3 MiB, read in blocks of 1
    table = read(csv_file(tmp_path, "a,b\n" + rows))
    assert table["a"].to_pylist() == list(range(40_000))
    assert table["b"].unique().to_pylist() == [text]


# --- memory

_MEASURE = """
import os, sys
from headrace.data.batches import batches
from headrace.memory import MemoryWatch, held_bytes
num_rows = 0
with MemoryWatch(os.getpid(), budget_bytes=1 << 50, on_excess=print, interval_s=0.005) as watch:
    for batch in batches(sys.argv[1]):
        num_rows += batch.num_rows
print(num_rows, watch.peak_bytes)
"""


def write_narrow(path: Path, num_rows: int, form: str) -> None:
    """A key and a text, written in pieces; Parquet in one row group, the hardest to stream."""
    schema = pa.schema({"a": pa.int64(), "b": pa.string()})
    pieces = (
        pa.table(
            {
                "a": np.arange(start, min(start + 500_000, num_rows)),
                "b": pa.array(np.arange(start, min(start + 500_000, num_rows)) % 1000).cast(
                    "string"
                ),
            },
            schema=schema,
        )
        for start in range(0, num_rows, 500_000)
    )
    if form == "parquet":
        with pq.ParquetWriter(path, schema) as writer:
            for piece in pieces:
                writer.write_table(piece)
    elif form == "arrow":
        with pa.ipc.new_file(str(path), schema) as writer:
            for piece in pieces:
                writer.write_table(piece, max_chunksize=100_000)
    else:
        import pyarrow.csv as pa_csv

        with pa_csv.CSVWriter(path, schema) as writer:
            for piece in pieces:
                writer.write_table(piece)


def measure(path: Path) -> tuple[int, int]:
    """Rows read in a fresh process, and the most bytes that it held."""
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    num_rows, peak = result.stdout.split()
    return int(num_rows), int(peak)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "slack_mib"), [("parquet", 8), ("arrow", 8), ("csv", 40)])
def test_memory_is_the_same_for_one_and_ten_million_rows(tmp_path, form, slack_mib):
    """Of a CSV Arrow reads 32 MiB ahead, which the smaller file does not fill."""
    peaks = []
    for num_rows in (1_000_000, 10_000_000):
        path = tmp_path / f"{num_rows}.{form}"
        write_narrow(path, num_rows, form)
        found, peak = measure(path)
        path.unlink()
        assert found == num_rows
        peaks.append(peak)
    assert peaks[1] <= 1.1 * peaks[0] + (slack_mib << 20), peaks
