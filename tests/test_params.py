"""params.yaml: one meaning for every scalar; each fault names key, line, value and remedy."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from headrace.errors import ConfigError
from headrace.params import Resources, Section, parse_bytes, parse_section, read_yaml


class _Inner(Section):
    depth: int = 3


class _Example(Section):
    rate: Annotated[float, Field(gt=0)] = 0.1
    names: Annotated[tuple[str, ...], Field(strict=False)] = ()
    inner: _Inner = _Inner()


def _read(tmp_path: Path, text: str) -> object:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return read_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:\n  b: 1\n  b: 2\n", r":3: `b` is set twice \(first on line 2\)"),
        ("a: 1e-6\n", r":1: `a` has the value 1e-6.*1\.0e-6"),
        ("a:\n  - .5\n", r":2: `a\[0\]` has the value \.5"),
        ("a: yes\n", "write true or false"),
        ("a: 012\n", "leading zero"),
        ("a: 1_000\n", "without underscores"),
        ("a: 12:30:45\n", "quote it"),
        ("a: .inf\n", "infinity"),
        ("a: 1.0e6\n", r"like 1\.0e\+6"),
        ("a: 0o17\n", "as a decimal"),
        ("a:\n  - 2013-09-31\n", r"line 2: `a\.0` is '2013-09-31', which is no date"),
        ("? [x, y]\n: 1\n", "cannot be read"),
        ("a: &x 1\nb: *x\n", "alias"),
        ("a: !!python/name:os.system x\n", "tag"),
        ("a: [1\n", "not valid YAML"),
        ("- a\n", "expected `section: ...` lines"),
    ],
)
def test_what_yaml_readers_disagree_on_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        _read(tmp_path, text)


def test_quoted_and_plain_values_are_read(tmp_path: Path):
    text = "a: 1.0e-6\nb: 'yes'\nc: true\nd: [1, -2.5, x]\ne:\n"
    assert _read(tmp_path, text) == {
        "a": 1e-6,
        "b": "yes",
        "c": True,
        "d": [1, -2.5, "x"],
        "e": None,
    }


def test_a_bomb_of_nodes_is_refused_before_it_is_built(tmp_path: Path):
    with pytest.raises(ConfigError, match="YAML nodes"):
        _read(tmp_path, "a: [" + "1, " * 30_000 + "1]\n")


def test_a_missing_or_undecodable_file_says_what_to_do(tmp_path: Path):
    with pytest.raises(ConfigError, match="headrace init"):
        read_yaml(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_bytes("a: ä\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        read_yaml(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rat": 1.0}, "`x.rat` is not a known parameter; nearest name: rate"),
        ({"inner": {"dept": 1}}, "`x.inner.dept` is not a known parameter; nearest name: depth"),
        ({"rate": "fast"}, "`x.rate` is 'fast'"),
        ({"rate": -1.0}, "greater than 0"),
        ({"inner": {"depth": 2.5}}, "`x.inner.depth` is 2.5"),
        ([1], "must be a section"),
    ],
)
def test_section_faults_name_key_and_value(raw: object, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_section(_Example, raw, key="x", path=Path("params.yaml"))


def test_all_faults_of_a_section_come_in_one_message():
    with pytest.raises(ConfigError, match=r"x\.inner\.depth.*x\.rat"):
        parse_section(
            _Example, {"rat": 1, "inner": {"depth": "a"}}, key="x", path=Path("params.yaml")
        )


def test_sizes():
    assert parse_bytes("2GiB") == 2 << 30
    assert parse_bytes("1.5 MB") == 1_500_000
    assert parse_bytes(17) == 17
    budget = parse_section(
        Resources, {"memory_budget": "512MiB"}, key="resources", path=Path("params.yaml")
    )
    assert budget.memory_budget == 512 << 20
    with pytest.raises(ConfigError, match="write for example 2GiB"):
        parse_section(
            Resources, {"memory_budget": "lots"}, key="resources", path=Path("params.yaml")
        )
