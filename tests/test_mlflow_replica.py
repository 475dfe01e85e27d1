"""MLflow is a replica of the journal: whole, once, rebuilt at will, and never in the way."""

import contextlib
import http.server
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.errors import ConfigError, DependencyError
from headrace.tracking import replica
from headrace.tracking.journal import RunJournal, list_runs, open_run, reopen_run
from headrace.tracking.location import (
    DATABASE,
    connect,
    find_store,
    prepare_store,
    repair_location,
    runs_url,
)
from headrace.tracking.replica import (
    Replicated,
    pending,
    replicate,
    replicate_or_defer,
    results_table,
)

RESULTS = {
    "late": {
        "catboost": {"roc_auc": {"value": 0.9213, "ci_low": 0.911, "ci_high": 0.931}},
        "baseline": {"roc_auc": {"value": 0.5, "ci_low": None, "ci_high": None}},
    }
}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a fresh store, made once: MLflow needs seconds for it."""
    project = tmp_path_factory.mktemp("empty-store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        prepare_store(find_store(project))
    return project


@pytest.fixture
def project(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fresh project in a folder of its own; also the current folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "a project"
    shutil.copytree(empty_store, folder)
    repair_location(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return folder


def journal_of(project: Path) -> Path:
    return project / ".headrace" / "journal"


def send(project: Path, **options) -> Replicated:
    return replicate(journal_of(project), find_store(project), experiment="flights", **options)


def tell_a_run(project: Path, *, num_epochs: int = 3, is_closed: bool = True) -> RunJournal:
    """Write one run with two stages, curves, files, data sets and results."""
    told: list[str] = []
    figure = project / "forest.svg"
    figure.write_text("<svg/>")
    run = open_run(journal_of(project), kind="flow")
    train = run.stage("train@catboost", on_warning=told.append)
    train.params({"depth": 6, "loss": "Logloss"})
    for epoch in range(num_epochs):
        train.metrics({"loss": 1 / (epoch + 1), "lr": 0.1}, step=epoch)
    train.dataset("flights", path=Path("data/reduce"), digest="d" * 64, num_rows=9, context="train")
    train.warn("one column is constant")
    train.peak_bytes = 1 << 20
    train.close("finished", exit_code=0)
    evaluate = run.stage("evaluate", on_warning=told.append)
    evaluate.dataset("flights", path=Path("data"), digest="e" * 64, num_rows=4, context="test")
    evaluate.dataset("flights", path=Path("data"), digest="e" * 64, num_rows=3, context="valid")
    evaluate.file(figure, folder="figures")
    evaluate.note("**tied**: none")
    evaluate.close("finished", exit_code=0)
    if is_closed:
        run.results(RESULTS, tied_with_best={"late": ["catboost"]})
        run.file(figure.rename(project / "summary.svg"))
        figure = project / "summary.svg"
        run.state(
            lineage="l" * 64, stage_keys={"train@catboost": "k" * 64}, unchanged={"reduce": None}
        )
        run.close("finished")
    figure.unlink()
    return run


def stored(project: Path) -> list[dict]:
    """All that the store holds of the experiment, without the ids MLflow drew."""
    client = connect(find_store(project))
    experiment = client.get_experiment_by_name("flights")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    names = {run.info.run_id: run.info.run_name for run in runs}
    return sorted((_described(client, run, names) for run in runs), key=lambda run: run["name"])


def _described(client, run, names) -> dict:
    tags = dict(run.data.tags)
    if parent := tags.pop("mlflow.parentRunId", None):
        tags["parent"] = names.get(parent, "deleted")
    tags.pop("headrace.reused_mlflow_run", None)
    metrics = {
        name: [
            (m.value, m.step, m.timestamp) for m in client.get_metric_history(run.info.run_id, name)
        ]
        for name in run.data.metrics
    }
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "times": (run.info.start_time, run.info.end_time),
        "tags": tags,
        "params": run.data.params,
        "metrics": {name: sorted(history) for name, history in metrics.items()},
        "inputs": sorted(
            (i.dataset.name, i.dataset.digest, i.tags[0].value) for i in run.inputs.dataset_inputs
        ),
        "files": sorted(_files(client, run.info.run_id)),
    }


def _files(client, run_id: str, folder: str | None = None) -> Iterator[str]:
    for info in client.list_artifacts(run_id, folder):
        if info.is_dir:
            yield from _files(client, run_id, info.path)
        else:
            yield info.path


def test_a_run_is_replicated_in_full(project: Path) -> None:
    """Parent and children with params, curves, files, data sets, tags, times, note."""
    run = tell_a_run(project)

    assert send(project).sent == 1

    by_name = {entry["name"]: entry for entry in stored(project)}
    parent, train, evaluate = (by_name[n] for n in (run.run_id, "train@catboost", "evaluate"))
    assert {entry["status"] for entry in by_name.values()} == {"FINISHED"}
    assert train["tags"]["parent"] == evaluate["tags"]["parent"] == run.run_id
    assert train["params"] == {"depth": "6", "loss": "Logloss"}
    assert [(v, s) for v, s, _ in train["metrics"]["loss"]] == [(1 / 3, 2), (0.5, 1), (1.0, 0)]
    assert train["metrics"]["stage/peak_bytes"][0][0] == 1 << 20
    assert train["metrics"]["roc_auc_ci_low"][0][0] == 0.911
    assert train["tags"]["tied_with_best"] == "yes"
    assert train["inputs"] == [("flights", "d" * 36, "train")]
    assert train["tags"]["headrace.stage_key"] == "k" * 64
    assert "- warning: one column is constant" in train["tags"]["mlflow.note.content"]
    assert evaluate["files"] == ["figures/forest.svg"]
    assert evaluate["tags"]["headrace.split_digest"] == "e" * 64
    assert parent["metrics"]["test/late/roc_auc/catboost_ci_high"][0][0] == 0.931
    assert parent["files"] == ["figures/forest.svg", "summary.svg"]
    assert parent["params"] == {"train/catboost.depth": "6", "train/catboost.loss": "Logloss"}
    assert parent["inputs"] == [
        ("flights", "d" * 36, "train"),
        ("flights", "e" * 36, "test, valid"),
    ]
    assert parent["tags"]["headrace.lineage"] == "l" * 64
    assert parent["tags"]["headrace.test_looks"] == "1"
    assert "0.9213 [0.911, 0.931]" in parent["tags"]["mlflow.note.content"]
    assert by_name["reduce (reused)"]["tags"]["headrace.reused_from"] == "unknown"
    assert not list(Path.cwd().iterdir()), "MLflow wrote into the current folder"


def test_sending_again_changes_nothing(project: Path) -> None:
    """Neither at once nor after the memory of what was sent is lost."""
    tell_a_run(project)
    send(project)
    before = stored(project)

    assert send(project).sent == 0
    (journal_of(project) / "replicated.json").unlink()
    assert pending(journal_of(project), find_store(project)) == 1
    assert send(project).sent == 0
    assert pending(journal_of(project), find_store(project)) == 0
    assert stored(project) == before


def test_a_running_run_is_sent_in_parts(project: Path) -> None:
    """What a live view sees first, and the end later, make the same history."""
    run = open_run(journal_of(project), kind="flow")
    stage = run.stage("train@nn")
    stage.metrics({"loss": 1.0}, step=0)
    send(project)
    assert {entry["status"] for entry in stored(project)} == {"RUNNING"}
    stage.metrics({"loss": 0.5}, step=1)
    stage.close("finished", exit_code=0)
    run.close("failed")
    send(project)

    parent, train = stored(project)
    assert (parent["status"], train["status"]) == ("FAILED", "FINISHED")
    assert [step for _, step, _ in train["metrics"]["loss"]] == [1, 0]


def test_long_curves_go_in_batches(project: Path) -> None:
    """More points than one batch of MLflow takes, in one call each thousand."""
    tell_a_run(project, num_epochs=1100)
    send(project)

    train = next(entry for entry in stored(project) if entry["name"] == "train@catboost")
    assert sorted(step for _, step, _ in train["metrics"]["loss"]) == list(range(1100))


def test_reused_stages_link_to_the_run_that_made_them(project: Path) -> None:
    """A run that reused an out shows what its maker told, with a link: no holes."""
    first = tell_a_run(project)
    second = open_run(journal_of(project), kind="repro")
    second.state(lineage="m" * 64, stage_keys={}, unchanged={"train@catboost": first.run_id})
    delay = {"catboost": {"rmse": {"value": 2.0, "ci_low": 1.0, "ci_high": 3.0}}}
    second.results(
        {**RESULTS, "delay": delay}, tied_with_best={"late": ["catboost"], "delay": ["stack"]}
    )
    second.close("finished")
    send(project)

    reused = next(e for e in stored(project) if e["name"] == "train@catboost (reused)")
    assert reused["params"] == {"depth": "6", "loss": "Logloss"}
    assert reused["metrics"]["loss"][0][0] == 1 / 3
    assert reused["metrics"]["late/roc_auc"][0][0] == 0.9213  # of several targets, each named
    assert reused["metrics"]["delay/rmse_ci_low"][0][0] == 1.0
    assert reused["tags"]["tied_with_best"] == "late"
    assert reused["tags"]["parent"] == second.run_id
    assert (
        f"reused from run [{first.run_id}](#/experiments/" in reused["tags"]["mlflow.note.content"]
    )


def test_the_trials_of_a_search_are_nested_in_one_run(project: Path) -> None:
    """Also those of a later call; the run itself does not repeat the settings of all of them."""
    run = open_run(journal_of(project), kind="search")
    for number, status in enumerate(("finished", "failed")):
        trial = run.stage(f"trial-000{number}")
        trial.params({"depth": number})
        trial.metrics({"late/valid_roc_auc": 0.7, "late/valid_roc_auc_ci_low": 0.6})
        trial.close(status, exit_code=0)
    run.close("interrupted")
    send(project)
    again = reopen_run(journal_of(project), run.run_id)
    again.stage("trial-0002").close("finished", exit_code=0)
    again.close("finished")
    send(project)

    *trials, parent = sorted(stored(project), key=lambda run: run["name"].startswith("0"))
    assert (parent["name"], parent["status"], parent["params"]) == (run.run_id, "FINISHED", {})
    assert parent["tags"]["headrace.door"] == "search"
    assert [one["name"] for one in trials] == ["trial-0000", "trial-0001", "trial-0002"]
    assert [one["status"] for one in trials] == ["FINISHED", "FAILED", "FINISHED"]
    assert {one["tags"]["parent"] for one in trials} == {run.run_id}
    assert trials[0]["params"] == {"depth": "0"}
    assert trials[0]["metrics"]["late/valid_roc_auc_ci_low"][0][0] == 0.6


class FailingClient:
    """A client that fails at call number ``last``, before or after the call took effect."""

    def __init__(self, client, *, last: int, is_after: bool) -> None:
        self.client, self.left, self.is_after = client, last, is_after

    def __getattr__(self, name: str):
        method = getattr(self.client, name)

        def call(*arguments, **options):
            self.left -= 1
            if self.left == 0 and not self.is_after:
                raise ConnectionError("cut before")
            result = method(*arguments, **options)
            if self.left == 0:
                raise ConnectionError("cut after")
            return result

        return call


def _cut_everywhere(project: Path, calls: range, monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut one replication at each of ``calls``, mend it, and compare; return how many were cut."""
    tell_a_run(project, num_epochs=1)
    whole = project.with_name("whole")
    shutil.copytree(project, whole)
    repair_location(whole)
    send(whole)
    expected = stored(whole)
    num_cut = 0
    for last in calls:
        part = project.with_name(f"part-{last}")
        shutil.copytree(project, part)
        repair_location(part)
        with monkeypatch.context() as patch:
            patch.setattr(
                replica,
                "connect",
                lambda store, last=last: FailingClient(
                    connect(store), last=last, is_after=last % 2 == 0
                ),
            )
            deferred = replicate_or_defer(journal_of(part), find_store(part), experiment="flights")
        if deferred.problem:
            num_cut += 1
            assert "it stays in the journal" in deferred.problem
            assert deferred.pending == 1
        send(part)
        assert stored(part) == expected, f"cut at call {last}"
        shutil.rmtree(part)
    return num_cut


