"""The pairs of models as files and for the report: the table, the forest, and what they say."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from headrace.evaluation.blend import rounded
from headrace.evaluation.comparison import Comparison
from headrace.evaluation.page import Cell, Chart, Section, Table
from headrace.evaluation.pairs import POWER, Pair

PAIRS = "pairs.csv"
_COLUMNS = (
    "target",
    "metric",
    "first",
    "second",
    "difference",
    "ci_low",
    "ci_high",
    "p_value",
    "p_holm",
    "smallest_detectable",
)


def pairs_csv(comparisons: Iterable[Comparison]) -> str:
    """Return every pair of every target and metric as lines of a table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for comparison in comparisons:
        for metric, pairs in comparison.pairs.items():
            for pair in pairs:
                writer.writerow([comparison.target, metric, *_cells(pair)])
    return text.getvalue()


def pair_section(comparison: Comparison) -> Section:
    """Return the part of the report that compares every pair of models of one target."""
    pairs = comparison.pairs[comparison.primary]
    title = comparison.primary_metric.title
    percent = f"{100 * comparison.confidence:.4g} %"
    table = Table(
        title=f"Pairs of models by {title}",
        headings=(
            "first",
            "second",
            "difference",
            "low",
            "high",
            "p",
            "p (Holm)",
            "smallest detectable",
            "told apart",
        ),
        rows=tuple((*_cells(pair), _said(pair, comparison)) for pair in pairs),
        note=(
            f"Difference: first − second, with its {percent} interval. p: two-sided bootstrap "
            f"test on the paired resamples of {comparison.num_units:,} {comparison.unit}s; Holm: "
            f"corrected over all {len(pairs)} pairs. Smallest detectable: the true difference that "
            f"a test of this one pair finds in {POWER:.0%} of such test sets."
        ),
    )
    return Section(
        anchor="pairs",
        title="Every pair of models",
        text=(_sentence(comparison),),
        tables=(table,),
        charts=(_forest(comparison, pairs),) if pairs else (),
    )


def _sentence(comparison: Comparison) -> str:
    if comparison.best is None:
        return "No model has a value of the primary metric, so none is the best."
    title = comparison.primary_metric.title
    others = [model for model in comparison.tied_with_best if model != comparison.best]
    ties = (
        f"these rows cannot tell it from {', '.join(others)}"
        if others
        else "no other model is tied with it"
    )
    return (
        f"Best {title} on these rows: {comparison.best}; {ties} "
        f"(Holm-corrected over all pairs). Test rows do not choose: the chosen model stays "
        f"{comparison.chosen}."
    )


def _forest(comparison: Comparison, pairs: Sequence[Pair]) -> Chart:
    known = [pair for pair in reversed(pairs) if pair.difference.value is not None]
    title = comparison.primary_metric.title
    values = [rounded(pair.difference.value) for pair in known]
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "x": values,
        "y": [f"{pair.first} − {pair.second}" for pair in known],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [_gap(pair.difference.value, pair.difference.high) for pair in known],
            "arrayminus": [_gap(pair.difference.low, pair.difference.value) for pair in known],
        },
        "marker": {
            "symbol": [
                "circle" if _said(pair, comparison) == "yes" else "circle-open" for pair in known
            ],
            "size": 9,
        },
        "hovertext": [f"p, Holm: {pair.p_holm:.3g}" if pair.p_holm else "" for pair in known],
        "showlegend": False,
    }
    percent = f"{100 * comparison.confidence:.4g} %"
    apart = [f"{p.first} − {p.second}" for p in pairs if _said(p, comparison) == "yes"]
    return Chart(
        name="pairs",
        title=f"Differences of {title} with {percent} intervals",
        alternative=(
            f"Filled: told apart once corrected for all {len(pairs)} pairs "
            f"({', '.join(apart) or 'none'}). Open: not told apart, or without a test."
        ),
        traces=(trace,),
        layout={
            "xaxis": {"title": {"text": f"difference of {title}"}, "zeroline": True},
            "yaxis": {"title": {"text": "pair of models"}, "type": "category", "automargin": True},
            "height": 140 + 28 * len(known),
        },
        is_wide=True,
    )


def _said(pair: Pair, comparison: Comparison) -> str:
    if pair.p_holm is None:
        return "no test"
    return "yes" if pair.p_holm <= 1 - comparison.confidence else "no"


def _cells(pair: Pair) -> tuple[Cell, ...]:
    change = pair.difference
    return (
        pair.first,
        pair.second,
        rounded(change.value),
        rounded(change.low),
        rounded(change.high),
        rounded(pair.p_value),
        rounded(pair.p_holm),
        rounded(pair.detectable),
    )


def _gap(low: float | None, high: float | None) -> float | None:
    return None if low is None or high is None else rounded(high - low)
