"""Permutation importance: how much a model loses when a column is shuffled, with an interval.

The same measure for every kind of model, so their figures can be compared. It is taken on rows
that set none of the model's weights. The loss is the squared error over the target's variance in
these rows, or the log-loss. A column the model does not use has 0. A column that others repeat has
little, for the model reads the others: such columns are shuffled together as a group, each row
getting the values of one other row. Source: Breiman 2001, "Random Forests"; Fisher et al. 2019,
"All Models are Wrong, but Many are Useful".

What the interval covers. The growth of the loss is a mean over pairs: a row that is judged, and the
row whose value it gets. Both are chance, and so is the shuffle that paired them. So a row counts by
what it adds as the one and as the other, and units (rows, days, groups) are drawn with replacement
by that: the interval covers which rows happened to be judged, which values happened to be dealt
out, and the shuffles, of which there are several. It is a little too wide, for the chance of the
shuffles is counted twice. In 400 trials of 300 rows, 5 shuffles, a 95 % interval covers 95.5 %; by
the judged rows alone it covers 84 %. Not covered: another training would give another model.

Legend: N rows, K shuffled things (columns or groups), R repeats, B resamples.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.evaluation.bootstrap import (
    Interval,
    Resampling,
    Units,
    counts,
    interval,
    sums_per_unit,
)
from headrace.evaluation.losses import log_losses
from headrace.models.probe import Floats, Predict, in_parts, numbers, with_rows_of
from headrace.schema import Target

Importances: TypeAlias = dict[str, dict[str, Interval]]  # by target and name

_CALL_VALUES = 6_000_000  # rows x columns that a model is asked about at a time
TOGETHER = 0.9  # columns with a larger rank correlation are shuffled together, too


@dataclass(frozen=True)
class JudgedRows:
    """Rows the model was not fitted on: inputs, labels per target (NaN where missing), units."""

    inputs: pa.Table
    labels: Mapping[str, Floats]
    weight: Floats | None
    units: Units

    def __len__(self) -> int:
        num_rows: int = self.inputs.num_rows
        return num_rows

    def weights(self, target: str) -> Floats:
        """Return what each row counts for a target: 0 where it has no label."""
        weights: Floats = np.where(np.isnan(self.labels[target]), 0.0, 1.0)
        return weights if self.weight is None else weights * self.weight


@dataclass(frozen=True)
class Alike:
    """Columns that go together: their names, and the weakest rank correlation that joins them."""

    columns: tuple[str, ...]
    correlation: float


def permutation_importances(
    predict: Predict,
    rows: JudgedRows,
    targets: Sequence[Target],
    shuffled: Mapping[str, Sequence[str]],
    *,
    repeats: int,
    resampling: Resampling,
) -> Importances:
    """Return per target and name by how much the loss grows when the name's columns are shuffled.

    ``shuffled`` are columns by the name of the importance: one column, or a group. Targets without
    a label in ``rows``, or without one that has a weight, are left out.
    """
    rng = np.random.default_rng(resampling.seed)
    orders = [rng.permutation(len(rows)) for _ in range(repeats)]
    judged = [target for target in targets if rows.weights(target.name).any()]
    whole = row_losses(predict(rows.inputs), rows.labels, judged)
    growth = {target: np.empty((repeats, len(rows), len(shuffled))) for target in whole}
    asked = list(itertools.product(enumerate(shuffled.values()), enumerate(orders)))
    # Several shuffles at once: a call takes as long for a few rows of many columns as for more.
    size = max(1, _CALL_VALUES // (len(rows) * rows.inputs.num_columns))
    for start in range(0, len(asked), size):
        together = asked[start : start + size]
        copies = [
            with_rows_of(rows.inputs, columns, order) for (_, columns), (_, order) in together
        ]
        parts = in_parts(predict(pa.concat_tables(copies)), len(copies))
        for ((k, _), (r, _)), values in zip(together, parts, strict=True):
            for target, loss in row_losses(values, rows.labels, judged).items():
                growth[target][r, :, k] = loss - whole[target]
    return {
        target: dict(
            zip(
                shuffled,
                _intervals(of_target, orders, rows.weights(target), rows.units, resampling),
                strict=True,
            )
        )
        for target, of_target in growth.items()
    }


def most_important(found: Mapping[str, Interval], count: int) -> list[str]:
    """Return the names with the largest values, at most ``count``, whose interval is above 0."""
    least = {name: one.value if one.low is None else one.low for name, one in found.items()}
    above = [name for name in found if (least[name] or 0) > 0]
    return sorted(above, key=lambda name: (-(found[name].value or 0), name))[:count]


def row_losses(
    values: Mapping[str, Floats], labels: Mapping[str, Floats], targets: Sequence[Target]
) -> dict[str, Floats]:
    """Return the loss of each row (N,), NaN where it has no label, of targets with any label."""
    losses = {}
    for target in targets:
        y = labels[target.name]
        if not np.isnan(y).all():
            losses[target.name] = _loss(values[target.name], y, target)
    return losses


def alike_columns(inputs: pa.Table, numeric: Sequence[str]) -> tuple[Alike, ...]:
    """Return the groups of numeric columns that are joined by rank correlations above TOGETHER.

    Missing values count as the mean rank. Categories have no order and are not looked at.
    """
    ranks = {name: _ranks(numbers(inputs[name])) for name in numeric}
    names = [name for name, rank_N in ranks.items() if rank_N.any()]
    if len(names) < 2:
        return ()
    scaled_KN = np.array([ranks[name] / np.linalg.norm(ranks[name]) for name in names])
    correlation = np.abs(np.einsum("in,jn->ij", scaled_KN, scaled_KN))
    group_of = list(range(len(names)))
    weakest: dict[int, float] = {}
    for i, j in np.argwhere(np.triu(correlation, 1) > TOGETHER).tolist():
        kept, joined = sorted((group_of[i], group_of[j]))
        group_of = [kept if group == joined else group for group in group_of]
        found = (correlation[i, j], weakest.get(kept, 1.0), weakest.pop(joined, 1.0))
        weakest[kept] = float(min(found))
    return tuple(
        Alike(tuple(name for name, own in zip(names, group_of, strict=True) if own == group), least)
        for group, least in sorted(weakest.items())
    )


def _intervals(
    growth_RNK: Floats,
    orders: Sequence[npt.NDArray[np.int64]],
    weight_N: Floats,
    units: Units,
    resampling: Resampling,
) -> list[Interval]:
    """Return each thing's mean over pairs of rows, with its interval."""
    growth_RNK = np.nan_to_num(growth_RNK)
    total = weight_N.sum()
    # einsum, for a product by BLAS depends on the number of threads in its last digits
    point_K = np.einsum("n,rnk->k", weight_N, growth_RNK) / (len(orders) * total)
    share_NK = np.zeros_like(growth_RNK[0])
    for growth_NK, order in zip(growth_RNK, orders, strict=True):
        of_pair_NK = weight_N[:, None] * (growth_NK - point_K)
        share_NK += of_pair_NK  # as the row that is judged
        share_NK[order] += of_pair_NK  # as the row whose value was dealt out
    share_KU = sums_per_unit(share_NK.T / (len(orders) * total), units)
    counts_BU = counts(units, resampling, first=0, num_resamples=resampling.num_resamples)
    means_BK = point_K + np.einsum("bu,ku->bk", counts_BU.astype(np.float64), share_KU)
    return [
        interval(float(point), means_B, units, resampling)
        for point, means_B in zip(point_K, means_BK.T, strict=True)
    ]


def _loss(values: Floats, y: Floats, target: Target) -> Floats:
    if target.task == "regression":
        variance = float(np.nanvar(y)) or 1.0
        squared: Floats = (values - y) ** 2 / variance
        return squared
    return log_losses(y, values)


def _ranks(values: Floats) -> Floats:
    """Return mean ranks of the known values about 0, and 0 for missing ones."""
    ranks = np.zeros(len(values))
    is_known = ~np.isnan(values)
    if is_known.any():
        _, place, counts = np.unique(values[is_known], return_inverse=True, return_counts=True)
        of_value = np.cumsum(counts) - (counts - 1) / 2
        ranks[is_known] = of_value[place] - (is_known.sum() + 1) / 2
    return ranks
