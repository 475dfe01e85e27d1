"""Sampling is arithmetic too: the right counts, restartable, the same for all ranks and workers."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.data.sampling import BalancedOrder, WeightedOrder, sampled
from headrace.data.selection import Selection
from headrace.data.shards import open_shards
from headrace.errors import ConfigError, DataError
from tests.encode_tables import encode_example

unhurried = settings(deadline=None)  # the first call of a kernel compiles it
SHARDS = st.lists(st.integers(0, 300), min_size=1, max_size=5)


def weighted(parts, **settings):
    return WeightedOrder(lambda: parts, **{"seed": 3, **settings})


def weights_of(sizes, seed):
    rng = np.random.default_rng(seed)
    return [
        (rng.exponential(size=size) * (rng.random(size) < 0.7)).astype(np.float32) for size in sizes
    ]


@unhurried
@given(
    sizes=SHARDS,
    seed=st.integers(0, 99),
    num_rows=st.none() | st.integers(1, 2000),
    is_part=st.booleans(),
)
def test_a_row_comes_as_often_as_its_weight_says(sizes, seed, num_rows, is_part):
    """Less than two from the expected count in every epoch, and never with weight 0."""
    parts = weights_of(sizes, seed)
    weight = np.concatenate(parts).astype(np.float64)
    mask = np.random.default_rng(seed).random(len(weight)) < 0.6
    chosen = Selection.from_mask(mask) if is_part else None
    if is_part:
        weight = np.where(mask, weight, 0.0)
    if not weight.sum():
        return
    order = weighted(parts, chosen=chosen, num_rows=num_rows)
    expected = order.num_rows * weight / weight.sum()

    counts = np.bincount(order.rows(2, 0, order.num_rows), minlength=len(weight))

    assert len(counts) == len(weight)
    assert counts.sum() == order.num_rows
    assert np.abs(counts - expected).max() < 2
    assert not counts[weight == 0].any()


def test_with_equal_weights_every_row_comes_once():
    order = weighted([np.full(700, 0.1, np.float32), np.full(300, 0.1, np.float32)])

    assert np.array_equal(np.sort(order.rows(0, 0, 1000)), np.arange(1000))


def test_counts_over_epochs_are_the_weights():
    """Unbiased: chi-square of the counts of 400 epochs is below that of independent draws."""
    parts = weights_of([200, 100], 8)
    weight = np.concatenate(parts).astype(np.float64)
    order = weighted(parts, num_rows=97)
    epochs = 400

    drawn = np.concatenate([order.rows(epoch, 0, 97) for epoch in range(epochs)])

    counts = np.bincount(drawn, minlength=300)[weight > 0]
    expected = epochs * 97 * weight[weight > 0] / weight.sum()
    assert ((counts - expected) ** 2 / expected).sum() < len(counts) + 5 * np.sqrt(2 * len(counts))


def test_a_pattern_in_the_table_is_not_a_pattern_in_the_epoch():
    """Rows that alternate between weights 1/2 and 3/2 keep their shares within each epoch."""
    order = weighted([np.tile(np.array([0.5, 1.5], np.float32), 2000)])
    shares = [np.mean(order.rows(epoch, 0, 4000) % 2) for epoch in range(20)]

    assert np.abs(np.array(shares) - 0.75).max() < 0.02


def test_neighbours_of_the_table_are_no_neighbours_of_the_epoch():
    order = weighted([np.ones(20_000, np.float32)])
    rows = order.rows(0, 0, 20_000)

    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 5 / np.sqrt(len(rows))
    assert not np.array_equal(rows, order.rows(1, 0, 20_000))
    assert not np.array_equal(
        rows, weighted([np.ones(20_000, np.float32)], seed=4).rows(0, 0, 20_000)
    )


def classes_of(sizes, num_rows=3000):
    label = np.full(num_rows, -1)
    rows = np.random.default_rng(2).permutation(num_rows)[: sum(sizes)]
    label[rows] = np.repeat(np.arange(len(sizes)), sizes)
    return label, [Selection.from_mask(label == number) for number in range(len(sizes))]


CLASSES = st.lists(st.integers(1, 700), min_size=2, max_size=4)


@unhurried
@given(sizes=CLASSES, num_rows=st.integers(1, 3000), cuts=st.tuples(*[st.integers(0, 3000)] * 2))
def test_any_run_of_places_holds_each_class_equally_often(sizes, num_rows, cuts):
    """To within one, so every epoch, every batch and every rank's slice does."""
    label, classes = classes_of(sizes)
    order = BalancedOrder(classes, seed=1, num_rows=num_rows)
    start, stop = sorted(min(cut, num_rows) for cut in cuts)

    counts = np.bincount(label[order.rows(4, start, stop)] + 1, minlength=len(sizes) + 1)

    assert counts[0] == 0  # of rows without a label
    assert np.ptp(counts[1:]) <= 1


