"""Split-conformal prediction: an interval or a set of classes that covers a stated share of rows.

Valid rows, which no model was fitted on, say how far off predictions are: the absolute residual of
a value, or 1 − the probability of the true class (LAC: Sadinle, Lei and Wasserman 2019). Of n rows
the ⌈(n + 1) × coverage⌉-th smallest such score is the limit: a new row that is exchangeable with
them stays within it with at least that chance (Vovk, Gammerman and Shafer 2005; Lei et al. 2018).
A set that would be empty gets the likeliest class, which only adds to the coverage. Each row counts
once, whatever its weight: the guarantee is one of rows.

Rows of a later time, or of other groups, are not exchangeable: then coverage is measured alone.
"""

import math
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.blend import rounded
from headrace.evaluation.metrics import Sample
from headrace.evaluation.rules import Conformal, of_classes

Floats: TypeAlias = npt.NDArray[np.float64]


def conform(sample: Sample, coverage: float) -> Conformal | None:
    """Return the limit that ``sample`` sets; None if it has fewer rows than ``fewest_rows``."""
    scores = np.sort(_scores(sample))
    place = _place(len(scores), coverage)
    if place > len(scores):
        return None
    # Written to 12 digits, upwards: the row that sets the limit stays within it.
    limit = rounded(float(max(0.0, scores[place - 1])) * (1 + 1e-11))
    return Conformal(coverage=coverage, limit=limit, num_rows=len(scores))


def fewest_rows(coverage: float) -> int:
    """Return from how many rows on there is a finite limit.

    >>> fewest_rows(0.9), fewest_rows(0.95), fewest_rows(0.5)
    (9, 19, 1)
    """
    share = _exact(coverage)
    return math.ceil(share / (1 - share))


def _place(num_rows: int, coverage: float) -> int:
    return math.ceil((num_rows + 1) * _exact(coverage))


def _exact(coverage: float) -> Fraction:
    return Fraction(repr(coverage))  # 0.9 is nine tenths, not the binary number next to it


def _scores(sample: Sample) -> Floats:
    if sample.task == "regression":
        residual: Floats = np.abs(sample.truth - sample.prediction)
        return residual
    p_NC = of_classes(sample.prediction)
    score: Floats = 1 - p_NC[np.arange(len(p_NC)), sample.truth.astype(np.int64)]
    return score
