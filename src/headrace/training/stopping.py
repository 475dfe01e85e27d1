"""When to stop training: counts epochs without improvement. Pure: numbers in, a verdict out.

An epoch counts as better only if it beats the best; a tie is no gain, so a plateau ends. NaN and
infinity end training at once: no later epoch can be trusted.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class EarlyStopping:
    """The memory of one training run's validation values.

    ``patience`` epochs in a row without a gain end it. ``best`` is NaN until the first epoch.
    """

    patience: int
    best: float = math.nan
    best_epoch: int = -1
    epochs_without_gain: int = 0
    is_diverged: bool = False

    def see(self, epoch: int, value: float, *, higher_is_better: bool = False) -> bool:
        """Take the value of one finished epoch; return whether it is the best so far."""
        if not math.isfinite(value):
            self.is_diverged = True
            return False
        is_first = self.best_epoch < 0
        if is_first or (value > self.best if higher_is_better else value < self.best):
            self.best, self.best_epoch, self.epochs_without_gain = value, epoch, 0
            return True
        self.epochs_without_gain += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether training should end now."""
        return self.is_diverged or self.epochs_without_gain >= self.patience

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: plain numbers."""
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "epochs_without_gain": self.epochs_without_gain,
            "is_diverged": self.is_diverged,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``state()`` returned."""
        self.best = float(state["best"])
        self.best_epoch = int(state["best_epoch"])
        self.epochs_without_gain = int(state["epochs_without_gain"])
        self.is_diverged = bool(state["is_diverged"])
