"""The pickle cache: faster where it is right, invisible where it is not."""

import hashlib
import json
import multiprocessing
import os
import pickle
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from headrace.data import cache as cache_module
from headrace.data.cache import cached_frame
from headrace.data.frames import read_frame
from headrace.data.table import Table, open_table
from headrace.errors import SchemaError
from headrace.record import MemoryRecorder
from headrace.schema import Role
from tests.encode_tables import write_table

KINDS: dict[str, pa.Array] = {
    "int": pa.array([1, 2, 3], pa.uint8()),
    "nullable": pa.array([1, None, 3], pa.int16()),
    "float": pa.array([0.5, None, 2.0], pa.float32()),
    "half": pa.array(np.array([0.5, 1.0, 2.0], np.float16)),
    "flag": pa.array([True, None, False]),
    "sure": pa.array([True, True, False]),
    "text": pa.array(["a", None, "ü"]),
    "code": pa.array(["x", None, "y"]).dictionary_encode(),
    "day": pa.array([date(2020, 1, 1), None, date(2021, 1, 1)]),
    "when": pa.array([1, None, 3], pa.timestamp("us")),
    "zone": pa.array([1, None, 3], pa.timestamp("us", tz="UTC")),
    "place": pa.array([1, None, 3], pa.timestamp("us", tz="Europe/Berlin")),
    "span": pa.array([1, None, 3], pa.duration("us")),
    "decimal": pa.array([Decimal("1.50"), None, Decimal("2.25")]),
    "list": pa.array([[1.0], None, []], pa.list_(pa.float32())),
    "target": pa.array([1, 2, 3], pa.int8()),
}
ROLES: dict[str, Role] = dict.fromkeys(KINDS, "ignore") | {"target": "target"}


@pytest.fixture
def table(tmp_path) -> Table:
    plain = {name: values for name, values in KINDS.items() if name != "half"}
    valid = {name: values.slice(0, 1) for name, values in plain.items()}
    splits = {"train": plain, "valid": valid}
    return write_table(tmp_path / "reduce", splits, roles=ROLES)


def get(table: Table, cache: Path, **kwargs: object) -> tuple[pd.DataFrame, MemoryRecorder]:
    recorder = MemoryRecorder()
    arguments = {"split": "train", "columns": None, **kwargs}
    split, columns = arguments.pop("split"), arguments.pop("columns")
    return cached_frame(
        table, split, columns, cache=cache, recorder=recorder, **arguments
    ), recorder


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "frames").glob("*.frame"))


def test_a_second_use_is_a_hit_that_tells_what_it_saved(table, tmp_path):
    first, told_first = get(table, tmp_path / "cache")
    second, told_second = get(table, tmp_path / "cache")

    pd.testing.assert_frame_equal(first, second)
    assert told_first.recorded_params == {"cache_hit": False}
    assert told_first.notes == told_first.warnings == told_second.warnings == []
    assert told_second.recorded_params == {"cache_hit": True}
    assert "from the cache in" in told_second.notes[0]
    assert "s saved" in told_second.notes[0]


def test_every_kind_of_column_survives_with_its_dtype(table, tmp_path):
    get(table, tmp_path / "cache")
    frame, told = get(table, tmp_path / "cache")

    assert told.recorded_params["cache_hit"]
    expected = {
        "int": "uint8", "nullable": "Int16", "float": "float32", "flag": "boolean",
        "sure": "bool", "text": "str", "code": "category", "day": "datetime64[ms]",
        "when": "datetime64[us]", "zone": "datetime64[us, UTC]",
        "place": "datetime64[us, Europe/Berlin]", "span": "timedelta64[us]",
        "decimal": "float64", "list": "object", "target": "int8", "row_id": "int64",
        "fold": "Int8",
    }  # fmt: skip
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == expected
    assert frame["nullable"].tolist() == [1, pd.NA, 3]
    assert frame["decimal"].tolist()[::2] == [1.5, 2.25]
    assert frame["text"].tolist()[::2] == ["a", "ü"]


def test_halves_are_read_as_floats_that_compute(tmp_path):
    columns = {"half": KINDS["half"], "target": KINDS["target"]}
    table = write_table(tmp_path / "reduce", {"train": columns}, roles=ROLES)
    assert str(read_frame(table, "train")["half"].dtype) == "float32"


