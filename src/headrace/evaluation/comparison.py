"""Models beside each other on the same rows: each metric's interval, and paired differences.

Two questions, two references. Of the model that was *chosen* without test rows: another model is
tied with it where the interval of their difference, taken on the same resamples, includes 0. Test
rows describe; they do not choose: a model that is better here stays unchosen, and the table says
so. And of the model that is *best* on these rows by the primary metric: all pairs are tested and
corrected together (``pairs``), and a model is tied with the best if its test does not reject.
"""

from collections.abc import Mapping, Sequence
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
from headrace.evaluation.metrics import Metric, MetricName
from headrace.evaluation.pairs import Pair, Rank, best_of, compare_pairs, ranks, tied_with
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
    confidence: float
    judged: tuple[Judged, ...]
    pairs: Mapping[MetricName, tuple[Pair, ...]]  # of every metric

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in the order they were given."""
        return tuple(dict.fromkeys(one.model for one in self.judged))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All metrics: those of the task, then the user's."""
        return tuple({one.metric.name: one.metric for one in self.judged}.values())

    @property
    def primary_metric(self) -> Metric:
        """The metric the choice was made by."""
        return next(metric for metric in self.metrics if metric.name == self.primary)

    @property
    def best(self) -> str | None:
        """The model with the best primary metric on these rows; None if it has no value."""
        points = {model: self.of(model, self.primary).estimate.value for model in self.models}
        return best_of(points, higher_is_better=self.primary_metric.higher_is_better)

    @property
    def ranks(self) -> dict[str, Rank]:
        """Where each model stands against the best; all untested if there is none."""
        if self.best is None:
            return dict.fromkeys(self.models, "untested")
        return ranks(self.best, self.models, self.pairs[self.primary], 1 - self.confidence)

    @property
    def tied_with_best(self) -> list[str]:
        """The best model, and those that the test rows cannot tell from it."""
        return tied_with(self.ranks)

    def of(self, model: str, metric: MetricName) -> Judged:
        """Return one model's metric."""
        return next(j for j in self.judged if (j.model, j.metric.name) == (model, metric))


def judge(
    scored: Mapping[str, Scored],
    chosen: str,
    metrics: Sequence[Metric],
    units: Units,
    resampling: Resampling,
) -> tuple[Judged, ...]:
    """Return every model's metrics with intervals and their difference to the chosen model."""
    return tuple(
        _judge_one(model, metric, scored, chosen, units, resampling)
        for model in scored
        for metric in metrics
    )


def all_pairs(
    scored: Mapping[str, Scored], units: Units, resampling: Resampling
) -> dict[MetricName, tuple[Pair, ...]]:
    """Return every pair of models, per metric."""
    metrics = next(iter(scored.values())).points
    return {metric: compare_pairs(metric, scored, units, resampling) for metric in metrics}


def metrics_json(comparisons: list[Comparison]) -> dict[str, Any]:
    """Return metrics.json: target → model → metric → value, ci_low, ci_high."""
    return {
        comparison.target: {
            model: {
                one.metric.name: interval_json(one.estimate)
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
            **interval_json(one.estimate),
            "standard_error": rounded(one.estimate.standard_error),
            "median": rounded(one.estimate.median),
            "num_undefined": one.estimate.num_undefined,
            "reason": one.estimate.reason,
            "difference": interval_json(one.difference),
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
            for metric in comparison.metrics
        ],
        "models": models,
        "best": comparison.best,
        "ranks": comparison.ranks,
        "tied_with_best": comparison.tied_with_best,
        "pairs": {
            name: [_pair_json(pair) for pair in pairs] for name, pairs in comparison.pairs.items()
        },
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


def _pair_json(pair: Pair) -> dict[str, Any]:
    return {
        "first": pair.first,
        "second": pair.second,
        "difference": interval_json(pair.difference),
        "standard_error": rounded(pair.difference.standard_error),
        "p_value": rounded(pair.p_value),
        "p_holm": rounded(pair.p_holm),
        "smallest_detectable": rounded(pair.detectable),
        "reason": pair.difference.reason,
    }


def interval_json(found: Interval) -> dict[str, float | None]:
    """Return a value and its interval."""
    return {
        "value": rounded(found.value),
        "ci_low": rounded(found.low),
        "ci_high": rounded(found.high),
    }
