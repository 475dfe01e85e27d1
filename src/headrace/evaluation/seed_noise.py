"""How far a metric moves when only the seed changes, and gains that are no larger.

The test rows are the same for all seeds, so this spread is not in the interval of a difference: an
interval that excludes 0 says that *these two fits* differ on these rows, not that the settings do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SeedNoise:
    """The values of one metric over seeds: how many, standard deviation, and range."""

    num_seeds: int
    deviation: float
    low: float
    high: float

    @property
    def reach(self) -> float:
        """How far a fit may be from a model without such noise: two deviations."""
        return 2 * self.deviation


def seed_noise(values: Sequence[float]) -> SeedNoise | None:
    """Return the spread of the values of replicates; None for fewer than two.

    >>> seed_noise([1.0, 3.0])
    SeedNoise(num_seeds=2, deviation=1.4142135623730951, low=1.0, high=3.0)
    """
    if len(values) < 2:
        return None
    return SeedNoise(len(values), float(np.std(values, ddof=1)), min(values), max(values))


def is_inside(gain: float, first: SeedNoise | None, second: SeedNoise | None) -> bool:
    """Whether two seeds alone could differ by ``gain``: by two deviations of such a difference.

    A model whose spread nobody has measured adds none.
    """
    reaches = [noise.reach for noise in (first, second) if noise is not None]
    return bool(reaches) and abs(gain) <= float(np.hypot.reduce(reaches))
