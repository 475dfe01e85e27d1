"""Slices of the test rows on which a model is worse than on the rest, told from chance.

A slice is a value of a category, a fifth of a number's values, or a block of time. Its mean loss
per row is compared with that of all other rows: a one-sided test with a standard error made of what
each resampling unit adds (the linearised variance of a difference of ratios), and t with the
slice's units less one as degrees of freedom. The p-values of all slices are corrected together by
Holm's method; those shown have an interval from the resamples of the units. A test by resamples
could not give p-values small enough for hundreds of slices.

A slice can be worse because its rows are harder, with nothing wrong in the model. The mean of
prediction − truth beside it tells these apart: far from 0, the model is off there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.bootstrap import Interval, Resampling, Units, interval, sums_per_unit
from headrace.evaluation.coded import Coded
from headrace.evaluation.losses import log_losses
from headrace.evaluation.metrics import Sample
from headrace.evaluation.pairs import holm
from headrace.kernels.bootstrap import resample

Floats: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

LEAST_ROWS, LEAST_UNITS = 50, 10  # of a slice, and of the rest
MOST_VALUES = 20  # of a category, the most frequent ones
SHOWN = 10
_PARTS = 5  # of a number; of time, as many as leave each enough units


@dataclass(frozen=True)
class Slice:
    """Some test rows beside the rest; ``value`` and ``rest`` are mean losses.

    ``bias`` is the mean of prediction − truth, None for several classes. ``difference`` is value −
    rest; its interval is of this slice alone, and None where the slice is not among those shown.
    """

    column: str
    label: str
    num_rows: int
    num_units: int
    value: float
    rest: float
    bias: float | None
    p_value: float
    p_holm: float
    difference: Interval | None = None


@dataclass(frozen=True)
class Slices:
    """The slices with the smallest p-values, and how many were tested.

    ``skipped`` says of a column why none of its slices was tested.
    """

    loss: str
    worst: tuple[Slice, ...]
    num_tested: int
    skipped: dict[str, str]


def loss_name(task: str) -> str:
    """Return the name of the loss per row."""
    return "absolute error" if task == "regression" else "log-loss"


def find_slices(
    sample: Sample, units: Units, columns: Sequence[Coded], resampling: Resampling
) -> Slices:
    """Test the slices of ``columns``, whose rows are those of ``sample``."""
    loss, weight, bias = _rows(sample)
    independent = units.of_row // units.block
    parts = (_PARTS, max(2, min(_PARTS, units.num_independent // (LEAST_UNITS + 1))))
    found: list[tuple[Slice, Mask]] = []
    skipped = {}
    for column in columns:
        tested = [
            (one, is_in)
            for label, is_in in _cut(column, parts[column.kind == "time"])
            if (one := _test(column.name, label, is_in, loss, weight, bias, independent))
        ]
        found += tested
        if not tested:
            skipped[column.name] = (
                f"no slice of {column.name} leaves {LEAST_ROWS} rows of {LEAST_UNITS} "
                f"{units.name}s in it and in the rest"
            )
    corrected = holm([one.p_value for one, _ in found])
    ranked = sorted(
        (
            (replace(one, p_holm=p if p is not None else 1.0), is_in)
            for (one, is_in), p in zip(found, corrected, strict=True)
        ),
        key=lambda pair: (pair[0].p_value, pair[0].column, pair[0].label),
    )[:SHOWN]
    worst = _with_intervals(ranked, loss, weight, units, resampling)
    return Slices(loss_name(sample.task), tuple(worst), len(found), skipped)


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
        "p_value": one.p_value,
        "p_holm": one.p_holm,
    }


def _rows(sample: Sample) -> tuple[Floats, Floats, Floats | None]:
    """Return loss, weight and prediction − truth of each row."""
    weight = np.ones(len(sample.truth)) if sample.weight is None else sample.weight
    if sample.task == "regression":
        error = sample.prediction - sample.truth
        return np.abs(error), weight, error
    loss = log_losses(sample.truth, sample.prediction)
    return loss, weight, sample.prediction - sample.truth if sample.task == "binary" else None


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
    column: str,
    label: str,
    is_in: Mask,
    loss: Floats,
    weight: Floats,
    bias: Floats | None,
    unit: npt.NDArray[np.int64],
) -> Slice | None:
    """Return the slice with its one-sided p-value, or None if it or the rest is too small."""
    from scipy.special import stdtr

    sides = (is_in, ~is_in)
    num_units = [len(np.unique(unit[side])) for side in sides]
    too_small = min(int(side.sum()) for side in sides) < LEAST_ROWS
    if too_small or min(num_units) < LEAST_UNITS or not all(weight[side].any() for side in sides):
        return None
    value, rest = (float(np.average(loss[side], weights=weight[side])) for side in sides)
    total = [weight[side].sum() for side in sides]
    added = np.where(is_in, (loss - value) / total[0], -(loss - rest) / total[1]) * weight
    of_unit = np.bincount(unit, weights=added)
    used = len(np.unique(unit))
    error = float(np.sqrt((of_unit**2).sum() * used / (used - 1)))
    # A slice without any spread says nothing that a test could weigh.
    p_value = float(stdtr(num_units[0] - 1, -(value - rest) / error)) if error > 0 else 1.0
    off = None if bias is None else float(np.average(bias[is_in], weights=weight[is_in]))
    num_rows = int(is_in.sum())
    return Slice(column, label, num_rows, num_units[0], value, rest, off, p_value, 1.0)


def _with_intervals(
    ranked: Sequence[tuple[Slice, Mask]],
    loss: Floats,
    weight: Floats,
    units: Units,
    resampling: Resampling,
) -> Iterator[Slice]:
    if not ranked:
        return
    rows = [weight * loss, weight]
    for _, is_in in ranked:
        rows += [weight * loss * is_in, weight * is_in]
    columns_KU = sums_per_unit(np.stack(rows), units)
    sums_BK, _ = resample(
        columns_KU,
        (),
        num_resamples=resampling.num_resamples,
        seed=resampling.seed,
        threads=resampling.threads,
        strata=units.strata,
        block=units.block,
    )
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
