"""The learning rate of each update, by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.training.params import Plateau, TrainingParams
from headrace.training.schedule import PlateauRate, learning_rate


def rates(steps, total=110, **settings):
    params = TrainingParams(learning_rate=2.0, **{"warmup_steps": 10, **settings})
    return [learning_rate(step, total, params) for step in steps]


def test_a_constant_rate_rises_then_stays():
    assert rates([0, 4, 9, 10, 109]) == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    assert rates([0, 50], warmup_steps=0) == [2.0, 2.0]
    assert rates([0, 99, 100], warmup_steps=None) == pytest.approx([0.02, 2.0, 2.0])


def test_cosine_falls_to_its_floor_and_stays_there():
    found = rates([9, 10, 60, 110, 500], schedule="cosine", rate_floor=0.05)

    assert found == pytest.approx([2.0, 2.0, 1.0, 0.1, 0.1])


def test_one_cycle_rises_for_three_tenths_and_falls_for_the_rest():
    found = rates([0, 14, 29, 30, 65, 100], total=100, schedule="one_cycle", warmup_steps=None)

    assert found == pytest.approx([2 / 30, 1.0, 2.0, 2.0, 1.0, 0.02])


@given(
    st.integers(0, 300),
    st.sampled_from(["constant", "cosine", "one_cycle", "plateau"]),
    st.floats(0.02, 1.0),
    st.sampled_from([None, 1, 40]),
)
def test_no_rate_is_below_the_floor_or_above_the_rate(step, schedule, floor, warmup):
    params = TrainingParams(schedule=schedule, rate_floor=floor, warmup_steps=warmup)
    found = learning_rate(step, 200, params, plateau_share=1e-9)

    assert floor * params.learning_rate <= found <= params.learning_rate


def falls(gains, **settings):
    """Return the epochs, from 1, after which the rate fell."""
    rate, found = PlateauRate(Plateau(**settings)), []
    for epoch, is_gain in enumerate(gains, start=1):
        before = rate.num_falls
        rate.see(is_gain=is_gain)
        found += [epoch] if rate.num_falls > before else []
    return found


def test_a_plateau_is_so_many_epochs_in_a_row_without_a_gain():
    assert falls([True, *[False] * 7], patience=3) == [4, 7]
    assert falls([True, False, False, True, False, False, False], patience=3) == [7]
    assert falls([False] * 9, patience=2, cooldown=2) == [2, 6]


def test_a_gain_in_the_cooldown_is_no_reason_to_wait_longer():
    assert falls([False, False, True, False, False], patience=2, cooldown=1) == [2, 5]


@given(st.lists(st.booleans(), max_size=20), st.integers(0, 20))
def test_a_restored_plateau_falls_when_the_first_would(gains, cut):
    settings = Plateau(patience=2, cooldown=1)
    first, second = PlateauRate(settings), PlateauRate(settings)
    whole = PlateauRate(settings)
    for is_gain in gains:
        whole.see(is_gain=is_gain)
    for is_gain in gains[:cut]:
        first.see(is_gain=is_gain)
    second.restore(first.state())
    for is_gain in gains[cut:]:
        second.see(is_gain=is_gain)

    assert second == whole


def test_what_a_plateau_left_is_a_power_of_its_factor():
    rate = PlateauRate(Plateau(patience=1, factor=0.5))
    for _ in range(3):
        rate.see(is_gain=False)

    assert rate.share == 0.125
    params = TrainingParams(schedule="plateau", warmup_steps=0, learning_rate=1.0)
    assert learning_rate(7, 10, params, plateau_share=rate.share) == 0.125
