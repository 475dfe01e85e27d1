"""Slices of the test rows on which a model is worse than on the rest, told from chance.

A slice is a value of a category, a fifth of a number's values, or a block of time. Its mean loss
per row is compared with that of all other rows: a one-sided test with a standard error made of what
each resampling unit adds (the linearised variance of a difference of ratios), and t with the
slice's units less one as degrees of freedom. The p-values of all slices are corrected together by
Holm's method; those shown have an interval from the resamples of the units. A test by resamples
could not give p-values small enough for hundreds of slices.

A slice can be worse because its rows are harder, with nothing wrong in the model: where a class is
as likely as not, its log-loss is large whatever the model does. So of classes the loss in the slice
is also compared with what the model's own probabilities say it is (their entropy), by the same kind
of test, corrected over all slices: only where the loss is larger is the model off. Of values nobody
knows what to expect; there the mean of prediction − truth stands beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.bootstrap import (
    Interval,
    Resampling,
    Units,
    interval,
    resampled_sums,
    sums_per_unit,
)
from headrace.evaluation.coded import Coded
from headrace.evaluation.losses import log_losses
from headrace.evaluation.metrics import Sample
from headrace.evaluation.pairs import holm

Floats: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

LEAST_ROWS, LEAST_UNITS = 50, 10  # of a slice, and of the rest
MOST_VALUES = 20  # of a category, the most frequent ones
SHOWN = 10
_PARTS = 5  # of a number; of time, as many as leave each enough units


@dataclass(frozen=True)
class Slice:
    """Some test rows beside the rest; ``value`` and ``rest`` are mean losses.

    ``bias`` is the mean of prediction − truth, None for several classes. ``expected`` is the loss
    by the model's own probabilities, and ``p_off`` the corrected p-value that the loss is larger;
    None for values. ``difference`` is value − rest; its interval is of this slice alone, and None
    where the slice is not among those shown.
    """

    column: str
    label: str
    num_rows: int
    num_units: int
    value: float
    rest: float
    bias: float | None
    expected: float | None
    p_value: float
    p_holm: float
    p_off: float | None
    difference: Interval | None = None

    @property
    def name(self) -> tuple[str, str]:
        """Column and label."""
        return self.column, self.label

    def is_worse(self, alpha: float) -> bool:
        """Whether the loss is larger than elsewhere."""
        return self.p_holm <= alpha

    def is_off(self, alpha: float) -> bool:
        """Whether it is also larger than expected, if anything is."""
        return self.is_worse(alpha) and (self.p_off is None or self.p_off <= alpha)


@dataclass(frozen=True)
class Slices:
    """The slices to look at first: those the model is off on, then those with small p-values.

    Of ``num_tested`` slices ``num_worse`` are worse and ``num_off`` of these off. ``skipped`` says
    of a column why none of its slices was tested.
    """

    loss: str
    units: str  # what is resampled, and how many there are
    worst: tuple[Slice, ...]
    num_tested: int
    num_worse: int
    num_off: int
    skipped: dict[str, str]


def loss_name(task: str) -> str:
    """Return the name of the loss per row."""
    return "absolute error" if task == "regression" else "log-loss"


def find_slices(
    sample: Sample, units: Units, columns: Sequence[Coded], resampling: Resampling
) -> Slices:
    """Test the slices of ``columns``, whose rows are those of ``sample``."""
    rows = _rows(sample)
    independent = units.of_row // units.block
    parts = (_PARTS, max(2, min(_PARTS, units.num_independent // (LEAST_UNITS + 1))))
    found: list[tuple[Slice, Mask]] = []
    skipped = {}
    for column in columns:
        tested = [
            (one, is_in)
            for label, is_in in _cut(column, parts[column.kind == "time"])
            if (one := _test(column.name, label, is_in, rows, independent))
        ]
        found += tested
        if not tested:
            skipped[column.name] = (
                f"no slice of {column.name} leaves {LEAST_ROWS} rows of {LEAST_UNITS} "
                f"{units.name}s in it and in the rest"
            )
    corrected = holm([one.p_value for one, _ in found])
    off = holm([one.p_off for one, _ in found])
    alpha = 1 - resampling.confidence
    ranked = sorted(
        (
            (replace(one, p_holm=p if p is not None else 1.0, p_off=q), is_in)
            for (one, is_in), p, q in zip(found, corrected, off, strict=True)
        ),
        key=lambda pair: (not pair[0].is_off(alpha), pair[0].p_value, *pair[0].name),
    )
    return Slices(
        loss_name(sample.task),
        str(units),
        tuple(_with_intervals(ranked[:SHOWN], rows, units, resampling)),
        len(ranked),
        sum(one.is_worse(alpha) for one, _ in ranked),
        sum(one.is_off(alpha) for one, _ in ranked),
        skipped,
    )


def slice_json(one: Slice) -> dict[str, Any]:
    """Return a slice as JSON has it."""
    change = one.difference
    return {
        "column": one.column,
        "slice": one.label,
        "num_rows": one.num_rows,
        "num_units": one.num_units,
        "value": one.value,
        "rest": one.rest,
        "difference": one.value - one.rest,
        "ci_low": change.low if change else None,
        "ci_high": change.high if change else None,
        "bias": one.bias,
        "expected": one.expected,
        "p_value": one.p_value,
        "p_holm": one.p_holm,
        "p_off": one.p_off,
    }


@dataclass(frozen=True)
class _Rows:
    """What is known of each row, (N,): see ``Slice``."""

    loss: Floats
    weight: Floats
    bias: Floats | None
    expected: Floats | None


def _rows(sample: Sample) -> _Rows:
    weight = np.ones(len(sample.truth)) if sample.weight is None else sample.weight
    if sample.task == "regression":
        error = sample.prediction - sample.truth
        return _Rows(np.abs(error), weight, error, None)
    is_binary = sample.task == "binary"
    p = sample.prediction
    chances_NC = np.column_stack([1 - p, p]) if is_binary else p
    codes = np.arange(chances_NC.shape[1])
    losses = [log_losses(np.full(len(p), code, np.float64), p) for code in codes]
    expected = (chances_NC * np.column_stack(losses)).sum(axis=1)
    bias = p - sample.truth if is_binary else None
    return _Rows(log_losses(sample.truth, p), weight, bias, expected)


def _cut(column: Coded, num_parts: int) -> Iterator[tuple[str, Mask]]:
    """Yield name and rows of each slice of a column."""
    is_missing = np.isnan(column.values)
    if column.kind == "category":
        for code, label in enumerate(column.labels[:MOST_VALUES]):
            yield label, column.values == code
    else:
        known = column.values[~is_missing]
        values = np.unique(known)
        if len(values) <= num_parts:
            for value in values:
                yield _text(column, value), column.values == value
        elif len(known):
            shares = np.linspace(0, 1, num_parts + 1)
            edges = np.unique(np.quantile(known, shares, method="higher"))  # values of rows
            for low, high in pairwise(edges):
                is_last = high == edges[-1]
                below = column.values <= high if is_last else column.values < high
                label = (
                    f"{_text(column, low)} to {'' if is_last else 'below '}{_text(column, high)}"
                )
                yield label, (column.values >= low) & below
    if is_missing.any():
        yield "missing", is_missing


def _text(column: Coded, value: float) -> str:
    if column.kind != "time":
        return f"{value:.6g}"
    moment = np.datetime64(int(value), "us").astype("datetime64[m]")
    return str(moment).replace("T", " ").removesuffix(" 00:00")


def _test(
    column: str, label: str, is_in: Mask, rows: _Rows, unit: npt.NDArray[np.int64]
) -> Slice | None:
    """Return the slice with its one-sided p-values, or None if it or the rest is too small."""
    loss, weight = rows.loss, rows.weight
    sides = (is_in, ~is_in)
    num_units = [len(np.unique(unit[side])) for side in sides]
    too_small = min(int(side.sum()) for side in sides) < LEAST_ROWS
    if too_small or min(num_units) < LEAST_UNITS or not all(weight[side].any() for side in sides):
        return None
    value, rest = (_mean(loss, weight, side) for side in sides)
    total = [weight[side].sum() for side in sides]
    added = np.where(is_in, (loss - value) / total[0], -(loss - rest) / total[1]) * weight
    p_off = expected = None
    if rows.expected is not None:
        expected = _mean(rows.expected, weight, is_in)
        excess = loss - rows.expected
        own = np.where(is_in, (excess - (value - expected)) / total[0], 0) * weight
        p_off = _p_value(value - expected, own[is_in], unit[is_in], num_units[0])
    return Slice(
        column,
        label,
        int(is_in.sum()),
        num_units[0],
        value,
        rest,
        None if rows.bias is None else _mean(rows.bias, weight, is_in),
        expected,
        _p_value(value - rest, added, unit, num_units[0]),
        1.0,
        p_off,
    )


def _mean(values: Floats, weight: Floats, is_in: Mask) -> float:
    return float(np.average(values[is_in], weights=weight[is_in]))


def _p_value(change: float, added: Floats, unit: npt.NDArray[np.int64], num_units: int) -> float:
    """Return the chance of a mean so far above 0, by what each row has ``added`` to it."""
    from scipy.special import stdtr

    used = len(np.unique(unit))
    of_unit = np.bincount(unit, weights=added)
    error = float(np.sqrt((of_unit**2).sum() * used / (used - 1)))
    # A slice without any spread says nothing that a test could weigh.
    return float(stdtr(num_units - 1, -change / error)) if error > 0 else 1.0


def _with_intervals(
    ranked: Sequence[tuple[Slice, Mask]], rows: _Rows, units: Units, resampling: Resampling
) -> Iterator[Slice]:
    if not ranked:
        return
    columns = [rows.weight * rows.loss, rows.weight]
    for _, is_in in ranked:
        columns += [rows.weight * rows.loss * is_in, rows.weight * is_in]
    columns_KU = sums_per_unit(np.stack(columns), units)
    sums_BK = resampled_sums(columns_KU, units, resampling)
    without_UK = columns_KU.sum(axis=1) - columns_KU.T  # what bca asks for
    for number, (one, _) in enumerate(ranked):
        value = one.value - one.rest
        influence = value - _gap(without_UK, number)
        change = interval(value, _gap(sums_BK, number), units, resampling, influence=influence)
        yield replace(one, difference=change)


def _gap(sums: Floats, number: int) -> Floats:
    """Return mean loss of the slice − that of the rest."""
    own, own_weight = sums[:, 2 + 2 * number], sums[:, 3 + 2 * number]
    with np.errstate(divide="ignore", invalid="ignore"):
        gap: Floats = own / own_weight - (sums[:, 0] - own) / (sums[:, 1] - own_weight)
    return gap
