"""The journal: what is told is kept, whatever is killed, and runs are told apart."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from headrace.errors import ConfigError, IntegrityError, ResourceError, Stopped
from headrace.tracking.history import find_run, kept_file, last_seq
from headrace.tracking.journal import (
    RUN_ID_VARIABLE,
    RunJournal,
    close_stale,
    count_looks,
    current_run,
    list_runs,
    made_by,
    open_run,
    open_stage,
    read_progress,
    read_run,
    reopen_run,
    run_path,
)

STAGE_PROGRAM = """
import sys
from pathlib import Path
from headrace.tracking.journal import open_stage
for stage in sys.argv[2:]:
    with open_stage(Path(sys.argv[1]), stage) as recorder:
        recorder.params({"a": 1})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(RUN_ID_VARIABLE, raising=False)
    return tmp_path / ".headrace" / "journal"


def only_run(folder: Path):
    (run_id,) = list_runs(folder)
    return read_run(run_path(folder, run_id))


def run_stages_under(folder: Path, *command: str) -> None:
    """Run the stage program below a process that looks like ``dvc``."""
    subprocess.run([*command], check=True, env={**os.environ, "PYTHONPATH": "src"})


def test_what_a_stage_tells_is_read_back(folder: Path, tmp_path: Path) -> None:
    """Params, metrics, files, data sets, notes, warnings, peak and seconds come back typed."""
    figure = tmp_path / "figure.svg"
    figure.write_text("<svg/>")
    warned = []
    run = open_run(folder, kind="flow")
    stage = run.stage("train@nn", on_warning=warned.append)
    stage.params({"device": "cpu", "threads": np.int64(2), "dropout": np.float32(0.5)})
    stage.metrics({"loss": 0.5}, step=0)
    stage.metrics({"loss": float("nan")}, step=1)
    stage.file(figure, folder="figures")
    stage.dataset(
        "flights", path=tmp_path / "data/reduce", digest="d" * 64, num_rows=7, context="train"
    )
    stage.note("**fine**")
    stage.warn("slow disk")
    stage.warn("slow disk")
    stage.peak_bytes = 1234
    stage.close("finished", exit_code=0)
    run.close("finished")
    figure.unlink()

    read = only_run(folder)
    (told,) = read.stages
    assert (read.status, read.kind, told.stage, told.status) == (
        "finished",
        "flow",
        "train@nn",
        "finished",
    )
    assert told.params == {"device": "cpu", "threads": 2, "dropout": 0.5}
    assert np.isnan(told.last_metrics["loss"])
    assert [event.data["step"] for event in told.of_kind("metrics")] == [0, 1]
    kept = kept_file(folder, told.of_kind("file")[0].data["sha256"])
    assert kept.read_text() == "<svg/>"
    assert told.of_kind("dataset")[0].data["rows"] == 7
    assert told.of_kind("dataset")[0].data["path"] == "data/reduce"
    assert [event.data["text"] for event in told.of_kind("warn")] == ["slow disk"]
    assert warned == ["slow disk"]
    assert (told.peak_bytes, told.exit_code) == (1234, 0)
    assert read.last_seq == last_seq(run_path(folder, read.run_id))


def test_warnings_reach_standard_error_with_their_stage(folder: Path, capsys) -> None:
    """By default a warning is one line on stderr."""
    with open_stage(folder, "reduce") as recorder:
        recorder.warn("inf in `a`")

    assert capsys.readouterr().err == "reduce: warning: inf in `a`\n"


def test_a_file_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    """A recorded file must exist."""
    run = open_run(folder, kind="flow")

    with pytest.raises(IntegrityError, match=r"none\.svg was recorded as a finished file"):
        run.file(tmp_path / "none.svg")


