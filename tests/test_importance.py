"""Permutation importances: what is used, what is repeated, what the interval covers."""

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import spearmanr

from headrace.evaluation.bootstrap import Interval, Resampling, Units
from headrace.models.importance import (
    JudgedRows,
    alike_columns,
    most_important,
    permutation_importances,
    row_losses,
)
from headrace.models.probe import with_rows_of
from headrace.schema import Target

Y = Target(name="y", task="regression")
LATE = Target(name="late", task="binary", labels=("no", "yes"))
BAND = Target(name="band", task="multiclass", labels=("a", "b", "c"))
RESAMPLING = Resampling(num_resamples=500, confidence=0.95, seed=3)


def judged(columns, labels, *, unit_of_row=None, weight=None):
    """Return rows of their own unit each, unless units are given."""
    inputs = pa.table({name: pa.array(values) for name, values in columns.items()})
    of_row = np.arange(inputs.num_rows) if unit_of_row is None else unit_of_row
    name = "row" if unit_of_row is None else "day"
    units = Units(name, of_row, len(np.unique(of_row)))
    return JudgedRows(inputs, labels, weight, units)


def of(rows, predict, shuffled, *, targets=(Y,), repeats=5, resampling=RESAMPLING):
    """Return the importances of the first target."""
    told = permutation_importances(
        predict, rows, targets, shuffled, repeats=repeats, resampling=resampling
    )
    return told[targets[0].name]


def values(rows, name):
    return rows[name].to_numpy()


def test_a_used_column_matters_and_noise_does_not():
    """What the model reads by mistake may help or harm by chance: its interval includes 0."""
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=400) for name in ("used", "noise", "unread")}
    y = columns["used"] + rng.normal(0, 0.5, 400)

    found = of(
        judged(columns, {"y": y}),
        lambda rows: {"y": values(rows, "used") + 0.1 * values(rows, "noise")},
        {name: (name,) for name in columns},
    )

    assert found["used"].low > 0.5
    assert found["noise"].low < 0 < found["noise"].high
    assert (found["unread"].value, found["unread"].low, found["unread"].high) == (0, 0, 0)


def test_a_repeated_column_matters_only_in_its_group():
    """A model that reads the mean of two equal columns loses by one a quarter of what by both."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=500)
    columns = {"feet": x, "metres": x, "other": rng.normal(size=500)}
    y = 2 * x + rng.normal(0, 0.3, 500)
    rows = judged(columns, {"y": y})

    (alike,) = alike_columns(rows.inputs, list(columns))
    assert alike.columns == ("feet", "metres")
    assert alike.correlation == pytest.approx(1)

    def predict(rows):
        return {"y": values(rows, "feet") + values(rows, "metres")}

    shuffled = {name: (name,) for name in columns} | {"length": alike.columns}
    found = of(rows, predict, shuffled)

    assert found["length"].low > 1.5
    assert max(found["feet"].high, found["metres"].high) < found["length"].low / 2
    assert found["other"].value == 0


@pytest.mark.parametrize("num_days", [None, 40])
def test_the_interval_covers_the_dealt_values_as_well(num_days):
    """y = x + e and a model x: the growth is 2 var(x) in expectation, whatever the rows."""
    hits, naive_hits, trials = 0, 0, 200
    for trial in range(trials):
        rng = np.random.default_rng([trial, 7])
        day = rng.integers(0, num_days, 300) if num_days else np.arange(300)
        x = rng.normal(size=300)
        if num_days:  # rows of a day are alike: half of the variance is the day's
            x = np.sqrt(0.5) * (x + rng.normal(size=num_days)[day])
            day = np.unique(day, return_inverse=True)[1]
        y = x + rng.normal(size=300)
        rows = judged({"x": x}, {"y": y}, unit_of_row=day if num_days else None)
        found = of(
            rows,
            lambda rows: {"y": values(rows, "x")},
            {"x": ("x",)},
            resampling=Resampling(300, 0.95, trial),
        )["x"]
        variance = np.var(y)
        hits += found.low * variance <= 2 <= found.high * variance
        naive_hits += abs(found.value * variance - 2) <= 1.96 * _naive_error(x, y, rng)

    assert 0.9 <= hits / trials <= 0.99
    assert naive_hits / trials < 0.9


def _naive_error(x, y, rng):
    """Return the standard error by the judged rows alone, each its own unit, of five shuffles."""
    growth = [(y - x[rng.permutation(300)]) ** 2 - (y - x) ** 2 for _ in range(5)]
    return np.mean(growth, axis=0).std() / np.sqrt(300)


def test_the_value_is_the_mean_growth_over_rows_and_shuffles():
    """By hand: weights, a missing label, and the shuffles that the seed gives."""
    rng = np.random.default_rng(5)
    x, weight = rng.normal(size=60), rng.uniform(0.5, 2, 60)
    y = np.where(np.arange(60) % 7 == 0, np.nan, x + rng.normal(size=60))
    found = of(
        judged({"x": x}, {"y": y}, weight=weight),
        lambda rows: {"y": values(rows, "x")},
        {"x": ("x",)},
        repeats=2,
    )["x"]

    rng = np.random.default_rng(RESAMPLING.seed)
    orders = [rng.permutation(60) for _ in range(2)]
    growth = np.mean([(x[order] - y) ** 2 - (x - y) ** 2 for order in orders], axis=0)
    known = ~np.isnan(y)
    expected = np.average(growth[known], weights=weight[known]) / np.var(y[known])
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high


@pytest.mark.parametrize(
    ("labels", "weight"), [(np.full(50, np.nan), None), (np.zeros(50), np.zeros(50))]
)
def test_a_target_that_nothing_is_known_of_is_left_out(labels, weight):
    rows = judged({"x": np.arange(50.0)}, {"y": labels}, weight=weight)
    found = permutation_importances(
        lambda rows: {"y": values(rows, "x")},
        rows,
        (Y,),
        {"x": ("x",)},
        repeats=2,
        resampling=RESAMPLING,
    )

    assert found == {}


def test_losses_of_the_tasks():
    """Squared error over the variance, and minus the log of the true class's probability."""
    labels = {
        "y": np.array([1.0, 3.0, np.nan]),
        "late": np.array([1.0, 0.0, 1.0]),
        "band": np.array([2.0, np.nan, 0.0]),
        "none": np.full(3, np.nan),
    }
    told = {
        "y": np.array([2.0, 3.0, 9.0]),
        "late": np.array([0.8, 0.4, 0.0]),
        "band": np.array([[0.1, 0.2, 0.7], [1, 0, 0], [0.5, 0.25, 0.25]]),
        "none": np.zeros(3),
    }
    none = Target(name="none", task="regression")
    losses = row_losses(told, labels, (Y, LATE, BAND, none))

    assert list(losses) == ["y", "late", "band"]
    assert losses["y"][:2].tolist() == [1, 0]
    assert np.isnan(losses["y"][2])
    assert losses["late"] == pytest.approx(-np.log([0.8, 0.6, np.finfo(float).eps]))
    assert losses["band"][[0, 2]] == pytest.approx(-np.log([0.7, 0.5]))
    assert np.isnan(losses["band"][1])


