"""Precision, recall and F1 of each class: scikit-learn's values, on the rows and on resamples."""

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from headrace.evaluation.bootstrap import Resampling, Units, bootstrap, counts
from headrace.evaluation.classes import classes_json, classes_section, score_classes
from headrace.evaluation.comparison import Comparison
from headrace.evaluation.metrics import Sample
from headrace.evaluation.streaming import Part, stream_bootstrap
from headrace.schema import Target

LATE = Target(name="late", task="binary", labels=("no", "yes"))
KIND = Target(name="kind", task="multiclass", labels=("a", "b", "c", "d"))
RESAMPLING = Resampling(200, 0.95, 5)
NAMES = ("precision", "recall", "f1")


def sample_of(target, seed=0, num_rows=400, *, weighted=True):
    rng = np.random.default_rng(seed)
    weight = rng.uniform(0.2, 3, num_rows) if weighted else None
    num_classes = len(target.labels)
    truth = rng.integers(0, num_classes, num_rows).astype(float)
    if target.task == "binary":
        told = np.clip(0.3 * truth + rng.uniform(0, 0.7, num_rows), 0, 1)
        return Sample("binary", truth, told, weight)
    told = rng.dirichlet(np.ones(num_classes), num_rows)
    told[np.arange(num_rows), truth.astype(int)] += 0.3
    return Sample("multiclass", truth, told / told.sum(axis=1, keepdims=True), weight)


def predicted(sample, threshold):
    if sample.task == "binary":
        return (sample.prediction >= threshold).astype(int)
    return sample.prediction.argmax(axis=1)


def units_of(num_rows=400, num_units=80):
    return Units("group", np.arange(num_rows) % num_units, num_units)


def scores_of(target, sample, units, *, threshold=0.4):
    scored = bootstrap(sample, units, RESAMPLING, threshold=threshold)
    return scored, score_classes({"m": scored}, target, units, RESAMPLING)


@pytest.mark.parametrize("target", [LATE, KIND], ids=lambda target: target.task)
@pytest.mark.parametrize("weighted", [False, True])
def test_values_equal_scikit_learn(target, weighted):
    """With the weights of the rows, and in each resample with its counts as weights."""
    sample, units = sample_of(target, weighted=weighted), units_of()
    scored, found = scores_of(target, sample, units)
    weight = np.ones(400) if sample.weight is None else sample.weight
    told = predicted(sample, 0.4)
    codes = range(len(target.labels))
    expected = precision_recall_fscore_support(
        sample.truth, told, labels=codes, sample_weight=weight
    )
    for name, values in zip(NAMES, expected, strict=False):
        assert [one.metrics[name].value for one in found] == pytest.approx(values, abs=1e-9)
    assert [one.label for one in found] == list(target.labels)
    for code, one in enumerate(found):
        assert one.true_share == pytest.approx(np.average(sample.truth == code, weights=weight))
        assert one.predicted_share == pytest.approx(np.average(told == code, weights=weight))

    drawn = counts(units, RESAMPLING, first=0, num_resamples=200)[:, units.of_row] * weight
    values = np.array(
        [
            precision_recall_fscore_support(
                sample.truth, told, labels=codes, sample_weight=one, zero_division=np.nan
            )[:3]
            for one in drawn
        ]
    )
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    for place, name in enumerate(NAMES):
        assert [one.metrics[name].low for one in found] == pytest.approx(low[place], abs=1e-9)
        assert [one.metrics[name].high for one in found] == pytest.approx(high[place], abs=1e-9)
    if target is LATE:  # the metrics of the positive class are those of the target
        yes = {name: found[1].metrics[name].value for name in NAMES}
        assert yes == pytest.approx({name: scored.points[name] for name in NAMES})


def test_a_stream_gives_the_same_values():
    """Sums are exact in a stream; intervals are from Poisson resamples."""
    sample = sample_of(KIND, num_rows=2000)
    units = units_of(2000, 200)
    _, whole = scores_of(KIND, sample, units)
    part = Part(sample, units.of_row.astype(np.int64))
    streamed = stream_bootstrap(
        lambda: [part], "multiclass", RESAMPLING, threshold=0.5, budget_bytes=1 << 24
    )
    found = score_classes({"m": streamed.scored}, KIND, units, RESAMPLING)
    for one, other in zip(found, whole, strict=True):
        for name in NAMES:
            a, b = one.metrics[name], other.metrics[name]
            assert a.value == pytest.approx(b.value, abs=1e-9)
            assert a.standard_error == pytest.approx(b.standard_error, rel=0.35)


def test_a_class_without_rows_says_why():
    """Never true and never told: no value of any of the three, each with its reason."""
    sample = sample_of(KIND)
    keep = (sample.truth != 3) & (predicted(sample, 0.5) != 3)
    units = units_of().of(keep)
    _, found = scores_of(KIND, sample.where(keep), units)
    lost = found[3].metrics
    assert [lost[name].value for name in NAMES] == [None, None, None]
    assert lost["precision"].reason == "no row is predicted to be of the class"
    assert lost["recall"].reason == "no row is of the class"
    assert lost["f1"].reason == "no row is of the class, in truth or prediction"
    assert found[3].true_share == found[3].predicted_share == 0


def test_a_number_has_no_classes():
    """And so the report has no part about them."""
    rng = np.random.default_rng(1)
    sample = Sample("regression", rng.normal(size=400), rng.normal(size=400))
    target = Target(name="y", task="regression")
    _, found = scores_of(target, sample, units_of())
    assert found == ()
    assert classes_section(comparison("m", "regression"), found) is None


def comparison(chosen, task="multiclass"):
    return Comparison("kind", task, "accuracy", chosen, "group", 80, 400, 0, 0.95, (), {})


def test_the_section_is_of_the_chosen_model():
    """A row and a point per class; the class told least well is named. JSON has every model."""
    units = units_of()
    scored = {
        name: bootstrap(sample_of(KIND, seed), units, RESAMPLING, threshold=0.5)
        for seed, name in enumerate(("one", "two"))
    }
    scores = score_classes(scored, KIND, units, RESAMPLING)
    section = classes_section(comparison("two"), scores)
    (table,) = section.tables
    assert [row[0] for row in table.rows] == list(KIND.labels)
    f1 = {one.label: one.metrics["f1"].value for one in scores if one.model == "two"}
    assert [row[3] for row in table.rows] == pytest.approx(list(f1.values()))
    assert f"tells {min(f1, key=f1.get)} least well" in section.text[0]
    (chart,) = section.charts
    assert {trace["choice"] for trace in chart.traces} == {"precision", "recall", "F1"}
    assert all(trace["y"] == list(KIND.labels) for trace in chart.traces)

    told = classes_json(scores)
    assert list(told) == list(KIND.labels)
    assert set(told["a"]["models"]) == {"one", "two"}
    assert told["b"]["models"]["two"]["f1"]["value"] == pytest.approx(f1["b"])
    assert sum(one["share"] for one in told.values()) == pytest.approx(1)
