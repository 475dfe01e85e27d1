"""Intervals of ROC-AUC, log-loss and RMSE from 1000 resamples: headrace beside what people write.

The slow ways run a few resamples and are scaled. Before timing, the same resample is checked
against scikit-learn: the AUC of its counts used as weights must agree to 1e-12.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.stats
from sklearn.metrics import log_loss, roc_auc_score, root_mean_squared_error

from benchmarks.harness import Row, Timing, arguments, measure, report
from headrace.evaluation.bootstrap import Resampling
from headrace.evaluation.metrics import Sample
from headrace.evaluation.streaming import Part, Streamed, stream_bootstrap
from headrace.kernels.bootstrap import draw_counts, rank, resample

NUM_RESAMPLES = 1000
SLOW_RESAMPLES = 5


class Case:
    """One data set, and each way to get the three metrics' resamples."""

    def __init__(self, num_rows: int) -> None:
        rng = np.random.default_rng(0)
        self.num_rows = num_rows
        self.score = np.clip(rng.beta(2, 5, num_rows), 1e-6, 1 - 1e-6)
        self.label = (rng.random(num_rows) < self.score).astype(float)
        self.truth = rng.normal(0, 30, num_rows)
        self.prediction = self.truth + rng.normal(0, 20, num_rows)
        self.rows = np.arange(num_rows)

    def log_losses(self) -> np.ndarray:
        of_truth = np.where(self.label == 1, self.score, 1 - self.score)
        return -np.log(of_truth)

    def headrace(self, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """All of it: losses, sorting, resamples."""
        columns = np.stack([self.log_losses(), (self.prediction - self.truth) ** 2])
        ranking = rank(self.score, self.label == 1, None, self.rows, with_precision=False)
        sums, ranks = resample(
            columns, [ranking], num_resamples=NUM_RESAMPLES, seed=1, threads=threads
        )
        return sums, ranks

    def draws(self) -> None:
        """The counts alone, drawn and dropped."""
        resample(np.empty((0, self.num_rows)), [], num_resamples=NUM_RESAMPLES, seed=1, threads=1)

    def streamed(self) -> Streamed:
        """All six metrics of two classes, rows in parts, as for a test set beyond memory."""

        def read() -> Iterator[Part]:
            for start in range(0, self.num_rows, 1 << 16):
                here = slice(start, start + (1 << 16))
                yield Part(Sample("binary", self.label[here], self.score[here]), self.rows[here])

        resampling = Resampling(NUM_RESAMPLES, 0.95, seed=1)
        return stream_bootstrap(read, "binary", resampling, threshold=0.5, budget_bytes=1 << 28)

    def scikit_learn(self) -> None:
        rng = np.random.default_rng(1)
        for _ in range(SLOW_RESAMPLES):
            taken = rng.integers(0, self.num_rows, self.num_rows)
            roc_auc_score(self.label[taken], self.score[taken])
            log_loss(self.label[taken], self.score[taken])
            root_mean_squared_error(self.truth[taken], self.prediction[taken])

    def scipy_means(self) -> None:
        """Log-loss and RMSE, vectorised as far as memory lets it."""
        for losses in (self.log_losses(), (self.prediction - self.truth) ** 2):
            scipy.stats.bootstrap(
                (losses,), np.mean, n_resamples=SLOW_RESAMPLES * 4, method="percentile", batch=4,
                rng=np.random.default_rng(1),
            )  # fmt: skip

    def scipy_auc(self) -> None:
        scipy.stats.bootstrap(
            (self.label, self.score), roc_auc_score, n_resamples=SLOW_RESAMPLES, batch=1,
            vectorized=False, paired=True, method="percentile", rng=np.random.default_rng(1),
        )  # fmt: skip

    def check(self) -> float:
        """Largest difference to scikit-learn over a few resamples, threads included."""
        _, ranks = self.headrace()
        _, threaded = self.headrace(threads=2)
        assert ranks.tobytes() == threaded.tobytes()
        counts = draw_counts(self.num_rows, num_resamples=3, seed=1)
        expected = [roc_auc_score(self.label, self.score, sample_weight=c) for c in counts]
        return float(np.abs(ranks[:3, 0, 0] - expected).max())


def rows_of(num_rows: int, repeats: int) -> list[Row]:
    """Time every way at one size, and compare CPU seconds turn by turn."""
    case = Case(num_rows)
    variants: dict[str, Callable[[], Any]] = {
        "headrace, 3 metrics": case.headrace,
        "counts only": case.draws,
        "streamed, 6 metrics": case.streamed,
        f"scikit-learn loop, 3 metrics, {SLOW_RESAMPLES} of 1000": case.scikit_learn,
        f"scipy, 2 means, {SLOW_RESAMPLES * 4} of 1000": case.scipy_means,
        f"scipy, AUC, {SLOW_RESAMPLES} of 1000": case.scipy_auc,
    }
    print(f"\n{num_rows:,} rows")
    ours, counts, streamed, loop, means, auc = measure(variants, repeats).values()
    scale = NUM_RESAMPLES / SLOW_RESAMPLES
    is_large = num_rows == 100_000
    size = f"{num_rows:,} rows"
    return [
        _ratio(f"{size}: faster than a scikit-learn loop", ours, [(loop, scale)],
               must=150.0 if is_large else 250.0, goal=250.0 if is_large else None),
        _ratio(f"{size}: faster than scipy", ours, [(means, scale / 4), (auc, scale)],
               must=90.0 if is_large else None),
        Row(f"{size}: times drawing the counts", statistics.median(
                a / b for a, b in zip(ours.cpu_s, counts.cpu_s, strict=True)
            ), "x", 4.5, 3.0, False, "counts only, cpu"),
        Row(f"{size}: streamed, times rows in memory", statistics.median(
                a / b for a, b in zip(streamed.cpu_s, ours.cpu_s, strict=True)
            ), "x", None, None, False, "six metrics, where rows in memory give three"),
        Row(f"{size}: AUC, largest difference", case.check(), "", 1e-12, None, False,
            "scikit-learn on the same resample"),
    ]  # fmt: skip


def _ratio(
    figure: str,
    ours: Timing,
    slow: list[tuple[Timing, float]],
    *,
    must: float | None,
    goal: float | None = None,
) -> Row:
    """How many times our CPU seconds the slow ways take, scaled to all resamples and summed."""
    totals = [
        sum(seconds * scale for seconds, (_, scale) in zip(turn, slow, strict=True))
        for turn in zip(*(timing.cpu_s for timing, _ in slow), strict=True)
    ]
    ratios = [total / own for total, own in zip(totals, ours.cpu_s, strict=True)]
    names = " + ".join(timing.name for timing, _ in slow)
    reference = f"{names}, scaled, cpu; {min(ratios):.0f}-{max(ratios):.0f}"
    return Row(figure, statistics.median(ratios), "x", must, goal, True, reference)


def main() -> int:
    args = arguments(__doc__)
    repeats = 3 if args.quick else 9
    return report([row for size in (100_000, 10_000) for row in rows_of(size, repeats)], args)


if __name__ == "__main__":
    sys.exit(main())
