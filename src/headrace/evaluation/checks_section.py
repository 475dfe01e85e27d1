"""The sanity checks in the report: verdicts, drifting columns, and the worst slices."""

from collections.abc import Mapping, Sequence

from headrace.evaluation.blend import rounded
from headrace.evaluation.drift import Shift
from headrace.evaluation.findings import Finding, counted, worst_first
from headrace.evaluation.page import Cell, Chart, Section, Table
from headrace.evaluation.slices import Slice, Slices

_DRIFTING = 15


def data_section(
    findings: Sequence[Finding], shifts: Mapping[tuple[str, str], Sequence[Shift]], note: str
) -> Section:
    """Return the checks of the table; ``note`` says which rows were looked at."""
    tables = [_table("Checks of the table", findings)]
    if drifting := [_shift_row(pair, one) for pair in shifts for one in shifts[pair][:_DRIFTING]]:
        tables.append(
            Table(
                "Columns that shift most",
                ("splits", "column", "stability index", "p", "Kolmogorov–Smirnov distance"),
                tuple(drifting),
                "Stability index over deciles or values, less what chance gives: below 0.1 stable, "
                "from 0.25 on a shift. p: chi-squared, corrected for rows of one unit being alike.",
            )
        )
    return Section(
        anchor="data-checks",
        title="Is the data sound?",
        text=(f"{counted(findings)}. {note}",),
        tables=tuple(tables),
        brief=counted(findings),
    )


def target_section(
    findings: Sequence[Finding], slices: Slices, *, chosen: str, confidence: float
) -> Section:
    """Return the checks of one target and its models, and the slices of the chosen one."""
    return Section(
        anchor="checks",
        title="Sanity checks and slices",
        text=(counted(findings) + ".",),
        tables=(
            _table("Checks of the target and its predictions", findings),
            *_slices_tables(slices, chosen, confidence),
        ),
        charts=_slices_charts(slices, confidence),
        brief=counted(findings),
    )


def _table(title: str, findings: Sequence[Finding]) -> Table:
    rows = tuple(
        (one.verdict, one.check, one.subject, one.sentence) for one in worst_first(findings)
    )
    return Table(title, ("verdict", "check", "of", "finding"), rows)


def _shift_row(pair: tuple[str, str], one: Shift) -> tuple[Cell, ...]:
    index, p_value, distance = (rounded(x) for x in (one.index, one.p_value, one.distance))
    return " → ".join(pair), one.column, index, p_value, distance


def _slices_tables(slices: Slices, chosen: str, confidence: float) -> tuple[Table, ...]:
    if not slices.worst:
        return ()
    is_expected = any(one.expected is not None for one in slices.worst)
    headings = (
        "slice",
        "the model is",
        "rows",
        f"{slices.loss} there",
        *(("expected there",) if is_expected else ()),
        "elsewhere",
        "difference",
        "low",
        "high",
        "prediction − truth",
        "p, Holm",
    )
    rows = tuple(_slice_row(one, confidence, is_expected=is_expected) for one in slices.worst)
    note = (
        f"{len(rows)} of {slices.num_tested} slices tested: first those the model is off on, then "
        f"by p-value, one-sided and corrected over all by Holm's method. The "
        f"{100 * confidence:.4g} % interval is of one slice alone, from resamples of "
        f"{slices.units}."
    )
    if is_expected:
        note += (
            " Expected there: by the model's own probabilities. Worse: the rows are harder; off: "
            "significantly more is lost than expected, too."
        )
    return (Table(f"Slices on which {chosen} is worst", headings, rows, note),)


def _slice_row(one: Slice, confidence: float, *, is_expected: bool) -> tuple[Cell, ...]:
    change = one.difference
    numbers = (
        one.value,
        *((one.expected,) if is_expected else ()),
        one.rest,
        one.value - one.rest,
        change.low if change else None,
        change.high if change else None,
        one.bias,
        one.p_holm,
    )
    told = (": ".join(one.name), _said(one, confidence), one.num_rows)
    return (*told, *(rounded(number) for number in numbers))


def _said(one: Slice, confidence: float) -> str:
    alpha = 1 - confidence
    if one.p_off is not None and one.is_off(alpha):
        return "off"
    return "worse" if one.is_worse(alpha) else "alike"


def _slices_charts(slices: Slices, confidence: float) -> tuple[Chart, ...]:
    shown = [
        (one, one.difference.low, one.difference.high)
        for one in reversed(slices.worst)
        if one.difference and one.difference.low is not None and one.difference.high is not None
    ]
    if not shown:
        return ()
    percent = f"{100 * confidence:.4g} %"
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [rounded(one.value - one.rest) for one, _, _ in shown],
        "y": [": ".join(one.name) for one, _, _ in shown],
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [rounded(high - one.value + one.rest) for one, _, high in shown],
            "arrayminus": [rounded(one.value - one.rest - low) for one, low, _ in shown],
        },
        "marker": {
            "symbol": [
                "circle" if one.is_worse(1 - confidence) else "circle-open" for one, _, _ in shown
            ],
            "size": 9,
        },
        "showlegend": False,
    }
    chart = Chart(
        name="slices",
        title=f"Slices: {slices.loss} there − elsewhere, with {percent} intervals",
        alternative="; ".join(
            f"{': '.join(one.name)}: {one.value - one.rest:.4g}, {_said(one, confidence)}"
            for one in slices.worst
        ),
        traces=(trace,),
        layout={
            "xaxis": {
                "title": {"text": f"difference of {slices.loss}"},
                "rangemode": "tozero",
                "zeroline": True,
            },
            "yaxis": {"title": {"text": "slice"}, "type": "category", "automargin": True},
            "height": 140 + 28 * len(shown),
        },
        is_wide=True,
    )
    return (chart,)