def test_a_cut_neither_loses_nor_doubles(project: Path, monkeypatch) -> None:
    """The connection breaks at some calls, before or after they take effect."""
    assert _cut_everywhere(project, range(3, 24, 10), monkeypatch) == 3


@pytest.mark.slow
def test_a_cut_at_any_call_neither_loses_nor_doubles(project: Path, monkeypatch) -> None:
    """The same at every call until none is left to cut."""
    assert 25 <= _cut_everywhere(project, range(1, 60), monkeypatch) < 59


def test_a_run_deleted_in_mlflow_stays_deleted(project: Path) -> None:
    """Deleting in the UI is a person's decision."""
    run = tell_a_run(project)
    send(project)
    client = connect(find_store(project))
    experiment = client.get_experiment_by_name("flights").experiment_id
    client.delete_run(replica.find_parent(client, experiment, run.run_id))
    (journal_of(project) / "replicated.json").unlink()

    assert send(project).sent == 0
    assert run.run_id not in {entry["name"] for entry in stored(project)}


def test_a_lost_store_is_built_again(project: Path) -> None:
    """Without mlflow.db everything is pending, and one call brings all of it back."""
    tell_a_run(project)
    send(project)
    before = stored(project)
    moved = project.with_name("rebuilt")
    shutil.copytree(project, moved)
    (moved / DATABASE).unlink()
    shutil.rmtree(moved / "mlruns")

    assert pending(journal_of(moved), find_store(moved)) == 1
    assert send(moved).sent == 1
    assert stored(moved) == before


