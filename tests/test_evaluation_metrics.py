"""Point values equal scikit-learn's, with ties and weights; the undefined is NaN, never 0."""

from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from headrace.evaluation.bootstrap import Resampling, Units, bootstrap, counts
from headrace.evaluation.metrics import METRICS, Sample, metric_of, point_values, prepare, score

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def values(sample, threshold=0.5):
    rows = np.arange(len(sample.truth))
    return point_values(prepare(sample, rows, threshold=threshold), len(rows))


def plain_calibration_error(told, is_hit, weight):
    """The textbook's loop."""
    total = 0.0
    for number in range(15):
        inside = (told > number / 15) & (told <= (number + 1) / 15)
        if number == 0:
            inside |= told == 0
        if inside.any():
            share = np.average(is_hit[inside], weights=weight[inside])
            mean = np.average(told[inside], weights=weight[inside])
            total += weight[inside].sum() * abs(share - mean)
    return total / weight.sum()


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
    score_[:2] = 0.1, 0.9  # both classes are predicted
    weight = rng.uniform(0, 2, num_rows) if weighted else None
    ones = np.ones(num_rows) if weight is None else weight
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
        "balanced_accuracy": sk.balanced_accuracy_score(truth, hard, **kw),
        "precision": sk.precision_score(truth, hard, **kw),
        "recall": sk.recall_score(truth, hard, **kw),
        "mcc": sk.matthews_corrcoef(truth, hard, **kw),
        "ece": plain_calibration_error(score_, truth == 1, ones),
    }
    assert found == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), weighted=st.booleans(), offset=st.sampled_from([0.0, 1e6]))
def test_regression_metrics_equal_scikit_learn(seed, weighted, offset):
    """Far from 0 too, where sums of raw squares would cancel; rounded, so that values tie."""
    rng = np.random.default_rng(seed)
    truth = np.round(rng.normal(offset, 2, 100), 1) + 0.05
    prediction = np.round(truth + rng.normal(0, 1, 100), 1)
    weight = rng.integers(0, 4, 100).astype(float) if weighted else None
    found = values(Sample("regression", truth, prediction, weight, quantile=0.9))
    kw = {"sample_weight": weight}
    repeats = np.ones(100, int) if weight is None else weight.astype(int)
    expected = {
        "rmse": sk.root_mean_squared_error(truth, prediction, **kw),
        "mae": sk.mean_absolute_error(truth, prediction, **kw),
        "r2": sk.r2_score(truth, prediction, **kw),
        "mape": sk.mean_absolute_percentage_error(truth, prediction, **kw),
        "pinball": sk.mean_pinball_loss(truth, prediction, alpha=0.9, **kw),
        "spearman": spearmanr(np.repeat(truth, repeats), np.repeat(prediction, repeats))[0],
    }
    assert found == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), weighted=st.booleans(), classes=st.integers(3, 6))
