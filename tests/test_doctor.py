"""Each line is ok, or a problem with its remedy; the servers are really started."""

import io
from collections import namedtuple
from importlib import metadata

import pytest
from rich.console import Console

from headrace.commands import doctor as checks
from headrace.errors import DependencyError


def test_a_package_outside_its_pin_and_a_missing_one_have_remedies():
    versions = {"prefect": "3.8.8", "fastapi": "0.165.0"}

    def installed(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    requirements = ("prefect>=3.8.8,<3.9", "fastapi>=0.139,<0.151", "duckdb>=2", "x; extra == 'y'")
    good, wrong, missing = checks.packages(requirements, installed)

    assert good.is_ok
    assert wrong.found == "0.165.0, but <0.151,>=0.139 is needed"
    assert 'pip install "fastapi<0.151,>=0.139"' in wrong.remedy
    assert missing.found == "is not installed"
    assert "pip install" in missing.remedy


def test_this_environment_fits_the_pins():
    assert [found for found in checks.packages() if not found.is_ok] == []
    assert checks.python().is_ok
    assert int(checks.cores().found) >= 1


def test_little_memory_and_disk_are_problems(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage(10, 9, 1 << 30))
    found = namedtuple("svmem", "total available")
    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: found(4 << 30, 1 << 30))

    assert "1.0 GiB free" in checks.disk(tmp_path).found
    assert not checks.disk(tmp_path).is_ok
    assert "memory_budget` below 1.0 GiB" in checks.memory().remedy


def test_telemetry_that_a_shell_turned_on_is_a_problem(monkeypatch):
    assert checks.telemetry().is_ok

    monkeypatch.setenv("DO_NOT_TRACK", "1")  # mlflow would not take this for yes

    assert "DO_NOT_TRACK=true" in checks.telemetry().remedy


def test_every_problem_is_printed_and_the_exit_code_is_4(monkeypatch):
    findings = [checks.Finding("a", "fine"), checks.Finding("b", "broken", "mend it")]
    monkeypatch.setattr(checks, "examine", lambda _: iter(findings))
    text = io.StringIO()

    with pytest.raises(DependencyError, match="1 problem") as caught:
        checks.doctor(None, console=Console(file=text))

    assert caught.value.exit_code == 4
    assert [line.split() for line in text.getvalue().splitlines()] == [
        ["ok", "a", "fine"],
        ["problem", "b", "broken:", "mend", "it"],
    ]


@pytest.mark.slow
def test_both_servers_start_here(monkeypatch):
    """An unlucky set of packages imports and yet does not start."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")  # must not matter
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")

    found = [checks.prefect(), checks.mlflow()]

    assert [one.remedy for one in found] == ["", ""]
    assert all("answers after" in one.found for one in found)