@unhurried
@given(sizes=CLASSES, num_rows=st.integers(1, 900))
def test_no_row_comes_again_before_all_of_its_class_came(sizes, num_rows):
    """Over the end of an epoch too."""
    label, classes = classes_of(sizes)
    order = BalancedOrder(classes, seed=1, num_rows=num_rows)

    rows = np.concatenate([order.rows(epoch, 0, num_rows) for epoch in range(3)])

    for number in range(len(sizes)):
        counts = np.bincount(rows[label[rows] == number], minlength=3000)
        assert np.ptp(counts[label == number]) <= 1


@pytest.mark.parametrize("size", [5, 200, 400, 20_000])
def test_a_class_has_another_order_each_time_round(size):
    """Drawn, tabled and computed permutations."""
    _, classes = classes_of([size, size], 50_000)
    order = BalancedOrder(classes, seed=1)
    rounds = [order.rows(epoch, 0, 2 * size)[::2] for epoch in range(4)]

    assert len({tuple(rows) for rows in rounds}) > 2
    assert len({tuple(np.sort(rows)) for rows in rounds}) == 1


def orders():
    _, classes = classes_of([900, 40, 400])
    return [weighted(weights_of([500, 0, 700], 1), num_rows=1500), BalancedOrder(classes, seed=6)]


@pytest.mark.parametrize("number", [0, 1])
def test_any_part_of_an_epoch_is_that_part_of_the_whole(number):
    order = orders()[number]
    whole = order.rows(5, 0, order.num_rows)
    for start, stop in ((0, 0), (1, 700), (699, 1300), (1339, 1340)):
        assert np.array_equal(order.rows(5, start, stop), whole[start:stop])


def as_weights():
    return weights_of([500, 20], 1)


def test_an_order_travels_to_a_worker_without_the_weights():
    order = WeightedOrder(as_weights, seed=2)
    content = pickle.dumps(order)

    assert len(content) < 1500
    assert np.array_equal(pickle.loads(content).rows(1, 0, 520), order.rows(1, 0, 520))


def test_a_balanced_order_travels_to_a_worker():
    order = orders()[1]

    assert np.array_equal(pickle.loads(pickle.dumps(order)).rows(1, 5, 99), order.rows(1, 5, 99))


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_weight_that_is_none_is_refused_with_its_row(bad):
    parts = [np.ones(100, np.float32), np.ones(100, np.float32)]
    parts[1][7] = bad

    with pytest.raises(DataError, match=rf"{bad} in row 107; .* correct the weight column"):
        weighted(parts)

    others = np.ones(200, bool)
    others[107] = False
    assert weighted(parts, chosen=Selection.from_mask(others)).num_rows == 199


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(DataError, match="all weights of the rows are 0"):
        weighted([np.zeros(10, np.float32)])


def test_a_single_class_cannot_be_balanced():
    _, classes = classes_of([9, 0])
    with pytest.raises(DataError, match=r"classes have \[9, 0\] rows"):
        BalancedOrder(classes, seed=0)


def test_an_epoch_without_places_is_refused():
    with pytest.raises(ConfigError, match="epoch of 0 rows"):
        weighted([np.ones(10, np.float32)], num_rows=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder, _, _ = encode_example(tmp_path_factory.mktemp("sampling"), num_train=900)
    return open_shards(folder, "train")


def test_weights_come_from_the_shards(shards):
    """Of several shards, and only of the rows chosen."""
    weight = shards.read("weight").astype(np.float64)
    mask = shards.read("fold") != 0
    order = sampled("weighted", shards, seed=1, chosen=Selection.from_mask(mask))
    weight[~mask] = 0

    counts = np.bincount(order.rows(0, 0, order.num_rows), minlength=len(weight))

    assert len(shards.sizes) > 1
    assert order.num_rows == mask.sum()
    assert np.abs(counts - order.num_rows * weight / weight.sum()).max() < 2


def test_classes_come_from_the_shards(shards):
    target = shards.read("targets")[:, shards.targets.index("late")]
    mask = shards.read("fold") != 0
    order = sampled("balanced:late", shards, seed=1, chosen=Selection.from_mask(mask))

    rows = order.rows(0, 0, order.num_rows)

    assert mask[rows].all()
    assert abs(target[rows].mean() - 0.5) < 1 / len(rows)
    assert order.num_rows == (mask & ~np.isnan(target)).sum()


@pytest.mark.parametrize(
    ("sampling", "match"),
    [
        ("balanced", "sampling is 'balanced'; it must be 'weighted', or 'balanced:'"),
        ("weighted:late", "it must be 'weighted'"),
        (
            "balanced:lat",
            "'balanced:lat', but that target is not there.*: late; nearest name: late",
        ),
        ("balanced:delay", "is a regression and has no classes.*: late"),
    ],
)
def test_a_sampling_that_is_none_is_refused(shards, sampling, match):
    with pytest.raises(ConfigError, match=match):
        sampled(sampling, shards, seed=0)
