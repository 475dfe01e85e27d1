"""Models beside each other on the same rows: each metric's interval, and paired differences.

The reference is the model that was chosen without test rows. Another model is *tied* with it where
the interval of their difference, taken on the same resamples, includes 0. Test rows describe; they
do not choose: a model that is better here stays unchosen, and the table says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from headrace.evaluation.blend import rounded
from headrace.evaluation.bootstrap import (
    UNDEFINED,
    Interval,
    Resampling,
    Scored,
    Units,
    difference,
    estimate,
)
from headrace.evaluation.metrics import METRICS, Metric, MetricName
from headrace.schema import Task

Verdict = Literal["chosen", "tied", "better", "worse", "unknown"]


@dataclass(frozen=True)
class Judged:
    """One metric of one model, beside the chosen model.

    ``difference`` is this model − chosen; ``verdict`` is unknown where it has no interval.
    """

    model: str
    metric: Metric
    estimate: Interval
    difference: Interval
    verdict: Verdict

    @property
    def is_tied(self) -> bool:
        """Whether the model is the chosen one or cannot be told from it."""
        return self.verdict in ("chosen", "tied")


@dataclass(frozen=True)
class Comparison:
    """All models of one target on the test rows that have a label."""

    target: str
    task: Task
    primary: MetricName  # the metric the choice was made by
    chosen: str
    unit: str
    num_units: int
    num_rows: int
    num_unlabelled: int
    judged: tuple[Judged, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in the order they were given."""
        return tuple(dict.fromkeys(one.model for one in self.judged))

    def of(self, model: str, metric: MetricName) -> Judged:
        """Return one model's metric."""
        return next(j for j in self.judged if (j.model, j.metric.name) == (model, metric))


def judge(
    scored: Mapping[str, Scored], chosen: str, task: Task, units: Units, resampling: Resampling
) -> tuple[Judged, ...]:
    """Return every model's metrics with intervals and their difference to the chosen model."""
    return tuple(
        _judge_one(model, metric, scored, chosen, units, resampling)
        for model in scored
        for metric in METRICS[task]
    )


def metrics_json(comparisons: list[Comparison]) -> dict[str, Any]:
    """Return metrics.json: target → model → metric → value, ci_low, ci_high."""
    return {
        comparison.target: {
            model: {
                one.metric.name: _interval_json(one.estimate)
                for one in comparison.judged
                if one.model == model
            }
            for model in comparison.models
        }
        for comparison in comparisons
    }


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Return one target's entry of comparison.json."""
    models: dict[str, dict[str, Any]] = {model: {} for model in comparison.models}
    for one in comparison.judged:
        models[one.model][one.metric.name] = {
            **_interval_json(one.estimate),
            "standard_error": rounded(one.estimate.standard_error),
            "median": rounded(one.estimate.median),
            "num_undefined": one.estimate.num_undefined,
            "reason": one.estimate.reason,
            "difference": _interval_json(one.difference),
            "verdict": one.verdict,
            "tied": one.is_tied,
        }
    return {
        "task": comparison.task,
        "primary": comparison.primary,
        "chosen": comparison.chosen,
        "unit": comparison.unit,
        "num_units": comparison.num_units,
        "num_rows": comparison.num_rows,
        "num_unlabelled": comparison.num_unlabelled,
        "metrics": [
            {
                "name": metric.name,
                "title": metric.title,
                "higher_is_better": metric.higher_is_better,
                "meaning": metric.meaning,
            }
            for metric in METRICS[comparison.task]
        ],
        "models": models,
    }


def _judge_one(
    model: str,
    metric: Metric,
    scored: Mapping[str, Scored],
    chosen: str,
    units: Units,
    resampling: Resampling,
) -> Judged:
    one, reference = scored[model], scored[chosen]
    found = _explained(estimate(metric.name, one, units, resampling), metric)
    change = _explained(difference(metric.name, one, reference, units, resampling), metric)
    verdict: Verdict = "chosen" if model == chosen else _verdict(change, metric)
    return Judged(model, metric, found, change, verdict)


def _verdict(change: Interval, metric: Metric) -> Verdict:
    if change.low is None or change.high is None:
        return "unknown"
    if change.low <= 0 <= change.high:
        return "tied"
    return "better" if (change.low > 0) == metric.higher_is_better else "worse"


def _explained(found: Interval, metric: Metric) -> Interval:
    return replace(found, reason=metric.undefined) if found.reason == UNDEFINED else found


def _interval_json(found: Interval) -> dict[str, float | None]:
    return {
        "value": rounded(found.value),
        "ci_low": rounded(found.low),
        "ci_high": rounded(found.high),
    }
