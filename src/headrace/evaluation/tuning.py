"""Which trial of a search is best, which cannot be told from it, and how much its score flatters.

All trials are scored on the same rows and the same resamples of their units, so a difference
between two has an interval of its own. The best of many scores is too good: part of it is luck.
``optimism`` estimates that part by the bootstrap: in each resample the best trial is chosen anew,
and its value there is compared with its value on the rows themselves (Efron and Tibshirani 1993,
"An Introduction to the Bootstrap", section 17.6, with the choice of a trial as the fit).

Legend: T trials, B resamples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from headrace.evaluation.bootstrap import Interval, Resampling, Scored, Units, difference
from headrace.evaluation.metrics import Metric


@dataclass(frozen=True)
class Standing:
    """One trial beside the best one; ``difference`` is this trial − the best."""

    number: int
    value: float
    difference: Interval
    is_tied: bool


@dataclass(frozen=True)
class Standings:
    """The trials, best first; ``optimism`` is what the best score owes to being the best, ≥ 0."""

    of: tuple[Standing, ...]
    optimism: float

    @property
    def best(self) -> Standing:
        """The first."""
        return self.of[0]


def rank_trials(
    scored: Mapping[int, Scored], metric: Metric, units: Units, resampling: Resampling
) -> Standings:
    """Order the trials by ``metric``; of equal ones the earlier is first."""
    sign = 1.0 if metric.higher_is_better else -1.0
    values = {number: one.points[metric.name] for number, one in scored.items()}
    order = sorted(values, key=lambda number: (-sign * values[number], number))
    best = scored[order[0]]
    standings = []
    for number in order:
        change = difference(metric.name, scored[number], best, units, resampling)
        is_tied = change.low is None or change.high is None or change.low <= 0 <= change.high
        standings.append(Standing(number, values[number], change, is_tied))
    resamples_TB = np.stack([scored[number].resamples[metric.name] for number in order])
    values_T = np.array([values[number] for number in order])
    return Standings(tuple(standings), _optimism(sign * resamples_TB, sign * values_T))


def _optimism(resamples_TB: np.ndarray, values_T: np.ndarray) -> float:
    """Return the mean luck of the best of each resample; higher values are better."""
    defined_TB = np.where(np.isfinite(resamples_TB), resamples_TB, -np.inf)
    best_B = defined_TB.argmax(axis=0)
    luck_B = np.take_along_axis(defined_TB, best_B[None], axis=0)[0] - values_T[best_B]
    luck_B = luck_B[np.isfinite(luck_B)]
    return max(0.0, float(luck_B.mean())) if len(luck_B) else 0.0
