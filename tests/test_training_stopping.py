"""Early stopping counts non-improvement: ties stop, NaN stops at once."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.training.stopping import EarlyStopping


def run(values, *, patience):
    stopping = EarlyStopping(patience)
    for epoch, value in enumerate(values):
        stopping.see(epoch, value)
        if stopping.is_over:
            return stopping, epoch + 1
    return stopping, len(values)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_stops_exactly_patience_epochs_after_the_best(patience):
    stopping, num_epochs = run([3.0, 2.0, *[5.0] * 9], patience=patience)

    assert (stopping.best, stopping.best_epoch, num_epochs) == (2.0, 1, 2 + patience)


def test_a_tie_is_no_gain():
    stopping, num_epochs = run([1.0] * 10, patience=3)

    assert (stopping.best_epoch, num_epochs) == (0, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stops_at_once(value):
    stopping, num_epochs = run([1.0, value, 0.5], patience=9)

    assert (stopping.is_diverged, stopping.best_epoch, num_epochs) == (True, 0, 2)


@given(
    st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan]), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(0, 11),
)
def test_a_restored_state_decides_as_the_first_would(values, patience, cut):
    whole, num_epochs = run(values, patience=patience)
    first, second = EarlyStopping(patience), EarlyStopping(patience)
    for epoch, value in enumerate(values[:num_epochs]):
        if epoch == cut:
            second.restore(first.state())
        (second if epoch >= cut else first).see(epoch, value)
    last = second if cut < num_epochs else first

    assert last == whole
