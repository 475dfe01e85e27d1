"""SHAP values of trees: what each input adds to single predictions, and how much on the whole.

CatBoost computes them exactly. A bag predicts the weighted mean of its fits, so what an input adds
is the weighted mean, too. For classes both are in log-odds, where additions are meant, so they add
up to the mean of the fits' log-odds, not to the log-odds of the bag's mean probability.
"""

from collections.abc import Collection
from typing import Any, cast

import numpy as np
import pyarrow as pa

from headrace.evaluation.blend import rounded
from headrace.models.bagging import BaggedModel
from headrace.models.catboost import CatboostModel, ShapValues
from headrace.models.embedding_catboost import EmbeddingCatboostModel
from headrace.models.probe import numbers
from headrace.models.protocol import FittedModel


def shap_values(model: FittedModel, rows: pa.Table) -> dict[str, ShapValues]:
    """Return the SHAP values of trees, or of a bag of them, per target."""
    if not isinstance(model, BaggedModel):
        return cast(CatboostModel, model).shap_values(rows)
    told = [cast(CatboostModel, member).shap_values(rows) for member in model.members.values()]
    weights = list(model.weights.values())
    found = {}
    for target, first in told[0].items():
        values_BFO = [one[target].values_BFO for one in told]
        base_O = [one[target].base_O for one in told]
        found[target] = ShapValues(
            first.columns,
            np.average(values_BFO, axis=0, weights=weights),
            np.average(base_O, axis=0, weights=weights),
        )
    return found


def shap_summary(
    model: FittedModel,
    rows: pa.Table,
    *,
    categories: Collection[str],
    num_columns: int,
    num_points: int,
) -> dict[str, Any]:
    """Return per target, as JSON values, what the inputs add on the whole and to single rows.

    ``mean_abs`` is the mean absolute value per input, over several classes the sum of theirs.
    ``points`` are, of the ``num_columns`` inputs that add most, the values of the first
    ``num_points`` rows and how high the input's own value is among the rows, from 0 to 1 (None:
    missing, or a category). Of several classes there are no points.
    """
    trees = model
    if isinstance(model, EmbeddingCatboostModel):
        trees, rows = model.trees, model.features.added_to(rows)
    summaries = {}
    for target, found in shap_values(trees, rows).items():
        sums_F = np.abs(found.values_BFO).mean(axis=0).sum(axis=1).tolist()
        order = sorted(range(len(sums_F)), key=lambda f: (-sums_F[f], found.columns[f]))
        shown = [f for f in order[:num_columns] if sums_F[f] > 0 and len(found.base_O) == 1]
        summaries[target] = {
            "base": [rounded(value) for value in found.base_O.tolist()],
            "mean_abs": {found.columns[f]: rounded(sums_F[f]) for f in order},
            "points": {
                found.columns[f]: {
                    "shap": [rounded(v) for v in found.values_BFO[:num_points, f, 0].tolist()],
                    "height": _heights(rows, found.columns[f], categories)[:num_points],
                }
                for f in shown
            },
        }
    return summaries


def _heights(rows: pa.Table, name: str, categories: Collection[str]) -> list[float | None]:
    """Return each number's place among the known ones, 0 the smallest and 1 the largest."""
    if name in categories:
        return [None] * rows.num_rows
    values = numbers(rows[name])
    is_known = ~np.isnan(values)
    _, place = np.unique(values[is_known], return_inverse=True)
    heights = np.full(len(values), np.nan)
    heights[is_known] = place / max(1, place.max(initial=0))
    return [None if np.isnan(height) else round(height, 3) for height in heights.tolist()]
