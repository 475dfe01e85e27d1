"""Poisson resamples of a stream: a plain twin, weighted metrics, any parts, budget and threads."""

import math
import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, log_loss, roc_auc_score

from headrace.evaluation.bootstrap import Resampling, Units, bootstrap, difference, estimate
from headrace.evaluation.metrics import METRICS, Sample
from headrace.evaluation.streaming import NUM_BINS, Part, stream_bootstrap
from headrace.kernels.poisson import Folds, one_count, poisson_counts, rank_error, ranks_of

RESAMPLING = Resampling(num_resamples=200, confidence=0.95, seed=3)
MASK = (1 << 64) - 1


def sample_of(task, num_rows, *, seed=0, weighted=False, ties=False):
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.2, 3, num_rows) if weighted else None
    if task == "regression":
        truth = rng.normal(1000, 3, num_rows)
        return Sample(task, truth, truth + rng.normal(0, 1, num_rows), weight)
    if task == "multiclass":
        truth = rng.integers(0, 3, num_rows).astype(float)
        return Sample(task, truth, rng.dirichlet([1, 1, 1], num_rows), weight)
    score = rng.random(num_rows)
    truth = (rng.random(num_rows) < score).astype(float)
    return Sample(task, truth, np.round(score, 2) if ties else score, weight)


def keys_of(num_units, *, seed=1):
    return np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, num_units)


def parts_of(sample, key, part_rows):
    """Return what reads the rows in parts of this size."""

    def read():
        for start in range(0, len(key), part_rows):
            keep = np.arange(start, min(start + part_rows, len(key)))
            yield Part(sample.where(keep), key[keep])

    return read


def streamed(sample, key, *, part_rows=128, resampling=RESAMPLING, budget_bytes=1 << 30):
    return stream_bootstrap(
        parts_of(sample, key, part_rows),
        sample.task,
        resampling,
        threshold=0.5,
        budget_bytes=budget_bytes,
    )


