"""A kind of model that chooses its inputs by the labels: preparation that must be inside a loop."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from headrace.data.encoder import EncodedBatch
from headrace.data.shards import open_shards
from headrace.models.protocol import FitParams, TrainViews, Values
from headrace.schema import Target


class SelectedParams(FitParams):
    bag: Literal["none"] = "none"
    num_inputs: int = Field(default=10, ge=1)


@dataclass(frozen=True)
class SelectedModel:
    """The mean of the chosen inputs, each with the sign of its correlation with the label."""

    target: Target
    signs: np.ndarray
    kind: str = "selected"
    inputs: Literal["encoded"] = "encoded"

    @property
    def summary(self) -> dict[str, Any]:
        return {}

    def predict(self, rows: EncodedBatch) -> Values:
        score = np.nan_to_num(rows.numeric).astype(np.float64) @ self.signs
        return {self.target.name: 1 / (1 + np.exp(-score))}


def choose_inputs(x: np.ndarray, y: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    """Return the signs of the ``count`` inputs that go best with ``y``, 0 for the others."""
    centred = x - np.average(x, axis=0, weights=weight)
    above = y - np.average(y, weights=weight)
    slope = (weight * above) @ centred / np.sqrt(weight @ centred**2)
    signs = np.zeros(x.shape[1])
    chosen = np.argsort(-np.abs(slope))[:count]
    signs[chosen] = np.sign(slope[chosen])
    return signs


def fit(views: TrainViews, params: SelectedParams, **_: Any) -> SelectedModel:
    shards = open_shards(views.encoded, "train")
    rows = shards.slice(0, shards.num_rows)
    rows = rows.where(views.is_learnt(rows.fold, rows.row_id))
    x, y = np.nan_to_num(rows.numeric).astype(np.float64), rows.targets[:, 0]
    weight = rows.weight.astype(np.float64)
    return SelectedModel(views.contract.targets[0], choose_inputs(x, y, weight, params.num_inputs))
