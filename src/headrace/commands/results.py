"""What a run has to show: the table of models with intervals, the stages' cost, where to look next.

Read from the outs of ``evaluate`` and from the journal; nothing is computed here.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.project import Project
from headrace.storage import read_json


@dataclass(frozen=True)
class Result:
    """One model's primary metric on one target, on test rows."""

    target: str
    metric: str
    model: str
    value: float | None
    low: float | None
    high: float | None
    verdict: str  # chosen, tied, better, worse, unknown
    rank: str  # best, tied (with the best, all pairs tested), worse, untested
    detectable: float | None  # smallest difference to the best that these rows would find
    unit: str
    num_units: int

    @property
    def interval(self) -> str:
        """The value with its interval, to two digits of the interval's width."""
        return interval_text(self.value, self.low, self.high)


def interval_text(value: float | None, low: float | None, high: float | None) -> str:
    """Return a value with its interval.

    >>> interval_text(0.69281, 0.6621, 0.7333)
    '0.6928 [0.6621, 0.7333]'
    """
    if value is None:
        return "undefined"
    # As many decimals for the bounds as four digits of the value need.
    decimals = max(0, 3 - math.floor(math.log10(abs(value) or 1.0)))
    if low is None or high is None:
        return f"{value:.{decimals}f}"
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def results(project: Project) -> list[Result]:
    """Return the primary metric of every model and target, best first; empty before evaluate."""
    path = project.data("evaluate") / "comparison.json"
    if not path.is_file():
        return []
    content = read_json(path)
    found = []
    for target, entry in content.get("targets", content).items():
        if not isinstance(entry, dict) or "primary" not in entry:
            continue
        primary = next(m for m in entry["metrics"] if m["name"] == entry["primary"])
        own = [_result(target, entry, primary, model) for model in entry["models"]]
        sign = -1.0 if primary["higher_is_better"] else 1.0
        found += sorted(own, key=lambda r: float("inf") if r.value is None else sign * r.value)
    return found


def report(project: Project) -> Path | None:
    """The path of the report, if there is one."""
    path = project.data("evaluate") / "report.html"
    return path if path.is_file() else None


def looks(project: Project) -> int | None:
    """How often ``evaluate`` has read this split's test rows, or None if nothing tells."""
    from headrace.tracking.history import count_looks

    path = project.data("evaluate") / "comparison.json"
    digest = read_json(path).get("split_digest") if path.is_file() else None
    return count_looks(project.journal, str(digest)) if digest else None


def looks_sentence(project: Project) -> str:
    """How often the test rows have been read, as every command that reads them ends."""
    count = looks(project)
    if not count:
        return "test rows of this split looked at: unknown, the journal was removed"
    return f"test rows of this split looked at: {'once' if count == 1 else f'{count} times'}"


def _detectable(entry: Any, model: str) -> float | None:
    for pair in entry["pairs"][entry["primary"]]:
        if {pair["first"], pair["second"]} == {model, entry["best"]}:
            found: float | None = pair["smallest_detectable"]
            return found
    return None


def _result(target: str, entry: Any, primary: Any, model: str) -> Result:
    one = entry["models"][model][primary["name"]]
    return Result(
        target=target,
        metric=primary["title"],
        model=model,
        value=one.get("value"),
        low=one.get("ci_low"),
        high=one.get("ci_high"),
        verdict=one["verdict"],
        rank=entry["ranks"][model],
        detectable=_detectable(entry, model),
        unit=entry["unit"],
        num_units=entry["num_units"],
    )
