"""Figures of variants that handle different numbers of rows: everything is per row."""

import statistics
from collections.abc import Sequence
from typing import Literal

from benchmarks.harness import Row, Timing

Clock = Literal["cpu", "wall"]


def seconds_per_row(timing: Timing, clock: Clock = "cpu") -> list[float]:
    """Return the seconds per row of each turn; a variant returns how many rows it handled."""
    seconds = timing.cpu_s if clock == "cpu" else timing.wall_s
    return [one / timing.result for one in seconds]


def rate_row(figure: str, timing: Timing, *, clock: Clock = "cpu") -> Row:
    """Rows per second, for reading; it has no limit, for it is the machine's as much as ours."""
    rates = [1 / one for one in seconds_per_row(timing, clock)]
    unit = "rows/cpu-s" if clock == "cpu" else "rows/s"
    reference = f"{min(rates):,.0f}-{max(rates):,.0f}"
    return Row(figure, statistics.median(rates), unit, reference=reference)


def times_row(
    figure: str,
    slow: Timing,
    fast: Timing,
    *,
    clock: Clock = "cpu",
    must: float | None = None,
    goal: float | None = None,
) -> Row:
    """How many times as many seconds a row takes in ``slow`` as in ``fast``: median over turns."""
    ratios = _ratios(seconds_per_row(slow, clock), seconds_per_row(fast, clock))
    reference = f"{slow.name} / {fast.name}, per row, {clock}; {min(ratios):.1f}-{max(ratios):.1f}"
    return Row(figure, statistics.median(ratios), "x", must, goal, reference=reference)


def share_row(
    figure: str, ours: Timing, limit: Timing, *, clock: Clock = "cpu", goal: float | None = None
) -> Row:
    """Our rows per second as a share of the limit's: median over turns."""
    shares = _ratios(seconds_per_row(limit, clock), seconds_per_row(ours, clock))
    reference = f"{limit.name}, per row, {clock}; {min(shares):.2f}-{max(shares):.2f}"
    return Row(figure, statistics.median(shares), "of it", goal=goal, reference=reference)


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]
