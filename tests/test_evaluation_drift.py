"""Drift is found where it is, and not made of chance or of rows that are alike."""

from dataclasses import replace

import numpy as np
import pytest

from headrace.evaluation.bootstrap import Resampling, Units
from headrace.evaluation.coded import Coded
from headrace.evaluation.drift import REAL, SHIFTED, STABLE, adversarial, shift

RESAMPLING = Resampling(200, 0.95, seed=0)


def sides(num_rows):
    return np.arange(2 * num_rows) >= num_rows


def rows(count):
    return Units("row", np.arange(count), count)


def test_a_shift_has_the_index_of_its_bins():
    """Two classes, from shares of .5 to shares of .8, by hand; many rows, so chance is small."""
    values = np.repeat([0.0, 1.0, 0.0, 1.0], [50_000, 50_000, 80_000, 20_000])
    found = shift(Coded("c", "category", values, ("a", "b")), sides(100_000), np.arange(200_000))
    by_hand = 0.3 * np.log(0.8 / 0.5) + -0.3 * np.log(0.2 / 0.5)
    assert found.index == pytest.approx(by_hand, abs=1e-3)
    assert found.index > SHIFTED
    assert found.is_real
    assert found.distance is None


def test_the_test_is_the_chi_squared_test_of_independent_rows():
    """Beside scipy's on the same table."""
    from scipy.stats import chi2_contingency

    rng = np.random.default_rng(0)
    values = rng.choice(3, 2000, p=[0.5, 0.3, 0.2]).astype(float)
    found = shift(Coded("c", "category", values, ("a", "b", "c")), sides(1000), np.arange(2000))
    table = [np.bincount(values[part].astype(int)) for part in (slice(1000), slice(1000, None))]
    assert found.p_value == pytest.approx(chi2_contingency(table).pvalue, rel=1e-6)


def test_the_distance_is_kolmogorovs():
    from scipy.stats import ks_2samp

    rng = np.random.default_rng(0)
    first, second = rng.normal(size=400), rng.normal(0.3, size=400)
    values = np.concatenate([first, second])
    found = shift(Coded("x", "number", values), sides(400), np.arange(800))
    assert found.distance == pytest.approx(ks_2samp(first, second).statistic, abs=1e-12)


@pytest.mark.parametrize("kind", ["number", "category"])
def test_chance_alone_is_no_shift(kind):
    """Over 100 draws of 300 rows: the test rejects about as often as it says, the index is low."""
    p_values, indices = [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=600) if kind == "number" else rng.integers(0, 8, 600).astype(float)
        found = shift(Coded("x", kind, values, tuple("abcdefgh")), sides(300), np.arange(600))
        p_values.append(found.p_value)
        indices.append(found.index)
    assert np.mean(np.array(p_values) < 0.1) < 0.2
    assert np.mean(indices) < 0.02
    assert np.mean(np.array(indices) > STABLE) < 0.03


def test_rows_of_one_unit_count_as_what_they_are():
    """40 units whose rows are all alike: as independent rows they would nearly always differ."""
    by_rows, by_units = [], []
    for seed in range(60):
        of_unit = np.random.default_rng(seed).normal(size=40)
        values = np.repeat(of_unit, 25)
        column = Coded("x", "number", values)
        by_rows.append(shift(column, sides(500), np.arange(1000)).p_value)
        by_units.append(shift(column, sides(500), np.repeat(np.arange(40), 25)).p_value)
    assert np.mean(np.array(by_rows) < REAL) > 0.9
    assert np.mean(np.array(by_units) < REAL) < 0.1


def test_missing_values_are_a_bin_of_their_own():
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000)
    values[1000:][rng.random(1000) < 0.4] = np.nan
    found = shift(Coded("x", "number", values), sides(1000), np.arange(2000))
    assert found.is_real
    assert found.index > SHIFTED


def made(seed, moved):
    rng = np.random.default_rng(seed)
    x, z = rng.normal(size=1200), rng.normal(size=1200)
    x[600:] += moved
    code = rng.integers(0, 4, 1200).astype(float)
    return [
        Coded("x", "number", x),
        Coded("z", "number", z),
        Coded("c", "category", code, tuple("abcd")),
    ]


def test_nothing_tells_equal_distributions_apart():
    """The mean over five draws is near a half, and no interval lies above it by much."""
    found = [adversarial(made(seed, 0), sides(600), rows(1200), RESAMPLING) for seed in range(5)]
    assert np.mean([one.value for one in found]) == pytest.approx(0.5, abs=0.02)
    assert all(one.low < 0.52 for one in found)


def test_a_moved_column_gives_the_splits_away():
    found = adversarial(made(0, 1.5), sides(600), rows(1200), RESAMPLING)
    # One column that is moved by d tells apart with Φ(d/√2) = .856 at best.
    assert 0.8 < found.value < 0.87
    assert found.low > 0.75


def test_categories_are_seen():
    columns = made(0, 0)
    columns[2].values[600:] = np.where(columns[2].values[600:] == 1, 3, columns[2].values[600:])
    found = adversarial(columns, sides(600), rows(1200), RESAMPLING)
    assert found.low > 0.55


@pytest.mark.filterwarnings("error")
def test_columns_of_one_value_or_none_are_taken():
    """Such as a sample of a rare column has; and categories of many labels."""
    rng = np.random.default_rng(0)
    many = rng.integers(0, 1200, 1200).astype(float)
    columns = [
        *made(0, 0),
        Coded("none", "number", np.full(1200, np.nan)),
        Coded("no label", "category", np.full(1200, np.nan)),
        Coded("one", "number", np.ones(1200)),
        Coded("many", "category", many, tuple(map(str, range(1200)))),
    ]
    found = adversarial(columns, sides(600), rows(1200), RESAMPLING)
    assert found.low < 0.52
    shifts = [shift(column, sides(600), np.arange(1200)) for column in columns[3:6]]
    assert {(one.index, one.is_real) for one in shifts} == {(0.0, False)}
    assert not shift(columns[6], sides(600), np.arange(1200)).is_real


def test_whole_units_are_judged_out_of_fold():
    """A unit's own mark, learned from its rows, must not give its other rows away."""
    rng = np.random.default_rng(0)
    of_row = np.repeat(np.arange(60), 20)
    columns = [Coded("mark", "number", rng.normal(size=60)[of_row])]
    units = Units("day", of_row, 60)
    found = adversarial(columns, sides(600), units, RESAMPLING)
    by_rows = adversarial(columns, sides(600), rows(1200), RESAMPLING)
    assert by_rows.value > 0.95
    assert found.value < 0.7


def test_too_few_units_give_a_reason():
    units = Units("day", np.repeat([0, 1, 2, 3], 300), 4)
    found = adversarial(made(0, 0), sides(600), units, RESAMPLING)
    assert found.value is None
    assert found.reason == "of one of the splits there are only 2 days"


def test_threads_change_nothing():
    one = adversarial(made(0, 0.5), sides(600), rows(1200), RESAMPLING)
    two = adversarial(made(0, 0.5), sides(600), rows(1200), replace(RESAMPLING, threads=2))
    assert one == two
