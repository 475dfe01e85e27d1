"""Slices: a planted one is found, pure noise is left alone, and small ones are named."""

import numpy as np
import pyarrow as pa
import pytest

from headrace.evaluation.bootstrap import Resampling, Units
from headrace.evaluation.coded import Coded, coded_columns
from headrace.evaluation.metrics import Sample
from headrace.evaluation.slices import LEAST_ROWS, SHOWN, find_slices

RESAMPLING = Resampling(200, 0.95, seed=0)
NUM_ROWS = 1500


def made(seed, *, task="regression", worse=0.0, unit="row", weight=None):
    """Rows with two columns; in those where c is b errors are larger by ``worse``."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=NUM_ROWS)
    code = rng.integers(0, 5, NUM_ROWS)
    of_row = np.arange(NUM_ROWS) if unit == "row" else rng.integers(0, 100, NUM_ROWS)
    of_day = rng.normal(size=100)[of_row % 100] if unit == "day" else np.zeros(NUM_ROWS)
    truth = rng.normal(size=NUM_ROWS)
    scale = np.exp(0.7 * of_day) * (1 + worse * (code == 1))
    if task == "regression":
        prediction = truth + scale * rng.normal(size=NUM_ROWS)
    else:
        truth = (rng.random(NUM_ROWS) < 0.4).astype(float)
        prediction = np.clip(0.4 + 0.2 * (truth - 0.4) + 0.05 * rng.normal(size=NUM_ROWS), 0.01, 1)
        prediction = np.where(worse * (code == 1) > 0, 0.85, prediction)
    columns = [
        Coded("x", "number", x),
        Coded("c", "category", code.astype(float), tuple("abcde")),
    ]
    units = Units(unit, of_row, len(np.unique(of_row)))
    return Sample(task, truth, prediction, weight), units.of(np.full(NUM_ROWS, True)), columns


@pytest.mark.parametrize("task", ["regression", "binary"])
def test_a_planted_slice_is_found(task):
    """Its numbers are those of its rows, by hand, and the interval is around the difference."""
    sample, units, columns = made(0, task=task, worse=0.6)
    found = find_slices(sample, units, columns, RESAMPLING)
    one = found.worst[0]
    is_in = columns[1].values == 1
    if task == "regression":
        loss = np.abs(sample.prediction - sample.truth)
    else:
        loss = -np.log(np.where(sample.truth == 1, sample.prediction, 1 - sample.prediction))

    assert (one.column, one.label, one.num_rows) == ("c", "b", is_in.sum())
    assert one.value == pytest.approx(loss[is_in].mean())
    assert one.rest == pytest.approx(loss[~is_in].mean())
    assert one.bias == pytest.approx((sample.prediction - sample.truth)[is_in].mean())
    assert one.p_holm < 0.01
    assert 0 < one.difference.low < one.difference.value < one.difference.high
    assert one.difference.value == pytest.approx(one.value - one.rest)
    assert found.num_tested == 10
    assert len([other for other in found.worst if other.p_holm < 0.05]) == 1


@pytest.mark.parametrize("unit", ["row", "day"])
@pytest.mark.parametrize("task", ["regression", "binary"])
def test_noise_has_no_slices(task, unit):
    """Of 50 draws at most five name a slice, with rows as units and with rows of a day alike."""
    few = Resampling(100, 0.9, seed=0)
    named = 0
    for seed in range(50):
        found = find_slices(*made(seed, task=task, unit=unit), few)
        named += found.worst[0].p_holm <= 0.05
    assert named <= 5


def test_the_p_value_is_that_of_unequal_variances():
    """Rows as units, no weights: nearly Welch's test, one-sided."""
    from scipy.stats import ttest_ind

    sample, units, columns = made(1, worse=0.1)
    found = {one.label: one for one in find_slices(sample, units, columns, RESAMPLING).worst}
    loss = np.abs(sample.prediction - sample.truth)
    is_in = columns[1].values == 1
    welch = ttest_ind(loss[is_in], loss[~is_in], equal_var=False, alternative="greater").pvalue
    assert found["b"].p_value == pytest.approx(welch, rel=0.1)


def test_weights_count():
    """Rows of weight 0 are not there."""
    weight = np.ones(NUM_ROWS)
    sample, units, columns = made(0, worse=0.6)
    weight[columns[1].values == 1] = np.arange((columns[1].values == 1).sum()) % 2
    weighed = find_slices(
        Sample("regression", sample.truth, sample.prediction, weight), units, columns, RESAMPLING
    )
    loss = np.abs(sample.prediction - sample.truth)
    (one,) = (other for other in weighed.worst if other.label == "b")
    assert one.value == pytest.approx(loss[(columns[1].values == 1) & (weight == 1)].mean())