def test_a_torn_last_line_is_left_out_and_then_cut_off(folder: Path) -> None:
    """A kill in the middle of a line loses that line alone, and the next writer goes on."""
    run = open_run(folder, kind="flow")
    run.note("kept")
    path = run_path(folder, run.run_id)
    with path.open("ab") as file:
        file.write(b'{"seq": 3, "ti')

    assert [event.kind for event in read_run(path).events] == ["run_open", "note"]
    RunJournal(folder, run.run_id).note("after")
    assert [event.seq for event in read_run(path).events] == [1, 2, 3]
    assert len(path.read_bytes().splitlines()) == 3


def test_a_damaged_line_is_named(folder: Path) -> None:
    """Bit rot inside the file is no torn line: refused, with the line."""
    run = open_run(folder, kind="flow")
    run.note("x")
    path = run_path(folder, run.run_id)
    path.write_bytes(path.read_bytes().replace(b'"seq": 2', b'"s#q": 2'))

    with pytest.raises(IntegrityError, match=r"\.jsonl:2: not a journal event"):
        read_run(path)


def test_a_file_left_empty_by_a_kill_does_not_count(folder: Path) -> None:
    """A writer killed before its first line leaves nothing that blocks later runs."""
    folder.mkdir(parents=True)
    (folder / "0001-20260101T000000Z-00000000.jsonl").touch()

    assert list_runs(folder) == ()
    assert close_stale(folder) == ()
    assert not list(folder.glob("*.jsonl"))


