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
def raising():
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


def send_and_release(*numbers):
    with held_signals() as held:
        held.release()  # nothing waits
        for number in numbers:
            assert held.is_stop_asked == (number != numbers[0])
            os.kill(os.getpid(), number)
        held.release()
        pytest.fail("the signal was lost")


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_waits_until_it_is_released(number, raising):
    with pytest.raises(Stopped, match=f"by {int(number)}"):
        send_and_release(number)

    assert signal.getsignal(number) is raising


def test_a_second_signal_does_not_cut_the_step_short():
    with pytest.raises(Stopped, match="by 2"):
        send_and_release(signal.SIGINT, signal.SIGTERM)


def send_and_end(error=None, *, after_s=0.0):
    with held_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(after_s)
        if error is not None:
            raise error


def test_one_that_waits_at_the_end_is_handed_on():
    with pytest.raises(Stopped):
        send_and_end()


def test_an_error_of_the_same_moment_does_not_hide_the_stop():
    """Ctrl-C also kills the reading processes, whose loss is then reported."""
    with pytest.raises(Stopped) as caught:
        send_and_end(RuntimeError("a worker died"))

    assert "a worker died" in str(caught.value.__context__)


def test_a_step_that_takes_too_long_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE_S", 0.05)
    with pytest.raises(Stopped) as caught:
        send_and_end(AssertionError("it was waited for"), after_s=30.0)

    assert caught.value.__context__ is None


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_signals() as held:
        os.kill(os.getpid(), signal.SIGINT)
        assert not held.is_stop_asked


def test_outside_the_main_thread_nothing_is_held(raising):
    seen = []

    def work():
        with held_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert seen == [raising]
