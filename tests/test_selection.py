"""A selection is the row numbers it was made of, in a bit per row."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.data.selection import Selection
from headrace.errors import ConfigError

# Runs of chosen and left out rows: dense, sparse and in clusters, over many blocks of 512.
RUNS = st.lists(
    st.tuples(st.integers(0, 4000), st.sampled_from([0.0, 0.01, 0.3, 0.97, 1.0])), max_size=12
)
unhurried = settings(deadline=None)  # the first call of the kernel compiles it


def mask_of(runs):
    rng = np.random.default_rng(5)
    return np.concatenate([np.zeros(0, bool), *[rng.random(rows) < share for rows, share in runs]])


@unhurried
@given(runs=RUNS)
def test_the_row_at_every_place_is_found(runs):
    mask = mask_of(runs)
    selection = Selection.from_mask(mask)

    rows = selection.rows(np.arange(len(selection)))

    assert rows.dtype == np.int64
    assert np.array_equal(rows, np.flatnonzero(mask))
    assert np.array_equal(selection.places(rows), np.arange(len(selection)))


@unhurried
@given(runs=RUNS, cuts=st.lists(st.integers(0, 40_000), max_size=9))
def test_counts_are_the_chosen_rows_of_each_shard(runs, cuts):
    mask = mask_of(runs)
    edges = [0, *sorted(min(cut, len(mask)) for cut in cuts), len(mask)]

    counts = Selection.from_mask(mask).counts(np.diff(edges).tolist())

    assert counts == tuple(int(mask[a:b].sum()) for a, b in pairwise(edges))


@given(runs=RUNS)
def test_equal_sets_have_equal_digests_and_others_do_not(runs):
    mask = mask_of(runs)
    selection = Selection.from_mask(mask)

    assert Selection.from_rows(np.flatnonzero(mask), len(mask)).digest == selection.digest
    assert Selection.from_mask(np.append(mask, False)).digest != selection.digest
    if len(mask):
        mask[len(mask) // 2] ^= True
        assert Selection.from_mask(mask).digest != selection.digest


@given(runs=RUNS)
def test_the_bits_are_the_set_for_dense_and_sparse_ones(runs):
    mask = mask_of(runs)

    bits = np.unpackbits(Selection.from_mask(mask).words().view(np.uint8), bitorder="little")

    assert np.array_equal(bits[: len(mask)], mask)
    assert not bits[len(mask) :].any()


@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
def test_memory_is_a_bit_per_row_or_less(share):
    """Above the bits there are only counts: a fifth of them."""
    selection = Selection.from_mask(np.random.default_rng(1).random(1_000_000) < share)

    assert selection.num_bytes <= 1_000_000 / 8 * 6 / 5


def test_a_selection_travels_to_a_worker():
    selection = Selection.from_mask(np.arange(5000) % 3 > 0)

    copy = pickle.loads(pickle.dumps(selection))

    assert copy.digest == selection.digest
    assert copy.rows(np.array([3000, 7])).tolist() == selection.rows(np.array([3000, 7])).tolist()


def test_a_place_that_is_not_there_is_refused():
    """The kernel reads memory by these numbers."""
    selection = Selection.from_mask(np.ones(600, bool))
    for place in (-1, 600):
        with pytest.raises(IndexError, match=r"0\.\.599"):
            selection.rows(np.array([place]))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([3, 3], "ascending"),
        ([4, 2], "ascending"),
        ([-1, 2], "ascending"),
        ([2, 10], "from 0 to 9"),
        ([0.5], "whole row numbers"),
        ([[1, 2]], "shape"),
    ],
)
def test_rows_that_are_no_set_are_refused(rows, match):
    with pytest.raises(ConfigError, match=match):
        Selection.from_rows(rows, 10)
