"""Time that a command may take: how it is written, and whether another piece of work fits in it."""

import re
import time
from collections.abc import Sequence
from statistics import median

from headrace.errors import ConfigError

_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as ``90s``, ``30m`` or ``1h30m``.

    Raises:
        ConfigError: if it is none, or 0.

    >>> parse_duration("1h30m")
    5400.0
    """
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    seconds = 0.0
    if found:
        parts = zip(found.groups(), _SECONDS.values(), strict=True)
        seconds = sum(int(number) * unit for number, unit in parts if number)
    if not seconds:
        raise ConfigError(f"--budget {text!r} is no time to work in; write 90s, 30m or 1h30m")
    return seconds


class Budget:
    """Seconds from now on, or any number of them (None)."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def has_time(self, earlier_s: Sequence[float]) -> bool:
        """Whether a piece of work that takes as long as earlier ones would end in time.

        Nobody knows what the first one takes: it begins while there is any time.
        """
        expected_s = median(earlier_s) if earlier_s else 0.0
        return self._end is None or time.monotonic() + expected_s <= self._end
