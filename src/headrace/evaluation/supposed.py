"""Two models that are supposed, where none has predicted yet: what a test set could tell apart.

Both are as good as each other and calibrated; their errors are alike to a stated ``correlation``,
and those of different rows do not hang together (where they do, as within a day, the difference
that real models show is noisier). Of a regression they explain half of the variance; of two
classes they rank a positive row above a negative one in 80 of 100 pairs. The labels are real ones,
so their rarity and spread are the data's own.
"""

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.metrics import Sample
from headrace.schema import Task

Floats: TypeAlias = npt.NDArray[np.float64]

EXPLAINED = 0.5  # R² of a supposed regression
RANKED = 0.8  # ROC-AUC of supposed scores of a class


def supposed_models(
    task: Task,
    truth: Floats,
    *,
    num_classes: int,
    weight: Floats | None,
    correlation: float,
    seed: int,
) -> dict[str, Sample]:
    """Return two models of the same skill on ``truth`` (N,): the value, or the class code."""
    rng = np.random.default_rng(seed)
    width = 1 if task == "regression" else num_classes
    shared, *own = rng.normal(size=(3, len(truth), width))
    samples = {}
    for name, noise in zip(("first", "second"), own, strict=True):
        mixed = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * noise
        samples[name] = Sample(task, truth, _prediction(task, truth, mixed), weight)
    return samples


def _prediction(task: Task, truth: Floats, noise_NC: Floats) -> Floats:
    if task == "regression":
        mean, deviation = truth.mean(), truth.std()
        told = EXPLAINED * (truth - mean)
        spread = deviation * math.sqrt(EXPLAINED * (1 - EXPLAINED))
        prediction: Floats = mean + told + spread * noise_NC[:, 0]
        return prediction
    probability_NC = _probabilities(truth.astype(np.int64), noise_NC)
    return probability_NC if task == "multiclass" else probability_NC[:, 1]


def _probabilities(code: npt.NDArray[np.int64], noise_NC: Floats) -> Floats:
    """Return what Bayes' rule makes of a normal score per class, higher by a shift for its own."""
    from scipy.special import log_softmax, ndtri

    num_classes = noise_NC.shape[1]
    # Of two classes the log-odds hang on the difference of two scores: of variance 2, about +d for
    # one class and -d for the other. So the area under the ROC curve is Φ(2d / √4).
    shift = float(ndtri(RANKED))
    score_NC = noise_NC.copy()
    score_NC[np.arange(len(code)), code] += shift
    share = np.bincount(code, minlength=num_classes) / len(code)
    with np.errstate(divide="ignore"):
        found: Floats = np.exp(log_softmax(np.log(share) + shift * score_NC, axis=1))
    return found
