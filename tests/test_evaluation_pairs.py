"""Pairs of models: p-values, Holm, ties, the smallest detectable difference."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from headrace.evaluation.bootstrap import Interval, Resampling, Scored, Units, bootstrap
from headrace.evaluation.comparison import Comparison, all_pairs, judge
from headrace.evaluation.metrics import METRICS, Sample
from headrace.evaluation.pair_section import pair_section, pairs_csv
from headrace.evaluation.pairs import (
    Pair,
    best_of,
    compare_pairs,
    holm,
    ranks,
    resamples_needed,
    smallest_detectable,
    tied_with,
    two_sided_p,
)

NOTHING = Interval(None, None, None)


def plain_holm(p_values):
    """Holm 1979 as it is written: reject in order until the first that is not rejected."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    for place, i in enumerate(order):
        stepped = [
            (len(order) - earlier) * p_values[order[earlier]] for earlier in range(place + 1)
        ]
        adjusted[i] = min(1.0, max(stepped))
    return adjusted


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_its_plain_twin(p_values):
    """For any p-values, ties among them too."""
    assert holm(p_values) == pytest.approx(plain_holm(p_values).tolist())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.2))
def test_holm_rejects_what_the_step_down_rule_does(p_values, alpha):
    """Reject the k-th smallest of m while it is at most alpha / (m − k)."""
    rejected = set()
    for place, i in enumerate(np.argsort(p_values, kind="stable").tolist()):
        if (len(p_values) - place) * p_values[i] > alpha:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


def test_holm_equals_the_published_example():
    """statsmodels.stats.multitest.multipletests([.01, .04, .03, .005], method="holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_missing_p_values_do_not_count_as_tests():
    """A pair without a test costs the others nothing."""
    assert holm([0.02, None, None]) == [0.02, None, None]
    assert holm([None]) == [None]


@settings(max_examples=50)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40))
def test_the_p_value_is_its_plain_twin(values):
    """Count and add one; the same for the negative; never 0, never above 1."""
    differences = np.array(values, float)
    share = (1 + min(sum(v <= 0 for v in values), sum(v >= 0 for v in values))) / (len(values) + 1)
    assert two_sided_p(differences) == pytest.approx(min(1, 2 * share))
    assert two_sided_p(-differences) == two_sided_p(differences)


def test_undefined_resamples_are_left_out_of_the_p_value():
    """And equal models have p = 1."""
    assert two_sided_p(np.array([np.nan, 1.0, 2.0, np.nan])) == pytest.approx(2 / 3)
    assert two_sided_p(np.full(5, np.nan)) is None
    assert two_sided_p(np.zeros(9)) == 1


def paired(rng, *, shift=0.0, num_rows=400, models=2):
    """Absolute errors of models whose errors are alike but for noise, and ``shift`` of the last."""
    truth = rng.normal(size=num_rows)
    shared = rng.normal(size=num_rows)
    samples = {}
    for number in range(models):
        error = 0.9 * shared + 0.4 * rng.normal(size=num_rows)
        factor = 1 + shift * (number == models - 1)
        samples[f"m{number}"] = Sample("regression", truth, truth + factor * error)
    return samples


def scored_of(samples, units, resampling):
    return {
        name: bootstrap(sample, units, resampling, threshold=0.5)
        for name, sample in samples.items()
    }


def rows(num_rows):
    return Units("row", np.arange(num_rows), num_rows)


def test_the_p_value_of_a_mean_is_that_of_the_paired_t_test():
    """Closed form beside it: on many rows of a mean both ask the same question."""
    rng = np.random.default_rng(3)
    resampling = Resampling(4000, 0.95, 1)
    for _ in range(4):
        samples = paired(rng, shift=0.02)
        (pair,) = compare_pairs(
            "mae", scored_of(samples, rows(400), resampling), rows(400), resampling
        )
        loss = [np.abs(s.prediction - s.truth) for s in samples.values()]
        expected = stats.ttest_rel(*loss).pvalue
        assert pair.p_value == pytest.approx(expected, abs=0.06)
        t = stats.ttest_rel(*loss)
        assert pair.difference.standard_error == pytest.approx(
            abs(pair.difference.value / t.statistic), rel=0.06
        )


def test_equal_models_are_told_apart_about_as_seldom_as_alpha_says():
    """Type I error over 300 simulated sets; and over all pairs of four models after Holm."""
    rng = np.random.default_rng(11)
    resampling = Resampling(400, 0.95, 5)
    single = family = 0
    for _ in range(300):
        scored = scored_of(paired(rng, num_rows=150, models=4), rows(150), resampling)
        pairs = compare_pairs("mae", scored, rows(150), resampling)
        single += pairs[0].p_value <= 0.05
        family += any(pair.p_holm <= 0.05 for pair in pairs)
    # Of 300 draws at 5 %, 15 are expected; 4 standard deviations of 3.8.
    assert 3 <= single <= 30
    assert family <= 30


def test_a_difference_of_the_smallest_detectable_size_is_found_four_times_in_five():
    """Power over 150 simulated sets, by the size that one other set states."""
    rng = np.random.default_rng(7)
    resampling = Resampling(400, 0.95, 5)
    pilot = scored_of(paired(rng, num_rows=4000), rows(4000), resampling)
    (told,) = compare_pairs("mae", pilot, rows(4000), resampling)
    at_400 = told.detectable * math.sqrt(10)
    mae = pilot["m0"].points["mae"]
    found = 0
    for _ in range(150):
        scored = scored_of(paired(rng, shift=at_400 / mae), rows(400), resampling)
        (pair,) = compare_pairs("mae", scored, rows(400), resampling)
        found += pair.p_value <= 0.05
    assert 0.68 <= found / 150 <= 0.92


def test_the_smallest_detectable_difference_has_its_closed_form():
    """The power of a z test at that difference is 80 %."""
    detectable = smallest_detectable(0.3, 0.99)
    z = stats.norm.ppf(0.995)
    assert stats.norm.sf(z - detectable / 0.3) == pytest.approx(0.8)


def test_ties_are_those_whose_corrected_test_does_not_reject():
    """Against the best only; without a test a model is not called as good."""
    pairs = (
        Pair("a", "b", NOTHING, 0.01, 0.03, 1.0),
        Pair("a", "c", NOTHING, 0.2, 0.2, 1.0),
        Pair("a", "d", NOTHING, None, None, None),
        Pair("b", "c", NOTHING, 0.9, 0.9, 1.0),
    )
    found = ranks("a", "abcd", pairs, 0.05)
    assert found == {"a": "best", "b": "worse", "c": "tied", "d": "untested"}
    assert tied_with(found) == ["a", "c"]
    assert ranks("a", "abcd", pairs, 0.01)["b"] == "tied"


def test_the_best_is_by_value_and_direction():
    """First of equal ones; models without a value cannot be it."""
    points = {"a": 0.5, "b": 0.7, "c": 0.7, "d": None}
    assert best_of(points, higher_is_better=True) == "b"
    assert best_of(points, higher_is_better=False) == "a"
    assert best_of({"a": None}, higher_is_better=True) is None


def test_resamples_needed_are_just_enough():
    """With that many the smallest p-value passes Holm's first step, with one less it does not."""
    for models in (2, 3, 8):
        needed = resamples_needed(models, 0.95)
        pairs = math.comb(models, 2)
        assert pairs * 2 / (needed + 1) <= 0.05 * (1 + 1e-9)
        assert pairs * 2 / needed > 0.05
    assert resamples_needed(1, 0.95) == 0


