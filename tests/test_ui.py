"""The local servers: both UIs answer, a taken port is named, nothing is left behind."""

import contextlib
import io
import signal
import socket
import subprocess
import sys
import urllib.request

import psutil
import pytest
from rich.console import Console

from headrace.commands.servers import HOST, ask, free_port, prefect_server, require_port
from headrace.commands.supervise import Group
from headrace.commands.ui import ui
from headrace.errors import DependencyError
from headrace.project import Project

UI = """
import sys
from pathlib import Path
from rich.console import Console
from headrace.commands.ui import ui
from headrace.project import Project
ui(
    Project(Path(sys.argv[1])),
    prefect_port=int(sys.argv[2]),
    mlflow_port=int(sys.argv[3]),
    console=Console(width=200),
    on_ready=lambda links: print("ready", flush=True),
)
"""


@contextlib.contextmanager
def taken_port():
    with socket.socket() as holder:
        holder.bind((HOST, 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_a_taken_port_is_named_with_the_option_that_helps(tmp_path):
    with taken_port() as port:
        with pytest.raises(DependencyError, match=rf"port {port} for Prefect .*--port"):
            require_port(port, "Prefect")
        with pytest.raises(DependencyError, match=rf"port {port} for MLflow .*--mlflow-port"):
            ui(
                Project(tmp_path),
                prefect_port=free_port(),
                mlflow_port=port,
                console=Console(file=io.StringIO()),
            )


def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")

    with (
        pytest.raises(
            DependencyError, match=r"Prefect server ended at its start .*doctor"
        ) as caught,
        prefect_server(Project(tmp_path), Group(), port=free_port(), log=tmp_path / "log"),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_no_answer_is_none():
    assert ask(f"http://{HOST}:{free_port()}/x") is None
    assert ask("not a url") is None


@pytest.mark.slow
def test_both_uis_open_and_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    ports = [free_port(), free_port()]
    process = subprocess.Popen(
        [sys.executable, "-c", UI, str(tmp_path), *map(str, ports)],
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    while "ready" not in lines:
        lines.append(process.stdout.readline().strip())
        assert process.poll() is None, lines
    children = psutil.Process(process.pid).children(recursive=True)
    for port in ports:
        with urllib.request.urlopen(f"http://{HOST}:{port}/", timeout=30) as page:
            assert b"<html" in page.read(2000).lower()

    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)

    assert process.returncode == 0
    assert out.strip().endswith("stopped")
    assert any(line == f"MLflow   http://{HOST}:{ports[1]}" for line in lines)
    assert any(line == f"Prefect  http://{HOST}:{ports[0]}" for line in lines)
    assert (tmp_path / ".prefect/prefect.db").is_file()
    assert not any(child.is_running() for child in children)
    for port in ports:
        require_port(port, "anything")
