"""Metrics of an epoch equal those of ``evaluate``, however the rows are cut and shared."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from headrace.evaluation.metrics import DEFAULT_METRIC, METRICS, Sample, score
from headrace.schema import Target
from headrace.training.distributed import ALONE, Ranks
from headrace.training.learner import EPOCH_METRICS
from headrace.training.metrics import EpochMetrics

TARGETS = {
    "regression": Target(name="y", task="regression"),
    "binary": Target(name="y", task="binary", labels=("no", "yes")),
    "multiclass": Target(name="y", task="multiclass", labels=("a", "b", "c")),
}


class Pair(Ranks):
    """One of two ranks in threads of this process, which meet at every exchange."""

    def __init__(self, rank, box, barrier):
        super().__init__(rank, 2, 0)
        object.__setattr__(self, "exchange", (box, barrier))

    def gathered(self, value):
        box, barrier = self.exchange
        box[self.rank] = value
        barrier.wait()
        found = list(box)
        barrier.wait()
        return found


def pair():
    box, barrier = [None, None], threading.Barrier(2, timeout=10)
    return [Pair(rank, box, barrier) for rank in range(2)]


def rows_of(task, num_rows=103, *, seed=0):
    """Truth, prediction and weight; labels missing, scores tied, a batch of rows of weight 0."""
    rng = np.random.default_rng(seed)
    if task == "regression":
        truth = rng.normal(1e4, 3, num_rows)
        prediction = truth + rng.normal(0, 2, num_rows)
    elif task == "binary":
        truth = rng.integers(0, 2, num_rows).astype(float)
        prediction = np.round(np.clip(0.3 * truth + 0.7 * rng.random(num_rows), 0, 1), 2)
    else:
        truth = rng.integers(0, 3, num_rows).astype(float)
        prediction = rng.dirichlet(np.ones(3), num_rows)
    truth[rng.random(num_rows) < 0.2] = math.nan
    weight = rng.uniform(0, 2, num_rows)
    weight[:25] = weight[::10] = 0
    return truth, prediction, weight


def feed(metrics, rows, *, batch_rows):
    """Give the rows in batches, of which the last is short."""
    parts = [torch.from_numpy(part).split(batch_rows) for part in rows]
    for truth, prediction, weight in zip(*parts, strict=True):
        metrics.add("y", truth=truth, prediction=prediction, weight=weight)
    return {name.removesuffix("_y"): metric.value for name, metric in metrics.values().items()}


def expected(task, rows):
    truth, prediction, weight = rows
    is_known = ~np.isnan(truth)
    sample = Sample(task, truth[is_known], prediction[is_known], weight[is_known])
    return {name: score(name, sample) for name in EPOCH_METRICS[task]}


@pytest.mark.parametrize("task", list(TARGETS))
def test_metrics_of_batches_equal_those_of_evaluate(task):
    rows = rows_of(task)
    found = feed(EpochMetrics([TARGETS[task]], ALONE), rows, batch_rows=25)

    assert found == pytest.approx(expected(task, rows), abs=1e-6)
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("task", list(TARGETS))
@pytest.mark.parametrize("cut", [60, 103])  # 103: the second rank has no rows at all
def test_two_ranks_find_what_one_finds_of_all_rows(task, cut):
    rows = rows_of(task)
    shares = [[part[:cut] for part in rows], [part[cut:] for part in rows]]
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(
                lambda ranks, share: feed(
                    EpochMetrics([TARGETS[task]], ranks),
                    share if len(share[0]) else [part[:0] for part in share],
                    batch_rows=25,
                ),
                pair(),
                shares,
            )
        )

    assert found[0] == found[1] == pytest.approx(expected(task, rows), abs=1e-9)


@pytest.mark.parametrize("task", list(TARGETS))
def test_an_epoch_forgets_the_one_before(task):
    metrics = EpochMetrics([TARGETS[task]], ALONE)
    feed(metrics, rows_of(task, seed=1), batch_rows=40)
    metrics.reset()
    rows = rows_of(task, seed=2)

    assert feed(metrics, rows, batch_rows=40) == pytest.approx(expected(task, rows), abs=1e-6)


@pytest.mark.parametrize("task", list(TARGETS))
def test_without_a_label_a_metric_is_no_number(task):
    truth, prediction, weight = rows_of(task)
    found = feed(EpochMetrics([TARGETS[task]], ALONE), (truth * math.nan, prediction, weight),
                 batch_rows=25)  # fmt: skip

    assert set(found) == set(EPOCH_METRICS[task])
    assert all(math.isnan(value) for value in found.values())


def test_the_area_of_one_class_is_no_number_but_its_log_loss_is():
    found = feed(
        EpochMetrics([TARGETS["binary"]], ALONE),
        (np.ones(4), np.array([0.5, 0.9, 0.8, 0.7]), np.ones(4)),
        batch_rows=4,
    )

    assert math.isnan(found["roc_auc"])
    assert found["log_loss"] == pytest.approx(-np.log([0.5, 0.9, 0.8, 0.7]).mean())


def test_names_say_metric_and_target_and_which_way_is_better():
    late = TARGETS["binary"].model_copy(update={"name": "late"})
    found = EpochMetrics([late], ALONE).values()

    assert {name: metric.higher_is_better for name, metric in found.items()} == {
        "roc_auc_late": True,
        "log_loss_late": False,
        "accuracy_late": True,
    }


def test_the_metric_that_chooses_models_comes_first():
    for task, names in EPOCH_METRICS.items():
        assert names[0] == DEFAULT_METRIC[task]
        assert set(names) <= {metric.name for metric in METRICS[task]}


@pytest.mark.parametrize(
    ("task", "shape"),
    [("regression", (2,)), ("regression", (3, 1)), ("binary", (3, 1)), ("multiclass", (3, 2))],
)
def test_shapes_that_do_not_belong_together_are_refused(task, shape):
    """(3, 1) − (3) would silently be 3 × 3."""
    metrics = EpochMetrics([TARGETS[task]], ALONE)
    with pytest.raises(ValueError, match=r"metrics of 'y': truth \(3,\), prediction \("):
        metrics.add("y", truth=torch.ones(3), prediction=torch.ones(shape), weight=torch.ones(3))
