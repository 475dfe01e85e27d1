"""What tuning a threshold promises and what it keeps, and what a tuned threshold costs in seconds.

python benchmarks/decide.py          # a minute on one core
"""

import time

import numpy as np

from headrace.evaluation.bootstrap import Resampling, Units
from headrace.evaluation.metrics import Sample, score
from headrace.evaluation.thresholds import Objective, ThresholdMetric, tune

NUM_SETS = 200
RESAMPLING = Resampling(200, 0.95, seed=0)


def draw(num_rows: int, rng: np.random.Generator) -> Sample:
    """Return labels drawn with the very probabilities told; one row in five is positive."""
    probability = 1 / (1 + np.exp(-(rng.normal(0, 1.5, num_rows) - 2)))
    return Sample("binary", (rng.random(num_rows) < probability).astype(float), probability)


def gains(metric: ThresholdMetric, num_rows: int) -> None:
    """Print the mean gain over 0.5: by the rows of the fit, cross-fitted, and on fresh rows."""
    rng = np.random.default_rng(0)
    fresh = draw(100_000, rng)
    at_half = score(metric, fresh)
    units = Units("row", np.arange(num_rows), num_rows)
    found = []
    for _ in range(NUM_SETS):
        sample = draw(num_rows, rng)
        tuned = tune(sample, units, RESAMPLING, Objective(metric, None))
        best = tuned.best.value
        own = score(metric, sample, threshold=best) - score(metric, sample)
        cross = np.nan if tuned.gain.value is None else tuned.gain.value
        really = score(metric, fresh, threshold=best) - at_half
        used = score(metric, fresh, threshold=tuned.threshold) - at_half
        found.append((own, cross, really, used, tuned.threshold != 0.5))
    own, cross, really, used, share = np.nanmean(np.array(found), axis=0)
    print(
        f"{metric}, {num_rows} rows: gain by the rows of the fit {own:.4f}, cross-fitted "
        f"{cross:.4f}, on fresh rows {really:.4f}; used in {share:.0%}, then with 0.5 elsewhere "
        f"{used:.4f}"
    )


def seconds(num_rows: int) -> None:
    """Print the CPU seconds of a threshold with 1000 resamples."""
    units = Units("row", np.arange(num_rows), num_rows)
    sample = draw(num_rows, np.random.default_rng(0))
    start = time.process_time()
    tune(sample, units, Resampling(1000, 0.95, seed=0), Objective("f1", None))
    print(f"{num_rows:,} rows, 1000 resamples: {time.process_time() - start:.1f} CPU s")


if __name__ == "__main__":
    for size in (200, 1000):
        gains("accuracy", size)
        gains("f1", size)
    for size in (10_000, 100_000):
        seconds(size)
