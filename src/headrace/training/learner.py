"""What the training loop asks of a model, and what it tells those who watch.

A ``Learner`` is a network with its batches, losses and held-back rows. Losses are sums over rows
beside sums of row weights: only at the end is one divided by the other, so that a loss is the mean
over rows however they were cut into batches, parts of a batch, or shares of ranks.

An ``Observer`` hears what happens: a health check, say. It looks and never touches: the weights
are the same bits with and without it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import nn

from headrace.evaluation.metrics import MetricName
from headrace.schema import Task
from headrace.training.distributed import Ranks

# The metrics of an epoch; first of a task the one that chooses models. Only that one may be a
# ranking of all rows, which the others do not need.
EPOCH_METRICS: Mapping[Task, tuple[MetricName, ...]] = {
    "regression": ("rmse", "mae"),
    "binary": ("roc_auc", "log_loss", "accuracy"),
    "multiclass": ("log_loss", "accuracy"),
}


@dataclass(frozen=True)
class Losses:
    """Losses of one batch: per name the sum over rows of weight × loss, and the sum of weights.

    ``scales`` are the factors with which the means enter the total that is minimised.
    """

    sums: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]
    scales: Mapping[str, float]

    def total(self) -> torch.Tensor:
        """Return the scaled sum of the row-weighted mean losses; a name without rows adds 0."""
        parts = [
            self.scales[name] * self.sums[name] / self.weights[name].clamp_min(1e-12)
            for name in self.sums
        ]
        return torch.stack(parts).sum()


@dataclass
class LossMeans:
    """Row-weighted mean losses over many batches, summed in float64."""

    scales: Mapping[str, float]
    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, losses: Losses) -> None:
        """Take in one batch."""
        names = list(losses.sums)
        sums = torch.stack([losses.sums[name].detach() for name in names])
        weights = torch.stack([losses.weights[name] for name in names])
        values = torch.stack([sums, weights]).T.tolist()  # one wait for the device
        for name, (total, weight) in zip(names, values, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        """Return the mean per name; NaN for a name without a labelled row."""
        return {
            name: total / self.weights[name] if self.weights[name] > 0 else math.nan
            for name, total in self.sums.items()
        }

    def total(self) -> float:
        """Return the scaled sum of the means that exist."""
        means = self.means()
        return sum(self.scales[n] * value for n, value in means.items() if self.weights[n] > 0)

    def over(self, ranks: Ranks) -> "LossMeans":
        """Return the means over the rows of all ranks; each has summed its own."""
        if ranks.size == 1:
            return self
        names = list(self.scales)
        own = [[part.get(name, 0.0) for name in names] for part in (self.sums, self.weights)]
        sums, weights = ranks.summed(torch.tensor(own, dtype=torch.float64)).tolist()
        return LossMeans(
            self.scales,
            dict(zip(names, sums, strict=True)),
            dict(zip(names, weights, strict=True)),
        )


@dataclass(frozen=True)
class Metric:
    """A figure of merit over the held-back rows."""

    value: float
    higher_is_better: bool


@dataclass(frozen=True)
class Validation:
    """How the network does on the held-back rows of all ranks.

    Metrics are named ``METRIC_TARGET``, as ``roc_auc_late``; there may be none.
    """

    losses: LossMeans
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return what early stopping may look at: ``loss``, each loss, each metric."""
        return ["loss", *self.losses.scales, *self.metrics]

    def figure(self, name: str) -> Metric:
        """Return the total loss, a loss or a metric by its name, one of ``names()``."""
        if name == "loss":
            return Metric(self.losses.total(), higher_is_better=False)
        if name in self.losses.scales:
            return Metric(self.losses.means().get(name, math.nan), higher_is_better=False)
        return self.metrics[name]


class RowBatch(Protocol):
    """What the loop itself needs of a batch."""

    @property
    def row_id(self) -> torch.Tensor:
        """The rows' ids, for messages; its length is the number of rows."""

    def split(self, sizes: list[int]) -> Sequence[Self]:
        """Return consecutive parts of so many rows each; together they are the batch."""


class Learner(Protocol):
    """What the loop trains: a network, its batches and its losses."""

    network: nn.Module
    num_batches: int  # at most, in one epoch

    def batches(self, epoch: int, *, used: int) -> Iterable[Any]:
        """Yield the batches (``RowBatch``) of ``epoch`` after the first ``used``."""

    def weights(self, batch: Any) -> Mapping[str, torch.Tensor]:
        """Return the weights that ``losses`` will have, per name, without running the network.

        Parts of a batch are learnt from one after the other, each divided by the whole's weights.
        """

    def losses(self, batch: Any) -> Losses:
        """Run the network on ``batch`` (or on a part of one); the sums carry gradients."""

    def validate(self) -> Validation:
        """Return losses and metrics over the held-back rows of all ranks.

        The loop has put the network in evaluation mode and switched gradients off.
        """


@dataclass(frozen=True)
class Epoch:
    """What is known of a finished epoch."""

    number: int  # from 1
    train_losses: Mapping[str, float]  # row-weighted means over the epoch, while it learnt
    inner_losses: Mapping[str, float]  # on the held-back rows, after it
    metrics: Mapping[str, Metric]  # likewise
    learning_rate: float  # of the last update
    is_best: bool  # by the figure that early stopping looks at


class Observer(Protocol):
    """Hears of a training run, on every rank; it leaves weights, buffers and the learner alone.

    Random numbers may be drawn: the loop puts its stream back. To run the network, copy it.
    """

    def before(self, learner: Learner) -> None:
        """Hear that a fresh run is about to take its first step; a resumed one does not tell."""

    def gradients(self, norm: float) -> None:
        """Hear the length of the gradient of one update, before it was clipped."""

    def epoch(self, epoch: Epoch) -> None:
        """Hear that an epoch was finished; the network is in evaluation mode."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: tensors, numbers, text, lists, mappings."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``state()`` returned."""
