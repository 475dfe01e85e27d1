"""The flow on a small pipeline, for real: a Prefect server, DVC, processes, kills.

``import prefect`` succeeds with sets of packages whose server does not start, so nothing less than
a flow that runs would notice (see pyproject.toml on fastapi).
"""

import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
from rich.console import Console

from headrace.commands.execute import Execution, journaled, record_state
from headrace.commands.pipeline import changes, read_dag
from headrace.commands.repro import repro
from headrace.commands.run import run_pipeline
from headrace.commands.servers import free_port, prefect_server
from headrace.commands.supervise import Group
from headrace.errors import DataError, DependencyError, HeadraceError
from headrace.evaluation.identity import EMPTY
from headrace.project import Project
from headrace.storage import write_file, write_json
from headrace.tracking.history import kept_file, list_runs, read_run, run_path
from tests.toy import STAGES, edit, make_toy, shared_prefect_home

slow = pytest.mark.slow

RUN = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from rich.console import Console
    from headrace.commands.run import run_pipeline
    from headrace.errors import HeadraceError
    from headrace.project import Project
    try:
        run_pipeline(Project(Path(sys.argv[1])), wait=False, console=Console())
    except HeadraceError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
    """
)


def until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def run_toy(project) -> str:
    text = io.StringIO()
    run_pipeline(project, wait=False, console=Console(file=text, width=120))
    return text.getvalue()


def repro_here(project, *stages) -> str:
    text = io.StringIO()
    repro(project, stages, wait=False, console=Console(file=text, width=120))
    return text.getvalue()


def events(project) -> list[dict]:
    folders = sorted(project.logs.glob("flow-*"), key=lambda path: path.stat().st_mtime)
    lines = (folders[-1] / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ended(project) -> dict[str, str]:
    return {e["stage"]: e["state"] for e in events(project) if e["event"] == "stage_ended"}


def flow_states() -> list[tuple[str, str]]:
    """State names and messages of all flow runs in the shared database, oldest first."""
    with sqlite3.connect(shared_prefect_home() / "prefect.db") as connection:
        query = (
            "select r.state_name, s.message from flow_run r "
            "left join flow_run_state s on s.id = r.state_id order by r.created"
        )
        found = connection.execute(query).fetchall()
    connection.close()
    return found


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """A Prefect server for many runs; each starts its own flow process."""
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(shared_prefect_home()))
        with prefect_server(
            Project(folder), Group(), port=free_port(), log=folder / "prefect.log"
        ) as running:
            yield f"{running.url}/api"


@pytest.fixture
def home(monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(shared_prefect_home()))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


@pytest.fixture
def server(home, api, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", api)


@slow
def test_both_doors_leave_the_other_nothing_to_do(server, tmp_path):
    """The flow runs all; DVC finds nothing; a parameter reruns what depends on it, by either."""
    project = make_toy(tmp_path / "toy")

    first = run_toy(project)
    assert ended(project) == dict.fromkeys(STAGES, "ran")
    assert flow_states()[-1][0] == "Completed"
    assert "lineage id: " in first
    assert changes(project, read_dag(project)) == {}
    assert "unchanged, nothing to do" in repro_here(project)
    assert "skipped, data unchanged" in run_toy(project)

    edit(project.params, "lr: 0.1", "lr: 0.2")
    edit(project.params, "a: {value: 2,", "a: {value: 7,")
    run_toy(project)
    assert ended(project) == {
        "one": "unchanged",
        "train@a": "ran",
        "train@b": "unchanged",
        "last": "ran",
    }

    edit(project.params, "last: {value: 4}", "last: {value: 5}")
    assert "last" in repro_here(project)
    assert "skipped, data unchanged" in run_toy(project)
    assert (project.root / "data/last/x.txt").read_text() == "5 7 1 3 1"

    runs = [read_run(run_path(project.journal, name)) for name in list_runs(project.journal)]
    assert [(run.kind, run.status) for run in runs] == [
        ("flow", "finished"),
        ("flow", "finished"),
        ("repro", "finished"),
    ]
    assert runs[0].lineage != runs[1].lineage


@slow
def test_a_failed_stage_ends_the_flow_with_its_own_code_in_one_line(server, tmp_path):
    project = make_toy(tmp_path / "toy")
    edit(project.params, "b: {value: 3}", "b: {value: 3, fail: 3}")

    with pytest.raises(DataError, match=r"^stage train@b ended with exit code 3") as caught:
        run_toy(project)

    assert "\n" not in str(caught.value)
    assert ended(project)["train@b"] == "failed"
    assert "last" not in ended(project)
    name, message = flow_states()[-1]
    assert (name, message) == ("Failed", str(caught.value))
    assert not any(event.get("text", "").endswith("trying again") for event in events(project))

    edit(project.params, "fail: 3", "x: 3")
    run_toy(project)
    assert ended(project)["train@a"] == "unchanged"
    assert ended(project)["last"] == "ran"


@slow
def test_only_an_unavailable_dependency_is_tried_again(server, tmp_path):
    project = make_toy(tmp_path / "toy")
    edit(project.params, "one: {value: 1}", "one: {value: 1, fail: 4}")

    with pytest.raises(DependencyError, match="exit code 4"):
        run_toy(project)

    assert [e["event"] for e in events(project)].count("stage_started") == 3


@slow
def test_stages_that_declare_little_run_at_the_same_time(server, tmp_path):
    project = make_toy(tmp_path / "toy")
    edit(
        project.root / "dvc.yaml",
        "    - data/train/${item.model}\n",
        "    - data/train/${item.model}\n    meta: {threads: 1, bytes: 1MiB}\n",
    )
    edit(project.params, "a: {value: 2,", "a: {value: 2, sleep: 3,")
    edit(project.params, "b: {value: 3}", "b: {value: 3, sleep: 3}")

    run_toy(project)

    order = [(e["event"], e["stage"]) for e in events(project) if "stage" in e]
    starts = [order.index(("stage_started", f"train@{m}")) for m in "ab"]
    ends = [order.index(("stage_ended", f"train@{m}")) for m in "ab"]
    assert max(starts) < min(ends)


def start(project, tmp_path) -> tuple[subprocess.Popen, int]:
    """Start ``headrace run`` on a toy whose stage ``last`` hangs; return it and the stage's pid."""
    edit(project.params, "last: {value: 4}", "last: {value: 4, pid: true, hang: 300}")
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(project.root)], stdout=subprocess.PIPE, text=True
    )
    note = project.root / "pid-last"
    assert until(lambda: note.is_file() and note.read_text().isdigit(), 120)
    return process, int(note.read_text())


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@slow
def test_a_stop_leaves_no_process_exits_75_and_can_be_resumed(home, tmp_path):
    project = make_toy(tmp_path / "toy")
    process, stage_pid = start(project, tmp_path)
    children = family(process.pid)

    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)

    assert process.returncode == 75
    assert "run again to resume" in out
    assert "Traceback" not in out
    assert not psutil.pid_exists(stage_pid)
    assert not any(child.is_running() for child in children)
    assert flow_states()[-1][0] == "Crashed"
    run = read_run(run_path(project.journal, list_runs(project.journal)[-1]))
    assert run.status == "interrupted"

    edit(project.params, ", pid: true, hang: 300", "")
    run_toy(project)
    assert ended(project) == {**dict.fromkeys(STAGES, "unchanged"), "last": "ran"}