def test_multiclass_metrics_equal_scikit_learn(seed, weighted, classes):
    """Probabilities rounded to quarters tie often, and the first of equal classes is predicted."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(90) % classes).astype(float)
    prediction = rng.multinomial(4, np.full(classes, 1 / classes), 90) / 4
    prediction[:classes] = np.eye(classes)  # each class is predicted
    weight = rng.uniform(0.1, 2, 90) if weighted else None
    ones = np.ones(90) if weight is None else weight
    found = values(Sample("multiclass", truth, prediction, weight))
    hard = prediction.argmax(axis=1)
    kw = {"sample_weight": weight}
    expected = {
        "log_loss": sk.log_loss(truth, prediction, **kw),
        "accuracy": sk.accuracy_score(truth, hard, **kw),
        "macro_f1": sk.f1_score(truth, hard, average="macro", **kw),
        "macro_roc_auc": sk.roc_auc_score(truth, prediction, multi_class="ovr", **kw),
        "brier": sk.brier_score_loss(truth, prediction, **kw),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, hard, **kw),
        "macro_precision": sk.precision_score(truth, hard, average="macro", **kw),
        "macro_recall": sk.recall_score(truth, hard, average="macro", **kw),
        "mcc": sk.matthews_corrcoef(truth, hard, **kw),
        "ece": plain_calibration_error(prediction.max(axis=1), hard == truth, ones),
    }
    assert found == pytest.approx(expected, abs=1e-9)


def test_macro_metrics_leave_out_classes_that_are_nowhere():
    """As scikit-learn does: a class neither true nor predicted has no F1."""
    truth = np.array([0.0, 0, 1, 1])
    prediction = np.array([[0.8, 0.2, 0], [0.2, 0.8, 0], [0.1, 0.9, 0], [0.3, 0.7, 0]])
    found = values(Sample("multiclass", truth, prediction))
    assert found["macro_f1"] == pytest.approx(
        sk.f1_score(truth, prediction.argmax(axis=1), average="macro")
    )
    for name, of in (("macro_precision", sk.precision_score), ("macro_recall", sk.recall_score)):
        assert found[name] == pytest.approx(of(truth, prediction.argmax(axis=1), average="macro"))
    assert np.isnan(found["macro_roc_auc"])


@pytest.mark.parametrize("code", [0.0, 1.0])
def test_one_class_leaves_ranking_metrics_undefined(code):
    """The others have values: log-loss needs no second class."""
    found = values(Sample("binary", np.full(5, code), np.linspace(0.1, 0.9, 5)))
    assert np.isnan(found["roc_auc"])
    assert np.isnan(found["average_precision"]) == (code == 0)
    assert np.isnan(found["recall"]) == (code == 0)
    assert np.isnan([found["balanced_accuracy"], found["mcc"]]).all()
    assert np.isfinite([found["log_loss"], found["precision"]]).all()


def test_no_positive_anywhere_leaves_f1_undefined():
    """scikit-learn would warn and say 0."""
    found = values(Sample("binary", np.zeros(5), np.full(5, 0.2)))
    assert np.isnan([found["f1"], found["precision"], found["mcc"]]).all()
    assert found["accuracy"] == 1


def test_one_class_of_many_leaves_correlations_undefined():
    prediction = np.array([[0.1, 0.9, 0], [0.6, 0.4, 0], [0, 1, 0]])
    found = values(Sample("multiclass", np.ones(3), prediction, np.array([0.1, 0.2, 0.7])))
    assert np.isnan([found["mcc"], found["balanced_accuracy"]]).all()
    assert found["accuracy"] == pytest.approx(0.8)


def test_rare_positives_keep_a_correlation():
    """Two of a million are no rounding error."""
    truth, told = np.zeros(1_000_000), np.zeros(1_000_000)
    truth[:2] = told[1:3] = 1
    assert values(Sample("binary", truth, told))["mcc"] == pytest.approx(0.5, abs=1e-5)


def test_a_truth_of_zero_leaves_mape_undefined():
    """scikit-learn would divide by 2e-16."""
    found = values(Sample("regression", np.array([0.0, 1, 2]), np.array([0.1, 1, 2])))
    assert np.isnan(found["mape"])


def test_a_constant_prediction_has_no_rank_correlation():
    found = values(Sample("regression", np.arange(5.0), np.full(5, 3.3)))
    assert np.isnan(found["spearman"])


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
    sample = Sample(task, truth + float(task == "regression"), prediction)
    for metric in METRICS[task]:
        assert score(metric.name, sample) == values(sample)[metric.name]


def test_an_unknown_metric_is_named_with_its_nearest():
    """And with all that the task has."""
    with pytest.raises(ValueError, match="no metric of a regression target; nearest name: rmse"):
        metric_of("regression", "rms")
    with pytest.raises(ValueError, match=r"'rmse' is no metric of a binary target.*roc_auc"):
        metric_of("binary", "rmse")


@pytest.mark.parametrize("task", list(METRICS))
@pytest.mark.parametrize("unit", ["row", "group"])
@pytest.mark.parametrize("weighted", [False, True])
def test_each_resample_has_the_value_of_its_counts_as_weights(task, unit, weighted):
    """Ties in every score; groups of rows that are drawn together."""
    rng = np.random.default_rng(3)
    truth = rng.permutation(np.arange(60) % 3 if task == "multiclass" else np.arange(60) % 2)
    told = rng.multinomial(4, [0.4, 0.3, 0.3], 60) / 4
    prediction = told if task == "multiclass" else told[:, 0] * 0.9 + 0.05
    weight = rng.uniform(0.5, 2, 60) if weighted else None
    sample = Sample(task, truth + (0.5 if task == "regression" else 0.0), prediction, weight)
    of_row = np.arange(60) if unit == "row" else rng.permutation(np.arange(60) % 12)
    units = Units(unit, of_row, of_row.max() + 1)
    resampling = Resampling(20, 0.95, seed=5)
    found = bootstrap(sample, units, resampling, threshold=0.5).resamples
    drawn = counts(units, resampling, first=0, num_resamples=20)[:, of_row]
    again = bootstrap(sample, units, Resampling(20, 0.95, seed=5, threads=3), threshold=0.5)

    asked = [metric for metric in METRICS[task] if not metric.no_interval]
    assert set(found) == {metric.name for metric in METRICS[task]}
    for number, count in enumerate(drawn):
        weights = count * (1.0 if weight is None else weight)
        expected = values(Sample(task, sample.truth, prediction, weights))
        for name in (metric.name for metric in asked):
            value = found[name][number]
            assert value == pytest.approx(expected[name], abs=1e-9, nan_ok=True), name
    for name, resamples in found.items():
        assert np.array_equal(again.resamples[name], resamples, equal_nan=True)


@pytest.mark.parametrize("task", list(METRICS))
def test_the_page_of_metrics_says_what_the_code_says(task):
    """docs/metrics.md: a line for each metric of each task, in the same words."""
    _, _, after = PAGE.read_text(encoding="utf-8").partition(f"(`{task}`)")
    lines = [line for line in after.partition("##")[0].splitlines() if line.startswith("| `")]
    expected = [
        f"| `{m.name}` | {'higher' if m.higher_is_better else 'lower'} "
        f"| {m.meaning.replace('|', chr(92) + '|')} | {m.undefined or '–'} |"
        for m in METRICS[task]
    ]
    assert lines == expected
