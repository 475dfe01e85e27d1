"""Probabilities that say what they mean: a map fitted on out-of-fold rows, or none.

Two maps are tried (of several classes only the first, which keeps their order):
- temperature: logits divided by one number (Guo et al. 2017);
- isotonic: the rising step function nearest the labels, straight between its steps (Zadrozny and
  Elkan 2002). It never says 0 or 1: with n rows nothing is surer than 1 − 1 / (n + 2).
Each is judged cross-fitted: the rows of a fold get the map that the other folds made. The better
one is used if the interval of its gain in log-loss excludes 0, and if it does no harm to valid
rows. These are asked as well since out-of-fold rows are told by the models of single folds, while
valid, test and new rows get the mean of a bag, which is less sure of itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.blend import linked, rounded
from headrace.evaluation.bootstrap import (
    Interval,
    Resampling,
    Scored,
    Units,
    bootstrap,
    difference,
)
from headrace.evaluation.metrics import Sample, score
from headrace.evaluation.rules import AnyCalibration, Isotonic, Temperature

Floats: TypeAlias = npt.NDArray[np.float64]
Method = Literal["temperature", "isotonic"]

_LOG_RANGE = 4.0  # temperatures from e^-4 to e^4
_NUM_BINS = 10  # of a reliability curve


@dataclass(frozen=True)
class Calibrated:
    """What was tried, and the map to use; None where none is, and ``reason`` says why.

    ``gains`` are what each map takes off the log-loss, cross-fitted over folds; ``on_valid`` what
    the map to use takes off it on valid rows. ``cross_fitted`` are the out-of-fold rows as the
    better map tells them, None where no map was tried.
    """

    map: AnyCalibration | None
    reason: str
    gains: Mapping[Method, Interval]
    raw_log_loss: float | None = None
    on_valid: float | None = None
    tried: Method | None = None  # the better map
    cross_fitted: Sample | None = None


def calibrate(
    rows: Sample,
    fold: npt.NDArray[np.int64],
    units: Units,
    resampling: Resampling,
    *,
    valid: Sample,
) -> Calibrated:
    """Return the map that lowers the log-loss of out-of-fold ``rows`` beyond doubt, if one does.

    ``fold`` (N,) is the fold of each row.
    """
    if len(np.unique(fold)) < 2:
        return Calibrated(None, "none: the out-of-fold rows are of one fold alone", {})
    if rows.task == "binary" and len(np.unique(rows.truth)) < 2:
        return Calibrated(None, "none: the out-of-fold rows are of one class alone", {})
    fits: dict[Method, Callable[[Sample], AnyCalibration]] = {"temperature": fit_temperature}
    if rows.task == "binary":
        fits["isotonic"] = fit_isotonic
    raw = _log_loss(rows, units, resampling)
    honest = {name: cross_fitted(rows, fold, fit) for name, fit in fits.items()}
    gains = {
        name: difference(
            "log_loss", _log_loss(one, units, resampling), raw, units, resampling
        ).negated()
        for name, one in honest.items()
    }
    best = max(gains, key=lambda name: gains[name].value or 0.0)
    gain = gains[best]
    found = Calibrated(None, "", gains, raw.points["log_loss"], None, best, honest[best])
    if gain.value is None or gain.low is None or gain.high is None:
        return replace(found, reason=f"none: the gain has no interval ({gain.reason})")
    what = "excludes 0" if gain.low > 0 else "includes 0" if gain.high >= 0 else "is below 0"
    told = (
        f"what {best} takes off the log-loss of out-of-fold rows, cross-fitted, {what}: "
        f"{gain.value:.3g} [{gain.low:.3g}, {gain.high:.3g}], "
        f"{100 * resampling.confidence:.4g} % interval over {units}"
    )
    if gain.low <= 0:
        return replace(found, reason=f"none: {told}")
    fitted = fits[best](rows)
    calibrated = replace(valid, prediction=fitted.of(valid.prediction))
    on_valid = score("log_loss", valid) - score("log_loss", calibrated)
    if on_valid < 0:
        harm = f"but it adds {-on_valid:.3g} to that of valid rows"
        return replace(found, reason=f"none: {told}; {harm}", on_valid=on_valid)
    return replace(found, map=fitted, reason=f"{best}: {told}", on_valid=on_valid)


def fit_temperature(sample: Sample) -> Temperature:
    """Return the temperature of least log-loss on ``sample``, to 6 digits."""
    from scipy.optimize import minimize_scalar

    weight = np.ones(len(sample.truth)) if sample.weight is None else sample.weight
    if sample.task == "binary":
        sign = np.where(sample.truth == 1, 1.0, -1.0)
        z_N = sign * linked(sample.prediction, "logit")[:, 0]

        def loss(log_t: float) -> float:
            return float((weight * np.logaddexp(0.0, -z_N * np.exp(-log_t))).sum())

    else:
        z_NC = linked(sample.prediction, "log")
        z_NC = z_NC - z_NC[np.arange(len(z_NC)), sample.truth.astype(np.int64)][:, None]

        def loss(log_t: float) -> float:
            scaled = z_NC * np.exp(-log_t)
            high = scaled.max(axis=1)
            sums = np.log(np.exp(scaled - high[:, None]).sum(axis=1)) + high
            return float((weight * sums).sum())

    # One minimum: the loss is convex in 1 / temperature.
    bounds = (-_LOG_RANGE, _LOG_RANGE)
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    # What another CPU's vector width may change lies beyond the digits kept.
    return Temperature(temperature=float(f"{np.exp(found.x):.6g}"))


def fit_isotonic(sample: Sample) -> Isotonic:
    """Return the isotonic regression of a binary target's labels on its probability."""
    from sklearn.isotonic import IsotonicRegression

    least = 1 / (len(sample.truth) + 2)
    fitted = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip")
    fitted.fit(sample.prediction, sample.truth, sample.weight)
    return Isotonic(
        raw=tuple(rounded(float(x)) for x in fitted.X_thresholds_),
        calibrated=tuple(rounded(float(y)) for y in fitted.y_thresholds_),
    )


