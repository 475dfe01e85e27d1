"""Resamples, intervals and kernels: a plain twin, closed forms, scipy, threads, clusters."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import average_precision_score, roc_auc_score

from headrace.evaluation.bootstrap import (
    Resampling,
    Scored,
    Units,
    bootstrap,
    difference,
    interval,
    sums_per_unit,
)
from headrace.evaluation.metrics import METRICS, Sample
from headrace.kernels.bootstrap import draw_counts, rank, resample

RESAMPLING = Resampling(num_resamples=200, confidence=0.95, seed=3, threads=1)


def rows(count):
    return Units("row", np.arange(count), count)


def binary_sample(num_rows=300, *, seed=0, weighted=False, ties=True):
    rng = np.random.default_rng(seed)
    score = rng.random(num_rows)
    truth = (rng.random(num_rows) < score).astype(float)
    weight = rng.uniform(0.2, 3, num_rows) if weighted else None
    return Sample("binary", truth, np.round(score, 1) if ties else score, weight)


def twin_of_draws(num_units, number, seed):
    """The counts of one resample in plain Python integers: xoshiro256++ from splitmix64 states."""
    mask = (1 << 64) - 1

    def mix(word):
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        return word ^ (word >> 31)

    def rotated(word, bits):
        return ((word << bits) | (word >> (64 - bits))) & mask

    golden = 0x9E3779B97F4A7C15
    start = mix((seed * golden + mix(number + 1)) & mask)
    state = [mix((start + golden * step) & mask) for step in range(1, 5)]
    counts = [0] * num_units
    draws = []
    while len(draws) < num_units:
        word = (rotated((state[0] + state[3]) & mask, 23) + state[0]) & mask
        shifted = (state[1] << 17) & mask
        state[2] ^= state[0]
        state[3] ^= state[1]
        state[1] ^= state[2]
        state[0] ^= state[3]
        state[2] ^= shifted
        state[3] = rotated(state[3], 45)
        draws += [word & 0xFFFFFFFF, word >> 32]
    for draw in draws[:num_units]:
        counts[(draw * num_units) >> 32] += 1
    return counts


def test_draws_equal_a_plain_twin():
    """Each resample number of each seed has its own stream, as written down."""
    for num_units in (1, 2, 7, 60):
        for seed in (0, 2**63 - 1):
            drawn = draw_counts(num_units, num_resamples=5, seed=seed)
            twins = [twin_of_draws(num_units, number, seed) for number in range(5)]
            assert drawn.tolist() == twins


@pytest.mark.parametrize(("num_units", "num_resamples"), [(40, 400), ((1 << 20) + 4, 4)])
def test_resamples_have_size_n_and_units_are_equally_likely(num_units, num_resamples):
    """A resample is as large as the data, and counts scatter as a multinomial's do.

    Above 2**20 units a draw takes a whole word; neighbours are added up there.
    """
    counts = draw_counts(num_units, num_resamples=num_resamples, seed=1)

    assert (counts.sum(axis=1) == num_units).all()
    total = counts.sum(axis=0).reshape(20, -1).sum(axis=1)
    chi_squared = ((total - total.mean()) ** 2 / total.mean()).sum()
    assert 0.001 < scipy.stats.chi2.cdf(chi_squared, 19) < 0.999
    assert counts.var() == pytest.approx(1 - 1 / num_units, rel=0.05)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_a_resample_equals_scikit_learn_on_repeated_rows(weighted, ties):
    """Counts as weights are the resampled rows themselves: AUC and AP agree for each resample."""
    sample = binary_sample(weighted=weighted, ties=ties)
    units = Units("group", np.arange(300) % 37, 37)
    ranking = rank(
        sample.prediction, sample.truth == 1, sample.weight, units.of_row, with_precision=True
    )
    _, ranks = resample(np.ones((1, 37)), [ranking], num_resamples=25, seed=5, threads=1)
    counts = draw_counts(37, num_resamples=25, seed=5)[:, units.of_row]
    for row, count in zip(ranks[:, 0], counts, strict=True):
        weight = count * (1 if sample.weight is None else sample.weight)
        assert row[0] == pytest.approx(
            roc_auc_score(sample.truth, sample.prediction, sample_weight=weight), abs=1e-9
        )
        assert row[1] == pytest.approx(
            average_precision_score(sample.truth, sample.prediction, sample_weight=weight), abs=1e-9
        )


def test_every_metric_of_a_resample_equals_its_value_on_the_repeated_rows():
    """Sums of counts x terms give what the metric gives on the rows written out."""
    rng = np.random.default_rng(4)
    truth = rng.normal(1000, 3, 80)
    samples = [
        Sample("regression", truth, truth + rng.normal(0, 1, 80)),
        binary_sample(80),
        Sample("multiclass", rng.integers(0, 3, 80).astype(float), rng.dirichlet([1, 1, 1], 80)),
    ]
    counts = draw_counts(80, num_resamples=20, seed=3)
    resampling = Resampling(20, 0.95, seed=3)
    for sample in samples:
        found = bootstrap(sample, rows(80), resampling, threshold=0.5)
        for number in range(20):
            taken = np.repeat(np.arange(80), counts[number])
            repeated = Sample(sample.task, sample.truth[taken], sample.prediction[taken])
            alone = bootstrap(repeated, rows(80), Resampling(1, 0.95, seed=0), threshold=0.5)
            for metric in METRICS[sample.task]:
                if metric.no_interval:
                    continue
                expected = alone.points[metric.name]
                assert found.resamples[metric.name][number] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("threads", [2, 5])
def test_the_same_resamples_come_on_any_number_of_threads(threads):
    """Bit for bit: a resample belongs to its number, not to a thread."""
    sample = binary_sample(weighted=True)
    one = bootstrap(sample, rows(300), RESAMPLING, threshold=0.5)
    many = bootstrap(
        sample, rows(300), Resampling(200, 0.95, seed=3, threads=threads), threshold=0.5
    )
    for name, values in one.resamples.items():
        assert values.tobytes() == many.resamples[name].tobytes()


def test_fewer_resamples_are_the_first_of_more():
    """And another seed gives others."""
    sample = binary_sample(ties=False)
    many = bootstrap(sample, rows(300), RESAMPLING, threshold=0.5).resamples["log_loss"]
    few = bootstrap(sample, rows(300), Resampling(50, 0.95, seed=3), threshold=0.5)
    other = bootstrap(sample, rows(300), Resampling(50, 0.95, seed=4), threshold=0.5)
    assert few.resamples["log_loss"].tolist() == many[:50].tolist()
    assert set(other.resamples["log_loss"]).isdisjoint(many)


def test_rows_in_another_order_give_the_same_values():
    """Resamples are of units, so shuffled rows with their units change nothing."""
    sample = binary_sample(weighted=True)
    units = Units("group", np.arange(300) % 50, 50)
    order = np.random.default_rng(8).permutation(300)
    shuffled = Sample("binary", sample.truth[order], sample.prediction[order], sample.weight[order])
    one = bootstrap(sample, units, RESAMPLING, threshold=0.5)
    two = bootstrap(shuffled, Units("group", units.of_row[order], 50), RESAMPLING, threshold=0.5)
    for name, values in one.resamples.items():
        np.testing.assert_allclose(values, two.resamples[name], rtol=1e-12)


def test_bounds_are_close_to_scipy():
    """Within 3 Monte Carlo standard errors of ``scipy.stats.bootstrap``'s percentile bounds."""
    sample = binary_sample(400, ties=False)
    resampling = Resampling(4000, 0.95, seed=1)
    found = bootstrap(sample, rows(400), resampling, threshold=0.5)
    mine = interval(found.points["brier"], found.resamples["brier"], rows(400), resampling)
    theirs = scipy.stats.bootstrap(
        ((sample.prediction - sample.truth) ** 2,),
        np.mean,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(2),
        vectorized=True,
    )
    # A 2.5 % quantile of B draws scatters by sqrt(p(1-p)/B)/density; both sides scatter.
    error = 2.67 * theirs.standard_error / np.sqrt(4000) * np.sqrt(2)
    assert mine.low == pytest.approx(theirs.confidence_interval.low, abs=3 * error)
    assert mine.high == pytest.approx(theirs.confidence_interval.high, abs=3 * error)


