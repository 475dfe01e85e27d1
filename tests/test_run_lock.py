"""One run at a time in a folder: the second refuses at once and says who, or waits."""

import os
import subprocess
import sys
import threading
import time

import pytest

from headrace.commands.lock import lock_folder
from headrace.commands.supervise import Child
from headrace.errors import DependencyError
from headrace.project import Project

HOLD = """
import sys, time
from pathlib import Path
from headrace.commands.lock import lock_folder
from headrace.project import Project
with lock_folder(Project(Path(sys.argv[1])), "headrace run", wait=False):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(folder, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_run_refuses_at_once_and_names_the_first(tmp_path):
    first = hold(tmp_path, 60)
    started = time.monotonic()
    told = rf"another run holds .*`headrace run`, pid {first.pid}, since \d{{4}}-.*--wait"
    with (
        pytest.raises(DependencyError, match=told) as caught,
        lock_folder(Project(tmp_path), "headrace repro", wait=False),
    ):
        pass

    assert caught.value.exit_code == 4
    assert time.monotonic() - started < 2
    first.kill()
    first.communicate()


def test_a_killed_holder_leaves_nothing_behind(tmp_path):
    first = hold(tmp_path, 60)
    first.kill()
    first.communicate()

    with lock_folder(Project(tmp_path), "headrace run", wait=False) as held:
        assert held is not None


def test_with_wait_the_second_starts_when_the_first_has_ended(tmp_path):
    first = hold(tmp_path, 0.5)
    told = []

    with lock_folder(Project(tmp_path), "headrace run", wait=True, on_wait=told.append):
        assert first.poll() is not None or first.wait(5) == 0
    first.communicate()

    assert told[0].pid == first.pid


def test_what_a_run_starts_belongs_to_it(tmp_path):
    with lock_folder(Project(tmp_path), "headrace run", wait=False):
        done = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path), "0"], capture_output=True, check=True
        )

    assert done.stdout == b"held\n"


def test_the_folder_stays_held_until_supervised_commands_are_gone(tmp_path):
    project = Project(tmp_path)
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    with lock_folder(project, "headrace run", wait=False) as held:
        child = Child(command, cwd=tmp_path, log=tmp_path / "log", env=os.environ, held=[held])
    other = threading.Thread(target=child.stop)

    probe = [sys.executable, "-c", HOLD, str(tmp_path), "0"]
    (tmp_path / ".headrace/run.lock").write_text('{"pid": 999999999, "command": "x", "since": "y"}')
    refused = subprocess.run(probe, capture_output=True, text=True, check=False)
    other.start()
    other.join()
    free = subprocess.run(probe, capture_output=True, text=True, check=False)

    assert "DependencyError" in refused.stderr
    assert free.returncode == 0
