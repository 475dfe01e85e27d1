"""The log-loss of single rows; its mean is the metric of ``evaluation.metrics``."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]

_TINY = np.finfo(np.float64).eps  # the metric's clip: a sure and wrong prediction costs 36.04


def log_losses(truth: Floats, probability: Floats) -> Floats:
    """Return −ln of the probability of each row's true class; NaN where ``truth`` is.

    Shapes: ``truth`` (N,) class codes; ``probability`` (N,) that of class 1, or (N, C).
    """
    is_known = ~np.isnan(truth)
    code = np.where(is_known, truth, 0).astype(np.int64)
    if probability.ndim == 1:
        of_truth = np.where(code == 1, probability, 1 - probability)
    else:
        of_truth = probability[np.arange(len(code)), code]
    return np.where(is_known, -np.log(np.clip(of_truth, _TINY, 1 - _TINY)), np.nan)
