"""Sanity checks of targets and predictions: each gives a verdict and says what to do about it.

They catch slips that no metric shows: labels of another kind in the test rows, probabilities of the
wrong class, rounded scores sent to a ranking metric, a constant. Limits are conventions, stated
here and in docs/checks.md. Intervals are from the resamples of the stage's units.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.bootstrap import (
    Interval,
    Resampling,
    Units,
    bootstrap,
    difference,
    estimate,
    interval,
    resampled_sums,
    sums_per_unit,
)
from headrace.evaluation.coded import Coded
from headrace.evaluation.drift import SHIFTED, STABLE, Shift, shift
from headrace.evaluation.findings import CheckVerdict, Finding, rows_text
from headrace.evaluation.metrics import MetricName, Sample
from headrace.schema import Target

Floats: TypeAlias = npt.NDArray[np.float64]
Codes: TypeAlias = npt.NDArray[np.int64]

PAIRS = (("train", "valid"), ("train", "test"), ("valid", "test"))
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_OFF, _FAR_OFF = 0.05, 0.25  # mean prediction − mean truth, in standard deviations of the truth
_TIED = 0.01  # share of pairs of rows with equal predictions that a ranking metric may have
_NEARLY_CONSTANT = 0.001  # spread of predictions over that of the truth


@dataclass(frozen=True)
class SplitValues:
    """Values of one split, their missing ones left out: (N,), and the codes of the rows' units."""

    values: Floats
    unit: Codes


def check_target(target: Target, splits: Mapping[str, SplitValues], *, by_time: bool) -> Finding:
    """Compare the target's distribution between the splits."""
    shifts = {pair: _shift_of(target, splits[pair[0]], splits[pair[1]]) for pair in PAIRS}
    verdicts = {pair: _shift_verdict(one, by_time=by_time) for pair, one in shifts.items()}
    pair = max(PAIRS, key=lambda one: (verdicts[one] != "ok", shifts[one].index))
    worst, verdict = shifts[pair], verdicts[pair]
    first, second = (_summary(target, splits[name].values) for name in pair)
    told = f"{pair[0]} and {pair[1]} ({_shift_text(worst)}; {first} against {second})"
    if verdict == "ok":
        sentence = f"The target is alike in train, valid and test; most unlike are {told}."
    else:
        advice = (
            "in a split by time this can be the world that moves: expect it to go on, retrain "
            "often, and compare metrics across splits with care"
            if by_time
            else "look for a filter, a unit or a label rule that differs, or stratify "
            "`extract.split`"
        )
        sentence = f"The target differs between {told}: {advice}."
    facts = {
        "splits": {name: _described(target, one.values) for name, one in splits.items()},
        "shifts": {" → ".join(pair): shift_json(one) for pair, one in shifts.items()},
    }
    return Finding("target distribution", target.name, verdict, sentence, facts)


def check_calibration(
    target: Target, model: str, sample: Sample, units: Units, resampling: Resampling
) -> Finding:
    """Compare the mean prediction with the mean truth, of several classes each class's."""
    truth_NC, predicted_NC = _outcomes(sample)
    names = [""] if target.task == "regression" else target.labels[-truth_NC.shape[1] :]
    found = []
    for column, name in enumerate(names):
        truth, predicted = truth_NC[:, column], predicted_NC[:, column]
        gap = _mean_gap(truth, predicted, sample.weight, units, resampling)
        spread = float(truth.std())
        size = 0.0 if gap.value is None else abs(gap.value) / (spread or 1.0)
        found.append((size, name, gap, truth, predicted))
    size, name, gap, truth, predicted = max(found, key=lambda one: one[0])
    verdict: CheckVerdict = "ok"
    if gap.low is None or gap.high is None:
        verdict = "unknown"
    elif not gap.low <= 0 <= gap.high:
        verdict = "bad" if size > _FAR_OFF else "warn" if size > _OFF else "ok"
    of_class = f" of {name!r}" if name else ""
    means = [np.average(one, weights=sample.weight) for one in (predicted, truth)]
    told = (
        f"The mean prediction{of_class} is {means[0]:.4g}, the mean truth {means[1]:.4g}: "
        f"difference {_interval_text(gap)}, {size:.2f} standard deviations of the truth"
    )
    rows = rows_text(len(truth), "test rows", units)
    sentence = f"{told} ({rows})."
    if verdict in ("warn", "bad"):
        sentence = (
            f"{told} ({rows}): probabilities or values are off as a "
            f"whole; look at the target's distribution in train and test, and calibrate."
        )
    facts: dict[str, Any] = {
        "difference": {"value": gap.value, "ci_low": gap.low, "ci_high": gap.high},
        "standard_deviations": size,
    }
    if target.task == "regression":
        facts["prediction_quantiles"] = _quantiles(predicted)
        facts["truth_quantiles"] = _quantiles(truth)
    return Finding("calibration in the large", model, verdict, sentence, facts)