@pytest.mark.parametrize("is_copy", [True, False])
def test_history_survives_moving_and_copying_the_folder(project: Path, tmp_path, is_copy) -> None:
    """After a move MLflow still finds every file, and an untouched original keeps its own."""
    run = tell_a_run(project)
    send(project)
    moved = tmp_path / "moved to here"
    if is_copy:
        shutil.copytree(project, moved)
    else:
        project.rename(moved)

    client = connect(find_store(moved))
    experiment = client.get_experiment_by_name("flights")
    parent = replica.find_parent(client, experiment.experiment_id, run.run_id)
    assert [info.path for info in client.list_artifacts(parent)] == ["figures", "summary.svg"]
    assert client.get_run(parent).info.artifact_uri.startswith(moved.as_uri() + "/")
    assert experiment.artifact_location.startswith(moved.as_uri() + "/")
    assert repair_location(moved) == 0
    if is_copy:
        original = connect(find_store(project))
        assert original.get_run(parent).info.artifact_uri.startswith(project.as_uri() + "/")


def test_locations_elsewhere_are_left_alone(project: Path, tmp_path: Path) -> None:
    """An experiment on S3, or in a folder whose name merely begins alike, is not rewritten."""
    client = connect(find_store(project))
    twin = project.as_uri() + "2/mlruns/x"
    client.create_experiment("s3", artifact_location="s3://bucket/x")
    client.create_experiment("twin", artifact_location=twin)
    moved = project.rename(tmp_path / "moved")
    repair_location(moved)

    with sqlite3.connect(moved / DATABASE) as connection:
        found = dict(connection.execute("SELECT name, artifact_location FROM experiments"))
    connection.close()
    assert (found["s3"], found["twin"]) == ("s3://bucket/x", twin)
    assert found["Default"] == moved.as_uri() + "/mlruns/0"


