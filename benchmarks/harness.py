"""Side-by-side measurement: interleaved variants, CPU beside wall seconds, medians with ranges.

On a shared machine wall time moves by several times, CPU time (user and system, children included)
by a few per cent. Slow drifts remain, so variants take turns and a ratio is that of two runs of one
turn: its median and range are over turns.

Use: ``args = arguments(__doc__)``; ``timings = measure({...}, repeats)``; rows from
``ratio_row(...)`` or ``Row(...)``; ``sys.exit(report(rows, args))``.
"""

import argparse
import gc
import json
import resource
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, one figure per turn, and what its last run returned."""

    name: str
    cpu_s: tuple[float, ...]
    wall_s: tuple[float, ...]
    result: Any

    def __str__(self) -> str:
        return f"{self.name:44} cpu {_spread(self.cpu_s)} s   wall {_spread(self.wall_s)} s"


@dataclass(frozen=True)
class Row:
    """One figure of a benchmark; ``must`` is required, ``goal`` hoped for, None is no limit."""

    figure: str
    value: float
    unit: str
    must: float | None = None
    goal: float | None = None
    higher_is_better: bool = True
    reference: str = ""  # what it is compared with, or the range over turns

    def is_reached(self, limit: float | None) -> bool | None:
        """Whether the value is as good as ``limit``; None without one."""
        if limit is None:
            return None
        return self.value >= limit if self.higher_is_better else self.value <= limit


def arguments(description: str | None) -> Namespace:
    """Parse ``[--quick] [--json FILE]``."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


def measure(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Run each variant once to warm up, then ``repeats`` turns of all of them; print each."""
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    wall: dict[str, list[float]] = {name: [] for name in variants}
    results: dict[str, Any] = {}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            results.pop(name, None)  # no variant runs while an earlier result of its own is held
            gc.collect()
            start_cpu, start = _cpu_seconds(), time.perf_counter()
            results[name] = run()
            if turn:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(_cpu_seconds() - start_cpu)
    timings = {
        name: Timing(name, tuple(cpu[name]), tuple(wall[name]), results[name]) for name in variants
    }
    for timing in timings.values():
        print(timing)
    return timings


def ratio_row(
    figure: str,
    slow: Timing,
    fast: Timing,
    *,
    clock: Literal["cpu", "wall"] = "cpu",
    must: float | None = None,
    goal: float | None = None,
    higher_is_better: bool = True,
) -> Row:
    """How many times as many seconds ``slow`` takes as ``fast``: the median over turns."""
    ours, theirs = (t.cpu_s if clock == "cpu" else t.wall_s for t in (fast, slow))
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    reference = f"{slow.name} / {fast.name}, {clock}; {min(ratios):.2f}-{max(ratios):.2f}"
    return Row(figure, statistics.median(ratios), "x", must, goal, higher_is_better, reference)


def report(rows: Sequence[Row], args: Namespace) -> int:
    """Print the rows, write them where ``--json`` says; return 1 if a must is missed, else 0.

    Sizes of ``--quick`` are too small to judge by: there a must is shown and does not fail.
    """
    lines = [("figure", "value", "unit", "must", "goal", "", "reference")]
    lines += [
        (
            row.figure,
            f"{row.value:.4g}",
            row.unit,
            _limit(row, row.must),
            _limit(row, row.goal),
            _verdict(row),
            row.reference,
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print()
    for line in lines:
        cells = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    is_missed = any(row.is_reached(row.must) is False for row in rows)
    return int(is_missed and not args.quick)


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):8.4f} ({min(seconds):.4f}-{max(seconds):.4f})"


def _limit(row: Row, limit: float | None) -> str:
    if limit is None:
        return ""
    return f"{'>=' if row.higher_is_better else '<='} {limit:.4g}"


def _verdict(row: Row) -> str:
    if row.is_reached(row.must) is False:
        return "MUST MISSED"
    if row.is_reached(row.goal) is False:
        return "goal missed"
    return "" if row.must is None and row.goal is None else "ok"
