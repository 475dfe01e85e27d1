"""Thresholds, calibration maps and conformal limits against twins, closed forms and simulation."""

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, matthews_corrcoef

from headrace.evaluation.bootstrap import Resampling, Units, counts
from headrace.evaluation.calibration import (
    calibrate,
    cross_fitted,
    fit_isotonic,
    fit_temperature,
    reliability,
)
from headrace.evaluation.conformal import conform, fewest_rows
from headrace.evaluation.decisions import (
    decision_section,
    measure_decisions,
    measured_json,
    stream_decisions,
)
from headrace.evaluation.metrics import Sample
from headrace.evaluation.rules import Conformal, Isotonic, Rule, Temperature, least_cost
from headrace.evaluation.streaming import Part
from headrace.evaluation.thresholds import Objective, Sweep, compare, tune
from headrace.kernels.poisson import poisson_counts
from headrace.schema import Target

RESAMPLING = Resampling(200, 0.95, seed=5)
LATE = Target(name="late", task="binary", labels=("no", "yes"))
SCORES = {
    "f1": f1_score,
    "balanced_accuracy": balanced_accuracy_score,
    "mcc": matthews_corrcoef,
    "accuracy": lambda y, c, sample_weight: np.average(y == c, weights=sample_weight),
}


def rows(num_rows):
    return Units("row", np.arange(num_rows), num_rows)


def binary(num_rows=300, *, seed=0, shift=-1.0, decimals=None, weighted=False):
    """Labels drawn with the very probabilities that are told."""
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-(rng.normal(0, 1.5, num_rows) + shift)))
    y = (rng.random(num_rows) < p).astype(float)
    p = p if decimals is None else np.round(p, decimals)
    weight = rng.uniform(0.2, 3, num_rows) if weighted else None
    return Sample("binary", y, p, weight)


def distorted(sample, temperature):
    logit = np.log(sample.prediction) - np.log1p(-sample.prediction)
    return replace(sample, prediction=1 / (1 + np.exp(-logit * temperature)))


@pytest.mark.parametrize("metric", SCORES)
@pytest.mark.parametrize("decimals", [1, 2, None])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_threshold_equals_brute_force(metric, decimals, weighted):
    """No threshold does better, ties and probabilities of 0 and 1 included."""
    sample = binary(120, decimals=decimals, weighted=weighted)
    sweep = Sweep(sample, rows(120), Objective(metric, None))
    found = sweep.best(sweep.weight)

    def value(threshold):
        decided = (sample.prediction >= threshold).astype(float)
        return SCORES[metric](sample.truth, decided, sample_weight=sample.weight)

    tried = [value(t) for t in [*np.unique(sample.prediction), 1.1]]
    assert value(found) == pytest.approx(max(tried), abs=1e-12)
    is_known = ~np.isnan(sweep.values(sweep.weight))
    expected = [value(t) for t in sweep.thresholds[is_known]]
    assert sweep.values(sweep.weight)[is_known] == pytest.approx(expected, abs=1e-12)


def test_of_equal_thresholds_the_one_nearest_a_half_is_taken():
    """All between 0.2 and 0.9 are alike: 0.5 itself; else as near as it gets."""
    y = np.array([0.0, 0, 1, 1])
    for p, expected in (([0.1, 0.2, 0.9, 0.95], 0.5), ([0.1, 0.2, 0.4, 0.9], 0.3)):
        sweep = Sweep(Sample("binary", y, np.array(p)), rows(4), Objective("accuracy", None))
        assert sweep.best(sweep.weight) == pytest.approx(expected)


def test_thresholds_of_resamples_equal_those_of_the_rows_drawn():
    """The twin repeats each row as often as its unit was drawn."""
    sample, objective = binary(80, decimals=2), Objective("f1", None)
    units = Units("day", np.arange(80) % 9, 9)
    found = Sweep(sample, units, objective).resampled(RESAMPLING)
    drawn = counts(units, RESAMPLING, first=0, num_resamples=20)

    for number in range(20):
        again = np.repeat(np.arange(80), drawn[number][units.of_row])
        repeated = Sample("binary", sample.truth[again], sample.prediction[again])
        sweep = Sweep(repeated, rows(len(again)), objective)
        decided = sample.prediction >= sweep.best(sweep.weight)
        other = sample.prediction >= found[number]
        assert f1_score(repeated.truth, decided[again]) == pytest.approx(
            f1_score(repeated.truth, other[again]), abs=1e-12
        )


