"""What every benchmark shares: interleaved timing in CPU seconds, a table, JSON rows.

Variants run in turn, round by round, so that a slow phase of the machine hits all of them; the
figure is the median over rounds of CPU seconds (user and system), which load moves far less than
wall seconds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One measured figure beside what it must reach and what it aims at."""

    figure: str
    value: float
    unit: str
    must: float | None
    goal: float | None
    higher_is_better: bool
    reference: str  # what it was measured against

    @property
    def verdict(self) -> str:
        """``ok`` if the must is met (``goal`` if the goal is too), ``MISSED`` if not."""
        sign = 1 if self.higher_is_better else -1
        if self.must is not None and sign * self.value < sign * self.must:
            return "MISSED"
        if self.goal is not None and sign * self.value >= sign * self.goal:
            return "goal"
        return "ok"


@dataclass(frozen=True)
class Timing:
    """CPU and wall seconds of one variant, one entry per round."""

    cpu_s: tuple[float, ...]
    wall_s: tuple[float, ...]

    @property
    def median_cpu_s(self) -> float:
        """Median CPU seconds."""
        return statistics.median(self.cpu_s)

    def __str__(self) -> str:
        """Median and range of CPU seconds, median of wall seconds."""
        low, high = min(self.cpu_s), max(self.cpu_s)
        wall = statistics.median(self.wall_s)
        return f"{self.median_cpu_s:9.4f} ({low:.4f}–{high:.4f})  {wall:9.4f}"


def interleave(variants: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, Timing]:
    """Run every variant once unmeasured, then ``rounds`` times in turn."""
    for run in variants.values():
        run()
    cpu_s: dict[str, list[float]] = {name: [] for name in variants}
    wall_s: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            cpu_s[name].append(time.process_time() - cpu)
            wall_s[name].append(time.perf_counter() - wall)
    return {name: Timing(tuple(cpu_s[name]), tuple(wall_s[name])) for name in variants}


def print_timings(title: str, timings: Mapping[str, Timing]) -> None:
    """Print a line per variant: CPU seconds (median and range) and wall seconds."""
    print(f"\n{title}\n{'variant':42} {'CPU s (range)':>27}  {'wall s':>9}")
    for name, timing in timings.items():
        print(f"{name:42} {timing!s:>38}")


def run_benchmark(measure: Callable[[bool], Sequence[Figure]]) -> None:
    """Parse ``[--quick] [--json FILE]``, measure, print the figures; exit 1 if a must is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer rounds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    figures = measure(options.quick)
    print(f"\n{'figure':52} {'value':>10} {'must':>8} {'goal':>8}  verdict")
    for one in figures:
        limits = " ".join(f"{'' if x is None else f'{x:g}':>8}" for x in (one.must, one.goal))
        print(f"{one.figure:52} {one.value:>8.4g} {one.unit:1} {limits}  {one.verdict}")
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in figures], indent=2) + "\n")
    sys.exit(any(one.verdict == "MISSED" for one in figures))
