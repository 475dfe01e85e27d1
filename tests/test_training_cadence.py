"""Lost work is at most one interval, checkpoints cost at most 3 %; all times are invented."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.training.cadence import Cadence

STEP = st.floats(0.001, 30)


def walk(cadence, steps, cost_s):
    """Take ``steps`` of so many seconds, save when due; yield (work at risk before, saved)."""
    now, at_risk = cadence.now, 0.0
    for step in steps:
        now, at_risk = now + step, at_risk + step
        is_due = cadence.is_due(now)
        yield at_risk, is_due
        if is_due:
            cadence.saved(now, now + cost_s)
            now, at_risk = now + cost_s, 0.0


@given(step=STEP, num_steps=st.integers(1, 200), interval=st.floats(30, 120))
def test_no_more_than_one_interval_is_at_risk(step, num_steps, interval):
    """A kill strikes at worst at the end of a step, before its checkpoint."""
    cadence = Cadence(interval, now=100.0)

    for at_risk, _ in walk(cadence, [step] * num_steps, cost_s=0.0):
        assert at_risk <= interval + 1e-6


@given(steps=st.lists(STEP, min_size=1, max_size=200), interval=st.floats(30, 120))
def test_steps_of_any_length_add_at_most_the_excess_of_the_longest(steps, interval):
    cadence = Cadence(interval, now=0.0)

    for at_risk, _ in walk(cadence, steps, cost_s=0.0):
        assert at_risk <= interval + max(steps)


@given(cost=st.floats(0.01, 100), step=STEP, interval=st.floats(0.001, 120))
def test_saving_takes_at_most_three_per_cent_of_the_time(cost, step, interval):
    """From the second checkpoint on: before the first its cost is not known."""
    cadence = Cadence(interval, now=0.0)
    cadence.saved(0.0, cost)
    steps = [step] * min(20_000, int(200 * cost / step) + 1)
    saves = sum(is_due for _, is_due in walk(cadence, steps, cost))
    work = step * len(steps)

    # A step may be up to one step early, so that no more than the interval is lost.
    assert saves * cost <= 0.03 * (work + saves * cost) + saves * cost * step / (33 * cost)


def test_an_interval_of_zero_saves_after_every_step_whatever_it_costs():
    cadence = Cadence(0.0, now=0.0)

    assert [due for _, due in walk(cadence, [1.0] * 5, cost_s=50.0)] == [True] * 5


@pytest.mark.parametrize(("cost", "expected"), [(0.0, 60.0), (1.0, 60.0), (2.0, 66.0)])
def test_the_interval_grows_where_saving_is_slow(cost, expected):
    cadence = Cadence(60.0, now=0.0)
    cadence.saved(10.0, 10.0 + cost)

    assert cadence.effective_interval_s == expected