def test_with_costs_the_threshold_nears_its_closed_form():
    """Of calibrated probabilities the best threshold is fp / (fp + fn): here 1 / 5."""
    sample = binary(20_000, seed=3)
    tuned = tune(sample, rows(20_000), RESAMPLING, Objective(None, ((0, 1), (4, 0))))

    assert tuned.threshold == pytest.approx(0.2, abs=0.05)
    assert tuned.best.low < 0.2 < tuned.best.high
    assert tuned.gain.low > 0
    expected = np.where(sample.truth == 1, 4 * (sample.prediction < 0.5), sample.prediction >= 0.5)
    assert tuned.at_default.value == pytest.approx(expected.mean())


def test_a_threshold_tuned_on_noise_gains_nothing():
    """Best on the rows by far, but judged cross-fitted: 0.5 stays in most of 40 data sets."""
    kept = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        sample = Sample("binary", (rng.random(100) < 0.5) * 1.0, rng.random(100))
        tuned = tune(sample, rows(100), RESAMPLING, Objective("accuracy", None))
        kept += tuned.threshold == 0.5
    assert kept >= 37


def test_the_gain_is_that_of_the_two_ways_on_the_same_resamples():
    sample, objective = binary(200, weighted=True), Objective("f1", None)
    ways = [(sample.prediction >= t).astype(np.int64) for t in (0.3, 0.5)]
    first, second, gain = compare(sample, *ways, rows(200), RESAMPLING, objective)
    drawn = counts(rows(200), RESAMPLING, first=0, num_resamples=200)
    values = [
        [f1_score(sample.truth, way, sample_weight=sample.weight * row) for row in drawn]
        for way in ways
    ]

    assert gain.value == pytest.approx(first.value - second.value)
    expected = np.quantile(np.subtract(*values), [0.025, 0.975])
    assert [gain.low, gain.high] == pytest.approx(expected, abs=1e-9)


def test_the_class_of_least_cost_is_the_minimum_of_expected_costs():
    rng = np.random.default_rng(0)
    p, costs = rng.dirichlet(np.ones(4), 50), rng.random((4, 4))
    code = least_cost(p, tuple(map(tuple, costs)))

    assert code.tolist() == np.argmin(p @ costs, axis=1).tolist()


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_recovers_a_known_distortion(temperature):
    sample = distorted(binary(40_000, seed=1), temperature)
    found = fit_temperature(sample)

    assert found.temperature == pytest.approx(temperature, rel=0.04)
    nearby = [
        log_loss(sample.truth, Temperature(temperature=found.temperature * f).of(sample.prediction))
        for f in (0.99, 1, 1.01)
    ]
    assert nearby[1] == min(nearby)


def test_the_temperature_of_several_classes_recovers_a_known_distortion():
    rng = np.random.default_rng(2)
    p = rng.dirichlet(np.ones(4), 30_000)
    y = (rng.random(30_000)[:, None] > p.cumsum(axis=1)).sum(axis=1).astype(float)
    sharp = p**2 / (p**2).sum(axis=1, keepdims=True)
    found = fit_temperature(Sample("multiclass", y, sharp))

    assert found.temperature == pytest.approx(2, rel=0.04)
    assert found.of(sharp) == pytest.approx(p, abs=0.01)


