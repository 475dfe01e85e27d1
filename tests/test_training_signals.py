"""Signals wait for the end of a step, then do what they always did."""

import os
import signal
import threading
import time

import pytest

from headrace.errors import Stopped
from headrace.training import signals
from headrace.training.signals import held_signals

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def _raising():
    """As a stage does: the first signal raises, later ones do nothing."""
    is_stopping = False

    def stop(number, _frame):
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            raise Stopped(f"by {number}")

    before = {number: signal.signal(number, stop) for number in BOTH}
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_waits_until_it_is_released(number, _raising):
    with pytest.raises(Stopped, match=f"by {int(number)}"), held_signals() as held:
        assert not held.is_stop_asked
        held.release()  # nothing waits
        os.kill(os.getpid(), number)
        assert held.is_stop_asked
        held.release()
        pytest.fail("the signal was lost")

    assert signal.getsignal(number) is _raising


def test_one_that_waits_at_the_end_is_handed_on():
    with pytest.raises(Stopped), held_signals():
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_error_of_the_same_moment_does_not_hide_the_stop():
    """Ctrl-C also kills the reading processes, whose loss is then reported."""
    with pytest.raises(Stopped) as caught, held_signals():
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("a worker died")

    assert "a worker died" in str(caught.value.__context__)


def test_a_second_signal_does_not_cut_the_step_short():
    with pytest.raises(Stopped, match="by 2"), held_signals() as held:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        held.release()


def test_a_step_that_takes_too_long_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE_S", 0.05)
    with pytest.raises(Stopped), held_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        pytest.fail("the step was waited for")


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_signals() as held:
        os.kill(os.getpid(), signal.SIGINT)
        assert not held.is_stop_asked


def test_outside_the_main_thread_nothing_is_held(_raising):
    seen = []

    def work():
        with held_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert seen == [_raising]