def cross_fitted(
    rows: Sample, fold: npt.NDArray[np.int64], fit: Callable[[Sample], AnyCalibration]
) -> Sample:
    """Return each fold's rows as the map fitted on the other folds tells them."""
    values = np.empty_like(rows.prediction)
    for number in np.unique(fold):
        is_own = fold == number
        values[is_own] = fit(rows.where(~is_own)).of(rows.prediction[is_own])
    return replace(rows, prediction=values)


def reliability(sample: Sample) -> dict[str, Any]:
    """Return told probability and share of hits in bins of about equal weight, as JSON.

    Of a binary target that of ``labels[1]``, else that of the likeliest class.
    """
    if sample.task == "binary":
        told, is_hit = sample.prediction, sample.truth
    else:
        told = sample.prediction.max(axis=1)
        is_hit = (sample.prediction.argmax(axis=1) == sample.truth).astype(np.float64)
    weight = np.ones(len(told)) if sample.weight is None else sample.weight
    order = np.argsort(told, kind="stable")
    told, is_hit, weight = told[order], is_hit[order], weight[order]
    place = np.minimum((np.cumsum(weight) - weight) / weight.sum() * _NUM_BINS, _NUM_BINS - 1)
    # Rows of one probability stay together: in the bin of the first of them.
    first = np.searchsorted(told, told, side="left")
    of_bin = place.astype(np.int64)[first]
    mass = np.bincount(of_bin, weight, minlength=_NUM_BINS)
    is_used = mass > 0

    def means(values: Floats) -> list[float]:
        sums = np.bincount(of_bin, weight * values, minlength=_NUM_BINS)
        return [rounded(float(value)) for value in sums[is_used] / mass[is_used]]

    return {"predicted": means(told), "observed": means(is_hit)}


def _log_loss(sample: Sample, units: Units, resampling: Resampling) -> Scored:
    return bootstrap(sample, units, resampling, threshold=0.5, only="log_loss")
