"""Point values equal scikit-learn's, with ties and weights; the undefined is NaN, never 0."""

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.evaluation.metrics import METRICS, Sample, metric_of, point_values, prepare, score


def values(sample, threshold=0.5):
    terms = prepare(sample, np.arange(len(sample.truth)), threshold=threshold)
    return point_values(terms, len(sample.truth))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    decimals=st.integers(0, 6),
    weighted=st.booleans(),
    num_rows=st.integers(4, 200),
)
def test_binary_metrics_equal_scikit_learn(seed, decimals, weighted, num_rows):
    """Few decimals make many ties, at the threshold and at 0 and 1 too."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(num_rows) % 2).astype(float)
    score_ = np.round(rng.random(num_rows), decimals)
    weight = rng.uniform(0, 2, num_rows) if weighted else None
    found = values(Sample("binary", truth, score_, weight))
    hard = score_ >= 0.5
    kw = {"sample_weight": weight}
    expected = {
        "roc_auc": sk.roc_auc_score(truth, score_, **kw),
        "log_loss": sk.log_loss(truth, score_, **kw),
        "brier": sk.brier_score_loss(truth, score_, **kw),
        "accuracy": sk.accuracy_score(truth, hard, **kw),
        "f1": sk.f1_score(truth, hard, **kw),
        "average_precision": sk.average_precision_score(truth, score_, **kw),
    }
    assert found == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), weighted=st.booleans(), offset=st.sampled_from([0.0, 1e6]))
def test_regression_metrics_equal_scikit_learn(seed, weighted, offset):
    """Far from 0 too, where sums of raw squares would cancel."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(offset, 2, 100)
    prediction = truth + rng.normal(0, 1, 100)
    weight = rng.uniform(0, 2, 100) if weighted else None
    found = values(Sample("regression", truth, prediction, weight))
    kw = {"sample_weight": weight}
    expected = {
        "rmse": sk.root_mean_squared_error(truth, prediction, **kw),
        "mae": sk.mean_absolute_error(truth, prediction, **kw),
        "r2": sk.r2_score(truth, prediction, **kw),
    }
    assert found == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), weighted=st.booleans(), classes=st.integers(3, 6))
def test_multiclass_metrics_equal_scikit_learn(seed, weighted, classes):
    """Probabilities rounded to quarters tie often, and the first of equal classes is predicted."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(90) % classes).astype(float)
    prediction = rng.multinomial(4, np.full(classes, 1 / classes), 90) / 4
    weight = rng.uniform(0.1, 2, 90) if weighted else None
    found = values(Sample("multiclass", truth, prediction, weight))
    hard = prediction.argmax(axis=1)
    kw = {"sample_weight": weight}
    expected = {
        "log_loss": sk.log_loss(truth, prediction, **kw),
        "accuracy": sk.accuracy_score(truth, hard, **kw),
        "macro_f1": sk.f1_score(truth, hard, average="macro", **kw),
        "macro_roc_auc": sk.roc_auc_score(truth, prediction, multi_class="ovr", **kw),
        "brier": sk.brier_score_loss(truth, prediction, **kw),
    }
    assert found == pytest.approx(expected, abs=1e-9)


def test_macro_f1_leaves_out_classes_that_are_nowhere():
    """As scikit-learn does: a class neither true nor predicted has no F1."""
    truth = np.array([0.0, 0, 1, 1])
    prediction = np.array([[0.8, 0.2, 0], [0.2, 0.8, 0], [0.1, 0.9, 0], [0.3, 0.7, 0]])
    found = values(Sample("multiclass", truth, prediction))
    assert found["macro_f1"] == pytest.approx(
        sk.f1_score(truth, prediction.argmax(axis=1), average="macro")
    )
    assert np.isnan(found["macro_roc_auc"])


@pytest.mark.parametrize("code", [0.0, 1.0])
def test_one_class_leaves_ranking_metrics_undefined(code):
    """The others have values: log-loss needs no second class."""
    found = values(Sample("binary", np.full(5, code), np.linspace(0.1, 0.9, 5)))
    assert np.isnan(found["roc_auc"])
    assert np.isnan(found["average_precision"]) == (code == 0)
    assert np.isfinite(found["log_loss"])


def test_no_positive_anywhere_leaves_f1_undefined():
    """scikit-learn would warn and say 0."""
    found = values(Sample("binary", np.zeros(5), np.full(5, 0.2)))
    assert np.isnan(found["f1"])
    assert found["accuracy"] == 1


@pytest.mark.parametrize("constant", [0.0, 5.1, 1e9 / 3])
def test_a_constant_truth_leaves_r2_undefined(constant):
    """Whatever rounding leaves of its variance."""
    found = values(Sample("regression", np.full(7, constant), np.arange(7.0)))
    assert np.isnan(found["r2"])
    assert np.isfinite(found["rmse"])


def test_the_threshold_counts_as_positive_and_can_be_moved():
    """A probability at the threshold is predicted positive."""
    sample = Sample("binary", np.array([1.0, 1, 0, 0]), np.array([0.5, 0.9, 0.2, 0.3]))
    assert values(sample)["accuracy"] == 1
    assert values(sample, threshold=0.6)["accuracy"] == 0.75


def test_a_sure_and_wrong_prediction_costs_a_finite_loss():
    """36.04, scikit-learn's clip, and not infinity."""
    sample = Sample("binary", np.array([1.0, 0]), np.array([0.0, 0.5]))
    assert values(sample)["log_loss"] == pytest.approx(
        sk.log_loss(sample.truth, sample.prediction), abs=1e-9
    )


@pytest.mark.parametrize("task", list(METRICS))
def test_score_is_the_point_value_of_each_metric(task):
    """The short way and the full way agree."""
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.arange(30) % 3 if task == "multiclass" else np.arange(30) % 2)
    prediction = rng.dirichlet([1, 1, 1], 30) if task == "multiclass" else rng.random(30)
    sample = Sample(task, truth.astype(float), prediction)
    for metric in METRICS[task]:
        assert score(metric.name, sample) == values(sample)[metric.name]


def test_an_unknown_metric_is_named_with_its_nearest():
    """And with all that the task has."""
    with pytest.raises(ValueError, match="no metric of a regression target; nearest name: rmse"):
        metric_of("regression", "rms")
    with pytest.raises(ValueError, match=r"'rmse' is no metric of a binary target.*roc_auc"):
        metric_of("binary", "rmse")
