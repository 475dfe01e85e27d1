"""The linear stacker: a ridge, logistic or multinomial regression on the members' predictions.

Values are predicted from values in units of the target's spread, probabilities from logits, and
classes from log-probabilities (Wolpert 1992, "Stacked Generalization"; Ting & Witten 1999 for
probabilities). It minimises its own loss, squared or logarithmic, whatever the metric, and may
give a model a negative coefficient. Many rows, few members: the penalty (1 on squared coefficients
against the sum over rows) only keeps coefficients of equal members equal.

Legend of axes: N rows, F what one model gives per row, K classes.
"""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.errors import DataError
from headrace.evaluation.blend import LinearBlend, Link, linked, rounded
from headrace.evaluation.metrics import Sample
from headrace.schema import Task

Floats: TypeAlias = npt.NDArray[np.float64]
_LINKS: Mapping[Task, Link] = {"regression": "identity", "binary": "logit", "multiclass": "log"}
_MAX_PASSES = 10_000


def linear_blend(samples: Mapping[str, Sample]) -> LinearBlend:
    """Return the regression on ``samples``, predictions of the same rows.

    Raises:
        DataError: if a class is in none of the rows.
    """
    from threadpoolctl import threadpool_limits

    first = next(iter(samples.values()))
    link = _LINKS[first.task]
    x_NF = np.hstack([linked(sample.prediction, link) for sample in samples.values()])
    with threadpool_limits(1, user_api="blas"):  # BLAS rounds by the number of its threads
        if first.task == "regression":
            intercept, coefficients = _ridge(x_NF, first)
        else:
            intercept, coefficients = _logistic(x_NF, first)
    num_outputs = len(coefficients)
    return LinearBlend(
        link=link,
        intercept=_numbers(intercept),
        coefficients={
            name: tuple(
                _numbers(row[place * num_outputs : (place + 1) * num_outputs])
                for row in coefficients
            )
            for place, name in enumerate(samples)
        },
    )


def _ridge(x_NF: Floats, sample: Sample) -> tuple[Floats, Floats]:
    from sklearn.linear_model import Ridge

    centre = np.average(sample.truth, weights=sample.weight)
    spread = np.sqrt(np.average((sample.truth - centre) ** 2, weights=sample.weight)) or 1.0
    x_NF -= centre
    x_NF /= spread
    found = Ridge(alpha=1.0).fit(x_NF, (sample.truth - centre) / spread, sample.weight)
    coefficients = found.coef_
    intercept = centre * (1 - coefficients.sum()) + spread * found.intercept_
    return np.array([intercept]), coefficients[None]


def _logistic(x_NF: Floats, sample: Sample) -> tuple[Floats, Floats]:
    from sklearn.linear_model import LogisticRegression

    num_classes = 2 if sample.task == "binary" else sample.prediction.shape[1]
    present = np.unique(sample.truth).astype(np.int64)
    absent = sorted(set(range(num_classes)) - set(present.tolist()))
    if absent:
        raise DataError(
            f"a linear stack needs rows of every class, but none that it is fitted on have the "
            f"classes with the codes {absent}; set `stack.method` to greedy, or change "
            f"`extract.split`"
        )
    found = LogisticRegression(C=1.0, max_iter=_MAX_PASSES).fit(x_NF, sample.truth, sample.weight)
    return found.intercept_, found.coef_


def _numbers(values: Floats) -> tuple[float, ...]:
    return tuple(rounded(value) for value in values.tolist())
