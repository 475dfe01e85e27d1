"""The settings that all kinds of networks share, in a module that loads no torch."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from headrace.models.protocol import FitParams
from headrace.training.params import TrainingParams

Bounds: TypeAlias = dict[str, Annotated[tuple[float, float], Field(strict=False)]]
OutputRange: TypeAlias = Bounds | Literal["seen"]


class NetworkParams(TrainingParams, FitParams):
    """What the section of every kind of network has; the kind adds its own shape to it."""

    # Factor of each target's loss in the total; a target that is not named has 1.
    target_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    # What early stopping looks at: loss (the total), a target's own loss by its name, or one of its
    # metrics, as roc_auc_TARGET (see docs/training.md)
    stop_on: str = "loss"
    # Regression targets whose predictions never leave [low, high], by a sigmoid a little wider
    # than that: for ratings, say. seen: all of them, within the values of the rows learnt from.
    output_range: OutputRange = Field(default_factory=dict)

    @property
    def needs_stop_rows(self) -> bool:
        """A plateau of the learning rate is one of the held-back loss."""
        return self.schedule == "plateau"