def test_dtypes_are_the_same_in_every_split(table):
    one, other = read_frame(table, "train"), read_frame(table, "valid")
    assert one.dtypes.drop("list").equals(other.dtypes.drop("list"))
    assert len(other) == 1
    assert len(read_frame(table, "test")) == 0


def test_the_frame_is_the_callers_to_change(table, tmp_path):
    for _ in range(2):  # built, then from the cache
        frame, _told = get(table, tmp_path / "cache", columns=["int", "float", "text"])
        assert frame.iloc[0].tolist() == [1, 0.5, "a"]
        frame.iloc[0, 0] = 9
        frame.loc[0, "float"] = 9.5
        frame["int"].to_numpy(copy=True)[:] = 0


def test_columns_come_in_the_order_asked_for_and_have_their_own_entries(table, tmp_path):
    frame, _ = get(table, tmp_path / "cache", columns=["text", "int"])
    assert list(frame) == ["text", "int"]
    _, told = get(table, tmp_path / "cache", columns=["int", "text"])
    assert told.recorded_params == {"cache_hit": False}
    _, told = get(table, tmp_path / "cache", columns=["int", "text"], split="valid")
    assert told.recorded_params == {"cache_hit": False}
    with pytest.raises(SchemaError, match="nearest name: text"):
        get(table, tmp_path / "cache", columns=["texts"])


def test_another_table_is_never_mistaken_for_this_one(table, tmp_path):
    """Same folder, same sizes, same modification times, one value changed."""
    get(table, tmp_path / "cache")
    files = [p for p in table.folder.rglob("*") if p.is_file()]
    times = {path: path.stat().st_mtime_ns for path in files}
    columns = {name: values for name, values in KINDS.items() if name != "half"}
    columns["int"] = pa.array([1, 2, 4], pa.uint8())
    changed = write_table(table.folder, {"train": columns}, roles=ROLES)
    for path, time in times.items():
        if path.exists():
            os.utime(path, ns=(time, time))

    frame, told = get(changed, tmp_path / "cache")

    assert frame["int"].tolist() == [1, 2, 4]
    assert told.recorded_params == {"cache_hit": False}


def test_a_flipped_bit_anywhere_is_found_and_the_frame_built_again(table, tmp_path):
    expected, _ = get(table, tmp_path / "cache")
    (path,) = entries(tmp_path / "cache")
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    positions = [0, 63, 64, 70, len(whole) - 1, *rng.integers(0, len(whole), 20).tolist()]
    for position in positions:
        bad = bytearray(whole)
        bad[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)

        frame, told = get(table, tmp_path / "cache")

        pd.testing.assert_frame_equal(frame, expected)
        assert len(told.warnings) == 1
        assert "another digest" in told.warnings[0]
        assert told.recorded_params == {"cache_hit": False}
    assert get(table, tmp_path / "cache")[1].recorded_params == {"cache_hit": True}


@pytest.mark.parametrize("length", [0, 10, 64, 100, -1])
def test_a_truncated_entry_is_dropped(table, tmp_path, length):
    expected, _ = get(table, tmp_path / "cache")
    (path,) = entries(tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:length])
    frame, told = get(table, tmp_path / "cache")
    pd.testing.assert_frame_equal(frame, expected)
    assert len(told.warnings) == 1


class _Poison:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


