"""Every pair of models on the same rows: the paired difference, its p-value, what it could detect.

The p-value is the two-sided bootstrap one: twice the smaller share of the paired resamples in which
the difference is at most, or at least, 0, each count raised by one (Davison and Hinkley 1997,
section 4.4). It asks of the resamples what their percentile interval asks, so the two agree, for
any metric and any resampling unit. Its price is resolution: B resamples give no p-value below
2 / (B + 1), which ``resamples_needed`` turns into how many a family of tests needs.

The p-values of one metric are corrected over all its pairs by Holm's step-down method (Holm 1979),
which holds whatever hangs together among them.

The smallest detectable difference is the true difference that a single two-sided test would find
in 80 of 100 test sets like this one: (z(1 - alpha/2) + z(0.8)) standard errors.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.bootstrap import Interval, Resampling, Scored, Units, difference
from headrace.evaluation.metrics import MetricName

Floats: TypeAlias = npt.NDArray[np.float64]

Rank = Literal["best", "tied", "worse", "untested"]

POWER = 0.8


@dataclass(frozen=True)
class Pair:
    """Two models and one metric; ``difference`` is first − second.

    ``p_value`` is of this pair alone, ``p_holm`` corrected over all pairs of the metric; both None
    where the difference has no interval, and so is ``detectable``, the smallest detectable
    difference.
    """

    first: str
    second: str
    difference: Interval
    p_value: float | None
    p_holm: float | None
    detectable: float | None

    def has(self, model: str) -> bool:
        """Whether ``model`` is one of the two."""
        return model in (self.first, self.second)


def compare_pairs(
    metric: MetricName, scored: Mapping[str, Scored], units: Units, resampling: Resampling
) -> tuple[Pair, ...]:
    """Return every pair of models on one metric, in the order of ``scored``."""
    return corrected(
        _pair(metric, first, second, scored, units, resampling)
        for first, second in combinations(scored, 2)
    )


def unpaired(first: str, second: str, one: Interval, other: Interval, confidence: float) -> Pair:
    """Return the difference of two models whose resamples cannot be paired.

    Both are taken as independent and normal, which on the same rows is far too wide.
    """
    from scipy.special import ndtr, ndtri

    if one.value is None or other.value is None:
        return Pair(first, second, Interval(None, None, None, reason="undefined"), None, None, None)
    value = one.value - other.value
    if one.standard_error is None or other.standard_error is None:
        return Pair(first, second, Interval(value, None, None), None, None, None)
    error = math.hypot(one.standard_error, other.standard_error)
    half = float(ndtri((1 + confidence) / 2)) * error
    change = Interval(value, value - half, value + half, standard_error=error)
    p_value = float(2 * ndtr(-abs(value) / error)) if error else float(value == 0)
    return Pair(first, second, change, p_value, None, smallest_detectable(error, confidence))


def corrected(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """Return the pairs with p-values corrected over all of them."""
    given = tuple(pairs)
    adjusted = holm([pair.p_value for pair in given])
    return tuple(replace(pair, p_holm=p) for pair, p in zip(given, adjusted, strict=True))


def ranks(best: str, models: Iterable[str], pairs: Sequence[Pair], alpha: float) -> dict[str, Rank]:
    """Return where each model stands against ``best``, by its corrected test.

    Tied: the test does not reject. A model without a test is untested, not tied: nothing says that
    it is as good.
    """
    against = {
        (pair.second if pair.first == best else pair.first): pair.p_holm
        for pair in pairs
        if pair.has(best)
    }
    return {
        model: "best" if model == best else _rank(against.get(model), alpha) for model in models
    }


def tied_with(found: Mapping[str, Rank]) -> list[str]:
    """Return the best model and those tied with it."""
    return [model for model, rank in found.items() if rank in ("best", "tied")]


def best_of(points: Mapping[str, float | None], *, higher_is_better: bool) -> str | None:
    """Return the model with the best value, the first of equal ones; None if none has a value."""
    known = {model: value for model, value in points.items() if value is not None}
    if not known:
        return None
    pick = max if higher_is_better else min
    return pick(known, key=lambda model: known[model])


def two_sided_p(differences: Floats) -> float | None:
    """Return the bootstrap p-value of no difference; None without any defined resample.

    >>> two_sided_p(np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9]))
    0.2
    """
    defined = differences[np.isfinite(differences)]
    if not len(defined):
        return None
    fewer = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    return min(1.0, 2 * (1 + fewer) / (len(defined) + 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected over all that are not None.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted


def smallest_detectable(standard_error: float, confidence: float) -> float:
    """Return the true difference that a test finds with probability ``POWER``.

    >>> round(smallest_detectable(1.0, 0.95), 3)
    2.802
    """
    from scipy.special import ndtri

    return float((ndtri((1 + confidence) / 2) + ndtri(POWER)) * standard_error)


def resamples_needed(num_models: int, confidence: float) -> int:
    """Return how many resamples let one of all pairs be told apart after Holm's correction.

    >>> resamples_needed(8, 0.95)
    1119
    """
    num_pairs = math.comb(num_models, 2)
    return max(0, math.ceil(round(2 * num_pairs / (1 - confidence), 6)) - 1)


def _rank(p_value: float | None, alpha: float) -> Rank:
    if p_value is None:
        return "untested"
    return "tied" if p_value > alpha else "worse"


def _pair(
    metric: MetricName,
    first: str,
    second: str,
    scored: Mapping[str, Scored],
    units: Units,
    resampling: Resampling,
) -> Pair:
    one, other = scored[first], scored[second]
    change = difference(metric, one, other, units, resampling)
    if change.low is None or change.standard_error is None:
        return Pair(first, second, change, None, None, None)
    return Pair(
        first,
        second,
        change,
        two_sided_p(one.resamples[metric] - other.resamples[metric]),
        None,
        smallest_detectable(change.standard_error, resampling.confidence),
    )
