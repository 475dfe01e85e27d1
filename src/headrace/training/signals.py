"""Stop at a step's end: the first SIGINT or SIGTERM waits until the state can be saved.

A handler that raises strikes anywhere, also in the middle of an update of the weights, where there
is nothing whole to save. So for the time of a training run the signal is only noted; the loop saves
at its next step and then hands the signal to the handler that was there before, which does what it
always did (raise ``Stopped``, or end the process). A step that takes too long is not waited for:
the signal is handed on where it strikes, and the last checkpoint counts.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE_S = 5.0  # for the running step; whoever asked may use force after 10 s


class HeldSignals:
    """The first signal that came, held back until the loop asks for it."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._is_overdue = False
        self._timer: threading.Timer | None = None
        # One that is ignored, or that C code handles, is left as it is.
        self._before = {
            number: handler
            for number in _SIGNALS
            if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN)
        }

    @property
    def is_stop_asked(self) -> bool:
        """Whether a signal waits."""
        return self._number is not None

    def release(self) -> None:
        """Hand a waiting signal to the handler that was there before, which may raise."""
        number, self._number = self._number, None
        self._forget_timer()
        if number is not None:
            self._restore()
            # In this thread and at once; a default action ends the process here.
            signal.raise_signal(number)

    def _hold(self) -> None:
        for number in self._before:
            signal.signal(number, self._on_signal)

    def _restore(self) -> None:
        self._forget_timer()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._is_overdue:
            self.release()
        elif self._number is None:  # a terminal and a supervisor both send one: the first counts
            self._number = number
            self._timer = threading.Timer(PATIENCE_S, self._insist)
            self._timer.daemon = True
            self._timer.start()

    def _insist(self) -> None:
        number = self._number
        if number is not None:
            self._is_overdue = True
            os.kill(os.getpid(), number)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


@contextmanager
def held_signals() -> Iterator[HeldSignals]:
    """Hold SIGINT and SIGTERM back within the block; one that waits at its end is handed on.

    Outside the main thread, where Python lets nobody handle signals, nothing is held.
    """
    held = HeldSignals()
    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    held._hold()
    try:
        yield held
    finally:
        held._restore()
        held.release()
