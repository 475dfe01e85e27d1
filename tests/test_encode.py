"""The stage encode: two passes, whole folders, the same bytes, one message for unusable data."""

import shutil
from collections import namedtuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from headrace.data.shards import open_shards
from headrace.errors import DataError, IntegrityError, ResourceError, SchemaError
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.schema import Target
from headrace.stages.encode import EncodeParams, encode
from headrace.storage import verify_folder
from tests.encode_tables import encode_example, example_columns, write_table


def run(folder, splits, **changed):
    recorder = MemoryRecorder()
    write_table(folder / "reduce", splits, **changed)
    encoded = encode(
        folder / "reduce",
        folder / "encode",
        EncodeParams(),
        resources=Resources(),
        recorder=recorder,
    )
    return encoded, recorder


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_it_encodes_train_valid_and_test_but_not_the_gap(tmp_path):
    folder, encoded, recorder = encode_example(tmp_path)

    assert dict(encoded.num_rows) == {"train": 500, "valid": 60, "test": 40}
    assert (encoded.num_numeric, encoded.num_categories) == (3, 2)
    assert not (folder / "gap").exists()
    assert str(encoded).startswith("encoded rows: train 500, valid 60, test 40; 3 numeric and 2")
    assert recorder.last_progress == (1100, 1100, "rows", "test")
    assert [(d["context"], d["rows"]) for d in recorder.datasets] == [
        ("train", 500),
        ("valid", 60),
        ("test", 40),
    ]
    shards = open_shards(folder, "valid")
    assert shards.read("row_id").tolist() == list(range(500, 560))
    assert (shards.read("fold") == -1).all()
    assert open_shards(folder, "train").read("fold").tolist() == [i % 5 for i in range(500)]


def test_two_runs_are_equal_byte_for_byte(tmp_path):
    first, _, _ = encode_example(tmp_path / "a")
    second, _, _ = encode_example(tmp_path / "b")

    assert content(first) == content(second)
    assert {"contract.json", "encoder.json", "encoder.safetensors", "shards.json"} <= set(
        verify_folder(first)
    )
    assert (first / "train" / "shard-00000" / "rows.bin").is_file()


def test_the_same_bytes_come_from_any_number_of_threads(tmp_path):
    """Many spans of row groups in three threads: statistics, codes and rows keep their bits."""
    write_table(tmp_path / "reduce", {"train": example_columns(30_000)}, row_group_rows=1000)
    contents = []
    for threads in (1, 2, 3):
        out = tmp_path / f"encode-{threads}"
        encode(
            tmp_path / "reduce",
            out,
            EncodeParams(shard_bytes=1 << 18),
            resources=Resources(threads=threads),
            recorder=MemoryRecorder(),
        )
        contents.append(content(out))

    assert contents[0] == contents[1] == contents[2]


def test_numbers_may_be_stored_as_float16_with_their_largest_error(tmp_path):
    """The certificate is the worst distance found by comparing every number again."""
    full, _, _ = encode_example(tmp_path / "full")
    half, _, _ = encode_example(tmp_path / "half", numeric="float16")
    schema = open_shards(half, "train").schema
    worst = np.zeros(3)
    for split in ("train", "valid", "test"):
        a = open_shards(full, split)
        b = open_shards(half, split)
        stored, exact = b.slice(0, b.num_rows), a.slice(0, a.num_rows)
        assert stored.numeric.dtype == np.float32
        assert np.array_equal(np.isnan(stored.numeric), np.isnan(exact.numeric))
        assert np.array_equal(stored.codes, exact.codes)
        worst = np.fmax(worst, np.nanmax(np.abs(stored.numeric - exact.numeric), axis=0))

    assert [error.name for error in schema.float16_errors] == ["distance", "seats", "is_weekend"]
    assert [error.worst for error in schema.float16_errors] == worst.tolist()
    assert 0 < worst[0] < 2e-3
    assert schema.rows.row_bytes < open_shards(full, "train").schema.rows.row_bytes
    assert open_shards(full, "train").schema.float16_errors == ()


def test_a_number_beyond_float16_is_refused(tmp_path):
    columns = {"x": pa.array([0.0] * 99_998 + [1.0, 1e9]), "y": pa.array(np.arange(1e5))}
    targets = (Target(name="y", task="regression"),)
    splits = {"train": {n: v.slice(0, 99_999) for n, v in columns.items()}, "valid": columns}
    write_table(tmp_path / "reduce", splits, roles={"x": "numeric", "y": "target"}, targets=targets)

    with pytest.raises(DataError, match=r"x is 3\.\d+e\+11 standard deviations .* float16 cannot"):
        encode(
            tmp_path / "reduce",
            tmp_path / "encode",
            EncodeParams(numeric="float16"),
            resources=Resources(),
            recorder=MemoryRecorder(),
        )
    assert not (tmp_path / "encode").exists()


def test_the_size_of_shards_is_a_parameter(tmp_path):
    """Bytes of a shard stay at the limit or below; the rows are the same."""
    folder, encoded, _ = encode_example(tmp_path / "a", shard_bytes=1000)
    whole, one, _ = encode_example(tmp_path / "b", shard_bytes=1 << 20)
    shard = folder / "train" / "shard-00000"

    assert sum(path.stat().st_size for path in shard.iterdir()) <= 1000
    assert (one.num_shards, encoded.num_shards > 20) == (3, True)
    for name in ("row_id", "codes", "weight"):
        small, large = (
            open_shards(folder, "train").read(name),
            open_shards(whole, "train").read(name),
        )
        assert np.array_equal(small, large)


