"""What the curves of a training run say about it, and which setting to try next. Pure.

``constant`` is the loss of the best constant prediction, which needs no inputs; ``learnt`` that of
the kept weights on rows they were learnt from, without dropout. Their difference is what was
learnt, and three figures are shares of it:

- *gap*: how much higher the held-back loss of the kept weights is than ``learnt``: what does not
  hold on other rows;
- *excess*: how much higher the loss was while learning (the mean of the kept epoch's updates) than
  on held-back rows: what dropout, noise or decay make harder than it is;
- *widening*: how much further apart the two curves were after the last epoch than after the kept
  one: whether the network went on to learn by heart.

The rules, of which the first that holds decides; the thresholds are the constants below:

1. ``underfit``: the epochs ran out while the held-back loss still fell, by 2 % of what had been
   learnt in their last tenth.
2. ``underfit``: what was learnt is less than 1 % of the constant's loss.
3. ``overfit``: the gap is at least a third.
4. ``fine``: at most a twentieth of the constant's loss is left.
5. ``over-regularised``: the gap is below 5 % and the excess above 2 %.
6. ``underfit``: the gap is below 5 % and the widening below 1 %.
7. ``fine``: the network could have learnt by heart, and was stopped in time.

How low a loss can get nobody knows, so these are rules of thumb: they name a setting that is worth
one more run. The thresholds were set by a look at some twenty runs on California housing and Adult
(dropout 0 to .8, widths 2 to 256, 3 or 60 epochs) and tried on no other data; a weight decay that
is far too strong goes unseen.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_FALLING = 0.02
_LEARNT = 0.01
_OVERFIT_GAP = 1 / 3
_LITTLE_LEFT = 0.05
_NO_GAP = 0.05
_EXCESS = 0.02
_NO_WIDENING = 0.01

# Keys of a model's params, of which the first that it has is the one to try.
_REGULARISERS = ("dropout", "weight_decay", "input_noise", "column_mask", "mixup")
_CAPACITY = ("hidden_sizes", "width", "dim", "learning_rate")

Name = Literal["underfit", "overfit", "over-regularised", "fine"]


@dataclass(frozen=True)
class Curves:
    """The total losses of one training run, per epoch and of the weights that were kept."""

    train: Sequence[float]  # while learning
    inner: Sequence[float]  # on held-back rows, after each epoch
    kept_epoch: int  # from 1
    max_epochs: int
    constant: float  # of the best constant prediction
    learnt: float  # of the kept weights on rows learnt from, without dropout

    @property
    def gap(self) -> float:
        """The share of what was learnt that does not hold on other rows."""
        return self._share(self.inner[self.kept_epoch - 1] - self.learnt)

    @property
    def excess(self) -> float:
        """How much harder it was while learning than on held-back rows."""
        return self._share(-self._apart(self.kept_epoch))

    @property
    def widening(self) -> float:
        """How far the curves went apart after the kept epoch."""
        return self._share(self._apart(len(self.inner)) - self._apart(self.kept_epoch))

    @property
    def is_falling(self) -> bool:
        """Whether the epochs ran out while the held-back loss still fell."""
        num_epochs, best = len(self.inner), min(self.inner)
        num_before = num_epochs - max(1, round(0.1 * num_epochs))
        if num_epochs < self.max_epochs or num_before < 1:
            return False
        return min(self.inner[:num_before]) - best > _FALLING * (self.constant - best) > 0

    def _apart(self, epoch: int) -> float:
        return self.inner[epoch - 1] - self.train[epoch - 1]

    def _share(self, loss: float) -> float:
        learnt = self.constant - self.learnt
        return loss / learnt if learnt > 0 else math.nan


@dataclass(frozen=True)
class Verdict:
    """The verdict, what it rests on, and one setting to try next."""

    name: Name
    reason: str
    setting: str  # a key of the model's params
    direction: Literal["higher", "lower"]

    def text(self) -> str:
        """Return the verdict in one line."""
        return f"{self.name}: {self.reason}. Try a {self.direction} `{self.setting}`"


def judge(curves: Curves, settings: Mapping[str, Any]) -> Verdict:
    """Return the verdict on ``curves`` of a model whose params are ``settings``.

    >>> curves = Curves([0.9, 0.7], [0.9, 0.7], 2, 2, constant=1.0, learnt=0.7)
    >>> judge(curves, {"max_epochs": 2}).text()
    'underfit: the held-back loss still fell when the epochs ran out. Try a higher `max_epochs`'
    """
    gap, inner = curves.gap, curves.inner[curves.kept_epoch - 1]
    if curves.is_falling:
        reason = "the held-back loss still fell when the epochs ran out"
        return Verdict("underfit", reason, "max_epochs", "higher")
    if curves.constant - curves.learnt < _LEARNT * curves.constant:
        reason = "even the rows learnt from are predicted hardly better than by a constant"
        return Verdict("underfit", reason, "learning_rate", "higher")
    if gap >= _OVERFIT_GAP:
        reason = f"{gap:.0%} of what was learnt does not hold on other rows"
        return Verdict("overfit", reason, _first(_REGULARISERS, settings), "higher")
    if inner <= _LITTLE_LEFT * curves.constant:
        reason = f"{inner / curves.constant:.1%} of the loss of a constant prediction is left"
        return Verdict("fine", reason, "learning_rate", "lower")
    if gap < _NO_GAP and curves.excess > _EXCESS:
        reason = (
            f"what was learnt holds on other rows, but while learning the loss was higher than on "
            f"held-back rows, by {curves.excess:.0%} of it"
        )
        used = [key for key in _REGULARISERS if settings.get(key)]
        return Verdict("over-regularised", reason, _first(used or _CAPACITY, settings), "lower")
    if gap < _NO_GAP and curves.widening < _NO_WIDENING:
        reason = "what was learnt holds on other rows, and further epochs learnt nothing by heart"
        return Verdict("underfit", reason, _first(_CAPACITY, settings), "higher")
    reason = f"{max(gap, 0):.0%} of what was learnt does not hold on other rows, which is usual"
    return Verdict("fine", reason, "learning_rate", "lower")


def _first(wanted: Sequence[str], settings: Mapping[str, Any]) -> str:
    return next(key for key in wanted if key in settings)
