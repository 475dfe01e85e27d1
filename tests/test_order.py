"""The order of rows is arithmetic: everything once, restartable, well mixed."""

import hashlib
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.data.order import KINDS, Cut, RowOrder, permuted

unhurried = settings(deadline=None)  # the first call of a kernel compiles it
ROWS = st.integers(0, 700)
SIZES = st.lists(st.integers(0, 90), min_size=1, max_size=12).map(tuple)


def order_of(kind, sizes, *, seed=3, window_pieces=3, block_rows=8):
    return RowOrder(kind, sizes, seed, window_pieces, block_rows)


@given(num_rows=ROWS, batch_size=st.integers(1, 60), num_ranks=st.integers(1, 5))
def test_every_row_is_in_one_slice_of_one_rank(num_rows, batch_size, num_ranks):
    """The slices of all ranks and batches, one after the other, are the epoch."""
    cut = Cut(num_rows, batch_size, num_ranks)
    slices = [
        cut.bounds(batch, rank) for batch in range(cut.num_batches) for rank in range(num_ranks)
    ]

    places = list(chain.from_iterable(range(first, end) for first, end in slices))

    assert places == list(range(num_rows))


@given(num_rows=ROWS, batch_size=st.integers(1, 60), num_ranks=st.integers(1, 5))
def test_slices_of_a_batch_differ_by_at_most_one_row(num_rows, batch_size, num_ranks):
    cut = Cut(num_rows, batch_size, num_ranks)
    for batch in range(cut.num_batches):
        sizes = [end - first for first, end in (cut.bounds(batch, r) for r in range(num_ranks))]
        is_last = batch == cut.num_batches - 1

        assert max(sizes) - min(sizes) <= 1
        assert is_last or set(sizes) == {batch_size}


@pytest.mark.parametrize(
    ("num_rows", "sizes"),
    [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (1, [1]), (0, []), (5, [5])],
)
def test_a_tail_of_one_row_joins_the_batch_before_it(num_rows, sizes):
    cut = Cut(num_rows, 4)

    assert [end - first for first, end in map(cut.bounds, range(cut.num_batches))] == sizes


def test_the_tail_counts_per_rank():
    """With three ranks five rows are under two per rank, six are not."""
    assert Cut(3 * 4 * 2 + 5, 4, 3).num_batches == 2
    assert Cut(3 * 4 * 2 + 6, 4, 3).num_batches == 3


@given(num_batches=st.integers(0, 40), used=st.integers(0, 40), num_workers=st.integers(1, 7))
def test_workers_in_turn_read_the_remaining_batches_in_order(num_batches, used, num_workers):
    """Taking one batch of each worker in turn gives the same batches for any number of workers."""
    cut = Cut(num_batches * 4, 4)
    shares = [list(cut.share(used, worker, num_workers)) for worker in range(num_workers)]
    in_turn = [
        share[i]
        for i in range(max(map(len, shares), default=0))
        for share in shares
        if i < len(share)
    ]

    assert in_turn == list(range(used, num_batches))


@unhurried
@given(
    kind=st.sampled_from(KINDS),
    sizes=SIZES,
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
    window_pieces=st.integers(1, 5),
    block_rows=st.integers(1, 40),
)
def test_an_epoch_is_every_row_once(kind, sizes, seed, epoch, window_pieces, block_rows):
    order = order_of(kind, sizes, seed=seed, window_pieces=window_pieces, block_rows=block_rows)

    rows = order.rows(epoch, 0, order.num_rows)

    assert np.array_equal(np.sort(rows), np.arange(order.num_rows))


@unhurried
@given(
    kind=st.sampled_from(KINDS),
    sizes=SIZES,
    cuts=st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
)
def test_any_part_of_the_order_is_that_part_of_the_whole(kind, sizes, cuts):
    """Restarting at a place costs nothing and changes nothing."""
    order = order_of(kind, sizes)
    start, stop = sorted(min(cut, order.num_rows) for cut in cuts)

    whole = order.rows(1, 0, order.num_rows)

    assert np.array_equal(order.rows(1, start, stop), whole[start:stop])


@pytest.mark.parametrize(
    ("num_rows", "rows"),
    [
        (16_385, [9946, 3161, 15019, 15375, 5269]),
        (60_000_000, [8916229, 14318810, 56667254, 35353776, 58946058]),
        (5_000_000_000, [368659032, 2867572711, 137710182, 281091716, 863672677]),
    ],
)
def test_a_permutation_is_the_one_recorded(num_rows, rows):
    """Recorded from the NumPy code before it was compiled: a saved position keeps its meaning."""
    places = np.array([0, 1, 2, num_rows // 2, num_rows - 1])

    assert permuted(places, num_rows, (7, 3, 0)).tolist() == rows


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("exact", "f11ea1de385fbb1d"),
        ("window", "21ed79a8f95d60c5"),
        ("block", "cf3d603b0e58cb65"),
    ],
)
def test_an_order_is_the_one_recorded(kind, digest):
    order = RowOrder(kind, (20_000, 0, 35_000, 17, 40_000, 20_000, 9), 5, 3, 64)

    rows = order.rows(2, 0, order.num_rows).astype("<i8")

    assert hashlib.sha256(rows.tobytes()).hexdigest()[:16] == digest


