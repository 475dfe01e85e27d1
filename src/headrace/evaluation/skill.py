"""What refits on bootstrap samples say together: mean, spread and percentile interval of a metric.

Each refit is judged on the rows that its sample does not hold, so its value is honest; the spread
over refits holds both kinds of luck, of the rows learnt from and of the rows judged on. A sample
holds 63 % of the different units, so a refit knows a little less than the model it stands for, and
the mean is a little pessimistic (Efron and Tibshirani 1997, "Improvements on Cross-Validation: The
.632+ Bootstrap Method"; its correction, which mixes in the error on rows learnt from, is not made:
it is too optimistic for models that fit those rows exactly).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.evaluation.metrics import METRICS, Metric, Sample, score

# With fewer refits the ends of a 95 % interval are the smallest and the largest of them.
FEW_REFITS = 40


@dataclass(frozen=True)
class Skill:
    """One metric over refits; None where too few of them have a value.

    ``num_undefined`` refits have none (one class only among the rows judged on, say).
    """

    metric: Metric
    num_refits: int
    mean: float | None
    deviation: float | None
    low: float | None
    high: float | None
    num_undefined: int


def metrics_of(sample: Sample) -> dict[str, float | None]:
    """Return every metric of the task on these rows; None where it is not defined."""
    values = {metric.name: score(metric.name, sample) for metric in METRICS[sample.task]}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def skill_of(metric: Metric, values: Sequence[float | None], *, confidence: float) -> Skill:
    """Return mean, standard deviation and percentile interval of one metric's values."""
    defined = np.array([value for value in values if value is not None])
    num_undefined = len(values) - len(defined)
    if not len(defined):
        return Skill(metric, 0, None, None, None, None, num_undefined)
    mean = float(defined.mean())
    if len(defined) < 2:
        return Skill(metric, 1, mean, None, None, None, num_undefined)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    deviation = float(defined.std(ddof=1))
    return Skill(metric, len(defined), mean, deviation, float(low), float(high), num_undefined)
