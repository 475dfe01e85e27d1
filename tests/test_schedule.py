"""Runs by the clock: a real Prefect server schedules, runs, and skips what did not change."""

import signal
import sqlite3
import subprocess
import sys
import time

import psutil
import pytest
from rich.console import Console

from headrace.commands.schedule import deployment_name, local_zone, require_cron, schedule
from headrace.commands.servers import ask, free_port
from headrace.errors import ConfigError
from headrace.project import Project
from tests.toy import make_toy, shared_prefect_home

SERVE = """
import sys
from pathlib import Path
from rich.console import Console
from headrace.commands.schedule import schedule
from headrace.project import Project
schedule(
    Project(Path(sys.argv[1])),
    cron="0 3 * * *",
    timezone="Europe/Berlin",
    port=int(sys.argv[2]),
    console=Console(width=200),
    on_ready=lambda found: print("ready", found.next_run, flush=True),
)
"""


@pytest.mark.parametrize("cron", ["every day", "61 * * * *", "0 3 * *", ""])
def test_a_wrong_cron_expression_is_refused_before_anything_starts(cron):
    with pytest.raises(ConfigError, match=r"is not a cron expression .*0 3 \* \* \*"):
        require_cron(cron)


def test_a_wrong_time_zone_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"'Europe/Berln' is not .*nearest name: Europe/Berlin"):
        schedule(
            Project(tmp_path),
            cron="0 3 * * *",
            timezone="Europe/Berln",
            console=Console(quiet=True),
        )


def test_the_local_zone_follows_tz(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert local_zone() == "Asia/Tokyo"


def test_two_folders_have_two_deployments(tmp_path):
    names = {deployment_name(Project(tmp_path / name)) for name in ("a b", "c/a b")}

    assert len(names) == 2
    assert all(name.startswith("a-b-") for name in names)


@pytest.mark.slow
def test_a_schedule_runs_then_skips_then_stops_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(shared_prefect_home()))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    project = make_toy(tmp_path / "toy")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(project.root), str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    while not any(line.startswith("ready") for line in lines):
        lines.append(process.stdout.readline().strip())
        assert process.poll() is None, lines
    children = psutil.Process(process.pid).children(recursive=True)
    api = f"http://127.0.0.1:{port}/api"
    name = deployment_name(project)
    deployment = ask(f"{api}/deployments/name/headrace/{name}")

    states = [run_now(api, deployment["id"]) for _ in range(2)]

    assert "scheduled: `0 3 * * *` (Europe/Berlin), next run due" in "".join(lines)
    assert lines[-1].split()[1][11:19] in ("01:00:00", "02:00:00")  # three in Berlin, in UTC
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert [state["name"] for state in states] == ["Completed", "Skipped"]
    assert states[1]["message"] == "skipped, data unchanged"
    assert (project.root / "data/last/x.txt").is_file()

    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=90)

    assert process.returncode == 0
    assert "the schedule is stopped" in out
    assert not any(child.is_running() for child in children)
    assert paused(name)


def run_now(api: str, deployment: str) -> dict:
    made = ask(f"{api}/deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        state = ask(f"{api}/flow_runs/{made['id']}")["state"]
        if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return state
        time.sleep(0.5)
    raise AssertionError(f"the run did not end: {state}")


def paused(name: str) -> bool:
    """Whether the deployment is paused and the server has dropped its scheduled runs."""
    connection = sqlite3.connect(shared_prefect_home() / "prefect.db")
    try:
        found = connection.execute(
            "select d.paused, (select count(*) from flow_run r where r.deployment_id = d.id "
            "and r.state_type = 'SCHEDULED') from deployment d where d.name = ?",
            (name,),
        ).fetchall()
    finally:
        connection.close()
    return found == [(1, 0)]
