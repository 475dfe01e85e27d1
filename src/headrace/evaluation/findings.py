"""What a sanity check says: a verdict, and a sentence that tells what was found and what to do.

Verdicts: ok; warn, look at it when there is time; bad, do not trust the results before it is
understood; unknown, it could not be checked, and the sentence says why.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from headrace.evaluation.blend import rounded
from headrace.evaluation.bootstrap import Units

CheckVerdict = Literal["ok", "unknown", "warn", "bad"]
VERDICTS: tuple[CheckVerdict, ...] = ("bad", "warn", "unknown", "ok")


@dataclass(frozen=True)
class Finding:
    """One check's result; ``subject`` is the model, the column or the splits it is about."""

    check: str
    subject: str
    verdict: CheckVerdict
    sentence: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # numbers and texts, as JSON has them

    def to_json(self) -> dict[str, Any]:
        """Return the entry of checks.json."""
        return {
            "check": self.check,
            "subject": self.subject,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "facts": _rounded(self.facts),
        }


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings by verdict, those of one verdict in their order."""
    return sorted(findings, key=lambda one: VERDICTS.index(one.verdict))


def counted(findings: Iterable[Finding]) -> str:
    """Return how many findings there are of each verdict.

    >>> counted([Finding("a", "", "ok", ""), Finding("b", "", "bad", "")])
    '1 bad, 0 warn, 0 unknown, 1 ok'
    """
    found = [one.verdict for one in findings]
    return ", ".join(f"{found.count(verdict)} {verdict}" for verdict in VERDICTS)


def rows_text(num_rows: int, kind: str, units: Units) -> str:
    """Return how many rows there are, and of how many units if those are not rows.

    >>> import numpy as np
    >>> rows_text(1200, "test rows", Units("day", np.arange(1200) % 30, 30))
    '1,200 test rows, 30 days'
    """
    said = f"{num_rows:,} {kind}"
    return said if units.name == "row" else f"{said}, {units}"


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return rounded(value) if isinstance(value, float) else value