def check_rounding(target: Target, model: str, prediction: Floats) -> Finding:
    """Look for few distinct predictions: to a ranking metric pairs of equal ones are half right."""
    columns = prediction.reshape(len(prediction), -1)
    counts = [np.unique(column, return_counts=True)[1] for column in columns.T]
    tied = max(_tied_share(one) for one in counts)
    num_values = min(len(one) for one in counts)
    facts = {"distinct": num_values, "tied_pairs": tied}
    told = (
        f"{num_values:,} distinct predictions on {len(columns):,} test rows; {100 * tied:.3g} % of "
        f"the pairs of rows are tied"
    )
    is_label = target.task != "regression" and bool(np.isin(columns, (0.0, 1.0)).all())
    if num_values == 1:
        return Finding("rounded predictions", model, "unknown", "All predictions are equal.", facts)
    if is_label:
        sentence = (
            f"{told}: all are 0 or 1, so these are labels and no probabilities; ranking metrics "
            f"and log-loss need probabilities."
        )
        return Finding("rounded predictions", model, "bad", sentence, facts)
    if tied > _TIED:
        places = _decimals(columns)
        rounding = f"they have {places} decimals, so they look rounded; " if places < 4 else ""
        sentence = (
            f"{told}: {rounding}ranking metrics count a tied pair as half right; keep all digits "
            f"of the predictions, or let the model tell more rows apart."
        )
        return Finding("rounded predictions", model, "warn", sentence, facts)
    return Finding("rounded predictions", model, "ok", f"{told}.", facts)


def check_inversion(
    target: Target, model: str, sample: Sample, units: Units, resampling: Resampling
) -> Finding:
    """See whether the opposite prediction would be better, beyond its paired interval."""
    if len(np.unique(sample.prediction)) == 1:
        return Finding("inverted predictions", model, "unknown", "All predictions are equal.")
    if target.task == "binary":
        return _inverted_probability(target, model, sample, units, resampling)
    if target.task == "regression":
        found = _correlation(sample, units, resampling)
        measure, half = "correlation of prediction and truth", 0.0
        advice = "larger predictions go with smaller truths; look for a sign or a wrong target"
    else:
        scored = bootstrap(sample, units, resampling, threshold=0.5, only="macro_roc_auc")
        found = estimate("macro_roc_auc", scored, units, resampling)
        measure, half = "macro ROC-AUC", 0.5
        advice = "probabilities stand against the truth; look for classes in another order"
    told = f"{measure}: {_interval_text(found)}"
    facts = {"value": found.value, "ci_low": found.low, "ci_high": found.high}
    if found.high is None:
        return Finding("inverted predictions", model, "unknown", f"{told}.", facts)
    if found.high < half:
        return Finding("inverted predictions", model, "bad", f"{told}: {advice}.", facts)
    return Finding("inverted predictions", model, "ok", f"{told}; not inverted.", facts)


