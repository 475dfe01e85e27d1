"""The local servers: Prefect's and MLflow's, on the loopback address, gone when we are.

Both start through their own command lines and are supervised like stages. Prefect's database lies
in ``.prefect`` of the project, so runs of any day are seen in one history.
"""

import base64
import contextlib
import json
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from headrace.commands.pipeline import environment, last_line
from headrace.commands.supervise import Child, Group
from headrace.errors import DependencyError
from headrace.project import Project

HOST = "127.0.0.1"
PREFECT_PORT = 4200
MLFLOW_PORT = 5000
_POLL_S = 0.1
_START_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 5.0
_SERVER_GRACE_S = 10.0


@dataclass(frozen=True)
class Server:
    """A server that answers: its address and its process."""

    name: str
    url: str
    child: Child


def prefect_environment(project: Project) -> dict[str, str]:
    """Settings of Prefect's processes for this project; what the user has set stands.

    Without the server's level at CRITICAL it prints a traceback at exit now and then.
    """
    defaults = {
        "PREFECT_HOME": str(project.root / ".prefect"),
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


@contextlib.contextmanager
def prefect_api(
    project: Project, group: Group, *, log: Path, port: int | None = None
) -> Iterator[tuple[str, int | None]]:
    """Yield the URL of a Prefect API: the one the environment names, or of a server of our own.

    Ours gets ``port``, or a free one. With the URL comes a descriptor that keeps our server up for
    a command it is handed to (None where the server is not ours).

    Raises:
        DependencyError: if the named one does not answer, or ours does not start.
    """
    if named := os.environ.get("PREFECT_API_URL"):
        if not _answers(f"{named.rstrip('/')}/health"):
            raise DependencyError(
                f"the Prefect API at PREFECT_API_URL={named} does not answer; start it, "
                f"or unset PREFECT_API_URL to use a server of this project's own"
            )
        yield named, None
        return
    with prefect_server(project, group, port=port or free_port(), log=log) as server:
        yield f"{server.url}/api", server.child.hold


@contextlib.contextmanager
def prefect_server(project: Project, group: Group, *, port: int, log: Path) -> Iterator[Server]:
    """Run a Prefect server for the time of the block.

    Raises:
        DependencyError: if the port is taken or the server does not start.
    """
    command = [sys.executable, "-P", "-m", "prefect", "server", "start"]
    with _server(
        "Prefect",
        [*command, "--host", HOST, "--port", str(port)],
        health="/api/health",
        group=group,
        port=port,
        cwd=project.root,
        log=log,
        env=environment(**prefect_environment(project)),
    ) as server:
        yield server


@contextlib.contextmanager
def mlflow_server(
    project: Project, group: Group, *, port: int, log: Path, uri: str
) -> Iterator[Server]:
    """Run an MLflow server over the store ``uri`` for the time of the block.

    Without its job consumers it holds 0.5 GB in two processes instead of 2.5 GB in ten.

    Raises:
        DependencyError: if the port is taken or the server does not start.
    """
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--backend-store-uri", uri]
    with _server(
        "MLflow",
        [*command, "--host", HOST, "--port", str(port), "--workers", "1"],
        health="/health",
        group=group,
        port=port,
        cwd=project.root,
        log=log,
        env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
    ) as server:
        yield server


def require_port(port: int, name: str, *, option: str = "--port") -> None:
    """Check that ``port`` is free on the loopback address.

    Raises:
        DependencyError: if it is taken, with what to do.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise DependencyError(
                f"port {port} for {name} cannot be used ({error.strerror}); stop what holds it, "
                f"or choose another with {option}"
            ) from error


def free_port() -> int:
    """Return a port that is free at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _server(
    name: str,
    command: list[str],
    *,
    health: str,
    group: Group,
    port: int,
    cwd: Path,
    log: Path,
    env: Mapping[str, str],
) -> Iterator[Server]:
    require_port(port, name)
    url = f"http://{HOST}:{port}"
    with group.start(command, cwd=cwd, log=log, env=env, grace_s=_SERVER_GRACE_S) as child:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not _answers(f"{url}{health}"):
            code = child.wait(_POLL_S)
            if code is not None:
                raise DependencyError(
                    f"the {name} server ended at its start with exit code {code}: "
                    f"{last_line(child.tail())}; see {log}, or run `headrace doctor`"
                )
            if time.monotonic() > deadline:
                raise DependencyError(
                    f"the {name} server did not answer within {_START_TIMEOUT_S:g} s; see {log}"
                )
        yield Server(name, url, child)


def ask(url: str, body: Any = None) -> Any:
    """Ask a server for JSON; None if it does not answer or does not know."""
    data = None if body is None else json.dumps(body).encode()
    answer = _open(url, data)
    if answer is None:
        return None
    try:
        return json.loads(answer)
    except ValueError:
        return None


def _answers(url: str) -> bool:
    return _open(url, None) is not None


def _open(url: str, data: bytes | None) -> bytes | None:
    """What a server answers, or None.

    One on this machine is asked directly, whatever HTTP proxy is set; Prefect's credentials go
    along if the environment has them.
    """
    is_local = urlsplit(url).hostname in (HOST, "localhost", "::1")
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_local else []))
    headers = {"Content-Type": "application/json", **_credentials()}
    try:
        request = urllib.request.Request(url, data=data, headers=headers)
        with opener.open(request, timeout=_ANSWER_TIMEOUT_S) as response:
            return bytes(response.read())
    except (OSError, ValueError):  # no connection, no success, no URL
        return None


def _credentials() -> dict[str, str]:
    if key := os.environ.get("PREFECT_API_KEY"):
        return {"Authorization": f"Bearer {key}"}
    if pair := os.environ.get("PREFECT_API_AUTH_STRING"):
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
    return {}
