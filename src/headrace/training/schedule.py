"""The learning rate of each update. Pure: steps and settings in, a number out.

Every schedule begins with a linear warm-up and never goes below ``rate_floor`` × ``learning_rate``.
What falls by plan falls over ``max_epochs``, so a run that stops early has not come to the end of
it. A constant rate from the first update on is ``schedule: constant`` with ``warmup_steps: 0``.
"""

import math
from dataclasses import dataclass

from headrace.training.params import Plateau, TrainingParams

_WARMUP_STEPS = 100
_CYCLE_RISE = 0.3  # of all updates; Smith & Topin 2018, "Super-Convergence"


def learning_rate(
    step: int, total_steps: int, params: TrainingParams, *, plateau_share: float = 1.0
) -> float:
    """Return the learning rate of update ``step`` (from 0) of at most ``total_steps``.

    ``plateau_share`` is what the schedule ``plateau`` has left of it.
    """
    warmup_steps = _warmup_steps(total_steps, params)
    if step < warmup_steps:
        share = (step + 1) / warmup_steps
    elif params.schedule == "constant":
        share = 1.0
    elif params.schedule == "plateau":
        share = plateau_share
    else:
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return params.learning_rate * max(params.rate_floor, share)


@dataclass
class PlateauRate:
    """What is left of the learning rate under the schedule ``plateau``; told after each epoch.

    It falls by ``factor`` after ``patience`` epochs in a row without a gain. The ``cooldown``
    epochs after a fall are not counted.
    """

    settings: Plateau
    num_falls: int = 0
    epochs_without_gain: int = 0
    cooling_epochs: int = 0

    @property
    def share(self) -> float:
        """What is left, as a share of the rate at the start."""
        return self.settings.factor**self.num_falls

    def see(self, *, is_gain: bool) -> None:
        """Take note of whether an epoch was better than all before it."""
        if self.cooling_epochs:
            self.cooling_epochs -= 1
            return
        self.epochs_without_gain = 0 if is_gain else self.epochs_without_gain + 1
        if self.epochs_without_gain >= self.settings.patience:
            self.num_falls += 1
            self.epochs_without_gain, self.cooling_epochs = 0, self.settings.cooldown

    def state(self) -> dict[str, int]:
        """Return what a checkpoint keeps."""
        return {
            "num_falls": self.num_falls,
            "epochs_without_gain": self.epochs_without_gain,
            "cooling_epochs": self.cooling_epochs,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Take over what ``state()`` returned."""
        self.num_falls = state["num_falls"]
        self.epochs_without_gain = state["epochs_without_gain"]
        self.cooling_epochs = state["cooling_epochs"]


def _warmup_steps(total_steps: int, params: TrainingParams) -> int:
    if params.warmup_steps is not None:
        return params.warmup_steps
    return round(_CYCLE_RISE * total_steps) if params.schedule == "one_cycle" else _WARMUP_STEPS