def check_constant(model: str, prediction: Floats, truth: Floats, *, is_chosen: bool) -> Finding:
    """Look for predictions that are all the same, or nearly so beside the truth's spread.

    They may be what a baseline is for: they are bad only of the chosen model.
    """
    columns = prediction.reshape(len(prediction), -1)
    spread, of_truth = float(columns.std(axis=0).max()), float(truth.std())
    facts = {"standard_deviation": spread, "truth_standard_deviation": of_truth}
    if (columns == columns[0]).all():
        sentence = (
            f"All {len(columns):,} predictions of test rows are equal: right for a baseline that "
            f"knows the mean alone; any other model learned nothing from its inputs: look at its "
            f"training curve, and whether the inputs are constant."
        )
        verdict: CheckVerdict = "bad" if is_chosen else "warn"
        return Finding("constant predictions", model, verdict, sentence, facts)
    if spread < _NEARLY_CONSTANT * of_truth:
        sentence = (
            f"Predictions of test rows hardly differ: their standard deviation is {spread:.3g}, "
            f"that of the truth {of_truth:.3g}; the model learned next to nothing."
        )
        return Finding("constant predictions", model, "warn", sentence, facts)
    sentence = f"Predictions vary: standard deviation {spread:.3g}, of the truth {of_truth:.3g}."
    return Finding("constant predictions", model, "ok", sentence, facts)


def _shift_verdict(one: Shift, *, by_time: bool) -> CheckVerdict:
    """Return the verdict of a shift; in a split by time, where it is expected, at most warn."""
    if not one.is_real or one.index < STABLE:
        return "ok"
    return "warn" if by_time or one.index < SHIFTED else "bad"


def _shift_text(one: Shift) -> str:
    """Return index and test of a shift as text."""
    return f"stability index {one.index:.3f}, p = {one.p_value:.2g}"


def shift_json(one: Shift) -> dict[str, Any]:
    """Return a shift as JSON has it."""
    return {
        "column": one.column,
        "stability_index": one.index,
        "p_value": one.p_value,
        "kolmogorov_smirnov": one.distance,
    }


def _shift_of(target: Target, first: SplitValues, second: SplitValues) -> Shift:
    values = np.concatenate([first.values, second.values])
    column = Coded(target.name, "number" if target.task == "regression" else "category", values)
    is_second = np.arange(len(values)) >= len(first.values)
    return shift(column, is_second, np.concatenate([first.unit, second.unit]))


def _summary(target: Target, values: Floats) -> str:
    if target.task == "regression":
        return f"mean {values.mean():.4g}, median {np.median(values):.4g}"
    shares = np.bincount(values.astype(np.int64), minlength=len(target.labels)) / len(values)
    first = np.argsort(-shares, kind="stable")[:3] if len(shares) > 2 else [1]
    return ", ".join(f"{100 * shares[k]:.3g} % {target.labels[k]}" for k in first)


def _described(target: Target, values: Floats) -> dict[str, Any]:
    if target.task == "regression":
        spread = float(values.std())
        return {
            "num_rows": len(values),
            "mean": float(values.mean()),
            "standard_deviation": spread,
            "quantiles": _quantiles(values),
        }
    counts = np.bincount(values.astype(np.int64), minlength=len(target.labels))
    shares = (counts / len(values)).tolist()
    return {"num_rows": len(values), "shares": dict(zip(target.labels, shares, strict=True))}


def _quantiles(values: Floats) -> dict[str, float]:
    found = np.quantile(values, _QUANTILES).tolist()
    return {f"{q:g}": value for q, value in zip(_QUANTILES, found, strict=True)}


def _outcomes(sample: Sample) -> tuple[Floats, Floats]:
    """Return truth and prediction of each output: the value, or 0 and 1 of a class."""
    if sample.task == "multiclass":
        num_classes = sample.prediction.shape[1]
        truth = (sample.truth[:, None] == np.arange(num_classes)).astype(np.float64)
        return truth, sample.prediction
    return sample.truth[:, None], sample.prediction[:, None]