def test_columns_that_go_together():
    """A chain is one group; constant columns and categories of numbers do not break it."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=1000)
    with_gaps = np.where(rng.random(1000) < 0.02, np.nan, -np.exp(x))
    columns = {
        "x": x,
        "cubed": x**3,
        "falling": with_gaps,
        "apart": rng.normal(size=1000),
        "constant": np.ones(1000),
        "is_late": x > 0,
    }
    table = pa.table({name: pa.array(v, from_pandas=True) for name, v in columns.items()})

    (group,) = alike_columns(table, list(columns))

    assert group.columns == ("x", "cubed", "falling")
    assert 0.9 < group.correlation < 1
    assert alike_columns(table, ["x", "apart"]) == ()
    assert alike_columns(table, []) == ()


def test_the_most_important_have_intervals_above_0():
    found = {
        "by chance": Interval(0.5, -0.1, 1.1),
        "small": Interval(0.1, 0.05, 0.2),
        "large": Interval(0.9, 0.8, 1.0),
        "one unit": Interval(0.2, None, None),
        "unused": Interval(0.0, 0.0, 0.0),
    }

    assert most_important(found, 9) == ["large", "one unit", "small"]
    assert most_important(found, 1) == ["large"]


def test_the_rank_correlation_is_spearmans_with_ties():
    rng = np.random.default_rng(4)
    one = rng.integers(0, 12, 400)
    other = one + rng.integers(0, 3, 400)
    (group,) = alike_columns(pa.table({"one": one, "other": other}), ["one", "other"])

    assert group.correlation == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


def test_columns_stay_as_they_were_declared_when_rows_are_exchanged():
    """A column without nulls stays one, so that copies can be put together."""
    schema = pa.schema([pa.field("a", pa.float64(), nullable=False), pa.field("b", pa.int8())])
    rows = pa.table({"a": [1.0, 2.0], "b": [1, None]}, schema=schema)
    changed = with_rows_of(rows, ["a", "b"], np.array([1, 0]))
    assert changed.schema == schema
    assert pa.concat_tables([rows, changed])["a"].to_pylist() == [1, 2, 2, 1]
