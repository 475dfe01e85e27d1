"""What this machine can do at best, measured in a fraction of a second each.

A stage's share says where the time goes; only beside the best that disk, memory, cores and device
can do does it say whether that is much. Times are taken with the torch threads that are set, by a
clock that stands still while another process has this thread's core, and are the fast end of
several runs: other processes only add.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

_LEAST_RUNS = 4
_COPY_BYTES = 64 << 20
_READ_BYTES = 64 << 20  # of one file, taken out of the page cache and read again
_PROBES = 256  # pages that are looked for in the page cache
_FAULTS = 48  # rows that are read from the drive one by one
_PAGE = 4096


@dataclass(frozen=True)
class Disk:
    """How files come from the drive; None where the system does not let us see.

    ``fits``: share of them that memory can keep, so that only the first epoch asks the drive.
    ``cached``: share of their pages that are in memory now. ``bytes_per_s``: read in a row from the
    drive. ``page_s``: seconds until a page that is not in memory can be read, at a random place.
    """

    fits: float = 1.0
    cached: float | None = None
    bytes_per_s: float | None = None
    page_s: float | None = None


def clock() -> float:
    """Return seconds that pass for this thread: waiting for data or a device counts, a core not.

    On a machine with three processes a core, a step of 2.5 ms took 2.9 by the clock on the wall at
    the median and 6.8 at the ninth decile; by this one 2.6 and 2.7. Where Linux does not tell how
    long a thread stood in the queue for a core, this is the clock on the wall.
    """
    while True:
        queued = _queued_s()
        now = time.perf_counter()
        if queued == _queued_s():  # or the core was lost between the two
            return now - queued


def _queued_s() -> float:
    if not hasattr(_of_thread, "statistics"):
        try:
            _of_thread.statistics = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            _of_thread.statistics = None
    if _of_thread.statistics is None:
        return 0.0
    return int(os.pread(_of_thread.statistics, 64, 0).split()[1]) / 1e9


_of_thread = threading.local()


def fast_end(seconds: Sequence[float]) -> float:
    """Return the time below which a fifth of ``seconds`` lies: what a run takes undisturbed.

    >>> fast_end([3.0, 1.0, 9.0, 2.0, 5.0])
    2.0
    """
    return sorted(seconds)[len(seconds) // 5]


def time_of(
    run: Callable[[], object], *, budget_s: float, wait: Callable[[], object] = lambda: None
) -> float:
    """Return the seconds that ``run`` takes undisturbed, from runs for ``budget_s``, four or more.

    The first run warms up and does not count, unless it alone takes the whole budget.
    """
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) <= _LEAST_RUNS or time.perf_counter() - began < budget_s:
        start = clock()
        run()
        wait()
        seconds.append(clock() - start)
        if seconds[0] > budget_s:
            return seconds[0]
    return fast_end(seconds[1:])


def waiter(device: torch.device) -> Callable[[], object]:
    """Return what blocks until ``device`` has done all it was given."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return torch.mps.synchronize if device.type == "mps" else lambda: None


def gemm_flops_per_s(device: torch.device, *, budget_s: float, size: int = 1024) -> float:
    """Return float32 FLOPs per second of the product of two square matrices."""
    a_NN = torch.ones(size, size, device=device)
    out_NN = torch.empty_like(a_NN)
    seconds = time_of(
        lambda: torch.mm(a_NN, a_NN, out=out_NN), budget_s=budget_s, wait=waiter(device)
    )
    return 2 * size**3 / seconds


def copy_bytes_per_s(device: torch.device, *, budget_s: float) -> float:
    """Return bytes read and written per second when a block larger than the caches is copied."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = time_of(lambda: target.copy_(source), budget_s=budget_s, wait=waiter(device))
    return 2 * _COPY_BYTES / seconds


def smallest_op_s(device: torch.device, *, budget_s: float) -> float:
    """Return the seconds from Python through the dispatcher and back for one tiny operation."""
    one = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(200):
            one.add_(1)

    return time_of(many, budget_s=budget_s, wait=waiter(device)) / 200


def take_s(num_rows: int, row_bytes: int, *, of_bytes: int, budget_s: float) -> float:
    """Return the seconds of ``np.take`` of random rows out of ``of_bytes`` (64 MiB at most)."""
    width = max(1, row_bytes)
    source = np.ones((max(1, min(of_bytes, _COPY_BYTES) // width), width), np.uint8)
    rows = np.random.default_rng(0).integers(0, len(source), num_rows)
    out = np.empty((num_rows, width), np.uint8)
    return time_of(lambda: np.take(source, rows, axis=0, out=out, mode="clip"), budget_s=budget_s)


def upload_bytes_per_s(device: torch.device, *, budget_s: float) -> float:
    """Return bytes per second from page-locked memory to ``device``."""
    source = torch.ones(_COPY_BYTES // 4)
    if device.type == "cuda":
        source = source.pin_memory()
    target = torch.empty_like(source, device=device)
    seconds = time_of(
        lambda: target.copy_(source, non_blocking=True), budget_s=budget_s, wait=waiter(device)
    )
    return _COPY_BYTES / seconds


def read_disk(files: Sequence[Path]) -> Disk:
    """Look how much of ``files`` is in the page cache, then read part of the largest anew.

    Call it before anything maps the files: pages that are mapped stay in memory.
    """
    if not files or not hasattr(os, "posix_fadvise"):
        return Disk()
    largest = max(files, key=lambda path: path.stat().st_size)
    size = largest.stat().st_size
    if size < _PAGE:
        return Disk()
    cached = cached_share(files)
    total = sum(path.stat().st_size for path in files)
    fits = min(1.0, psutil.virtual_memory().available / total)
    with largest.open("rb", buffering=0) as file:
        number, part = file.fileno(), min(size, _READ_BYTES)
        _drop(number, part)
        began = time.perf_counter()
        while file.read(1 << 20) and file.tell() < part:
            pass
        rate = part / (time.perf_counter() - began)
        _drop(number, part)
        os.posix_fadvise(number, 0, part, os.POSIX_FADV_RANDOM)
        places = np.random.default_rng(0).integers(0, part // _PAGE, min(_FAULTS, part // _PAGE))
        began = time.perf_counter()
        for place in places.tolist():
            os.pread(number, _PAGE, place * _PAGE)
        page_s = (time.perf_counter() - began) / len(places)
    return Disk(fits, cached, rate, page_s)


def cached_share(files: Sequence[Path]) -> float | None:
    """Return the share of the files' pages that can be read without the drive, by a sample."""
    sizes = [path.stat().st_size for path in files]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    if not starts[-1] or not hasattr(os, "preadv") or not hasattr(os, "RWF_NOWAIT"):
        return None
    found, buffer = 0, bytearray(1)
    places = np.random.default_rng(0).integers(0, starts[-1], _PROBES)
    owners = np.searchsorted(starts, places, side="right") - 1
    for owner in np.unique(owners).tolist():
        number = os.open(files[owner], os.O_RDONLY)
        try:
            for place in (places[owners == owner] - starts[owner]).tolist():
                try:
                    os.preadv(number, [buffer], place, os.RWF_NOWAIT)
                    found += 1
                except BlockingIOError:
                    continue
                except OSError as error:
                    if error.errno == errno.EOPNOTSUPP:  # not every file system answers
                        return None
                    raise
        finally:
            os.close(number)
    return found / _PROBES


def _drop(number: int, num_bytes: int) -> None:
    """Let go of the pages of an open file; others may hold them, then they stay."""
    os.fsync(number)
    os.posix_fadvise(number, 0, num_bytes, os.POSIX_FADV_DONTNEED)