def test_train_rows_without_any_label_are_left_out_and_counted(tmp_path):
    """In valid they stay, for they can be predicted; a row with one of two labels stays."""
    columns = example_columns(100)
    is_gone = pa.array(np.arange(100) < 30)
    columns["delay"] = pc.if_else(is_gone, None, pc.fill_null(columns["delay"], 1.0))
    columns["late"] = pc.if_else(pa.array(np.arange(100) < 20), None, columns["late"])

    encoded, recorder = run(tmp_path, {"train": columns, "valid": columns})

    assert dict(encoded.num_rows) == {"train": 80, "valid": 100, "test": 0}
    assert encoded.num_unlabelled == 20
    assert "20 train rows have no label and are left out" in recorder.warnings
    targets = open_shards(tmp_path / "encode", "train").read("targets")
    assert np.isnan(targets[:10, 0]).all()
    assert not np.isnan(targets[:, 1]).any()


def test_left_out_features_and_infinite_values_are_told(tmp_path):
    columns = example_columns(50)
    seats = columns["seats"].to_numpy().astype(float)
    seats[3] = np.inf
    columns |= {"seats": pa.array(seats), "gate": pa.array([7] * 50)}

    encoded, recorder = run(tmp_path, {"train": columns, "test": columns})

    assert dict(encoded.dropped) == {"gate": "constant: all train rows are '7'"}
    assert recorder.warnings == [
        "feature gate is left out: constant: all train rows are '7'",
        "seats: 1 infinite values in train count as missing",
        "seats: 1 infinite values in test count as missing",
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("importance", -1.0, "1 rows of train have the weight 'importance' null, negative or inf"),
        ("importance", None, "1 rows of train have the weight 'importance' null"),
        ("delay", np.inf, r"have the target 'delay' infinite .*first row ids: \['3'\]"),
        ("delay", 1e300, "have the target 'delay' infinite or beyond float32"),
    ],
)
def test_unusable_weights_and_targets_are_refused(tmp_path, name, value, message):
    columns = example_columns(50)
    values = columns[name].to_pylist()
    values[3] = value
    columns[name] = pa.array(values, pa.float64())

    with pytest.raises(DataError, match=message):
        run(tmp_path, {"train": columns})
    assert not (tmp_path / "encode").exists()


def test_a_class_that_train_does_not_know_is_refused(tmp_path):
    """The stage leaves nothing behind that looks finished."""
    columns = {"x": pa.array([1.0, 2.0, 3.0]), "y": pa.array(["a", "b", "a"])}
    valid = columns | {"y": pa.array(["a", "c", "a"])}
    targets = (Target(name="y", task="binary", labels=("a", "b")),)

    with pytest.raises(SchemaError, match=r"'y' has classes that the train rows do not have: 'c' "):
        run(
            tmp_path,
            {"train": columns, "valid": valid},
            roles={"x": "numeric", "y": "target"},
            targets=targets,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reduce"]


def test_no_train_rows_or_no_labels_are_refused(tmp_path):
    columns = example_columns(30)
    empty = {name: values.slice(0, 0) for name, values in columns.items()}
    nulls = {name: pa.nulls(30, columns[name].type) for name in ("delay", "late")}

    with pytest.raises(DataError, match=r"has no train rows; change `extract\.split`"):
        run(tmp_path / "a", {"train": empty, "valid": columns})
    with pytest.raises(DataError, match="no train row has a label of delay, late"):
        run(tmp_path / "b", {"train": columns | nulls})


def test_a_damaged_table_is_refused(tmp_path):
    write_table(tmp_path / "reduce", {"train": example_columns(30)})
    path = tmp_path / "reduce" / "train" / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)

    with pytest.raises(IntegrityError, match=r"part-00000\.parquet has another digest"):
        encode(
            tmp_path / "reduce",
            tmp_path / "encode",
            EncodeParams(),
            resources=Resources(),
            recorder=MemoryRecorder(),
        )


def test_too_little_memory_or_disk_is_said_with_the_figure(tmp_path, monkeypatch):
    write_table(tmp_path / "reduce", {"train": example_columns(30)})

    def start(**resources):
        encode(
            tmp_path / "reduce",
            tmp_path / "encode",
            EncodeParams(),
            resources=Resources(**resources),
            recorder=MemoryRecorder(),
        )

    with pytest.raises(ResourceError, match=r"encode needs about 256\.0 MiB .*memory_budget"):
        start(memory_budget=1 << 20)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 100))
    with pytest.raises(ResourceError, match=r"need 2\.0 KiB of disk, 100 B are free"):
        start()


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    write_table(tmp_path / "reduce", {"train": example_columns(30)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headrace.data.shards.ShardWriter.append", full)
    with pytest.raises(ResourceError, match=r"nothing was kept\. Free some"):
        encode(
            tmp_path / "reduce",
            tmp_path / "encode",
            EncodeParams(),
            resources=Resources(),
            recorder=MemoryRecorder(),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reduce"]