def comparison(scored, units, resampling):
    return Comparison(
        target="y",
        task="regression",
        primary="mae",
        chosen="m0",
        unit=units.name,
        num_units=units.count,
        num_rows=len(units.of_row),
        num_unlabelled=0,
        confidence=resampling.confidence,
        judged=judge(scored, "m0", METRICS["regression"], units, resampling),
        pairs=all_pairs(scored, units, resampling),
    )


def test_the_section_says_who_is_tied_and_shows_every_pair():
    """Its table has a line per pair, its chart a point; CSV has every metric."""
    resampling = Resampling(400, 0.95, 5)
    samples = paired(np.random.default_rng(2), shift=0.5, models=3)
    found = comparison(scored_of(samples, rows(400), resampling), rows(400), resampling)
    section = pair_section(found)

    assert found.best in ("m0", "m1")
    assert found.tied_with_best == ["m0", "m1"]
    other = {"m0": "m1", "m1": "m0"}[found.best]
    assert f"cannot tell it from {other}" in section.text[0]
    (table,), (chart,) = section.tables, section.charts
    assert [row[:2] for row in table.rows] == [("m0", "m1"), ("m0", "m2"), ("m1", "m2")]
    assert [row[-1] for row in table.rows] == ["no", "yes", "yes"]
    assert len(chart.traces[0]["x"]) == 3
    assert "m0 − m2" in chart.alternative
    assert len(pairs_csv([found]).splitlines()) == 1 + 3 * len(found.pairs)


def test_a_single_model_has_no_pairs():
    """And no chart of them."""
    resampling = Resampling(200, 0.95, 5)
    samples = paired(np.random.default_rng(2), models=1)
    found = comparison(scored_of(samples, rows(400), resampling), rows(400), resampling)
    assert found.tied_with_best == ["m0"]
    assert pair_section(found).charts == ()


def test_an_undefined_primary_metric_has_neither_best_nor_ties():
    """One class only: no value, no test, no claim."""
    resampling = Resampling(200, 0.95, 5)
    sample = Sample("binary", np.zeros(50), np.linspace(0, 1, 50))
    scored = scored_of({"m0": sample, "m1": sample}, rows(50), resampling)
    pairs = compare_pairs("roc_auc", scored, rows(50), resampling)
    assert pairs[0].p_value is None
    assert math.isnan(scored["m0"].points["roc_auc"])
    assert isinstance(scored["m0"], Scored)