@slow
def test_kill_9_leaves_no_process_and_the_folder_free(home, tmp_path):
    project = make_toy(tmp_path / "toy")
    process, stage_pid = start(project, tmp_path)
    children = family(process.pid)

    process.kill()
    process.communicate()

    assert until(lambda: not psutil.pid_exists(stage_pid), 5)
    assert until(lambda: not any(child.is_running() for child in children), 60)
    edit(project.params, ", pid: true, hang: 300", "")
    run_toy(project)
    assert (project.root / "data/last/x.txt").is_file()


@slow
def test_a_flow_killed_outright_is_closed_by_the_next_run(home, tmp_path):
    """Prefect itself would show it as running for ever."""
    project = make_toy(tmp_path / "toy")
    process, stage_pid = start(project, tmp_path)
    (note,) = (project.state / "flow-runs").iterdir()
    flow_pid = int(note.read_text().partition(":")[0])

    os.kill(flow_pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=60)

    assert process.returncode == 4
    assert "the flow engine ended with exit code 137" in out
    assert until(lambda: not psutil.pid_exists(stage_pid), 5)
    assert flow_states()[-1][0] == "Running"
    edit(project.params, ", pid: true, hang: 300", "")
    run_toy(project)
    assert flow_states()[-2][0] == "Crashed"
    assert "closed by the next run" in flow_states()[-2][1]


