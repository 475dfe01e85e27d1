"""Why a stage would run: old and new values, files, and the stage upstream that brings it on."""

import shutil
import sys

import pytest

from headrace.commands.pipeline import changes, environment, read_dag
from headrace.commands.supervise import Child
from headrace.commands.why import judge, sentences, why
from headrace.errors import ConfigError, DependencyError
from headrace.lineage import value_changes
from tests.toy import STAGES, edit, make_toy, repro_toy


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    project = make_toy(tmp_path_factory.mktemp("toy"))
    repro_toy(project)
    return project


@pytest.fixture
def toy(fresh, tmp_path):
    shutil.copytree(fresh.root, tmp_path / "toy", symlinks=True)
    return type(fresh)(tmp_path / "toy")


def told(project, *stages):
    return dict(line.split(": ", 1) for line in sentences(why(project, stages)))


def test_nothing_changed(toy):
    assert sentences(why(toy)) == ["all stages: unchanged, nothing to do"]
    assert sentences(why(toy, ("last",))) == ["last: unchanged, nothing to do"]


def test_a_parameter_with_its_old_and_new_value(toy):
    edit(toy.params, "lr: 0.1", "lr: 0.25")

    lines = told(toy)

    assert lines["train@a"] == "will run: parameter train.a.lr 0.1 → 0.25"
    assert lines["train@b"] == "unchanged"
    assert lines["last"] == "unchanged itself; runs if train@a gives another result"


def test_a_new_and_a_removed_parameter(toy):
    edit(toy.params, "lr: 0.1", "depth: 3")

    line = told(toy, "train@a")["train@a"]

    assert "parameter train.a.lr 0.1 → not set" in line
    assert "parameter train.a.depth not set → 3" in line


def test_code_and_input_files_are_told_apart(toy):
    edit(toy.root / "step.py", "import json", "import json  # same")
    edit(toy.root / "input.txt", "0", "1")

    line = told(toy, "one")["one"]

    assert "code step.py modified" in line
    assert "input input.txt modified" in line


def test_the_command(toy):
    edit(toy.root / "dvc.yaml", "step.py last data/last", "step.py last  data/last")

    assert told(toy, "last")["last"] == "will run: command is another one now"


def test_a_removed_out(toy):
    shutil.rmtree(toy.root / "data/last")

    assert told(toy, "last")["last"] == "will run: out data/last is missing"


def test_the_stage_upstream_is_named(toy):
    shutil.rmtree(toy.root / "data/one")

    lines = told(toy)

    assert lines["one"] == "will run: out data/one is missing"
    assert lines["train@a"].startswith("will run: upstream data/one deleted (made by one)")
    assert "one runs first" in lines["train@a"]


def test_a_stage_that_never_ran(tmp_path):
    project = make_toy(tmp_path)

    verdicts = why(project)

    assert [verdict.stage for verdict in verdicts] == list(STAGES)
    assert {verdict.state for verdict in verdicts} == {"never run"}
    assert sentences(verdicts)[0] == "one: will run: first run"


def test_a_matrix_by_its_name(toy):
    assert [verdict.stage for verdict in why(toy, ("train",))] == ["train@a", "train@b"]


def test_an_unknown_stage(toy):
    with pytest.raises(
        ConfigError, match=r"'lats' is not a stage of dvc\.yaml; nearest name: last"
    ):
        why(toy, ("lats",))


def test_a_verdict_says_how_far_a_change_reaches(toy):
    edit(toy.params, "one: {value: 1}", "one: {value: 9}")
    dag = read_dag(toy)

    verdicts = {verdict.stage: verdict for verdict in judge(toy, dag, changes(toy, dag))}

    assert [verdicts[name].state for name in STAGES] == ["stale", "waiting", "waiting", "waiting"]
    assert verdicts["last"].causes == ("train@a", "train@b")


def test_while_a_stage_runs_it_says_so(toy):
    edit(toy.params, "last: {value: 4}", "last: {value: 4, pid: true, hang: 60}")
    busy = Child(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=toy.root,
        log=toy.root / "log",
        env=environment(),
    )
    while not (toy.root / "pid-last").is_file():
        assert busy.wait(0.1) is None

    with pytest.raises(DependencyError, match=r"a stage is running in .*; ask again when"):
        why(toy)
    busy.stop()


def test_nested_parameter_changes_are_leaves():
    old = {"a": {"x": 1, "y": [1, 2]}, "b": 2}
    new = {"a": {"x": 1, "y": [1, 3]}, "c": None}

    assert value_changes("s", old, new) == [
        ("s.a.y", "[1, 2] → [1, 3]"),
        ("s.b", "2 → not set"),
        ("s.c", "not set → None"),
    ]