def test_writers_in_parallel_number_every_event_once(folder: Path) -> None:
    """Four writers with their own handles: no line lost, no number twice."""
    run = open_run(folder, kind="flow")

    def write(name: str) -> None:
        stage = RunJournal(folder, run.run_id).stage(name)
        for step in range(25):
            stage.metrics({"loss": 1.0 / (step + 1)}, step=step)
        stage.note("x" * 200_000)
        stage.close("finished", exit_code=0)

    threads = [threading.Thread(target=write, args=(f"train@{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    lines = run_path(folder, run.run_id).read_text().splitlines()
    assert [json.loads(line)["seq"] for line in lines] == list(range(1, 1 + 1 + 4 * 28))
    assert all(len(stage.of_kind("metrics")) == 25 for stage in only_run(folder).stages)


def test_a_kill_loses_no_synced_event(folder: Path) -> None:
    """SIGKILL while writing: every whole line is there and in order."""
    program = (
        "from pathlib import Path; import sys\n"
        "from headrace.tracking.journal import open_run\n"
        "run = open_run(Path(sys.argv[1]), kind='flow')\n"
        "stage = run.stage('encode')\n"
        "for i in range(10**6):\n"
        "    stage.note(str(i)); print(i, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        for _ in range(20):
            told = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        told = int((process.stdout.read().splitlines() or [told])[-1])

    notes = [int(e.data["text"]) for e in only_run(folder).stages[0].of_kind("note")]
    assert notes == list(range(len(notes)))
    assert len(notes) >= told + 1


@pytest.mark.parametrize(
    ("error", "status", "exit_code", "run_status"),
    [
        (ResourceError("no memory"), "failed", 6, "failed"),
        (ValueError("slip"), "failed", 1, "failed"),
        (Stopped("on request"), "stopped", 75, "interrupted"),
        (KeyboardInterrupt(), "stopped", 75, "interrupted"),
    ],
)
def test_what_ends_a_stage_is_kept(folder, error, status, exit_code, run_status) -> None:
    """A stage of its own run closes it, with the exit code of what happened."""
    with pytest.raises(type(error)), open_stage(folder, "encode"):
        raise error

    run = only_run(folder)
    assert (run.stages[0].status, run.stages[0].exit_code) == (status, exit_code)
    assert (run.kind, run.status) == ("stage", run_status)


def test_stages_join_the_run_named_in_the_environment(folder: Path, monkeypatch) -> None:
    """Under the flow every stage writes to the flow's run and leaves it open."""
    run = open_run(folder, kind="flow")
    monkeypatch.setenv(RUN_ID_VARIABLE, run.run_id)
    for stage in ("extract", "publish"):
        with open_stage(folder, stage):
            pass

    read = only_run(folder)
    assert [stage.stage for stage in read.stages] == ["extract", "publish"]
    assert read.status == "running"
    assert current_run(folder).run_id == run.run_id


def test_a_run_id_of_another_form_is_refused(folder: Path, monkeypatch) -> None:
    """The variable cannot name a path."""
    monkeypatch.setenv(RUN_ID_VARIABLE, "../../etc/x")

    with pytest.raises(ConfigError, match="is not a run id"), open_stage(folder, "extract"):
        pass


def test_stages_of_one_dvc_process_share_a_run(folder: Path, tmp_path: Path) -> None:
    """First stage opens, later ones join, publish closes; the next dvc process has a new run."""
    program = tmp_path / "stage.py"
    program.write_text(STAGE_PROGRAM)
    dvc = tmp_path / "dvc"
    dvc.write_text(
        "#!/bin/sh\nfor s in extract train@nn publish; do\n"
        f'  {sys.executable} {program} "$1" $s || exit 1\ndone\n'
    )
    dvc.chmod(0o755)
    for _ in range(2):
        run_stages_under(folder, "/bin/sh", str(dvc), str(folder))

    runs = [read_run(run_path(folder, run_id)) for run_id in list_runs(folder)]
    assert [[s.stage for s in run.stages] for run in runs] == [
        ["extract", "train@nn", "publish"]
    ] * 2
    assert [(run.kind, run.status) for run in runs] == [("dvc", "finished")] * 2


def test_a_dvc_process_that_ends_early_leaves_a_run_to_close(folder: Path, tmp_path: Path) -> None:
    """Without publish the run stays open until the next command: then it is finished."""
    program = tmp_path / "stage.py"
    program.write_text(STAGE_PROGRAM)
    dvc = tmp_path / "dvc"
    dvc.write_text(f'#!/bin/sh\n{sys.executable} {program} "$1" extract\nexit 0\n')
    dvc.chmod(0o755)
    run_stages_under(folder, "/bin/sh", str(dvc), str(folder))

    assert only_run(folder).status == "running"
    assert close_stale(folder) == list_runs(folder)
    assert only_run(folder).status == "finished"
    assert close_stale(folder) == ()


def test_a_killed_flow_is_closed_as_interrupted(folder: Path) -> None:
    """Owner gone, stage open: both closed, and a live owner's run is left alone."""
    program = (
        "from pathlib import Path; import sys, os\n"
        "from headrace.tracking.journal import open_run\n"
        "open_run(Path(sys.argv[1]), kind='flow').stage('encode')\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=False)
    alive = open_run(folder, kind="flow")

    (closed,) = close_stale(folder)
    run = read_run(run_path(folder, closed))
    assert (run.status, run.stages[0].status) == ("interrupted", "interrupted")
    assert current_run(folder).run_id == alive.run_id


def test_progress_is_thinned_and_ends_with_its_stage(folder: Path) -> None:
    """A million calls are cheap; the latest state is there while the stage runs, then gone."""
    run = open_run(folder, kind="flow")
    stage = run.stage("extract")
    started = time.monotonic()
    for done in range(100_000):
        stage.progress(done, 100_000, unit="rows")
    assert time.monotonic() - started < 2
    stage.progress(100_000, 100_000, unit="rows", detail="last")

    state = read_progress(folder, run.run_id)["extract"]
    assert (state.done, state.total, state.unit, state.detail) == (100_000, 100_000, "rows", "last")
    assert last_seq(run_path(folder, run.run_id)) == 2
    stage.close("finished", exit_code=0)
    assert read_progress(folder, run.run_id) == {}


def test_looks_at_the_test_rows_are_counted_per_split(folder: Path) -> None:
    """One look per evaluation, whatever it reads for how many targets; other splits apart."""
    for digest, repeats in (("a" * 64, 2), ("a" * 64, 1), ("b" * 64, 1)):
        with open_stage(folder, "evaluate") as recorder:
            for _ in range(repeats):
                recorder.dataset("t", path=Path("d"), digest=digest, num_rows=1, context="test")
    with open_stage(folder, "train@nn") as recorder:
        recorder.dataset("t", path=Path("d"), digest="a" * 64, num_rows=1, context="test")
    with open_stage(folder, "evaluate") as recorder:
        recorder.dataset("t", path=Path("d"), digest="a" * 64, num_rows=1, context="valid")

    assert count_looks(folder, "a" * 64) == 2
    assert count_looks(folder, "b" * 64) == 1
    assert count_looks(folder, "a" * 64, until=list_runs(folder)[0]) == 1


def test_the_maker_of_an_out_is_found_by_stage_key(folder: Path) -> None:
    """The newest run that made the stage with this key, not merely the newest."""
    makers = []
    for key in ("k1", "k2"):
        run = open_run(folder, kind="flow")
        run.stage("reduce").close("finished", exit_code=0)
        run.state(lineage="l", stage_keys={"reduce": key}, unchanged={})
        run.close("finished")
        makers.append(run.run_id)

    assert made_by(folder, "reduce", key="k1") == makers[0]
    assert made_by(folder, "reduce") == makers[1]
    assert made_by(folder, "reduce", key="k3") is None
    assert made_by(folder, "encode") is None


def test_a_run_is_found_by_number_or_as_last(folder: Path) -> None:
    """People name runs by number; an unknown name says what there is."""
    first, second = (open_run(folder, kind="flow").run_id for _ in range(2))

    assert find_run(folder, "1").run_id == first
    third = open_run(folder, kind="search").run_id
    assert find_run(folder, "last").run_id == second
    assert find_run(folder, "3").run_id == third
    with pytest.raises(ConfigError, match=r"has no run '7'.*it holds 3 runs"):
        find_run(folder, "7")


def test_commit_and_uncommitted_diff_are_recorded(tmp_path: Path, monkeypatch) -> None:
    """The run names the commit, and the digest of what is not committed once there is something."""
    for variable in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / ".headrace" / "journal"

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@e", *words],
            check=True,
            capture_output=True,
        )

    git("init")
    (tmp_path / "params.yaml").write_text("version: 1\n")
    git("add", "params.yaml")
    git("commit", "-m", "first")
    open_run(folder, kind="flow")
    (tmp_path / "params.yaml").write_text("version: 1  # changed\n")
    open_run(folder, kind="flow")

    clean, dirty = (read_run(run_path(folder, run_id)) for run_id in list_runs(folder))
    assert len(clean.commit) == 40
    assert clean.dirty is None
    assert len(dirty.dirty) == 64


def test_an_orphan_of_headrace_repro_is_interrupted_even_between_two_stages(tmp_path: Path):
    """Its own door always writes how it ended, so silence means that it was killed."""
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    run = open_run(tmp_path, kind="repro", owner_pid=owner.pid)
    run.stage("extract").close("finished", exit_code=0)
    owner.kill()
    owner.wait()
    close_stale(tmp_path)
    assert read_run(run_path(tmp_path, run.run_id)).status == "interrupted"


def test_a_run_that_ended_is_gone_on_with_by_another_owner(folder: Path) -> None:
    """The new owner counts: a run that goes on is not closed because the first one is gone."""
    gone = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    first = open_run(folder, kind="search", owner_pid=gone.pid)
    first.stage("trial-0000").close("finished", exit_code=0)
    gone.kill()
    gone.wait()
    assert close_stale(folder) == (first.run_id,)
    before = only_run(folder)
    assert before.status == "interrupted"

    again = reopen_run(folder, first.run_id)
    assert only_run(folder).status == "running"
    assert close_stale(folder) == ()
    again.stage("trial-0001").close("finished", exit_code=0)
    again.close("finished")
    after = only_run(folder)
    assert (after.kind, after.status, after.opened) == ("search", "finished", before.opened)
    assert [stage.stage for stage in after.stages] == ["trial-0000", "trial-0001"]