def test_an_api_that_does_not_answer_is_named(tmp_path, monkeypatch):
    project = make_toy(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    started = time.monotonic()

    with pytest.raises(DependencyError, match=r"PREFECT_API_URL=.* does not answer; start it"):
        run_toy(project)

    assert time.monotonic() - started < 15


def test_repro_gives_the_code_and_the_name_of_the_stage_that_failed(tmp_path):
    project = make_toy(tmp_path)
    edit(project.params, "b: {value: 3}", "b: {value: 3, fail: 3}")

    with pytest.raises(DataError, match="stage train@b ended with exit code 3"):
        repro_here(project)

    run = read_run(run_path(project.journal, list_runs(project.journal)[-1]))
    assert (run.kind, run.status) == ("repro", "failed")
    with pytest.raises(HeadraceError, match="'thing' is not a stage"):
        repro_here(project, "thing")


def test_repro_needs_nothing_activated(tmp_path, monkeypatch):
    """The toy's stages call ``python``, which must be this one: it has yaml."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    project = make_toy(tmp_path)

    text = repro_here(project, "train@a")

    assert "train@a" in text
    assert (project.root / "data/train/a/x.txt").is_file()
    assert not (project.root / "data/last").exists()
    assert "stages are not up to date: headrace why" in text  # so no results are shown


def test_a_stage_over_its_own_time_is_stopped_and_said(tmp_path):
    project = make_toy(tmp_path)
    edit(
        project.root / "dvc.yaml",
        "outs: [data/one]\n",
        "outs: [data/one]\n    meta: {timeout_s: 3}\n",
    )
    edit(project.params, "one: {value: 1}", "one: {value: 1, hang: 60}")
    execution = Execution(project, read_dag(project), run_id="", logs=project.logs / "x")

    done = execution.run_stage("one")

    assert done.state == "failed"
    assert done.failure.exit_code == 6
    assert "stage one: " in done.failure.message
    assert "did not end within 3 s" in done.failure.message


def test_the_lineage_of_a_run_is_written_beside_it(tmp_path):
    project = make_toy(tmp_path)
    repro_here(project)
    dag = read_dag(project)
    write_json(project.data("evaluate") / "metrics.json", {})
    write_json(project.data("evaluate") / "comparison.json", {"targets": {}})
    page = project.data("evaluate") / "report.html"
    write_file(page, f"<p>all</p>{EMPTY}")
    with journaled(project, "flow") as journal:
        lineage = record_state(project, dag, journal)

    run = read_run(run_path(project.journal, journal.run_id))
    beside = json.loads((project.state / "lineage.json").read_text())
    assert run.lineage == beside["lineage"] == lineage
    assert set(run.stage_keys) == set(STAGES)
    assert set(run.reused) == set(STAGES)
    assert beside["run"] == journal.run_id
    (told,) = [event.data for event in run.events if event.kind == "file"]
    kept = kept_file(project.journal, told["sha256"]).read_text()
    assert told["name"] == "report.html"
    assert f"<dt>lineage id</dt><dd>{lineage}</dd>" in kept
    assert journal.run_id in kept
    assert page.read_text() == f"<p>all</p>{EMPTY}"  # the stage's own is as it was
