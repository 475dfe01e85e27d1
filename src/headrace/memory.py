"""How much memory a run really holds, and the watch that keeps it inside the budget.

Counted are anonymous and shared pages (RssAnon + RssShmem) summed over a process and its
descendants: pages of mapped files belong to the page cache and can be dropped at any time, so they
do not count (VmHWM counts them: it read 597 MB for a process that held 12). Where /proc is absent
(macOS) the sum of resident sizes stands in, which is more than we hold, never less.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_PROC = Path("/proc")


def held_bytes(pid: int) -> int:
    """Return the bytes that process ``pid`` and its descendants hold; 0 when it is gone."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_held_by_one(process) for process in family)


class MemoryWatch:
    """Samples what a process tree holds; keeps the peak; calls back once when over the budget."""

    def __init__(
        self,
        pid: int,
        *,
        budget_bytes: int,
        on_excess: Callable[[int], None],
        interval_s: float = 0.1,
    ) -> None:
        self.peak_bytes = 0
        self._pid = pid
        self._budget_bytes = budget_bytes
        self._on_excess = on_excess
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        is_told = False
        while True:
            held = held_bytes(self._pid)
            self.peak_bytes = max(self.peak_bytes, held)
            if held > self._budget_bytes and not is_told:
                is_told = True
                self._on_excess(held)
            if self._stop.wait(self._interval_s):
                return


def format_bytes(num_bytes: float) -> str:
    """Return a size a person can read.

    >>> format_bytes(3 << 29)
    '1.5 GiB'
    """
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _held_by_one(process: psutil.Process) -> int:
    try:
        if not _PROC.is_dir():
            return int(process.memory_info().rss)
        lines = (_PROC / str(process.pid) / "status").read_text().splitlines()
    except (psutil.NoSuchProcess, psutil.ZombieProcess, FileNotFoundError, ProcessLookupError):
        return 0
    wanted = [line.split() for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
    return sum(int(words[1]) * 1024 for words in wanted)