def test_two_classes_told_by_one_or_by_two_columns_have_one_temperature():
    sample = distorted(binary(500), 2.0)
    both = np.column_stack([1 - sample.prediction, sample.prediction])
    two = fit_temperature(Sample("multiclass", sample.truth, both))

    assert two.temperature == pytest.approx(fit_temperature(sample).temperature, rel=1e-4)
    assert two.of(both)[:, 1] == pytest.approx(two.of(sample.prediction), abs=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_isotonic_map_equals_scikit_learns_within_its_bounds(weighted):
    sample = binary(400, decimals=2, weighted=weighted)
    found = fit_isotonic(sample)
    expected = IsotonicRegression(out_of_bounds="clip").fit(
        sample.prediction, sample.truth, sample.weight
    )
    told = np.clip(expected.predict(sample.prediction), 1 / 402, 401 / 402)

    assert found.of(sample.prediction) == pytest.approx(told, abs=1e-9)
    assert Isotonic.model_validate_json(found.model_dump_json()) == found


def test_each_fold_gets_the_map_of_the_others():
    sample, fold = distorted(binary(300), 2.0), np.arange(300) % 3
    found = cross_fitted(sample, fold, fit_temperature).prediction

    for number in range(3):
        own = fold == number
        of_others = fit_temperature(sample.where(~own))
        assert found[own] == pytest.approx(of_others.of(sample.prediction[own]))


def test_what_is_calibrated_already_is_left_alone_and_what_is_not_is_mended():
    """By gain: in most of 20 data sets none, and with distorted logits always a map."""
    kept = 0
    fold = np.arange(600) % 5
    for seed in range(20):
        sample, valid = binary(600, seed=seed), binary(600, seed=seed + 100)
        kept += calibrate(sample, fold, rows(600), RESAMPLING, valid=valid).map is None
        found = calibrate(
            distorted(sample, 3.0), fold, rows(600), RESAMPLING, valid=distorted(valid, 3.0)
        )
        assert found.map is not None
        assert min(gain.low for gain in found.gains.values()) > 0
    assert kept >= 18


def test_a_map_that_harms_valid_rows_is_left_out():
    """A bag's mean is not as sure as its fits: valid rows do not need what out-of-fold rows do."""
    sample, valid = distorted(binary(600), 3.0), binary(600, seed=9)
    found = calibrate(sample, np.arange(600) % 5, rows(600), RESAMPLING, valid=valid)

    assert found.map is None
    assert found.on_valid < 0
    assert "adds" in found.reason


def test_reliability_is_of_bins_of_equal_weight():
    sample = binary(1000)
    found = reliability(sample)
    order = np.argsort(sample.prediction)
    assert found["predicted"] == pytest.approx(
        sample.prediction[order].reshape(10, 100).mean(axis=1)
    )
    assert found["observed"] == pytest.approx(sample.truth[order].reshape(10, 100).mean(axis=1))


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
def test_intervals_cover_exchangeable_rows_within_their_binomial_interval(coverage):
    """One new row to each of 2,000 valid sets: the chance is ⌈(n + 1)c⌉ / (n + 1) exactly."""
    rng = np.random.default_rng(4)
    num_rows, num_sets = 39, 2000
    error = np.abs(rng.standard_t(3, (num_sets, num_rows + 1)))
    hits = sum(
        row[-1] <= conform(Sample("regression", row[:-1], np.zeros(num_rows)), coverage).limit
        for row in error
    )
    chance = np.ceil((num_rows + 1) * coverage) / (num_rows + 1)

    assert stats.binomtest(int(hits), num_sets, chance).pvalue > 0.01


def test_sets_cover_at_least_as_asked_and_are_never_empty():
    rng = np.random.default_rng(6)
    p = rng.dirichlet(np.full(5, 0.5), 6000)
    y = (rng.random(6000)[:, None] > p.cumsum(axis=1)).sum(axis=1).astype(float)
    found = conform(Sample("multiclass", y[:3000], p[:3000]), 0.9)
    is_in = found.classes(p[3000:])
    covered = is_in[np.arange(3000), y[3000:].astype(int)]

    assert is_in.sum(axis=1).min() == 1
    assert covered.mean() > 0.88
    assert is_in.sum(axis=1).mean() < 4
    low = found.classes(np.array([0.5, 0.001]))
    assert low.tolist() == [[True, True], [True, False]]


def test_the_limit_is_the_rank_with_one_row_more():
    """Of 9 rows the largest residual at 0.9, of 19 the 18th; with 8 rows there is none."""
    errors = np.arange(1.0, 20.0)
    sample = Sample("regression", errors, np.zeros(19))

    assert 18 <= conform(sample, 0.9).limit == pytest.approx(18)
    assert conform(sample.where(errors <= 9), 0.9).limit == pytest.approx(9)
    assert conform(sample.where(errors <= 8), 0.9) is None
    assert fewest_rows(0.9) == 9


def entry(**more):
    return {
        "task": "binary",
        "num_classes": 2,
        "objective": {"metric": "f1", "costs": [[0, 1], [4, 0]]},
        "conformal": {"reason": "coverage 0.9"},
        **more,
    }


RULE = Rule(
    model="sharp",
    calibration=Temperature(temperature=2.0),
    threshold=0.3,
    conformal=Conformal(coverage=0.9, limit=0.7, num_rows=100),
)


def test_test_rows_are_measured_both_ways():
    """Against scikit-learn, with weights; coverage counts rows."""
    sample = distorted(binary(400, weighted=True), 2.0)
    found = measured_json(measure_decisions(sample, rows(400), RESAMPLING, RULE, entry()), LATE)
    p = Temperature(temperature=2.0).of(sample.prediction)
    told, weight = found["metrics"], sample.weight

    for name, score in SCORES.items():
        usual, ruled = (
            score(sample.truth, c, sample_weight=weight)
            for c in (sample.prediction >= 0.5, p >= 0.3)
        )
        assert told[name]["default"]["value"] == pytest.approx(usual, abs=1e-9)
        assert told[name]["decided"]["value"] == pytest.approx(ruled, abs=1e-9)
        assert told[name]["gain"]["value"] == pytest.approx(ruled - usual, abs=1e-9)
        assert told[name]["gain"]["ci_low"] < ruled - usual < told[name]["gain"]["ci_high"]
    cost = np.where(sample.truth == 1, 4 * (p < 0.3), p >= 0.3)
    assert told["mean_cost"]["decided"]["value"] == pytest.approx(np.average(cost, weights=weight))
    assert told["mean_cost"]["gain"]["value"] == pytest.approx(
        told["mean_cost"]["default"]["value"] - told["mean_cost"]["decided"]["value"]
    )
    losses = [log_loss(sample.truth, q, sample_weight=weight) for q in (sample.prediction, p)]
    assert found["log_loss"]["raw"]["value"] == pytest.approx(losses[0])
    assert found["log_loss"]["calibrated"]["value"] == pytest.approx(losses[1])
    assert found["log_loss"]["gain"]["ci_low"] > 0
    score = np.where(sample.truth == 1, 1 - p, p)
    assert found["conformal"]["coverage"]["value"] == pytest.approx((score <= 0.7).mean())


def test_a_stream_says_the_same_from_poisson_resamples():
    sample = binary(300)
    key = np.arange(300) + 10**6
    parts = [
        Part(sample.where(keep), key[keep]) for keep in (np.arange(300) < 77, np.arange(300) >= 77)
    ]
    whole = measure_decisions(sample, rows(300), RESAMPLING, RULE, entry())
    found = stream_decisions(parts, rows(300), RESAMPLING, RULE, entry())
    drawn = poisson_counts(key, num_resamples=200, seed=5)
    p = Temperature(temperature=2.0).of(sample.prediction)
    values = [f1_score(sample.truth, p >= 0.3, sample_weight=row) for row in drawn]

    assert found.num_rows == 300
    assert found.metrics["f1"].ruled.value == pytest.approx(whole.metrics["f1"].ruled.value)
    assert found.coverage.value == pytest.approx(whole.coverage.value)
    ruled = found.metrics["f1"].ruled
    assert [ruled.low, ruled.high] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=1e-9)