def test_auc_bounds_are_close_to_scipy():
    """The ranking metric too, paired as scipy pairs it."""
    sample = binary_sample(150, ties=False)
    resampling = Resampling(2000, 0.95, seed=1)
    found = bootstrap(sample, rows(150), resampling, threshold=0.5, only="roc_auc")
    mine = interval(found.points["roc_auc"], found.resamples["roc_auc"], rows(150), resampling)
    theirs = scipy.stats.bootstrap(
        (sample.truth, sample.prediction),
        roc_auc_score,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(2),
        vectorized=False,
        paired=True,
    )
    error = 2.67 * theirs.standard_error * np.sqrt(1 / 2000 + 1 / 1000)
    assert mine.low == pytest.approx(theirs.confidence_interval.low, abs=3 * error)
    assert mine.high == pytest.approx(theirs.confidence_interval.high, abs=3 * error)


def test_clustered_rows_have_wider_intervals_by_their_unit():
    """Rows of a day share its error: by row the interval is far too narrow."""
    rng = np.random.default_rng(6)
    day = np.repeat(np.arange(40), 50)
    error = rng.normal(0, 1, 40)[day] + rng.normal(0, 0.2, 2000)
    sample = Sample("regression", np.zeros(2000) + rng.normal(0, 1e-3, 2000), error)
    resampling = Resampling(1000, 0.95, seed=0)
    widths = []
    for units in (rows(2000), Units("day", day, 40)):
        found = bootstrap(sample, units, resampling, threshold=0.5)
        mae = interval(found.points["mae"], found.resamples["mae"], units, resampling)
        widths.append(mae.high - mae.low)
    assert widths[1] > 4 * widths[0]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """300 simulated sets of 200 rows: a 90 % interval of the mean absolute error covers 86–94 %."""
    truth = np.sqrt(2 / np.pi)
    resampling = Resampling(300, 0.9, seed=0)
    covered = 0
    for number in range(300):
        error = np.random.default_rng(number).normal(0, 1, 200)
        sample = Sample("regression", np.zeros(200), error)
        found = bootstrap(sample, rows(200), resampling, threshold=0.5, only="mae")
        mae = interval(found.points["mae"], found.resamples["mae"], rows(200), resampling)
        covered += mae.low <= truth <= mae.high
    assert 0.86 <= covered / 300 <= 0.94


