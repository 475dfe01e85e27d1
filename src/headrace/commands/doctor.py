"""``headrace doctor``: whether this machine can run headrace, line by line, with a remedy each.

Importing a package proves little: with an unlucky set Prefect imports and its server does not
start. So the servers are really started, on databases of their own that are thrown away.
"""

import contextlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console

from headrace.commands.servers import free_port, mlflow_server, prefect_server
from headrace.commands.supervise import Group
from headrace.errors import DependencyError, HeadraceError
from headrace.memory import format_bytes
from headrace.project import Project

MIN_PYTHON = (3, 11)
_MIN_MEMORY = 2 << 30
_MIN_DISK = 5 << 30
# What must be set so that no tool reports home; see headrace/__init__.py, which sets them.
_TELEMETRY = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and the remedy if that is a problem."""

    name: str
    found: str
    remedy: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether there is nothing to do."""
        return not self.remedy


def doctor(project: Project | None, *, console: Console) -> None:
    """Print one line per finding as it is made.

    Raises:
        DependencyError: at the end, if there is any problem.
    """
    problems = 0
    for finding in examine(project):
        mark = "ok" if finding.is_ok else "problem"
        line = f"{mark:<8} {finding.name:<15} {finding.found}"
        if not finding.is_ok:
            problems += 1
            line += f": {finding.remedy}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if problems:
        count = "1 problem" if problems == 1 else f"{problems} problems"
        raise DependencyError(f"doctor found {count}; each line above has its remedy")


def examine(project: Project | None) -> Iterator[Finding]:
    """Yield all findings, cheap ones first; ``project`` is where disk space is looked for."""
    yield python()
    yield from packages()
    yield cores()
    yield memory()
    yield disk(project.root if project else Path.cwd())
    yield accelerator()
    yield telemetry()
    yield prefect()
    yield mlflow()


def python() -> Finding:
    """The interpreter's version."""
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < MIN_PYTHON:
        return Finding("python", found, f"install Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer")
    return Finding("python", found)


def packages(
    requirements: tuple[str, ...] | None = None,
    installed: Callable[[str], str] = metadata.version,
) -> Iterator[Finding]:
    """Each package that headrace requires, against the versions it is known to work with."""
    if requirements is None:
        requirements = tuple(metadata.requires("headrace") or ())
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        install = f'run `{sys.executable} -m pip install "{requirement}"`'
        try:
            version = installed(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "is not installed", install)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(requirement.name, version)
        else:
            wanted = str(requirement.specifier)
            yield Finding(requirement.name, f"{version}, but {wanted} is needed", install)


def cores() -> Finding:
    """The cores this process may use."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Finding("cores", str(count))


def memory() -> Finding:
    """Memory that is available now."""
    found = psutil.virtual_memory()
    told = f"{format_bytes(found.available)} available of {format_bytes(found.total)}"
    if found.available < _MIN_MEMORY:
        return Finding(
            "memory",
            told,
            f"close programs, or set `resources.memory_budget` below "
            f"{format_bytes(found.available)}",
        )
    return Finding("memory", told)


def disk(folder: Path) -> Finding:
    """Disk space where the project lies."""
    free = shutil.disk_usage(folder).free
    told = f"{format_bytes(free)} free at {folder}"
    if free < _MIN_DISK:
        return Finding("disk", told, f"free some; {format_bytes(_MIN_DISK)} is a comfortable start")
    return Finding("disk", told)


def accelerator() -> Finding:
    """Whether torch loads, and what it finds beside the CPU."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("gpu", f"torch does not load ({error})", "install torch again")
    if torch.cuda.is_available():
        return Finding("gpu", torch.cuda.get_device_name(0))
    if torch.backends.mps.is_available():
        return Finding("gpu", "Apple GPU (mps)")
    return Finding("gpu", "none; the CPU is used")


def telemetry() -> Finding:
    """Whether the tools' telemetry is off."""
    on = [name for name, value in _TELEMETRY.items() if os.environ.get(name, "").lower() != value]
    if on:
        wanted = " ".join(f"{name}={_TELEMETRY[name]}" for name in on)
        return Finding("telemetry", "not all off", f"unset what your shell sets, or set {wanted}")
    return Finding("telemetry", "off for prefect, dvc and mlflow")


def prefect() -> Finding:
    """Whether a Prefect server starts on a fresh database and answers."""
    with tempfile.TemporaryDirectory(prefix="headrace-doctor-") as folder:
        home = Project(Path(folder))
        log = home.root / "prefect.log"
        try:
            with (
                _without("PREFECT_HOME", "PREFECT_API_URL", "PREFECT_API_DATABASE_CONNECTION_URL"),
                prefect_server(home, Group(), port=free_port(), log=log) as server,
            ):
                seconds = server.child.seconds
        except HeadraceError as error:
            remedy = "the packages do not fit together: reinstall from requirements.lock"
            return Finding("prefect up", str(error), remedy)
    return Finding("prefect up", f"the server answers after {seconds:.0f} s")


def mlflow() -> Finding:
    """Whether an MLflow store can be made and its server answers."""
    from headrace.tracking.location import find_store, prepare_store

    with tempfile.TemporaryDirectory(prefix="headrace-doctor-") as folder:
        home = Project(Path(folder))
        log = home.root / "mlflow.log"
        try:
            with _without("MLFLOW_TRACKING_URI"):
                store = find_store(home.root)
                prepare_store(store)
                with mlflow_server(
                    home, Group(), port=free_port(), log=log, uri=store.uri
                ) as server:
                    seconds = server.child.seconds
        except HeadraceError as error:
            remedy = "the packages do not fit together: reinstall from requirements.lock"
            return Finding("mlflow up", str(error), remedy)
    return Finding("mlflow up", f"the server answers after {seconds:.0f} s")


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Take variables out of the environment for the block, so that a user's server stays alone."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