def test_small_slices_are_not_tested_and_a_column_without_any_says_so():
    """A slice needs rows and units, and so does the rest."""
    sample, units, _ = made(0)
    code = np.zeros(NUM_ROWS)
    code[: LEAST_ROWS - 1] = 1
    columns = [Coded("rare", "category", code, ("a", "b")), Coded("none", "number", code * np.nan)]
    found = find_slices(sample, units, columns, RESAMPLING)
    assert found.num_tested == 0
    assert found.worst == ()
    assert found.skipped["rare"] == (
        "no slice of rare leaves 50 rows of 10 rows in it and in the rest"
    )
    assert "none" in found.skipped
    few = Units("day", np.arange(NUM_ROWS) % 9, 9)
    code[: NUM_ROWS // 2] = 1
    assert find_slices(sample, few, columns, RESAMPLING).num_tested == 0


def test_numbers_are_cut_in_fifths_and_missing_values_apart():
    sample, units, _ = made(0)
    values = np.arange(NUM_ROWS, dtype=float)
    values[:100] = np.nan
    found = find_slices(sample, units, [Coded("x", "number", values)], RESAMPLING)
    sizes = {one.label: one.num_rows for one in found.worst}
    assert sizes.pop("missing") == 100
    assert set(sizes.values()) == {280}
    assert "100 to below 380" in sizes
    assert "1220 to 1499" in sizes


def test_a_time_is_cut_into_blocks_of_enough_units():
    """Thirty days make two blocks."""
    day = np.arange(NUM_ROWS) % 30
    sample, _, _ = made(0)
    moments = (19_000 + day) * 86_400e6
    found = find_slices(sample, Units("day", day, 30), [Coded("when", "time", moments)], RESAMPLING)
    labels = sorted(one.label for one in found.worst)
    assert labels == ["2022-01-08 to below 2022-01-23", "2022-01-23 to 2022-02-06"]


def test_no_more_than_the_worst_are_shown():
    sample, units, columns = made(0)
    code = np.arange(NUM_ROWS) % 18
    columns.append(Coded("many", "category", code.astype(float), tuple("abcdefghijklmnopqr")))
    found = find_slices(sample, units, columns, RESAMPLING)
    assert found.num_tested == 28
    assert len(found.worst) == SHOWN
    p_values = [one.p_value for one in found.worst]
    assert p_values == sorted(p_values)


def test_a_slice_that_is_off_comes_before_harder_ones():
    """Ten harder slices with smaller p-values do not hide it."""
    rng = np.random.default_rng(0)
    num_rows = 6000
    code = np.arange(num_rows) % 25
    p = np.where(code < 12, rng.uniform(0.4, 0.6, num_rows), rng.choice([0.1, 0.9], num_rows))
    truth = (rng.random(num_rows) < np.where(code == 24, 0.5, p)).astype(float)
    column = Coded("c", "category", np.minimum(code, 18) + 0.0, tuple("abcdefghijklmnopqrs"))
    off = Coded("off", "category", (code == 24) + 0.0, ("no", "yes"))
    units = Units("row", np.arange(num_rows), num_rows)
    found = find_slices(Sample("binary", truth, p), units, [column, off], RESAMPLING)
    assert found.worst[0].name == ("off", "yes")
    assert found.num_worse > SHOWN
    assert found.num_off < 3


def test_columns_of_a_table_become_codes_numbers_and_moments():
    rows = pa.table(
        {
            "n": pa.array([1, None, 3], pa.int8()),
            "f": pa.array([0.5, float("inf"), None]),
            "b": pa.array([True, None, True]),
            "code": pa.array([7, 7, 8]),
            "text": pa.array(["u", "v", "v"]).dictionary_encode(),
            "day": pa.array([0, 1, None], pa.int32()).cast(pa.date32()),
            "ns": pa.array([1_001, None, 2_999], pa.timestamp("ns")),
            "half": pa.array(np.array([1, 2, np.nan], "f2")),
        }
    )
    found = {one.name: one for one in coded_columns(rows, rows.column_names, categories=["code"])}
    nan = np.nan
    np.testing.assert_array_equal(found["n"].values, [1, nan, 3])
    np.testing.assert_array_equal(found["f"].values, [0.5, nan, nan])
    np.testing.assert_array_equal(found["b"].values, [0, nan, 0])
    assert found["b"].labels == ("true",)
    assert (found["code"].labels, found["code"].kind) == (("7", "8"), "category")
    np.testing.assert_array_equal(found["text"].values, [1, 0, 0])
    np.testing.assert_array_equal(found["text"].codes(), [2, 1, 1])
    np.testing.assert_array_equal(found["day"].values, [0, 86_400e6, nan])
    assert found["day"].kind == "time"
    np.testing.assert_array_equal(found["ns"].values, [1, nan, 2])
    np.testing.assert_array_equal(found["half"].values, [1, 2, nan])
