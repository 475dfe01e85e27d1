"""``headrace predict``: every row of a file gets its own prediction, or the file one message."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from headrace.commands.predict import predict_file
from headrace.errors import ConfigError, DataError, IntegrityError, SchemaError
from headrace.models.package import Package, load_package
from tests.published_case import Case, make_case, raw_rows

HEADER = "distance,seats,is_weekend,carrier,gate\n"
ROW = "100.5,120,true,AA,3\n"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("predicted"))


@pytest.fixture(scope="module")
def package(case: Case) -> Package:
    return load_package(case.package)


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def predicted(case: Case, source: Path, **options) -> pa.Table:
    out = source.with_name("out.parquet")
    told = predict_file(source, out, model=case.package, **options)
    table = pq.read_table(out)
    assert told.num_rows == table.num_rows
    return table


def close(a: pa.Table, b: pa.Table) -> bool:
    """Whether predictions are equal, to the rounding of one batch or another."""
    return a.column_names == b.column_names and all(
        np.allclose(x.to_numpy(), y.to_numpy(), rtol=1e-12, atol=1e-12)
        if pa.types.is_floating(x.type)
        else x.to_pylist() == y.to_pylist()
        for x, y in zip(a.columns, b.columns, strict=True)
    )


def test_csv_and_parquet_predict_what_memory_predicts(case, package, tmp_path) -> None:
    """The same rows by three ways, over several batches, in their order."""
    rows = raw_rows(40_000)
    pq.write_table(rows, tmp_path / "rows.parquet")
    pacsv.write_csv(rows, tmp_path / "rows.csv")
    expected = package.predict(rows)

    assert close(predicted(case, tmp_path / "rows.parquet"), expected)
    assert close(predicted(case, tmp_path / "rows.csv"), expected)


def test_csv_out_has_the_same_predictions(case, package, tmp_path) -> None:
    """The output's suffix chooses its format."""
    rows = raw_rows(30)
    pq.write_table(rows, tmp_path / "rows.parquet")
    predict_file(tmp_path / "rows.parquet", tmp_path / "out.csv", model=case.package)
    text = pa.csv.ConvertOptions(column_types={"late": pa.string()})
    found = pacsv.read_csv(tmp_path / "out.csv", convert_options=text)

    assert close(found, package.predict(rows))


def test_what_was_done_is_told(case, tmp_path) -> None:
    """Rows, files, targets and the package that scored them; progress on the way."""
    pq.write_table(raw_rows(20_000), tmp_path / "rows.parquet")
    heard: list[int] = []
    told = predict_file(
        tmp_path / "rows.parquet", tmp_path / "o.csv", model=case.package, on_rows=heard.append
    )

    assert str(told).startswith("20,000 rows of ")
    assert case.published.digest[:16] in str(told)
    assert heard == [16_384, 20_000]


def test_keys_are_handed_through_as_they_are(case, tmp_path) -> None:
    """A key above 2^53, or with leading zeros, comes out as it went in."""
    source = written(
        tmp_path / "rows.csv", f"flight,{HEADER}0009007199254740993,{ROW}9007199254740993,{ROW}"
    )
    found = predicted(case, source)
    assert found["flight"].to_pylist() == ["0009007199254740993", "9007199254740993"]

    rows = raw_rows(2).append_column("flight", pa.array([2**62 + 1, 7]))
    pq.write_table(rows, tmp_path / "rows.parquet")
    assert predicted(case, tmp_path / "rows.parquet")["flight"].to_pylist() == [2**62 + 1, 7]


def test_columns_are_found_by_name(case, tmp_path) -> None:
    """Other order, further columns with anything in them, a byte order mark, Windows lines."""
    plain = predicted(case, written(tmp_path / "a.csv", HEADER + ROW))
    moved = predicted(
        case,
        written(
            tmp_path / "b.csv",
            b"\xef\xbb\xbfnote,gate,carrier,is_weekend,seats,distance\r\n"
            b'"two\r\nlines, and a comma",3,AA,true,120,100.5\r\n',
        ),
    )

    assert close(moved, plain)