def test_resamples_of_one_class_are_counted_and_left_out():
    """Never 0: the interval is over the others, and the count is told."""
    truth = np.zeros(60)
    truth[:4] = 1
    sample = Sample("binary", truth, np.linspace(0.9, 0.1, 60))
    found = bootstrap(sample, rows(60), RESAMPLING, threshold=0.5)
    counts = draw_counts(60, num_resamples=200, seed=3)
    one_class = int((counts[:, :4].sum(axis=1) == 0).sum())
    auc = interval(found.points["roc_auc"], found.resamples["roc_auc"], rows(60), RESAMPLING)
    assert one_class > 0
    assert auc.num_undefined == one_class
    assert auc.value == auc.low == auc.high == 1.0


def test_too_many_undefined_resamples_give_no_interval():
    """One positive row: a third of the resamples lack it."""
    truth = np.zeros(60)
    truth[0] = 1
    found = bootstrap(
        Sample("binary", truth, np.linspace(0.9, 0.1, 60)), rows(60), RESAMPLING, threshold=0.5
    )
    auc = interval(found.points["roc_auc"], found.resamples["roc_auc"], rows(60), RESAMPLING)
    assert auc.value == 1.0
    assert auc.low is None
    assert auc.high is None
    assert auc.reason == f"undefined in {auc.num_undefined} of 200 resamples"


def test_one_unit_gives_no_interval():
    """A single day says nothing of other days."""
    sample = binary_sample()
    units = Units("day", np.zeros(300, np.int64), 1)
    found = bootstrap(sample, units, RESAMPLING, threshold=0.5)
    auc = interval(found.points["roc_auc"], found.resamples["roc_auc"], units, RESAMPLING)
    assert auc.low is None
    assert auc.reason == "1 day: a 95 % interval needs at least 4"


def test_differences_are_paired():
    """Two models that err alike differ by little, however uncertain each of them is."""
    rng = np.random.default_rng(9)
    truth, error = rng.normal(0, 1, 400), rng.normal(0, 1, 400)
    samples = [Sample("regression", truth, truth + error + shift) for shift in (0, 0.02)]
    one, two = (bootstrap(s, rows(400), RESAMPLING, threshold=0.5) for s in samples)
    alone = interval(one.points["rmse"], one.resamples["rmse"], rows(400), RESAMPLING)
    paired = difference("rmse", two, one, rows(400), RESAMPLING)
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)
    assert difference("rmse", one, one, rows(400), RESAMPLING).low == 0


def test_units_that_lose_their_rows_are_gone():
    """A day without a labelled row is no unit of that target."""
    units = Units("day", np.array([0, 0, 1, 2, 2]), 3)
    kept = units.of(np.array([True, False, False, True, True]))
    assert kept.of_row.tolist() == [0, 1, 1]
    assert kept.count == 2


def test_sums_per_unit_of_single_rows_follow_the_units():
    """With a row per unit, rows are put in the units' order."""
    columns = np.array([[1.0, 2.0, 3.0]])
    shuffled = Units("row", np.array([2, 0, 1]), 3)
    assert sums_per_unit(columns, shuffled).tolist() == [[2.0, 3.0, 1.0]]
    assert sums_per_unit(columns, Units("day", np.array([1, 0, 1]), 2)).tolist() == [[2.0, 4.0]]


def test_an_undefined_value_has_no_interval():
    """Constant truth: R² is not defined, and it is not 0."""
    found = bootstrap(
        Sample("regression", np.full(30, 5.1), np.arange(30.0)), rows(30), RESAMPLING, threshold=0.5
    )
    r2 = interval(found.points["r2"], found.resamples["r2"], rows(30), RESAMPLING)
    assert (r2.value, r2.low, r2.high) == (None, None, None)


def test_scored_holds_only_what_was_asked_for():
    """``only`` computes one metric and no ranking for it."""
    found = bootstrap(binary_sample(), rows(300), RESAMPLING, threshold=0.5, only="brier")
    assert isinstance(found, Scored)
    assert list(found.points) == list(found.resamples) == ["brier"]


def test_compiled_code_from_the_cache_gives_the_same_numbers(tmp_path):
    """A fresh compilation and one read back from disk agree to the last bit."""
    code = (
        "import numpy as np; from headrace.kernels.bootstrap import *\n"
        "x = np.random.default_rng(0).random(500)\n"
        "r = rank(x, x > 0.4, None, np.arange(500) % 90, with_precision=True)\n"
        "a, b = resample(np.random.default_rng(1).random((2, 90)), [r], num_resamples=30, seed=1,"
        " threads=2)\n"
        "print(a.tobytes().hex(), b.tobytes().hex())"
    )
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert said[0] == said[1] != ""
    assert list(tmp_path.rglob("*.nbc"))
