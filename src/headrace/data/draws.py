"""What a hash of a row's id decides: whether a sample keeps it, how often a bootstrap draws it.

A pure function of (row id, seed): the same for any order of the rows, on any machine, and the same
for every model that asks with the same seed.
"""

import math

import numpy as np
import numpy.typing as npt

_MOST_DRAWS = 12  # P(a Poisson(1) number is larger) is below 1e-10


def is_sampled(row_id: npt.NDArray[np.int64], share: float, *, seed: int) -> npt.NDArray[np.bool_]:
    """Return which rows a sample of about ``share`` keeps."""
    keep: npt.NDArray[np.bool_] = _uniform(row_id, seed) < share
    return keep


def bootstrap_counts(row_id: npt.NDArray[np.int64], *, seed: int) -> npt.NDArray[np.int64]:
    """Return how often a bootstrap sample holds each row: Poisson numbers of mean 1.

    The streaming form of drawing n of n rows with replacement; about 37 % of the rows get 0.
    Source: Chamandy et al. 2012, "Estimating Uncertainty for Massive Data Streams".
    """
    chances = [math.exp(-1) / math.factorial(count) for count in range(_MOST_DRAWS)]
    return np.searchsorted(np.cumsum(chances), _uniform(row_id, seed), side="right")


def mixed(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the finaliser of splitmix64, one to one and well spread."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def _uniform(row_id: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) per row: 53 bits of the mixed id."""
    seeded = row_id.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15) % (1 << 64))
    return (mixed(seeded) >> np.uint64(11)).astype(np.float64) / (1 << 53)
