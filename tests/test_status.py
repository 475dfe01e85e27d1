"""What `headrace status` and the end of a run show."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from headrace.commands.display import Display
from headrace.commands.pipeline import read_dag
from headrace.commands.results import results
from headrace.commands.status import disk_bytes, print_status, status
from headrace.commands.summary import Cost, print_summary
from headrace.errors import IntegrityError
from headrace.project import Project
from headrace.storage import write_json
from headrace.tracking.history import Progress
from headrace.tracking.journal import open_run
from tests.toy import STAGES, edit, make_toy, repro_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    project = make_toy(tmp_path_factory.mktemp("toy"))
    repro_toy(project)
    return project


HOLD = """
import sys
from pathlib import Path
from headrace.commands.lock import lock_folder
from headrace.project import Project
with lock_folder(Project(Path(sys.argv[1])), "headrace run", wait=False):
    print("held", flush=True)
    sys.stdin.readline()
"""


def printed(show, *arguments, width=120) -> str:
    text = io.StringIO()
    show(*arguments, Console(file=text, width=width))
    return text.getvalue()


def test_stages_runs_and_disk(toy):
    journal = open_run(toy.journal, kind="flow")
    recorder = journal.stage("one")
    recorder.close("finished", exit_code=0)
    journal.close("finished")
    edit(toy.params, "last: {value: 4}", "last: {value: 5}")

    found = status(toy)
    text = printed(print_status, found)

    assert [(one.stage, one.state) for one in found.stages] == [
        *((name, "fresh") for name in STAGES[:3]),
        ("last", "stale"),
    ]
    assert found.stages[0].made_by == journal.run_id
    assert found.stages[0].num_bytes == disk_bytes(toy.root / "data/one") > 0
    assert {".dvc/cache", ".headrace"} <= {name for name, _ in found.stores}
    assert f"last run: {journal.run_id} (flow)" in text
    assert "1 stage is not up to date: headrace why" in text


def test_a_new_project(tmp_path):
    found = status(make_toy(tmp_path))

    assert {one.state for one in found.stages} == {"never run"}
    assert "no run yet: headrace run" in printed(print_status, found)


def test_while_a_run_goes_on_its_progress_is_shown(toy, tmp_path):
    journal = open_run(toy.journal, kind="flow")
    recorder = journal.stage("train@a")
    recorder.progress(3, 5, unit="epochs")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(toy.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"

    text = printed(print_status, status(toy))
    holder.communicate(b"\n")
    recorder.close("finished", exit_code=0)
    journal.close("finished")

    assert "running 3/5 epochs" in text
    assert f"running: `headrace run` (pid {holder.pid})" in text


def test_a_file_with_two_names_counts_once(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100_000))
    alone = disk_bytes(tmp_path)
    os.link(tmp_path / "a", tmp_path / "b")

    assert disk_bytes(tmp_path) == alone >= 100_000
    assert disk_bytes(tmp_path / "a") == alone
    assert disk_bytes(tmp_path / "none") == 0


def metric(value, verdict) -> dict:
    return {
        "auc": {"value": value, "ci_low": value - 0.01, "ci_high": value + 0.01, "verdict": verdict}
    }


def write_comparison(project: Project) -> None:
    write_json(
        project.data("evaluate") / "comparison.json",
        {
            "format": 1,
            "split_digest": "abc",
            "targets": {
                "late": {
                    "primary": "auc",
                    "unit": "day",
                    "num_units": 45,
                    "metrics": [{"name": "auc", "title": "AUC", "higher_is_better": True}],
                    "models": {
                        "baseline": metric(0.5, "worse"),
                        "nn": metric(0.69, "tied"),
                        "stack": metric(0.7, "chosen"),
                    },
                    "best": "stack",
                    "ranks": {"baseline": "worse", "nn": "tied", "stack": "best"},
                    "pairs": {
                        "auc": [
                            {"first": "nn", "second": "stack", "smallest_detectable": 0.0123},
                            {"first": "baseline", "second": "nn", "smallest_detectable": 0.9},
                        ]
                    },
                }
            },
        },
    )


def test_the_end_of_a_run_names_unit_ties_lineage_and_next_step(tmp_path):
    project = make_toy(tmp_path)
    write_comparison(project)
    journal = open_run(project.journal, kind="flow")
    recorder = journal.stage("evaluate")
    recorder.dataset("test", path=tmp_path, digest="abc", num_rows=5, context="test")
    recorder.close("finished", exit_code=0)
    journal.close("finished")
    costs = [Cost("one", "ran", 12.34, 3 << 29), Cost("last", "unchanged", 0.1, 0)]

    text = printed(print_summary, project, read_dag(project), costs)

    assert [one.model for one in results(project)] == ["stack", "nn", "baseline"]
    assert "late: AUC on test rows, 95 % interval over 45 days" in text
    assert "0.7000 [0.6900, 0.7100]" in text
    lines = [line.split("│")[1:-1] for line in text.splitlines() if "[0." in line]
    assert [[cell.strip() for cell in line][2:] for line in lines] == [
        ["chosen", "best", ""],
        ["tied", "tied", "0.0123"],
        ["worse", "worse", ""],
    ]
    assert "stack was chosen without test rows; tied with it: nn" in text
    assert "1.5 GiB" in text
    assert "budget 1.0 GiB" in text
    assert "looked at: once" in text
    assert "lineage id: " in text
    assert "headrace ui" in text
    assert "next: " in text


def test_a_damaged_comparison_is_named(tmp_path):
    project = Project(tmp_path)
    path = project.data("evaluate") / "comparison.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")

    with pytest.raises(IntegrityError, match=r"comparison\.json is not whole JSON"):
        results(project)


def test_without_a_terminal_progress_is_plain_lines():
    text = io.StringIO()
    with Display(Console(file=text)) as display:
        display.wait_for("starting")
        display.started("one")
        display.progress({"one": Progress("one", 5, 10, "rows", "", 1.0)})
        display.ended("one", "ran", 12.3, 1 << 30)
        display.ended("two", "unchanged", 0.4, 0)

    lines = text.getvalue().splitlines()
    assert lines[0] == "starting"
    assert lines[1].split() == ["one", "done", "12.3", "s", "1.0", "GiB"]
    assert lines[2].split() == ["two", "unchanged"]
    assert "\x1b" not in text.getvalue()


def test_on_a_terminal_progress_has_rows_and_their_rate():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with Display(console) as display:
        display.started("one")
        display.progress({"one": Progress("one", 0, 4000, "rows", "epoch 1", 1.0)})
        display.progress({"one": Progress("one", 3000, 4000, "rows", "epoch 2", 2.0)})
        display._bars.refresh()

    assert "3,000/4,000 rows" in text.getvalue()
    assert "3,000 rows/s" in text.getvalue()
    assert "epoch 2" in text.getvalue()
