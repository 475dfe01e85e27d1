"""Figures that need a process of their own: the peak memory of an epoch, the time to a first batch.

Run as ``python -m benchmarks._fresh WHAT SOURCE ORDER [ENCODED]``; prints JSON. With ENCODED the
source is Parquet, read through the encoder there. Imports and compiled kernels are warm before
anything is counted.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from benchmarks._peers import BATCH_ROWS, drain
from benchmarks.harness import Row
from headrace.data import shards
from headrace.data.stream import BatchStream, stream
from headrace.memory import MemoryWatch, format_bytes, held_bytes

_CHECK = "_check_blocks"  # the method of shards._Mapped that compares digests


def memory_rows(figure: str, small: list[str], large: list[str], *, must: float) -> list[Row]:
    """Return the peak of an epoch of the large table, as a share of the small one's and in bytes.

    Args:
        figure: Name of the row.
        small: Arguments of this script after WHAT.
        large: The same, for the large table.
        must: Largest share allowed.
    """
    first, second = _run("memory", small), _run("memory", large)
    more = {
        size: run["peak"] - run["before"] for size, run in (("small", first), ("large", second))
    }
    reference = (
        f"{format_bytes(second['peak'])} / {format_bytes(first['peak'])}; "
        f"{second['rows']:,} / {first['rows']:,} rows; over the warm process: "
        f"{format_bytes(more['large'])} / {format_bytes(more['small'])}"
    )
    return [
        Row(figure, second["peak"] / first["peak"], "x", must, None, False, reference),
        Row(f"{figure}: over the warm process", more["large"] / 2**20, "MiB", None, None, False),
    ]


def opening_rows(small: Path, large: Path, repeats: int) -> list[Row]:
    """Return the time from opening a finished set to its first batch, and how it grows."""
    runs: dict[Path, list[dict[str, float]]] = {small: [], large: []}
    for _ in range(repeats):  # in turns
        for folder, found in runs.items():
            found.append(_run("first", [str(folder), "block"]))
    apart = {
        folder: [1e3 * (run["all"] - run["check"]) for run in found]
        for folder, found in runs.items()
    }
    whole = [1e3 * run["all"] for run in runs[large]]
    best = {folder: min(times) for folder, times in apart.items()}
    return [
        Row("open to first batch, verification apart", statistics.median(apart[large]), "ms", 50.0,
            None, False, f"wall; {min(apart[large]):.1f}-{max(apart[large]):.1f}"),
        Row("open to first batch: 4 times the rows", best[large] / best[small], "x", None, 1.5,
            False, f"{best[large]:.1f} / {best[small]:.1f} ms, the best of {repeats}"),
        Row("open to first batch, verification included", statistics.median(whole), "ms", None,
            None, False, f"wall; {min(whole):.1f}-{max(whole):.1f}"),
    ]  # fmt: skip


def opened(source: str, order: str, encoded: str | None = None) -> BatchStream:
    """Open shards, or Parquet that is encoded as it is read."""
    if encoded is None:
        return stream(source, batch_size=BATCH_ROWS, order=order)
    return stream(source, batch_size=BATCH_ROWS, order=order, encoder=encoded)


def _memory(*source: str) -> dict[str, float]:
    next(iter(opened(*source)))  # whatever is made on first use
    before = held_bytes(os.getpid())
    watch = MemoryWatch(
        os.getpid(), budget_bytes=1 << 50, on_excess=lambda _: None, interval_s=0.005
    )
    with watch:
        num_rows = drain(opened(*source))
    return {"before": before, "peak": watch.peak_bytes, "rows": num_rows}


def _first(*source: str) -> dict[str, float]:
    next(iter(opened(*source)))
    with _timed_check() as spent:
        start = time.perf_counter()
        next(iter(opened(*source)))
        seconds = time.perf_counter() - start
    return {"all": seconds, "check": sum(spent)}


@contextmanager
def _timed_check() -> Iterator[list[float]]:
    spent: list[float] = []
    check = getattr(shards._Mapped, _CHECK)

    def timed(*args: object) -> None:
        start = time.perf_counter()
        check(*args)
        spent.append(time.perf_counter() - start)

    with mock.patch.object(shards._Mapped, _CHECK, timed):
        yield spent


def _run(what: str, arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks._fresh", what, *arguments]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return json.loads(told.stdout)


if __name__ == "__main__":
    ways = {"memory": _memory, "first": _first}
    print(json.dumps(ways[sys.argv[1]](*sys.argv[2:])))