class _Gadget:
    """Harmless by its module: a method of a class that frames are made of."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return pd.DataFrame.to_csv, (pd.DataFrame({"x": [1]}), str(self.canary))


class _Bound(_Gadget):
    """The same as a method of one frame: pickled as a call of getattr, as a time zone is."""

    def __reduce__(self):
        return pd.DataFrame({"x": [1]}).to_csv, (str(self.canary),)


def poisoned(payload: bytes) -> bytes:
    """An entry with a right digest around any pickle."""
    header = json.dumps({"lengths": [len(payload)], "built_s": 0.0}).encode() + b"\n"
    body = header + bytes(-len(header) % 64) + payload + bytes(-len(payload) % 64)
    return hashlib.sha256(body).hexdigest().encode() + body


@pytest.mark.parametrize("kind", [_Poison, _Gadget, _Bound])
@pytest.mark.parametrize("is_digest_right", [False, True])
def test_a_poisoned_entry_runs_nothing(table, tmp_path, kind, is_digest_right):
    expected, _ = get(table, tmp_path / "cache")
    (path,) = entries(tmp_path / "cache")
    canary = tmp_path / "canary"
    entry = poisoned(pickle.dumps(kind(canary)))
    path.write_bytes(entry if is_digest_right else b"0" * 64 + entry[64:])

    frame, told = get(table, tmp_path / "cache")

    assert not canary.exists()
    pd.testing.assert_frame_equal(frame, expected)
    assert len(told.warnings) == 1
    assert ("which no frame is made of" in told.warnings[0]) == is_digest_right
    pickle.loads(pickle.dumps(kind(canary)))  # the payload would have done it
    assert canary.exists()


def test_an_entry_of_other_versions_is_dropped_with_one_warning(table, tmp_path, monkeypatch):
    get(table, tmp_path / "cache")
    versions = cache_module._versions()
    for name in versions:
        monkeypatch.setattr(
            cache_module, "_versions", lambda name=name: versions | {name: "0.0 (other)"}
        )
        _, told = get(table, tmp_path / "cache")
        assert told.recorded_params == {"cache_hit": False}, name
        assert len(told.warnings) == 1
        assert "other versions" in told.warnings[0]
    assert len(entries(tmp_path / "cache")) == 1
    assert set(versions) == {"python", "machine", "pandas", "numpy", "pyarrow", "headrace"}


def test_entries_used_longest_ago_go_first(table, tmp_path):
    cache = tmp_path / "cache"
    for name in ("int", "float", "text"):
        get(table, cache, columns=[name])
    size = max(path.stat().st_size for path in entries(cache))
    for path in entries(cache):
        os.utime(path, ns=(1, 1))
    get(table, cache, columns=["float"])  # used, so it stays

    get(table, cache, columns=["sure"], cap_bytes=2 * size + 100)

    assert len(entries(cache)) == 2
    assert get(table, cache, columns=["float"])[1].recorded_params == {"cache_hit": True}
    assert get(table, cache, columns=["sure"])[1].recorded_params == {"cache_hit": True}


def test_a_frame_beyond_the_cap_is_not_kept_and_that_is_said(table, tmp_path):
    frame, told = get(table, tmp_path / "cache", cap_bytes=10)
    assert len(frame) == 3
    assert "not kept in the cache" in told.warnings[0]
    assert entries(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_only_warns(table, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    frame, told = get(table, tmp_path / "cache")
    assert len(frame) == 3
    assert "not kept in the cache" in told.warnings[-1]


def test_what_a_killed_writer_left_is_swept(table, tmp_path):
    folder = tmp_path / "cache" / "frames"
    folder.mkdir(parents=True)
    (folder / ".new-x.frame.999999999").write_bytes(b"half")
    get(table, tmp_path / "cache")
    assert [path.suffix for path in folder.iterdir()] == [".frame"]


def _fill(folder: str, cache: str, barrier, results) -> None:
    table = open_table(Path(folder))
    barrier.wait()
    for _ in range(10):
        for columns in (["int", "text"], ["float"], ["code"]):
            recorder = MemoryRecorder()
            frame = cached_frame(
                table, "train", columns, cache=Path(cache), recorder=recorder, cap_bytes=6000
            )
            results.put((columns, frame.iloc[0].tolist(), recorder.warnings))


def test_processes_that_fill_the_same_entries_read_no_torn_one(table, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (str(table.folder), str(tmp_path / "cache"), barrier, results)
    processes = [context.Process(target=_fill, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    got = [results.get(timeout=60) for _ in range(3 * 10 * 3)]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    expected = {"int": [1, "a"], "float": [0.5], "code": ["x"]}
    for columns, first_row, warnings in got:
        assert first_row == expected[columns[0]]
        assert warnings == []


def test_an_entry_is_read_without_a_second_copy(tmp_path):
    """The arrays of the frame lie in the bytes that were read."""
    values = {"target": pa.array(np.arange(100_000))}
    table = write_table(tmp_path / "reduce", {"train": values}, roles=ROLES, row_group_rows=10**6)
    get(table, tmp_path / "cache", columns=["target"])
    frame, _ = get(table, tmp_path / "cache", columns=["target"])
    block = frame["target"].to_numpy()
    assert not block.flags.owndata
    assert block.ctypes.data % 8 == 0