@pytest.mark.parametrize(
    ("split", "message"),
    [("random", "Guaranteed"), ("time", "Measured, not guaranteed: .* later time")],
)
def test_the_section_says_what_is_guaranteed(split, message):
    sample = binary(300)
    tuned = {"value": 0.3, "ci_low": 0.2, "ci_high": 0.4}
    told = entry(
        threshold={"reason": "0.3: gains", "tuned": tuned, "curve": [[0.2, 0.5], [0.3, 0.6]]},
        calibration={
            "reason": "temperature",
            "chosen": "temperature",
            "tried": "temperature",
            "reliability": {
                "before": {"predicted": [0.1, 0.9], "observed": [0.2, 0.8]},
                "after": {"predicted": [0.2, 0.8], "observed": [0.2, 0.8]},
            },
        },
        objective={"metric": "f1", "costs": None},
    )
    measured = measure_decisions(sample, rows(300), RESAMPLING, RULE, told)
    section = decision_section(measured, LATE, told, split=split, confidence=0.95)

    assert any(re.search(message, text) for text in section.text)
    assert [chart.name for chart in section.charts] == ["threshold", "reliability"]
    assert "0.2 to 0.4" in section.charts[0].alternative
    assert "raw 0.1, temperature, cross-fitted 0" in section.charts[1].alternative
    assert section.tables[0].rows[0][0] == "F1"
    assert section.tables[1].rows[0][:2] == ("coverage", 0.9)