def _mean_gap(
    truth: Floats,
    predicted: Floats,
    weight: Floats | None,
    units: Units,
    resampling: Resampling,
) -> Interval:
    weight = np.ones(len(truth)) if weight is None else weight
    columns_KU = sums_per_unit(np.stack([weight * (predicted - truth), weight]), units)
    sums_BK = resampled_sums(columns_KU, units, resampling)
    total, all_weight = columns_KU.sum(axis=1)
    value = total / all_weight
    influence = (columns_KU[0] - value * columns_KU[1]) / all_weight
    with np.errstate(divide="ignore", invalid="ignore"):
        values = sums_BK[:, 0] / sums_BK[:, 1]
    return interval(float(value), values, units, resampling, influence=influence)


def _correlation(sample: Sample, units: Units, resampling: Resampling) -> Interval:
    weight = np.ones(len(sample.truth)) if sample.weight is None else sample.weight
    x = sample.prediction - np.average(sample.prediction, weights=weight)
    y = sample.truth - np.average(sample.truth, weights=weight)
    rows_KN = weight * np.stack([np.ones_like(x), x, y, x * x, y * y, x * y])
    columns_KU = sums_per_unit(rows_KN, units)
    sums_BK = resampled_sums(columns_KU, units, resampling)
    sums_UK = columns_KU.sum(axis=1) - columns_KU.T  # without each unit, for bca
    value = float(_correlations(columns_KU.sum(axis=1)))
    influence = value - _correlations(sums_UK)
    return interval(value, _correlations(sums_BK), units, resampling, influence=influence)


def _correlations(sums: Floats) -> Floats:
    weight, x, y, xx, yy, xy = (sums[..., k] for k in range(6))
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.sqrt((xx - x * x / weight) * (yy - y * y / weight))
        found: Floats = (xy - x * y / weight) / spread
    return found


def _inverted_probability(
    target: Target, model: str, sample: Sample, units: Units, resampling: Resampling
) -> Finding:
    flipped = Sample(sample.task, sample.truth, 1 - sample.prediction, sample.weight)
    facts: dict[str, Any] = {}
    told, is_better, is_known = [], [], []
    metrics: tuple[tuple[MetricName, str, int], ...] = (
        ("roc_auc", "ROC-AUC", 1),
        ("log_loss", "log-loss", -1),
    )
    for metric, title, better in metrics:
        one, other = (
            bootstrap(rows, units, resampling, threshold=0.5, only=metric)
            for rows in (sample, flipped)
        )
        gain = difference(metric, other, one, units, resampling)
        facts[metric] = {"value": gain.value, "ci_low": gain.low, "ci_high": gain.high}
        told.append(f"{title} {_interval_text(gain)}")
        if gain.low is not None and gain.high is not None:
            is_known.append(metric)
            is_better.append(gain.low > 0 if better > 0 else gain.high < 0)
    change = f"1 − p instead of p changes {', '.join(told)}"
    if not is_known:
        return Finding("inverted predictions", model, "unknown", f"{change}.", facts)
    if any(is_better):
        sentence = (
            f"{change}: the opposite probability is better; the model gives that of "
            f"{target.labels[0]!r} where {target.labels[1]!r} is meant, or its labels are swapped."
        )
        return Finding("inverted predictions", model, "bad", sentence, facts)
    return Finding("inverted predictions", model, "ok", f"{change}; not inverted.", facts)


def _tied_share(counts: npt.NDArray[np.int64]) -> float:
    """Return the share of pairs of different rows that have equal values."""
    num_rows = int(counts.sum())
    pairs = float((counts * (counts - 1.0)).sum())
    return pairs / max(1, num_rows * (num_rows - 1))


def _decimals(values: Floats) -> int:
    """Return how many decimals all values have, 4 where it is more than 3."""
    return next((k for k in range(4) if np.allclose(values, values.round(k), rtol=0, atol=1e-9)), 4)


def _interval_text(found: Interval) -> str:
    if found.value is None:
        return found.reason
    if found.low is None:
        return f"{found.value:.4g} ({found.reason})"
    return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"
