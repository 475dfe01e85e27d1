"""The metrics of an epoch: streamed states of torchmetrics, values by ``evaluation.metrics``.

torchmetrics keeps the states, reduces them over ranks and clears them for the next epoch. Its own
metrics know no row weights, so the states hold the terms that ``evaluation.metrics`` is made of:
sums of weighted terms or, for a ranking, the rows themselves. What is logged while training and
what ``evaluate`` reports of the same predictions therefore cannot disagree.

Memory: a few numbers per target, and 24 bytes per held-back row of a binary target, whose ROC-AUC
is a ranking of all of them. Imported where metrics are computed: torchmetrics takes a second.

Legend: B rows of the batch, K weighted terms of a row, N rows of the epoch.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchmetrics
from torchmetrics.utilities import dim_zero_cat

from headrace.evaluation.metrics import (
    MetricName,
    Sample,
    combine,
    metric_of,
    point_values,
    prepare,
)
from headrace.schema import Target
from headrace.training.distributed import Ranks
from headrace.training.learner import EPOCH_METRICS, Metric

_THRESHOLD = 0.5  # of the probability from which a row counts as positive, for accuracy


class EpochMetrics:
    """The metrics of all targets over the rows of one epoch, of all ranks."""

    def __init__(self, targets: Sequence[Target], ranks: Ranks) -> None:
        self._targets = {target.name: target for target in targets}
        self._metrics = {target.name: _target_metric(target, ranks) for target in targets}

    def reset(self) -> None:
        """Forget the rows seen."""
        for metric in self._metrics.values():
            metric.reset()

    def add(
        self, target: str, *, truth: torch.Tensor, prediction: torch.Tensor, weight: torch.Tensor
    ) -> None:
        """Take in the predictions of one batch.

        Shapes: ``truth`` (B,) the value in the target's unit or the class code, NaN where the label
        is missing; ``prediction`` (B,) the value or the probability of class 1, or (B, C)
        probabilities; ``weight`` (B,). A row without label or weight changes nothing.

        Raises:
            ValueError: if the shapes do not belong together.
        """
        one = self._targets[target]
        wanted = [len(truth), one.num_outputs] if one.task == "multiclass" else [len(truth)]
        shapes = [list(part.shape) for part in (truth, prediction, weight)]
        if shapes != [[len(truth)], wanted, [len(truth)]]:
            raise ValueError(
                f"metrics of {target!r}: truth {tuple(truth.shape)}, prediction "
                f"{tuple(prediction.shape)}, weight {tuple(weight.shape)}; expected (rows,), "
                f"{tuple(wanted)} and (rows,)"
            )
        counts = (~torch.isnan(truth) & (weight > 0)).cpu()
        parts = (part.detach().cpu().double()[counts] for part in (truth, prediction, weight))
        self._metrics[target].update(*parts)

    def values(self) -> dict[str, Metric]:
        """Return the metrics, the same on every rank, as ``METRIC_TARGET``; NaN where undefined."""
        found = {}
        for target in self._targets.values():
            metric = self._metrics[target.name]
            metric.update(*_NOTHING)  # a rank may have no rows, of which torchmetrics would warn
            for name, value in metric.compute().items():
                is_better = metric_of(target.task, name).higher_is_better
                found[f"{name}_{target.name}"] = Metric(value, higher_is_better=is_better)
        return found


class _SummedMetric(torchmetrics.Metric):
    """Metrics of one target that are functions of weighted sums over rows."""

    sums_K: torch.Tensor

    def __init__(self, target: Target, **settings: Any) -> None:
        super().__init__(**settings)
        self._task = target.task
        one_row = np.ones((1, target.num_outputs)) if target.task == "multiclass" else np.ones(1)
        num_terms = len(self._terms(Sample(target.task, np.ones(1), one_row)))
        self.add_state("sums_K", torch.zeros(num_terms, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, truth: torch.Tensor, prediction: torch.Tensor, weight: torch.Tensor) -> None:
        if len(truth):
            sample = Sample(self._task, truth.numpy(), prediction.numpy(), weight.numpy())
            self.sums_K += torch.from_numpy(self._terms(sample).sum(axis=1))

    def compute(self) -> dict[MetricName, float]:
        found = combine(self._task, self.sums_K.numpy(), np.empty((0, 2)))
        return {name: float(found[name]) for name in EPOCH_METRICS[self._task]}

    def _terms(self, sample: Sample) -> npt.NDArray[np.float64]:
        unit = np.arange(len(sample.truth))
        name = EPOCH_METRICS[self._task][0]  # none of them is a ranking
        return prepare(sample, unit, threshold=_THRESHOLD, only=name).columns_KN


class _RankedMetric(torchmetrics.Metric):
    """Metrics of a binary target, of which one needs all rows at once."""

    rows_N3: list[torch.Tensor]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("rows_N3", [], dist_reduce_fx="cat")

    def update(self, truth: torch.Tensor, prediction: torch.Tensor, weight: torch.Tensor) -> None:
        if len(truth):
            self.rows_N3.append(torch.stack([truth, prediction, weight], dim=1))

    def compute(self) -> dict[MetricName, float]:
        names = EPOCH_METRICS["binary"]
        if not len(self.rows_N3):
            return dict.fromkeys(names, math.nan)
        rows_3N = np.ascontiguousarray(dim_zero_cat(self.rows_N3).numpy().T)
        unit = np.arange(rows_3N.shape[1])
        terms = prepare(Sample("binary", *rows_3N), unit, threshold=_THRESHOLD, only="roc_auc")
        found = point_values(terms, len(unit))
        return {name: found[name] for name in names}


_NOTHING = (torch.empty(0), torch.empty(0), torch.empty(0))


def _target_metric(target: Target, ranks: Ranks) -> torchmetrics.Metric:
    """Return a metric whose states are reduced over ``ranks``, alone or not."""
    over_ranks: dict[str, Any] = {
        "dist_sync_fn": lambda state, group: ranks.gathered(state),  # noqa: ARG005 - its signature
        "distributed_available_fn": lambda: ranks.size > 1,
    }
    if target.task == "binary":
        return _RankedMetric(**over_ranks)
    return _SummedMetric(target, **over_ranks)