def twin_of_counts(key, number, seed):
    """The count of one unit in one resample in plain Python integers."""

    def mix(word):
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
        return word ^ (word >> 31)

    golden = 0x9E3779B97F4A7C15
    start = mix((key & MASK) ^ mix((seed * golden + 1) & MASK))
    word = mix((start + golden * (number // 4 + 1)) & MASK)
    draw = (word >> (16 * (number % 4))) & 0xFFFF
    chance = np.cumsum([math.exp(-1) / math.factorial(count) for count in range(9)])
    return sum(draw >= round(end * 65536) for end in chance)


def test_counts_equal_a_plain_twin_and_are_poisson():
    """From (seed, resample, key) alone: mean and variance 1, the chances of 0, 1 and 2."""
    key = keys_of(4000)
    counts = poisson_counts(key, num_resamples=150, seed=2**63 - 1)
    for unit in (0, 7, 3999):
        for number in (0, 1, 3, 66, 149):
            assert counts[number, unit] == twin_of_counts(int(key[unit]), number, 2**63 - 1)
    assert counts.mean() == pytest.approx(1, abs=0.006)
    assert counts.var() == pytest.approx(1, abs=0.01)
    for value, chance in enumerate((math.exp(-1), math.exp(-1), math.exp(-1) / 2)):
        assert (counts == value).mean() == pytest.approx(chance, abs=0.003)
    over_units, over_resamples = counts.mean(axis=1), counts.mean(axis=0)
    assert over_units.std() == pytest.approx(1 / math.sqrt(4000), rel=0.2)
    assert over_resamples.std() == pytest.approx(1 / math.sqrt(150), rel=0.1)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_resample_equals_scikit_learn_with_the_counts_as_weights(weighted):
    """Scores with ties have a bin each, so rankings are exact; rows of a group come apart."""
    sample = sample_of("binary", 500, weighted=weighted, ties=True)
    key = keys_of(60)[np.arange(500) % 60]
    found = streamed(sample, key)
    counts = poisson_counts(key, num_resamples=200, seed=3)
    is_positive = sample.truth == 1
    for number in (0, 63, 64, 199):
        weight = counts[number] * (1 if sample.weight is None else sample.weight)
        for name, expected in {
            "roc_auc": roc_auc_score(is_positive, sample.prediction, sample_weight=weight),
            "average_precision": average_precision_score(
                is_positive, sample.prediction, sample_weight=weight
            ),
            "log_loss": log_loss(is_positive, sample.prediction, sample_weight=weight),
            "f1": f1_score(is_positive, sample.prediction >= 0.5, sample_weight=weight),
        }.items():
            assert found.scored.resamples[name][number] == pytest.approx(expected, abs=1e-9)
    assert set(found.error_bound.values()) == {0}


@pytest.mark.parametrize("task", ["regression", "binary", "multiclass"])
def test_points_are_those_of_all_rows_in_memory(task):
    """Sums exactly; rankings within the bound, which is small."""
    sample = sample_of(task, 20_000, weighted=True)
    found = streamed(sample, keys_of(20_000), resampling=Resampling(64, 0.95, 0), part_rows=7000)
    whole = bootstrap(
        sample, Units("row", np.arange(20_000), 20_000), Resampling(1, 0.95, 0), threshold=0.5
    )
    assert {"rmse", "log_loss"} & set(found.error_bound)
    for name, bound in found.error_bound.items():
        assert bound < 0.01
        assert found.scored.points[name] == pytest.approx(whole.points[name], abs=bound + 1e-9)
    for metric in METRICS[task]:
        if metric.name not in found.error_bound:
            assert np.isnan(found.scored.points[metric.name])
            assert found.scored.no_interval[metric.name] == "needs all rows in memory"


def test_the_bound_holds_whatever_the_order_within_bins():
    """The rows of ten bins in the best and in the worst order."""
    rng = np.random.default_rng(0)
    bins = np.repeat(np.arange(10), 30)
    is_positive = rng.random(300) < bins / 10
    cells = 2 * bins + is_positive
    _, cells_RC = one_count(np.zeros((0, 300)), cells[None], np.ones(300), 10)
    is_tied = np.zeros((1, 10), dtype=bool)
    middle, error = ranks_of(cells_RC, is_tied)[0], rank_error(cells_RC, is_tied)[0]
    for sign in (1, -1):
        score = bins + 0.1 * sign * is_positive
        exact = [roc_auc_score(is_positive, score), average_precision_score(is_positive, score)]
        assert (np.abs(exact - middle) <= error + 1e-12).all()
        assert exact[0] - middle[0] == pytest.approx(sign * error[0])  # no order moves it further


def test_parts_order_budget_and_threads_do_not_matter():
    """Parts, budget and threads: bit for bit. Another order of rows: to rounding."""
    sample, key = sample_of("binary", 3000, weighted=True), keys_of(3000)
    one = streamed(sample, key, part_rows=3000).scored.resamples
    order = np.random.default_rng(0).permutation(3000)
    several = {
        "parts": streamed(sample, key, part_rows=17),
        "budget": streamed(sample, key, budget_bytes=1),
        "threads": streamed(sample, key, resampling=Resampling(200, 0.95, 3, threads=2)),
    }
    for found in several.values():
        for name, values in one.items():
            assert found.scored.resamples[name].tobytes() == values.tobytes()
    shuffled = streamed(sample.where(order), key[order]).scored.resamples
    for name, values in one.items():
        np.testing.assert_allclose(values, shuffled[name], rtol=1e-11)
    regression = sample_of("regression", 3000)
    values = streamed(regression, key, part_rows=3000).scored.resamples["r2"]
    again = streamed(regression, key, part_rows=100).scored.resamples["r2"]
    assert values.tobytes() == again.tobytes()


def test_intervals_are_close_to_those_of_drawing_with_replacement():
    """Bounds within 3 Monte Carlo standard errors, and so for a paired difference."""
    sample, key = sample_of("binary", 2000), keys_of(2000)
    noise = np.random.default_rng(3).normal(0, 0.2, 2000)
    other = Sample("binary", sample.truth, np.clip(sample.prediction + noise, 0, 1))
    units = Units("row", np.arange(2000), 2000)
    resampling = Resampling(2000, 0.95, 5)
    streams = [streamed(s, key, resampling=resampling).scored for s in (sample, other)]
    drawn = [bootstrap(s, units, resampling, threshold=0.5) for s in (sample, other)]
    for name in ("roc_auc", "average_precision", "log_loss", "brier", "accuracy", "f1"):
        for mine, exact in (
            (
                estimate(name, streams[0], units, resampling),
                estimate(name, drawn[0], units, resampling),
            ),
            (
                difference(name, *streams, units, resampling),
                difference(name, *drawn, units, resampling),
            ),
        ):
            move = 3 * 2.67 * exact.standard_error * math.sqrt(2 / 2000) + 1e-4
            assert mine.low == pytest.approx(exact.low, abs=move)
            assert mine.high == pytest.approx(exact.high, abs=move)


def test_one_class_is_undefined_and_counted():
    """A resample without the two positives has no ROC-AUC; it is not 0."""
    sample = sample_of("binary", 100)
    sample.truth[:] = 0
    sample.truth[:2] = 1
    key = keys_of(100)
    found = streamed(sample, key)
    counts = poisson_counts(key, num_resamples=200, seed=3)
    is_one_class = counts[:, :2].sum(axis=1) == 0
    assert 10 < is_one_class.sum() < 50
    assert np.isnan(found.scored.resamples["roc_auc"]).tolist() == is_one_class.tolist()
    sample.truth[:] = 0
    none = streamed(sample, key)
    assert np.isnan(none.scored.points["roc_auc"])
    assert "roc_auc" not in none.error_bound
    assert none.error_bound["brier"] == 0


def test_memory_does_not_grow_with_the_rows():
    """Ten times the rows, the same peak."""

    def peak(num_parts):
        def read():
            for number in range(num_parts):
                sample = sample_of("binary", 2000, seed=number)
                yield Part(sample, keys_of(2000, seed=number))

        tracemalloc.start()
        stream_bootstrap(
            read, "binary", Resampling(64, 0.95, 0), threshold=0.5, budget_bytes=1 << 20
        )
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    assert peak(40) < 1.1 * peak(8)


def test_what_a_stream_cannot_do_is_refused():
    """Acceleration needs every unit; no rows have no metric."""
    sample, key = sample_of("binary", 100), keys_of(100)
    with pytest.raises(ValueError, match="expected percentile or basic"):
        streamed(sample, key, resampling=Resampling(200, 0.95, 0, method="bca"))
    with pytest.raises(ValueError, match="no rows"):
        stream_bootstrap(list, "binary", RESAMPLING, threshold=0.5, budget_bytes=1)
    with pytest.raises(ValueError, match="first is 3, expected a multiple of 64"):
        Folds(1, first=3, seed=0, num_columns=1, num_rankings=0, num_bins=1)
    assert NUM_BINS == 4096
