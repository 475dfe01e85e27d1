"""When a checkpoint is due: often enough to lose little, seldom enough to cost little. Pure.

A run that is killed loses what it learnt since the last checkpoint. That is at most one interval,
for a step that would end after it is not begun without saving; only a step longer than any since
the last checkpoint can add its own excess. Saving in turn takes at most 3 % of the time: where a
checkpoint is so large or the disk so slow that the interval asked for would cost more, the interval
grows with the cost of the last one.
"""

from dataclasses import dataclass

COST_FACTOR = 33.0  # seconds of training for each second of saving: at most 1/34 of all time


@dataclass
class Cadence:
    """Decides at every step whether to save now; all times come from the caller's clock.

    ``interval_s`` is the time of work that may be lost; with 0, every step is followed by a
    checkpoint, whatever it costs. ``now`` is when the run begins.
    """

    interval_s: float
    now: float
    cost_s: float = 0.0  # of the last checkpoint
    _longest_step_s: float = 0.0
    _saved_at: float = 0.0

    def __post_init__(self) -> None:
        self._saved_at = self.now

    @property
    def effective_interval_s(self) -> float:
        """The interval that is kept: the one asked for, or longer where saving is slow."""
        return max(self.interval_s, COST_FACTOR * self.cost_s) if self.interval_s else 0.0

    def is_due(self, now: float) -> bool:
        """Take note that a step ended at ``now``; return whether to save before the next."""
        self._longest_step_s = max(self._longest_step_s, now - self.now)
        self.now = now
        return now - self._saved_at + self._longest_step_s > self.effective_interval_s or (
            self.interval_s == 0
        )

    def saved(self, began: float, now: float) -> None:
        """Take note that a checkpoint was written from ``began`` to ``now``."""
        self.cost_s, self.now, self._saved_at, self._longest_step_s = now - began, now, now, 0.0
