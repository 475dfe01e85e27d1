"""Honest selection: blend weights and the choice of a model, from valid rows and nothing else.

The blend is greedy ensemble selection with replacement (Caruana et al. 2004, "Ensemble Selection
from Libraries of Models"): start from the best single model, add in each round the member that
helps the mean most, keep the best mean seen. The blend is chosen only if its gain over the best
single model is more than sampling noise: the paired interval of the gain excludes 0. The weights
were fitted on these very rows, so the gain is flattered a little; test rows judge it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.errors import DataError
from headrace.evaluation.bootstrap import Interval, Resampling, Units, bootstrap, difference
from headrace.evaluation.metrics import Metric, Sample, score

Floats: TypeAlias = npt.NDArray[np.float64]
STACK = "stack"  # the blend's name wherever models are named


@dataclass(frozen=True)
class Choice:
    """What was chosen for one target, and why."""

    metric: Metric
    ranking: tuple[tuple[str, float], ...]  # single models on valid rows, best first
    weights: Mapping[str, float]  # of every member in the blend, summing to 1
    chosen: str  # a member, or STACK
    reason: str
    blend_value: float
    gain: Interval  # of the blend over the best single model; positive is better

    @property
    def best_single(self) -> str:
        """The best single model."""
        return self.ranking[0][0]


def choose(
    samples: Mapping[str, Sample],
    metric: Metric,
    units: Units,
    resampling: Resampling,
    *,
    rounds: int,
    target: str,
) -> Choice:
    """Return weights of the members and whether their blend or the best single model is chosen.

    ``samples`` are the members' predictions of the same valid rows, by model name.

    Raises:
        DataError: if the metric is not defined on these rows.
    """
    values = {model: score(metric.name, sample) for model, sample in samples.items()}
    if not all(np.isfinite(value) for value in values.values()):
        raise DataError(
            f"target {target!r}: {metric.title} is not defined on the valid rows "
            f"({metric.undefined}), so no model can be chosen by it; set "
            f"`stack.metric.{target}` to another metric, or change `extract.split`"
        )
    sign = 1 if metric.higher_is_better else -1
    # sorted is stable: of equal models the one named first in params.yaml leads.
    ranking = tuple(sorted(values.items(), key=lambda item: -sign * item[1]))
    weights = blend_weights(samples, metric, best_single=ranking[0][0], rounds=rounds)
    blended = blend(samples, weights)
    chosen, reason, gain = _decide(samples, blended, weights, metric, ranking, units, resampling)
    return Choice(
        metric=metric,
        ranking=ranking,
        weights=weights,
        chosen=chosen,
        reason=reason,
        blend_value=score(metric.name, blended),
        gain=gain,
    )


def blend_weights(
    samples: Mapping[str, Sample], metric: Metric, *, best_single: str, rounds: int
) -> dict[str, float]:
    """Return each member's share of the picks: greedy, with replacement, from the best single."""
    sign = 1 if metric.higher_is_better else -1
    first = samples[best_single]
    total = first.prediction.copy()
    picks = dict.fromkeys(samples, 0) | {best_single: 1}
    best_value, best_picks = sign * score(metric.name, first), dict(picks)
    for num_picked in range(1, rounds):
        values = {
            model: sign
            * score(metric.name, _replaced(first, (total + sample.prediction) / (num_picked + 1)))
            for model, sample in samples.items()
        }
        winner = max(values, key=values.__getitem__)
        total += samples[winner].prediction
        picks[winner] += 1
        if values[winner] > best_value:
            best_value, best_picks = values[winner], dict(picks)
    num_picks = sum(best_picks.values())
    return {model: count / num_picks for model, count in best_picks.items()}


def blend(samples: Mapping[str, Sample], weights: Mapping[str, float]) -> Sample:
    """Return the weighted mean of the members' predictions."""
    first = next(iter(samples.values()))
    return _replaced(first, mix({m: s.prediction for m, s in samples.items()}, weights))


def mix(predictions: Mapping[str, Floats], weights: Mapping[str, float]) -> Floats:
    """Return the weighted mean of predictions of the same rows, (N,) or (N, C)."""
    used = [(weights[model], values) for model, values in predictions.items() if weights[model]]
    total = np.zeros_like(used[0][1])
    for weight, values in used:
        total += weight * values
    if len(used) == 1:
        return used[0][1].copy()  # exactly the member's own values, no rounding
    # Rounding may carry a mean of equal probabilities an ulp past them: stay within the members.
    stacked = np.stack([values for _, values in used])
    return np.clip(total, stacked.min(axis=0), stacked.max(axis=0))


def choice_json(choice: Choice) -> dict[str, Any]:
    """Return one target's entry of selection.json."""
    return {
        "metric": choice.metric.name,
        "higher_is_better": choice.metric.higher_is_better,
        "ranking": [{"model": model, "value": rounded(value)} for model, value in choice.ranking],
        "best_single": choice.best_single,
        "weights": {model: rounded(weight) for model, weight in choice.weights.items()},
        "chosen": choice.chosen,
        "reason": choice.reason,
        "blend_value": rounded(choice.blend_value),
        "gain": {
            "value": rounded(choice.gain.value),
            "ci_low": rounded(choice.gain.low),
            "ci_high": rounded(choice.gain.high),
        },
    }


def rounded(value: float | None) -> float | None:
    """Return ``value`` to 12 significant digits: what another CPU's vector width may not change."""
    return None if value is None else float(f"{value:.12g}")


def _decide(
    samples: Mapping[str, Sample],
    blended: Sample,
    weights: Mapping[str, float],
    metric: Metric,
    ranking: tuple[tuple[str, float], ...],
    units: Units,
    resampling: Resampling,
) -> tuple[str, str, Interval]:
    best = ranking[0][0]
    if len(samples) == 1:
        return best, "the only model", Interval(0.0, None, None)
    if weights[best] == 1:
        return best, f"no blend beats {best} on the valid rows", Interval(0.0, None, None)
    scored = {
        name: bootstrap(sample, units, resampling, threshold=0.5, only=metric.name)
        for name, sample in ((best, samples[best]), (STACK, blended))
    }
    change = difference(metric.name, scored[STACK], scored[best], units, resampling)
    gain = change if metric.higher_is_better else _negated(change)
    share = f"{resampling.confidence:.0%} interval over {units.count} {units.name}s"
    if gain.value is None or gain.low is None or gain.high is None:
        why = f"the blend's gain over {best} has no interval on the valid rows ({gain.reason})"
        return best, why, gain
    text = f"{gain.value:.3g} [{gain.low:.3g}, {gain.high:.3g}] in {metric.title}, {share}"
    if gain.low > 0:
        return STACK, f"the blend gains on {best} on the valid rows: {text}", gain
    return best, f"the blend's gain over {best} on the valid rows includes 0: {text}", gain


def _negated(interval: Interval) -> Interval:
    if interval.value is None or interval.low is None or interval.high is None:
        return interval
    return Interval(-interval.value, -interval.high, -interval.low, interval.num_undefined)


def _replaced(sample: Sample, prediction: Floats) -> Sample:
    return Sample(sample.task, sample.truth, prediction, sample.weight)
