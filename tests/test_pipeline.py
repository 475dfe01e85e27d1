"""The stages as DVC has them, what may run at a time, and what failed stages leave behind."""

import os
import sys
from pathlib import Path

import pytest

from headrace.commands.failure import clear_failure, read_failure, write_failure
from headrace.commands.pipeline import (
    Capacity,
    Dag,
    StageNode,
    admissible,
    changes,
    environment,
    outcome,
    prepare,
    read_dag,
    use_without_git,
)
from headrace.commands.supervise import Finished
from headrace.errors import ConfigError, DataError, ResourceError, Stopped
from headrace.project import Project
from tests.toy import STAGES, edit, make_toy, repro_toy


def node(name: str, *upstream: str, threads=None, num_bytes=None) -> StageNode:
    return StageNode(name, "", upstream, (), (), threads=threads, num_bytes=num_bytes)


def finished(tail: str, exit_code: int = 255) -> Finished:
    return Finished(exit_code=exit_code, seconds=1.0, tail=tail, log=Path("x.log"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def test_stages_come_in_running_order_with_their_upstream(toy):
    dag = read_dag(toy)

    assert tuple(dag.by_name) == STAGES
    assert dag.by_name["train@a"].upstream == ("one",)
    assert set(dag.by_name["last"].upstream) == {"train@a", "train@b"}  # by a folder dependency
    assert dag.by_name["one"].outs == ("data/one",)
    assert "input.txt" in dag.by_name["one"].deps


def test_names_do_not_depend_on_the_working_directory(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert tuple(read_dag(toy).by_name) == STAGES
    assert list(changes(toy, read_dag(toy))) == list(STAGES)


def test_declared_needs_are_read_and_checked(tmp_path):
    project = make_toy(tmp_path)
    edit(
        tmp_path / "dvc.yaml",
        "    outs: [data/one]\n",
        "    outs: [data/one]\n    meta: {threads: 1, bytes: 512MiB, timeout_s: 5}\n",
    )
    one = read_dag(project).by_name["one"]
    assert (one.threads, one.num_bytes, one.timeout_s) == (1, 512 << 20, 5.0)

    edit(tmp_path / "dvc.yaml", "512MiB", "lots")
    with pytest.raises(ConfigError, match=r"`meta` of stage one: 'lots' is not a size"):
        read_dag(project)


def test_a_broken_dvc_yaml_is_one_message(tmp_path):
    project = make_toy(tmp_path)
    (tmp_path / "dvc.yaml").write_text("stages: [\n")

    with pytest.raises(ConfigError, match=r"dvc\.yaml") as caught:
        read_dag(project)
    assert "\n" not in str(caught.value)


def test_no_pipeline_here(tmp_path):
    with pytest.raises(ConfigError, match=r"has no dvc\.yaml; .*headrace init"):
        read_dag(Project(tmp_path))


def test_an_unknown_stage_is_named_with_the_nearest(toy):
    with pytest.raises(ConfigError, match=r"'trian@a' is not a stage .*nearest name: train@a"):
        read_dag(toy).require(["trian@a"])


def test_a_matrix_may_be_named_as_a_whole(toy):
    dag = read_dag(toy)
    dag.require(["train"])

    assert dag.members("train") == ("train@a", "train@b")
    assert dag.downstream(["train@a"]) == ("last",)


def test_one_heavy_stage_at_a_time():
    dag = Dag((node("a"), node("b")))
    room = Capacity(threads=2, num_bytes=1000)

    assert admissible(dag, ["a", "b"], [], room) == "a"
    assert admissible(dag, ["b"], ["a"], room) is None


def test_stages_that_declare_little_run_beside_each_other():
    dag = Dag(
        (
            node("a", threads=1, num_bytes=400),
            node("b", threads=1, num_bytes=700),
            node("c", threads=1, num_bytes=600),
        )
    )
    room = Capacity(threads=2, num_bytes=1000)

    assert admissible(dag, ["b", "c"], ["a"], room) == "c"  # b does not fit in memory
    assert admissible(dag, ["b"], ["a", "c"], room) is None


def test_a_stage_that_declares_more_than_there_is_runs_alone():
    dag = Dag((node("a", threads=64, num_bytes=10**12), node("b", threads=1, num_bytes=1)))
    room = Capacity(threads=2, num_bytes=1000)

    assert admissible(dag, ["a"], [], room) == "a"
    assert admissible(dag, ["a"], ["b"], room) is None


def test_the_stages_own_word_comes_first(tmp_path):
    project = Project(tmp_path)
    write_failure(project, "train@nn", 3, "column x\nis missing")

    failure = outcome(project, "train@nn", finished("ERROR: failed ..., exited with 1"))

    assert failure == read_failure(project, "train@nn")
    assert isinstance(failure.error(), DataError)
    assert str(failure.error()) == "column x is missing"
    clear_failure(project, "train@nn")
    assert read_failure(project, "train@nn") is None


@pytest.mark.parametrize(
    ("tail", "code", "told"),
    [
        ("ERROR: failed to reproduce 'a': failed to run: x, exited with 3", 3, "exit code 3"),
        ("ERROR: ... exited with -9", 6, "lack of memory; lower `resources.memory_budget`"),
        ("ERROR: ... exited with 137", 6, "lack of memory"),
        ("ERROR: ... exited with -15", 143, "exit code 143"),
        ("ERROR: unexpected: [Errno 28] No space left on device", 6, "no space left"),
        ("ERROR: Unable to acquire lock", 4, "another DVC"),
        ("ERROR: failed: missing data 'source': in.csv", 3, "missing data 'source': in.csv"),
        ("ERROR: something new", 4, "DVC failed: something new; see x.log"),
    ],
)
def test_dvcs_255_becomes_the_stages_code(tmp_path, tail, code, told):
    failure = outcome(Project(tmp_path), "a", finished(tail))

    assert failure.exit_code == code
    assert told in failure.message


def test_success_is_no_failure(tmp_path):
    assert outcome(Project(tmp_path), "a", finished("", exit_code=0)) is None


def test_errors_keep_their_exit_code(tmp_path):
    project = Project(tmp_path)
    write_failure(project, "a", 75, "stopped")
    assert isinstance(read_failure(project, "a").error(), Stopped)
    write_failure(project, "a", 6, "full")
    assert isinstance(read_failure(project, "a").error(), ResourceError)
    write_failure(project, "a", 99, "odd")
    assert read_failure(project, "a").error().exit_code == 99


def test_missing_raw_data_is_named_before_anything_runs(tmp_path):
    project = make_toy(tmp_path)
    (tmp_path / "input.txt").unlink()

    with pytest.raises(
        DataError, match=r"input\.txt \(needed by one\); put it there, or `dvc pull"
    ):
        prepare(project, read_dag(project))


def test_outs_of_a_model_that_left_the_list_are_removed(tmp_path):
    project = make_toy(tmp_path)
    repro_toy(project)
    (tmp_path / "data/train/.new-b.999999999").mkdir()  # left by a killed writer
    edit(project.params, "models: [a, b]", "models: [a]")

    notes = prepare(project, read_dag(project))

    assert notes == ["removed data/train/b: no stage makes it any more"]
    assert [path.name for path in (tmp_path / "data/train").iterdir()] == ["a"]
    assert prepare(project, read_dag(project)) == []


def test_outside_git_dvc_is_told_so_in_its_ignored_settings(tmp_path):
    project = make_toy(tmp_path)
    tracked = tmp_path / ".dvc/config"
    tracked.write_text("[core]\n    analytics = false\n")

    assert use_without_git(project)

    assert tracked.read_text() == "[core]\n    analytics = false\n"
    assert not use_without_git(project)  # done once
    assert list(changes(project, read_dag(project))) == list(STAGES)


@pytest.mark.parametrize("repository", ["toy/.git", ".git"])
def test_inside_git_nothing_is_touched(tmp_path, repository):
    project = make_toy(tmp_path / "toy")
    (project.root / ".dvc/config").write_text("")
    (tmp_path / repository).mkdir()

    assert not use_without_git(project)
    assert not (project.root / ".dvc/config.local").exists()


def test_a_folder_without_dvc_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"is no DVC project; run `headrace init`"):
        use_without_git(Project(tmp_path))


def test_children_find_this_installations_programs_first(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("HEADRACE_RUN_PID", raising=False)

    env = environment(EXTRA="1")

    assert Path(env["PATH"].split(os.pathsep)[0]) == Path(sys.executable).parent
    assert env["HEADRACE_RUN_PID"] == str(os.getpid())
    assert env["DO_NOT_TRACK"] == "true"
    assert env["EXTRA"] == "1"
    assert "127.0.0.1" in env["NO_PROXY"].split(",")
