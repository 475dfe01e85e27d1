"""Stage ``reduce``: the same rows, narrower, streamed, and the proof beside them."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from headrace.data.ranges import COUNTED_ROWS, ColumnScan
from headrace.data.table import open_table
from headrace.errors import IntegrityError, ResourceError, SchemaError
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.schema import Role, read_contract
from headrace.stages.reduce import Reduced, ReduceParams, reduce
from tests.encode_tables import write_table

ROLES: dict[str, Role] = {
    "id": "key",
    "seats": "numeric",
    "wind": "numeric",
    "exact": "numeric",
    "carrier": "category",
    "remark": "text",
    "when": "time",
    "delay": "target",
    "late": "target",
}


def columns(num_rows: int, *, seed: int, most_seats: int = 100) -> dict[str, pa.Array]:
    """Wide columns as an extraction writes them."""
    rng = np.random.default_rng(seed)
    delay = np.where(rng.random(num_rows) < 0.1, np.nan, rng.integers(-60, 900, num_rows))
    return {
        "id": pa.array(rng.integers(2**53, 2**62, num_rows)),
        "seats": pa.array(rng.integers(0, most_seats, num_rows)),
        "wind": pa.array(rng.normal(size=num_rows)),
        "exact": pa.array(rng.normal(size=num_rows).astype(np.float32).astype(np.float64)),
        "carrier": pa.array(rng.choice(["AA", "UA", "Delta", None], num_rows).tolist()),
        "remark": pa.array([f"remark {i}" for i in range(num_rows)]),
        "when": pa.array(np.arange(num_rows), pa.timestamp("us")),
        "delay": pa.array(delay, from_pandas=True),
        "late": pa.array(delay > 15),
    }


@pytest.fixture
def source(tmp_path):
    splits = {"train": columns(700, seed=1), "test": columns(90, seed=2, most_seats=60_000)}
    return write_table(tmp_path / "extract", splits, roles=ROLES)


def run(source, out, *, recorder: MemoryRecorder | None = None, **params: object) -> Reduced:
    return reduce(
        source.folder,
        out,
        ReduceParams.model_validate(params),
        resources=Resources(),
        recorder=recorder or MemoryRecorder(),
    )


def rows_of(table, split: str) -> pa.Table:
    return pa.Table.from_batches(table.batches(split)).unify_dictionaries()


def test_every_row_comes_back_in_order_and_every_value_exact(source, tmp_path):
    run(source, tmp_path / "reduce", row_group_bytes=4096)
    reduced = open_table(tmp_path / "reduce")

    for split in ("train", "test"):
        before, after = rows_of(source, split), rows_of(reduced, split)
        assert after.column_names == before.column_names
        for name in before.column_names:
            back = after[name].cast(before[name].type)
            assert back.to_pylist() == before[name].to_pylist(), name
    assert reduced.files("valid") == []


def test_the_type_holds_for_every_split_and_stands_in_the_contract(source, tmp_path):
    run(source, tmp_path / "reduce")
    expected = {
        "id": "int64",
        "seats": "uint16",  # the train rows alone would fit uint8
        "wind": "double",
        "exact": "float",
        "carrier": "dictionary<values=string, indices=int8, ordered=0>",
        "remark": "string",
        "when": "timestamp[us]",
        "delay": "int16",
        "late": "bool",
    }
    contract = read_contract(tmp_path / "reduce")
    assert {column.name: column.dtype for column in contract.columns} == expected
    for split in ("train", "test"):
        schema = pq.read_schema(tmp_path / "reduce" / split / "part-00000.parquet")
        assert {name: str(schema.field(name).type) for name in expected} == expected
        assert schema.metadata[b"headrace.contract"].decode() == contract.digest
    before = source.contract.model_dump(exclude={"columns": {"__all__": {"dtype"}}})
    assert contract.model_dump(exclude={"columns": {"__all__": {"dtype"}}}) == before


def test_the_certificate_says_what_it_cost(source, tmp_path):
    run(source, tmp_path / "reduce")
    plan = json.loads((tmp_path / "reduce" / "plan.json").read_text())
    seats, delay, key = (plan["columns"][name] for name in ("seats", "delay", "id"))
    both = [*rows_of(source, "train")["seats"], *rows_of(source, "test")["seats"]]

    assert (seats["low"], seats["high"]) == (
        min(v.as_py() for v in both),
        max(v.as_py() for v in both),
    )
    assert seats["worst_rel_error"] == 0.0
    assert (seats["bytes_before"], seats["bytes_after"]) == (790 * 8, 790 * 2)
    assert delay["nulls"] == sum(rows_of(source, s)["delay"].null_count for s in ("train", "test"))
    assert key["key_collisions"] == 0
    assert isinstance(key["high"], str)  # above 2^53 JSON readers round
    assert plan["rows"] == 790
    assert plan["bytes_after"] < 0.75 * plan["bytes_before"]


def test_bytes_before_count_the_texts(source, tmp_path):
    reduced = run(source, tmp_path / "reduce")
    remark = next(c for c in reduced.columns if c.name == "remark")
    texts = sum(len(f"remark {i}") for n in (700, 90) for i in range(n))
    assert remark.bytes_before == texts + 4 * 790


def test_what_was_done_is_printed_per_column_and_in_total(source, tmp_path):
    recorder = MemoryRecorder()
    reduced = run(source, tmp_path / "reduce", recorder=recorder)
    lines = str(reduced).splitlines()
    assert lines[0].split() == ["column", "from", "to", "bytes", "before", "after"]
    assert next(line for line in lines if line.startswith("seats")).split()[1:3] == [
        "int64",
        "uint16",
    ]
    assert "category (int8 codes)" in str(reduced)
    assert lines[-2].startswith("in memory")
    assert "790 rows" in lines[-2]
    assert str(reduced) in recorder.notes[0]
    assert recorder.last_progress == (1580, 1580, "rows", "writing test")


def test_a_column_to_know_about_is_warned_of(tmp_path):
    table = {
        **columns(50, seed=1),
        "wind": pa.array([1.0, math.inf] * 25),
        "seats": pa.nulls(50, pa.int64()),
        "exact": pa.array([1.0] * 50),
    }
    source = write_table(tmp_path / "extract", {"train": table}, roles=ROLES)
    recorder = MemoryRecorder()
    run(source, tmp_path / "reduce", recorder=recorder)
    for words in ("wind holds infinite", "seats has no value", "exact is constant"):
        assert words in recorder.warnings[0]


def test_the_same_input_gives_the_same_bytes_however_it_was_cut(source, tmp_path):
    run(source, tmp_path / "one")
    splits = {"train": columns(700, seed=1), "test": columns(90, seed=2, most_seats=60_000)}
    cut = write_table(tmp_path / "cut", splits, roles=ROLES, row_group_rows=37)
    assert cut.digest != source.digest
    run(cut, tmp_path / "two")
    for path in (p for p in (tmp_path / "one").rglob("*") if p.is_file()):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes(), path.name


def test_row_groups_go_by_bytes_and_texts_stay_codes_in_each(source, tmp_path):
    run(source, tmp_path / "reduce", row_group_bytes=8192)
    footer = pq.read_metadata(tmp_path / "reduce" / "train" / "part-00000.parquet")
    sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    assert len(set(sizes[:-1])) == 1
    assert 4096 < footer.row_group(0).total_byte_size < 16384
    names = footer.schema.to_arrow_schema().names
    for i in range(footer.num_row_groups):
        carrier = footer.row_group(i).column(names.index("carrier"))
        assert "RLE_DICTIONARY" in carrier.encodings
        assert "RLE_DICTIONARY" not in footer.row_group(i).column(names.index("wind")).encodings
        assert carrier.compression == "LZ4"


def test_numbers_that_repeat_are_stored_as_codes_too(tmp_path):
    table = columns(700, seed=1, most_seats=5)
    source = write_table(tmp_path / "extract", {"train": table}, roles=ROLES)
    run(source, tmp_path / "reduce")
    group = pq.read_metadata(tmp_path / "reduce" / "train" / "part-00000.parquet").row_group(0)
    chunks = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert "RLE_DICTIONARY" in chunks["seats"].encodings
    assert "RLE_DICTIONARY" not in chunks["id"].encodings


def test_what_repeats_does_not_hang_on_how_rows_come_in_batches():
    values = pa.array([i % 9 for i in range(COUNTED_ROWS)] + list(range(500)))
    for step in (COUNTED_ROWS // 3, COUNTED_ROWS, len(values)):
        scan = ColumnScan("x", values.type)
        for start in range(0, len(values), step):
            scan.add(values[start : start + step])
        assert scan.result().rows_per_value == COUNTED_ROWS / 9


def test_long_numbers_that_do_not_repeat_are_stored_as_differences(source, tmp_path):
    run(source, tmp_path / "reduce")
    group = pq.read_metadata(tmp_path / "reduce" / "train" / "part-00000.parquet").row_group(0)
    chunks = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    differences = {n for n, chunk in chunks.items() if "DELTA_BINARY_PACKED" in chunk.encodings}
    assert differences == {"row_id", "id", "when"}


def test_only_columns_with_nulls_may_hold_them(tmp_path):
    """As an integer a NaN is a null; a null in the test rows alone counts for all files."""
    splits = {"train": columns(70, seed=1), "test": columns(90, seed=2)}
    splits["test"]["seats"] = pa.array([None, *range(89)])
    splits["train"]["delay"] = pa.array(np.array([np.nan, *range(69)]))
    splits["test"]["delay"] = pa.array(np.arange(90.0))
    run(write_table(tmp_path / "wide", splits, roles=ROLES), tmp_path / "reduce")
    for split in splits:
        schema = pq.read_schema(tmp_path / "reduce" / split / "part-00000.parquet")
        nullable = {field.name for field in schema if field.nullable}
        assert nullable == {"fold", "seats", "carrier", "delay"}


def test_a_granted_error_and_overrides_are_followed(source, tmp_path):
    run(
        source,
        tmp_path / "reduce",
        max_rel_error=1e-6,
        overrides={"exact": "float16", "seats": "keep"},
    )
    plan = json.loads((tmp_path / "reduce" / "plan.json").read_text())["columns"]
    assert plan["wind"]["to"] == "float"
    assert 0 < plan["wind"]["worst_rel_error"] <= 1e-6
    assert plan["exact"]["to"] == "halffloat"
    assert plan["exact"]["worst_rel_error"] > 1e-6
    assert plan["seats"]["to"] == "int64"
    assert plan["delay"]["to"] == "int16"


def test_more_categories_than_allowed_stay_texts(source, tmp_path):
    run(source, tmp_path / "reduce", max_categories=2)
    assert read_contract(tmp_path / "reduce").column("carrier").dtype == "string"


def test_a_reduced_table_reduces_to_itself(source, tmp_path):
    run(source, tmp_path / "one")
    run(open_table(tmp_path / "one"), tmp_path / "two")
    assert read_contract(tmp_path / "one") == read_contract(tmp_path / "two")
    for split in ("train", "test"):
        name = f"{split}/part-00000.parquet"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_unknown_column_in_overrides_names_the_nearest(source, tmp_path):
    with pytest.raises(SchemaError, match=r"reduce\.overrides.*seat'.*nearest name: seats"):
        run(source, tmp_path / "reduce", overrides={"seat": "int8"})
    assert not (tmp_path / "reduce").exists()


def test_an_override_that_does_not_hold_leaves_nothing_behind(source, tmp_path):
    with pytest.raises(SchemaError, match="ask for uint16"):
        run(source, tmp_path / "reduce", overrides={"seats": "uint8"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["extract"]


def test_too_little_memory_is_said_with_the_figure(source, tmp_path):
    with pytest.raises(ResourceError, match=r"needs 288\.0 MiB.*leaves 100\.0 MiB"):
        reduce(
            source.folder,
            tmp_path / "reduce",
            ReduceParams(),
            resources=Resources(memory_budget=100 << 20),
            recorder=MemoryRecorder(),
        )


def test_a_damaged_source_is_refused(source, tmp_path):
    path = source.files("train")[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="damaged"):
        run(source, tmp_path / "reduce")


def test_splits_of_other_types_are_refused(tmp_path):
    other = {**columns(20, seed=2), "seats": pa.array([1.5] * 20)}
    source = write_table(
        tmp_path / "extract", {"train": columns(20, seed=1), "test": other}, roles=ROLES
    )
    with pytest.raises(SchemaError, match=r"test.part-00000\.parquet has the columns"):
        run(source, tmp_path / "reduce")


@pytest.mark.parametrize(
    "wrong",
    [{"max_rel_error": -1.0}, {"max_rel_error": "0"}, {"overrides": {"x": "float8"}}, {"a": 1}],
)
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(ValidationError):
        ReduceParams.model_validate(wrong)


_MEASURE = """
import os, sys
from pathlib import Path
from headrace.kernels.ranges import float_facts
from headrace.memory import MemoryWatch, held_bytes
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.stages.reduce import ReduceParams, reduce
import numpy
float_facts(numpy.ones(2))
start = held_bytes(os.getpid())
with MemoryWatch(os.getpid(), budget_bytes=1 << 50, on_excess=print, interval_s=0.01) as watch:
    reduce(Path(sys.argv[1]), Path(sys.argv[2]), ReduceParams(row_group_bytes=4 << 20),
           resources=Resources(), recorder=MemoryRecorder())
print(watch.peak_bytes - start)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(tmp_path):
    peaks = []
    for num_rows in (1_000_000, 4_000_000):  # fewer is too few row groups to reach the peak
        rng = np.random.default_rng(1)
        table = {
            "x": pa.array(rng.normal(size=num_rows)),
            "y": pa.array(rng.integers(0, 1000, num_rows)),
            "c": pc.cast(pa.array(rng.integers(0, 50, num_rows)), pa.string()),
        }
        roles: dict[str, Role] = {"x": "numeric", "y": "target", "c": "category"}
        folder = tmp_path / f"extract{num_rows}"
        write_table(folder, {"train": table}, roles=roles, row_group_rows=200_000)
        result = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(folder), str(tmp_path / f"out{num_rows}")],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        peaks.append(int(result.stdout))
    assert peaks[1] < 1.25 * peaks[0] + (16 << 20), peaks