def twin(places, num_rows, key):
    """Return what ``permuted`` says, one row at a time in whole numbers without a width."""
    bits = (num_rows - 1).bit_length()
    words = np.random.SeedSequence(key).generate_state(10, np.uint64).tolist()
    out = []
    for place in places:
        row = int(place)
        while True:
            for add, multiply in zip(words[::2], words[1::2], strict=True):
                row = (row + add) * (multiply | 1) % 2**bits
                row ^= row >> (bits + 1) // 2
            if row < num_rows:
                break
        out.append(row)
    return out


@unhurried
@given(num_rows=st.integers(2**14 + 1, 2**40), place=st.integers(0, 2**40), seed=st.integers(0, 9))
def test_the_compiled_permutation_is_its_plain_twin(num_rows, place, seed):
    """Also above 32 bits, and for more places than one chunk of the kernel."""
    places = (place + np.arange(600)) % num_rows

    assert permuted(places, num_rows, (seed, 1)).tolist() == twin(places, num_rows, (seed, 1))


@settings(max_examples=25, deadline=None)
@given(num_rows=st.integers(2**14 - 2, 2**17), epoch=st.integers(0, 5))
def test_a_large_permutation_is_one(num_rows, epoch):
    """Above the size of stored tables the bijection is computed: still every row once."""
    rows = permuted(np.arange(num_rows), num_rows, (0, epoch))

    assert np.array_equal(np.sort(rows), np.arange(num_rows))


@pytest.mark.parametrize("kind", ["exact", "window", "block"])
def test_epochs_and_seeds_have_orders_of_their_own(kind):
    sizes = (30_000, 30_000)
    first = order_of(kind, sizes).rows(0, 0, 60_000)

    assert not np.array_equal(first, order_of(kind, sizes).rows(1, 0, 60_000))
    assert not np.array_equal(first, order_of(kind, sizes, seed=4).rows(0, 0, 60_000))
    assert np.array_equal(first, order_of(kind, sizes).rows(0, 0, 60_000))


def test_sequential_is_the_stored_order_in_every_epoch():
    assert order_of("sequential", (5, 4)).rows(7, 2, 9).tolist() == [2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("num_rows", [20_000, 100_003, 262_145])
def test_a_computed_permutation_mixes_like_a_drawn_one(num_rows):
    """Batch means of sorted rows spread as without replacement, over batches and over epochs."""
    size = 500
    means = []
    for epoch in range(8):
        rows = permuted(np.arange(num_rows), num_rows, (11, epoch))
        cut = rows[: num_rows // size * size].reshape(-1, size)
        means.append(cut.mean(axis=1))
        step = np.corrcoef(rows[:-1], rows[1:])[0, 1]
        assert abs(step) < 5 / np.sqrt(num_rows)
    spread = np.sqrt((num_rows**2 - 1) / 12 / size * (num_rows - size) / (num_rows - 1))
    z = (np.concatenate(means) - (num_rows - 1) / 2) / spread

    assert abs(z.mean()) < 5 / np.sqrt(len(z))
    assert z.std() == pytest.approx(1, abs=5 / np.sqrt(2 * len(z)))
    assert np.abs(z).max() < 5


def test_where_a_row_lands_is_uniform_over_epochs():
    """Chi-square of row thirds by place thirds stays in its range for a computed permutation."""
    num_rows, cells = 20_011, 30
    table = np.zeros((cells, cells))
    for epoch in range(10):
        rows = permuted(np.arange(num_rows), num_rows, (5, epoch))
        np.add.at(table, (np.arange(num_rows) * cells // num_rows, rows * cells // num_rows), 1)
    expected = table.sum() / cells**2
    freedom = (cells - 1) ** 2
    chi = ((table - expected) ** 2 / expected).sum()

    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_window_mixes_only_its_shards():
    """Rows of the first window come from as many shards as the window has, all of them."""
    order = order_of("window", (100,) * 10, window_pieces=2)

    shards = order.rows(0, 0, 200) // 100

    assert len(np.unique(shards)) == 2
    assert not np.array_equal(shards, np.sort(shards))


def test_a_block_keeps_its_rows_together_and_epochs_cut_elsewhere():
    order = order_of("block", (1000,), block_rows=10)
    first = order.rows(0, 0, 1000).reshape(-1, 10)

    assert set(np.unique(np.diff(first, axis=1))) <= {1, -999}  # -999: the ring closes
    assert first[0, 0] % 10 != order.rows(1, 0, 10)[0] % 10