@pytest.mark.parametrize(
    ("row", "other"),
    [
        ("100.5,120,TRUE,AA,3", ROW),
        ("100.5,120.0,1,AA,3.0", ROW),
        (' 100.5 ,"120", t, AA ,3', ROW),
        ("1.005e2,+120,yes,AA,03", ROW),
        ("NA,120,true,AA,3", ",120,true,AA,3"),
        ("nan,NULL,?,NA,n/a", ",,,,"),
    ],
)
def test_spellings_of_one_value_predict_the_same(case, tmp_path, row: str, other: str) -> None:
    """Blanks, quotes, pandas' 120.0 and marks for missing values."""
    one = predicted(case, written(tmp_path / "a.csv", f"{HEADER}{row}\n"))
    two = predicted(case, written(tmp_path / "b.csv", HEADER + other))

    assert close(one, two)


def test_a_mark_that_is_a_label_is_a_label(case, package, tmp_path, monkeypatch) -> None:
    """If train rows had the carrier NA (Namibia's), NA in a file is it and not missing."""
    from headrace.data.rowfile import read_rows

    source = written(tmp_path / "a.csv", f"{HEADER}1,2,true,NA,3\n")
    (known,) = read_rows(source, package.inputs, labels={"carrier": ("AA", "NA")})
    (unknown,) = read_rows(source, package.inputs, labels={"carrier": ("AA",)})

    assert known["carrier"].to_pylist() == ["NA"]
    assert unknown["carrier"].to_pylist() == [None]


def test_a_header_alone_gives_no_rows(case, package, tmp_path) -> None:
    """No rows in, no rows out, with the columns."""
    found = predicted(case, written(tmp_path / "a.csv", HEADER))

    assert found.num_rows == 0
    assert found.column_names == package.output_schema.names


