"""What we start ends with us: on a stop, on a signal, and when we are killed outright."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from headrace.commands.supervise import Child, Group, run, stop_on_signals
from headrace.errors import DependencyError, ResourceError, Stopped

SLEEPER = [sys.executable, "-S", "-c", "import time; print('up', flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-S",
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); time.sleep(60)",
]


def until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def is_up(log: Path) -> bool:
    return log.is_file() and "up" in log.read_text()


def test_exit_code_output_and_time_come_back(tmp_path):
    command = [sys.executable, "-c", "import sys; print('hello'); sys.exit(3)"]

    finished = run(command, cwd=tmp_path, log=tmp_path / "logs" / "a.log", env=os.environ)

    assert finished.exit_code == 3
    assert finished.tail == "hello\n"
    assert 0 < finished.seconds < 10


def test_a_killed_command_has_128_plus_the_signal(tmp_path):
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]

    assert run(command, cwd=tmp_path, log=tmp_path / "log", env=os.environ).exit_code == 137


def test_a_program_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DependencyError, match="cannot start no-such-program"):
        run(["no-such-program"], cwd=tmp_path, log=tmp_path / "log", env=os.environ)


def test_the_tail_holds_only_what_this_command_wrote(tmp_path):
    log = tmp_path / "log"
    log.write_text("from before\n")

    finished = run([sys.executable, "-c", "print('now')"], cwd=tmp_path, log=log, env=os.environ)

    assert finished.tail == "now\n"
    assert log.read_text() == "from before\nnow\n"


def test_timeout_stops_the_whole_group(tmp_path):
    script = (
        "import subprocess, sys, time; "
        "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); "
        "open('pid', 'w').write(str(p.pid)); time.sleep(60)"
    )
    with pytest.raises(ResourceError, match=r"did not end within 1 s"):
        run(
            [sys.executable, "-S", "-c", script],
            cwd=tmp_path,
            log=tmp_path / "log",
            env=os.environ,
            timeout_s=1.0,
        )

    assert until(lambda: not psutil.pid_exists(int((tmp_path / "pid").read_text())))


def test_a_command_that_ignores_sigterm_is_killed_after_the_grace(tmp_path):
    log = tmp_path / "log"
    child = Child(STUBBORN, cwd=tmp_path, log=log, env=os.environ, grace_s=0.3)
    assert until(lambda: is_up(log))

    child.stop()

    assert child.wait(0) == 137
    assert not psutil.pid_exists(child.pid)


def test_a_background_helper_does_not_outlive_its_command(tmp_path):
    script = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); "
        "print(p.pid)"
    )
    command = [sys.executable, "-S", "-c", script]

    finished = run(command, cwd=tmp_path, log=tmp_path / "log", env=os.environ)

    assert finished.exit_code == 0
    assert until(lambda: not psutil.pid_exists(int(finished.tail)), 3)


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")
def test_a_helper_that_left_the_group_does_not_outlive_its_command_either(tmp_path):
    script = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'], "
        "start_new_session=True); print(p.pid)"
    )
    command = [sys.executable, "-S", "-c", script]

    finished = run(command, cwd=tmp_path, log=tmp_path / "log", env=os.environ)

    assert not psutil.pid_exists(int(finished.tail))


def test_the_command_is_stopped_when_its_leash_is_killed(tmp_path):
    log = tmp_path / "log"
    child = Child(SLEEPER, cwd=tmp_path, log=log, env=os.environ)
    assert until(lambda: is_up(log))

    os.kill(child._leash.pid, signal.SIGKILL)

    assert child.wait(10) == 137
    assert until(lambda: not psutil.pid_exists(child.pid))


def test_stopping_a_group_stops_every_command_and_starts_none(tmp_path):
    group = Group()
    errors = []

    def work(name):
        try:
            run(SLEEPER, cwd=tmp_path, log=tmp_path / name, env=os.environ, group=group)
        except Stopped as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    assert until(lambda: is_up(tmp_path / "a") and is_up(tmp_path / "b"))
    group.stop()
    for thread in threads:
        thread.join(10)

    assert len(errors) == 2
    with pytest.raises(Stopped):
        run(SLEEPER, cwd=tmp_path, log=tmp_path / "c", env=os.environ, group=group)


PARENT = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from headrace.commands.supervise import run, stop_on_signals
    from headrace.errors import Stopped

    here = Path(sys.argv[1])
    child = (
        "import os, subprocess, sys, time; "
        "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); "
        "open('pids', 'w').write(f'{os.getpid()} {p.pid} '); time.sleep(60)"
    )
    try:
        with stop_on_signals("stopped; run again to resume"):
            run([sys.executable, "-S", "-c", child], cwd=here, log=here / "log", env=os.environ)
    except Stopped as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
    """
)


def start_parent(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE, text=True
    )
    pids = folder / "pids"
    assert until(lambda: pids.is_file() and pids.read_text().endswith(" "))
    return parent, [int(pid) for pid in pids.read_text().split()]


def test_kill_9_of_the_parent_takes_the_children_along(tmp_path):
    parent, pids = start_parent(tmp_path)

    parent.kill()
    parent.communicate()

    assert until(lambda: not any(map(psutil.pid_exists, pids)), 5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_children_and_exits_75(tmp_path, number):
    parent, pids = start_parent(tmp_path)

    parent.send_signal(number)
    out, _ = parent.communicate(timeout=20)

    assert parent.returncode == 75
    assert "run again to resume" in out
    assert not any(map(psutil.pid_exists, pids))


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="enough"), stop_on_signals("enough"):
        os.kill(os.getpid(), signal.SIGTERM)

    assert signal.getsignal(signal.SIGTERM) is before
