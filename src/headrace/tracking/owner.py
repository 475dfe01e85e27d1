"""Which process owns a run: its mark, whether it still lives, and the dvc process above a stage.

A pid alone names nobody for long: pids are used again. The mark adds the start of the process in
clock ticks and the boot it belongs to, which do not move when the wall clock is set.
"""

import contextlib
import itertools
import socket
from pathlib import Path

import psutil


def process_mark(pid: int) -> str:
    """Return what tells process ``pid`` from any later one with the same pid."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{pid}:{stat.rpartition(')')[2].split()[19]}:{boot}"
    except (FileNotFoundError, ProcessLookupError):
        try:
            return f"{pid}:{psutil.Process(pid).create_time():.1f}:{socket.gethostname()}"
        except psutil.NoSuchProcess:
            return f"{pid}:gone"


def is_alive(mark: str) -> bool:
    """Tell whether the process that ``process_mark`` named still runs."""
    pid = int(mark.partition(":")[0])
    return psutil.pid_exists(pid) and process_mark(pid) == mark and not _is_zombie(pid)


def dvc_above(pid: int) -> int | None:
    """Return the pid of the nearest ``dvc`` process above ``pid``, or None."""
    try:
        parents = psutil.Process(pid).parents()
    except psutil.NoSuchProcess:
        return None
    for parent in parents:
        with contextlib.suppress(psutil.Error):
            words = parent.cmdline()[:4]
            is_module = any(pair == ("-m", "dvc") for pair in itertools.pairwise(words))
            if is_module or any(Path(word).name == "dvc" for word in words[:2]):
                return int(parent.pid)
    return None


def _is_zombie(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