def test_tabs_and_other_delimiters(case, tmp_path) -> None:
    """.tsv means tabs; another delimiter is said."""
    plain = predicted(case, written(tmp_path / "a.csv", HEADER + ROW))
    tabs = predicted(case, written(tmp_path / "a.tsv", (HEADER + ROW).replace(",", "\t")))
    semicolons = written(tmp_path / "b.csv", (HEADER + ROW).replace(",", ";"))

    assert close(tabs, plain)
    assert close(predicted(case, semicolons, delimiter=";"), plain)
    with pytest.raises(DataError, match=r"b\.csv:1: the header .* has no ','.*--delimiter ';'"):
        predicted(case, semicolons)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("\n\n", "has no header line"),
        (HEADER + ROW + "1,2,true,AA\n", "a.csv:3: 4 fields instead of 5"),
        (HEADER + ROW + '\n"1\n",2,true,AA,3,4\n', "a.csv:4: 6 fields instead of 5"),
        (HEADER + ROW + "1,many,true,AA,3\n", "a.csv:3: column 'seats' holds 'many', which is no"),
        (HEADER + ROW + "1,2.5,true,AA,3\n", "a.csv:3: column 'seats' holds '2.5'"),
        (HEADER + '1,2,true,"A\nA",3\nx,2,true,AA,3\n', "a.csv:4: column 'distance' holds 'x'"),
        (HEADER + ROW + "1,2,maybe,AA,3\n", "a.csv:3: column 'is_weekend' holds 'maybe'"),
        (HEADER + ROW + '1,2,true,"AA,3\n', "a quote is opened and not closed"),
        (HEADER + ROW + "1,99999999999999999999,true,AA,3\n", "a.csv:3: column 'seats' holds '999"),
        ((HEADER + ROW).encode() + b"1,2,true,\xe9,3\n", "a.csv:3: is not UTF-8 text"),
        ((HEADER + ROW).encode() + b"1,2,true,\0,3\n", "a.csv:3: holds a NUL byte"),
        ((HEADER + ROW).encode("utf-16"), "is UTF-16 text"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(case, tmp_path, text, told: str) -> None:
    """One message with the file, the line and what is there; nothing is written."""
    source = written(tmp_path / "a.csv", text)

    with pytest.raises(DataError) as refused:
        predict_file(source, tmp_path / "out.csv", model=case.package)
    assert told in str(refused.value)
    assert str(source) in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_missing_column_names_file_and_nearest(case, tmp_path, suffix: str) -> None:
    """A renamed header is no wrong order."""
    rows = raw_rows(3).rename_columns(["distanse", "seats", "is_weekend", "carrier", "gate"])
    source = tmp_path / f"a.{suffix}"
    pq.write_table(rows, source) if suffix == "parquet" else pacsv.write_csv(rows, source)

    with pytest.raises(SchemaError, match=rf"a\.{suffix}: .*\['distance'\].*name: distanse"):
        predict_file(source, tmp_path / "out.csv", model=case.package)


def test_a_doubled_header_is_refused(case, tmp_path) -> None:
    """Which of the two columns is meant is not ours to guess."""
    source = written(tmp_path / "a.csv", "gate," + HEADER + "1," + ROW)

    with pytest.raises(SchemaError, match=r"columns \['gate'\] twice"):
        predict_file(source, tmp_path / "out.csv", model=case.package)


def test_a_wrong_type_in_parquet_names_file_and_column(case, tmp_path) -> None:
    """Parquet has types: text is not silently read as a number."""
    rows = raw_rows(3)
    rows = rows.set_column(1, "seats", pa.array(["1", "2", "3"]))
    pq.write_table(rows, tmp_path / "a.parquet")

    with pytest.raises(SchemaError, match=r"a\.parquet: .*'seats' should be int64, but is string"):
        predict_file(tmp_path / "a.parquet", tmp_path / "out.csv", model=case.package)


def test_a_damaged_parquet_is_refused(case, tmp_path) -> None:
    """Truncated, and no Parquet at all."""
    pq.write_table(raw_rows(100), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    for text in (data[:-40], b"no parquet"):
        source = written(tmp_path / "b.parquet", text)
        with pytest.raises(DataError, match=r"b\.parquet is not a whole Parquet file"):
            predict_file(source, tmp_path / "out.csv", model=case.package)


@pytest.mark.parametrize(
    ("source", "out", "error", "told"),
    [
        ("rows.xlsx", "out.csv", ConfigError, r"neither \.csv, \.tsv nor \.parquet"),
        ("rows.csv", "out.txt", ConfigError, r"neither \.csv nor \.parquet"),
        ("rows.csv", "rows.csv", ConfigError, "is the file to read"),
        ("absent.csv", "out.csv", DataError, "does not exist"),
    ],
)
def test_files_that_cannot_be_meant(case, tmp_path, source, out, error, told) -> None:
    """Refused before anything is read or written."""
    written(tmp_path / "rows.csv", HEADER + ROW)
    written(tmp_path / "rows.xlsx", "x")

    with pytest.raises(error, match=told):
        predict_file(tmp_path / source, tmp_path / out, model=case.package)
    assert (tmp_path / "rows.csv").read_text() == HEADER + ROW


def test_without_a_package_the_remedy_is_named(tmp_path) -> None:
    """Nothing published yet."""
    source = written(tmp_path / "rows.csv", HEADER + ROW)

    with pytest.raises(IntegrityError, match="run `headrace repro`"):
        predict_file(source, tmp_path / "out.csv", model=tmp_path / "publish")


def test_a_failure_leaves_an_older_output_as_it_was(case, tmp_path) -> None:
    """The third batch is bad: the file that was there stays whole."""
    source = written(tmp_path / "a.csv", HEADER + ROW * 40_000 + "1,x,true,AA,3\n")
    out = written(tmp_path / "out.csv", "older")

    with pytest.raises(DataError, match=r"a\.csv:40002: "):
        predict_file(source, out, model=case.package)
    assert out.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "out.csv"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_memory_does_not_grow_with_the_file(case, tmp_path, suffix: str) -> None:
    """Four times the rows, the same peak of held memory within a sixth."""
    program = (
        "import os, sys; from pathlib import Path\n"
        "from headrace.commands.predict import predict_file\n"
        "from headrace.memory import MemoryWatch\n"
        "with MemoryWatch(os.getpid(), budget_bytes=1 << 62, on_excess=print) as watch:\n"
        "    predict_file(Path(sys.argv[1]), Path(sys.argv[2]), model=Path(sys.argv[3]))\n"
        "print(watch.peak_bytes)"
    )
    peaks = []
    for num_rows in (400_000, 1_600_000):
        rows = raw_rows(10_000)
        rows = rows.append_column("unasked", pa.array(["x" * 200] * 10_000))
        rows = pa.concat_tables([rows] * (num_rows // 10_000))
        source = tmp_path / f"a.{suffix}"
        if suffix == "parquet":
            pq.write_table(rows, source, row_group_size=100_000)
        else:
            pacsv.write_csv(rows, source)
        command = [sys.executable, "-c", program, str(source), str(tmp_path / "out.parquet")]
        done = subprocess.run(
            [*command, str(case.package)], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))

    assert peaks[1] < 7 / 6 * peaks[0], peaks
