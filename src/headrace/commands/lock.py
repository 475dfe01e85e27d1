"""One run at a time in one project folder.

An advisory lock on ``.headrace/run.lock``: the kernel drops it when the last process that holds it
is gone, so nothing stale can remain. Supervised commands hold it too (see ``Child``): after a
``kill -9`` the folder is free when the last process of the run is gone, and not before. The file's
text only tells people who holds it.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from rich.console import Console

from headrace.errors import DependencyError
from headrace.project import Project

_POLL_S = 0.2


@dataclass(frozen=True)
class Holder:
    """Who holds the folder: process, what it runs, since when (ISO, UTC)."""

    pid: int
    command: str
    since: str


@contextlib.contextmanager
def lock_folder(
    project: Project,
    command: str,
    *,
    wait: bool,
    on_wait: Callable[[Holder], None] = lambda _: None,
) -> Iterator[int | None]:
    """Hold the project folder for one run; yield the descriptor to hand to supervised commands.

    A process that was started, at whatever depth, by the holder belongs to its run and passes:
    it gets None.

    Raises:
        DependencyError: if another run holds the folder and ``wait`` is False.
    """
    path = _path(project)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _try(descriptor):
            holder = _holder(path)
            if holder.pid in _ancestors():
                yield None
                return
            if not wait:
                raise DependencyError(
                    f"another run holds {project.root}: `{holder.command}`, pid {holder.pid}, "
                    f"since {holder.since}; let it end, stop it, or use --wait"
                )
            on_wait(holder)
            while not _try(descriptor):
                time.sleep(_POLL_S)
        os.ftruncate(descriptor, 0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({"pid": os.getpid(), "command": command, "since": since})
        os.pwrite(descriptor, text.encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def current_holder(project: Project) -> Holder | None:
    """Who holds the folder at this moment, if anybody does."""
    path = _path(project)
    if not path.is_file():
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return None if _try(descriptor) else _holder(path)
    finally:
        os.close(descriptor)


def told_to(console: Console) -> Callable[[Holder], None]:
    """What tells a person at ``console`` who is waited for."""

    def tell(holder: Holder) -> None:
        text = f"waiting for `{holder.command}` (pid {holder.pid}, since {holder.since})"
        console.print(text, markup=False, highlight=False)

    return tell


def _path(project: Project) -> Path:
    return project.state / "run.lock"


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: Path) -> Holder:
    try:
        content = json.loads(path.read_text())
        return Holder(int(content["pid"]), str(content["command"]), str(content["since"]))
    except (OSError, ValueError, KeyError, TypeError):  # the moment between lock and text
        return Holder(0, "unknown", "just now")


def _ancestors() -> set[int]:
    with contextlib.suppress(psutil.Error):
        return {parent.pid for parent in psutil.Process().parents()} | {os.getpid()}
    return {os.getpid()}