def test_a_locked_database_is_pending_not_fatal(project: Path) -> None:
    """Another process holds the file: said with a remedy, the run is not lost."""
    tell_a_run(project)
    holder = sqlite3.connect(project / DATABASE, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    store, journal = find_store(project), journal_of(project)
    try:
        with pytest.raises(DependencyError, match=r"is locked by another process.*headrace sync"):
            send(project)
        deferred = replicate_or_defer(journal, store, experiment="flights")
    finally:
        holder.rollback()
        holder.close()

    assert (deferred.pending, "is locked" in deferred.problem) == (1, True)
    assert replicate_or_defer(journal, store, experiment="flights").sent == 1


def test_a_database_of_a_newer_mlflow_is_refused(project: Path) -> None:
    """The message names the version and two ways out."""
    with sqlite3.connect(project / DATABASE) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    connection.close()
    tell_a_run(project)

    with pytest.raises(ConfigError, match=r"written by a newer MLflow.*install a newer mlflow, or"):
        send(project)


def test_a_database_of_an_older_mlflow_names_the_upgrade(project: Path) -> None:
    """A known but older schema is the user's to upgrade, after a backup."""
    with sqlite3.connect(project / DATABASE) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    connection.close()
    tell_a_run(project)

    with pytest.raises(ConfigError, match=r"older MLflow.*mlflow db upgrade sqlite:///"):
        send(project)


def test_a_file_that_is_no_database_is_refused(project: Path) -> None:
    """Garbage under the name of the store."""
    (project / DATABASE).write_bytes(b"garbage" * 1000)
    tell_a_run(project)

    with pytest.raises(ConfigError, match="is no MLflow database"):
        send(project)


def test_a_deleted_experiment_is_named(project: Path) -> None:
    """Its name stays taken in MLflow, so runs cannot go there."""
    tell_a_run(project)
    client = connect(find_store(project))
    client.delete_experiment(client.create_experiment("flights"))

    with pytest.raises(ConfigError, match=r"experiment 'flights'.*was deleted; restore it"):
        send(project)


def test_a_path_that_no_database_uri_can_hold_is_refused(tmp_path, monkeypatch) -> None:
    """A question mark would put the database elsewhere."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="has a question mark in its name"):
        find_store(tmp_path / "what?")


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class StubServer(http.server.BaseHTTPRequestHandler):
    """An MLflow server that is alive but useless: ``mode`` says how."""

    mode = "503"

    def do_GET(self) -> None:
        if self.mode == "hang":
            time.sleep(20)
        is_healthy = self.mode == "sick" and self.path == "/health"
        self.send_response(200 if is_healthy else int(self.mode if self.mode.isdigit() else 500))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *arguments) -> None:
        pass


@pytest.mark.parametrize("mode", ["refused", "503", "429", "500", "hang", "sick"])
def test_a_server_in_trouble_never_blocks_for_long(tmp_path, monkeypatch, free_port, mode) -> None:
    """Whatever the server does, the answer comes in seconds, names no secret and loses nothing."""
    port = free_port
    uri = f"http://user:hidden@127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(StubServer, "mode", mode)
    project = tmp_path / "project"
    project.mkdir()
    tell_a_run(project)
    server = None
    if mode != "refused":
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), StubServer)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
    started = time.monotonic()
    try:
        deferred = replicate_or_defer(
            journal_of(project), find_store(project), experiment="flights"
        )
    finally:
        if server:
            server.shutdown()
            server.server_close()

    assert time.monotonic() - started < 10
    assert deferred.pending == 1
    assert f"127.0.0.1:{port}" in deferred.problem
    assert "hidden" not in deferred.problem
    assert (
        "hidden"
        not in (journal_of(project) / list_runs(journal_of(project))[0])
        .with_suffix(".jsonl")
        .read_text()
    )
    assert not (project / DATABASE).exists()


def test_time_used_up_leaves_the_rest_pending(project: Path) -> None:
    """A budget of no time sends nothing, says so, and the next call sends all."""
    tell_a_run(project)
    late = send(project, budget_s=0.0)

    assert (late.sent, late.pending, "slow" in late.problem) == (0, 1, True)
    assert send(project).sent == 1


def test_nothing_pending_costs_no_import(project: Path) -> None:
    """The check at the end of every command does not load MLflow."""
    tell_a_run(project)
    send(project)
    program = (
        "import sys; from pathlib import Path\n"
        "from headrace.tracking.location import find_store\n"
        "from headrace.tracking.replica import replicate_or_defer\n"
        "p = Path(sys.argv[1])\n"
        "replicate_or_defer(p / '.headrace/journal', find_store(p), experiment='flights')\n"
        "print('mlflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(project)], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_processes_that_start_together_share_one_new_store(tmp_path: Path) -> None:
    """Six at once on a folder without a store: one makes it, none breaks, all is quiet."""
    program = (
        "import sys; from pathlib import Path\n"
        "from headrace.tracking.location import connect, find_store\n"
        "connect(find_store(Path(sys.argv[1]))).search_experiments()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stderr=subprocess.PIPE,
            env=environment,
            cwd=tmp_path,
        )
        for _ in range(6)
    ]
    told = [process.communicate()[1] for process in processes]

    assert [process.returncode for process in processes] == [0] * 6, told
    assert told == [b""] * 6
    assert sorted(path.name for path in tmp_path.iterdir()) == [".headrace", DATABASE]


def _start_server(folder: Path, port: int) -> subprocess.Popen:
    """Start a real MLflow server and wait until it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    server = subprocess.Popen(
        command,
        env={**os.environ, "PATH": path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=folder,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return server
        time.sleep(0.2)
    raise TimeoutError("the MLflow server did not start")


@pytest.mark.slow
def test_a_server_takes_what_was_pending_when_it_comes(tmp_path, monkeypatch, free_port) -> None:
    """Server absent at the first run, there at the second: both arrive, files included."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port}")
    store = find_store(project)
    tell_a_run(project)
    first = replicate_or_defer(journal_of(project), store, experiment="flights")
    server = _start_server(tmp_path, free_port)
    try:
        tell_a_run(project)
        second = replicate_or_defer(journal_of(project), store, experiment="flights")
        there = stored(project)
        assert send(project).sent == 0
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()

    assert (first.pending, second.sent, second.pending) == (1, 2, 0)
    assert len(there) == 8
    parents = [entry for entry in there if entry["tags"]["headrace.kind"] == "run"]
    assert [entry["files"] for entry in parents] == [["figures/forest.svg", "summary.svg"]] * 2
    assert sorted(path.name for path in project.iterdir()) == [".headrace"]


def test_results_are_readable_at_a_glance() -> None:
    """A table per target, with intervals where there are any."""
    table = results_table(RESULTS)

    assert "| catboost | 0.9213 [0.911, 0.931] |" in table
    assert "| baseline | 0.5 |" in table


def test_the_link_shows_runs() -> None:
    """Without the query MLflow opens a view that hides them."""
    assert runs_url("http://x:1/", "7").startswith("http://x:1/#/experiments/7/runs?")
    assert "workflowType=machine_learning" in runs_url("http://x:1", "7")
