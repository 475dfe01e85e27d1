"""Permutation importance: how much a model loses when one input is shuffled, for any kind of model.

The same measure for every kind, so their figures can be compared. It is taken on train rows that
set none of the model's weights: those of its own fold in a bag, else those it stopped on. The loss
is the squared error over the target's variance, or the log-loss; an input the model does not use
has 0, one that other inputs repeat has little. Source: Breiman 2001, "Random Forests"; Fisher et
al. 2019, "All Models are Wrong, but Many are Useful".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.evaluation.canvas import COLOURS, WIDE, Figure, panels, svg_of
from headrace.models.protocol import FittedModel, Values
from headrace.schema import Target

if TYPE_CHECKING:
    from headrace.data.encoder import EncodedBatch

Floats: TypeAlias = npt.NDArray[np.float64]
Importances: TypeAlias = dict[str, dict[str, float]]

ROWS = 1000
_SHOWN = 15  # inputs in the figure, per target
_LEAST_PROBABILITY = 1e-12


def permutation_importances(
    model: FittedModel,
    rows: "EncodedBatch | pa.Table",
    labels: Mapping[str, Floats],
    targets: Sequence[Target],
    *,
    numeric: Sequence[str],
    categories: Sequence[str],
    seed: int,
) -> Importances:
    """Return per target and input by how much the loss grows when the input's rows are shuffled.

    ``labels`` are those of ``rows``, per target (B,) values or class codes, NaN where missing. Of
    an encoded batch ``numeric`` and ``categories`` name the columns in their order; of a table they
    are the columns to shuffle.
    """
    order = np.random.default_rng(seed).permutation(len(rows))
    whole = _losses(model.predict(rows), labels, targets)
    found: Importances = {target.name: {} for target in targets}
    for name, shuffled in _shuffled(rows, order, numeric, categories):
        for target, loss in _losses(model.predict(shuffled), labels, targets).items():
            found[target][name] = loss - whole[target]
    return found


def importance_figure(importances: Importances) -> Figure:
    """Return the inputs that matter most, a panel per target."""
    most = {
        target: sorted(found.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
        for target, found in importances.items()
    }
    height = 0.8 + 0.22 * max(map(len, most.values()))
    with panels(len(most), columns=2, width=WIDE, height=height) as (canvas, axes):
        for ax, (target, ranked) in zip(axes, most.items(), strict=True):
            names = [name for name, _ in reversed(ranked)]
            ax.barh(names, [value for _, value in reversed(ranked)], color=COLOURS[0])
            ax.set_title(target, loc="left")
            ax.set_xlabel("growth of the loss when shuffled")
        svg = svg_of(canvas)
    said = "; ".join(
        f"{target}: " + ", ".join(f"{name} {value:.3g}" for name, value in ranked[:5])
        for target, ranked in most.items()
    )
    return Figure("importances", "Permutation importance", said, svg, is_wide=True)


def _shuffled(
    rows: "EncodedBatch | pa.Table",
    order: npt.NDArray[np.int64],
    numeric: Sequence[str],
    categories: Sequence[str],
) -> Iterator[tuple[str, "EncodedBatch | pa.Table"]]:
    """Yield each input's name and the rows with that input in another order."""
    if isinstance(rows, pa.Table):
        for name in (*numeric, *categories):
            place = rows.column_names.index(name)
            yield name, rows.set_column(place, name, rows[name].take(pa.array(order)))
        return
    for names, field in ((numeric, "numeric"), (categories, "codes")):
        for place, name in enumerate(names):
            copy = rows.where(np.arange(len(rows)))
            column = getattr(copy, field)[:, place]
            column[...] = column[order]
            yield name, copy


def _losses(
    values: Values, labels: Mapping[str, Floats], targets: Sequence[Target]
) -> dict[str, float]:
    """Return the mean loss of each target that has a label here."""
    losses = {}
    for target in targets:
        y = labels[target.name]
        is_known = ~np.isnan(y)
        if is_known.any():
            losses[target.name] = _LOSSES[target.task](values[target.name][is_known], y[is_known])
    return losses


def _squared(value: Floats, y: Floats) -> float:
    return float(((value - y) ** 2).mean() / (y.var() or 1.0))


def _binary(p: Floats, y: Floats) -> float:
    return float(-np.log(np.maximum(np.where(y == 1, p, 1 - p), _LEAST_PROBABILITY)).mean())


def _classes(p: Floats, y: Floats) -> float:
    true = p[np.arange(len(y)), y.astype(np.int64)]
    return float(-np.log(np.maximum(true, _LEAST_PROBABILITY)).mean())


_LOSSES: Mapping[str, Callable[[Floats, Floats], float]] = {
    "regression": _squared,
    "binary": _binary,
    "multiclass": _classes,
}
