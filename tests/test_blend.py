"""Blends: greedy weights against a plain twin, quick scores, the linear stacker, exact values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression

from headrace.errors import DataError
from headrace.evaluation.blend import LinearBlend, MeanBlend, blend_of
from headrace.evaluation.greedy import _averaged, _quick_score, greedy_blend
from headrace.evaluation.linear import linear_blend
from headrace.evaluation.metrics import METRICS, Sample, metric_of, score


def samples_of(task, seed, *, sizes, num_rows=400, weighted=False):
    """Return models that know the truth with noise of these sizes."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(0, 2, num_rows)
    weight = rng.uniform(0.2, 3, num_rows) if weighted else None
    seen = {name: latent + rng.normal(0, size, num_rows) for name, size in sizes.items()}
    if task == "regression":
        truth = latent + rng.normal(0, 0.3, num_rows)
        return {name: Sample(task, truth, z, weight) for name, z in seen.items()}
    if task == "binary":
        truth = (latent + rng.logistic(0, 1, num_rows) > 1).astype(float)
        return {
            name: Sample(task, truth, 1 / (1 + np.exp(1 - z)), weight) for name, z in seen.items()
        }
    truth = np.digitize(latent, [-1, 1]).astype(float)
    found = {}
    for name, z in seen.items():
        logits = z[:, None] * np.array([-1.0, 0.0, 1.0]) + np.array([-0.5, 0.0, -0.5])
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        found[name] = Sample(task, truth, shares, weight)
    return found


def value_of(metric, samples, blend):
    first = next(iter(samples.values()))
    mixed = blend.of({name: sample.prediction for name, sample in samples.items()})
    return score(metric, Sample(first.task, first.truth, mixed, first.weight))


def test_greedy_selection_equals_a_plain_twin():
    """Ten rounds by hand: start from the best, add what helps the mean most, keep the best mean."""
    samples = samples_of("regression", 3, sizes={"a": 1.0, "b": 1.2, "c": 3.0})
    metric = metric_of("regression", "rmse")

    def rmse(names):
        mean = sum(samples[name].prediction for name in names) / len(names)
        return float(np.sqrt(((mean - samples["a"].truth) ** 2).mean()))

    picks = ["a"]
    history = [list(picks)]
    for _ in range(9):
        picks.append(min(samples, key=lambda name: rmse([*picks, name])))
        history.append(list(picks))
    best = min(history, key=rmse)
    found = greedy_blend(samples, metric, rounds=10).weights
    assert found == pytest.approx({name: best.count(name) / len(best) for name in samples})
    assert greedy_blend(samples, metric, rounds=1).weights == {"a": 1, "b": 0, "c": 0}


def test_the_example_of_the_documentation():
    """docs/stacking.md, by hand."""
    truth = np.array([10.0, 20, 30, 40])
    told = {"a": np.array([12.0, 18, 33, 41]), "b": np.array([7.0, 21, 26, 38])}
    samples = {name: Sample("regression", truth, values) for name, values in told.items()}
    metric = metric_of("regression", "rmse")
    short, long = (greedy_blend(samples, metric, rounds=rounds) for rounds in (4, 50))
    assert short.weights == {"a": 0.5, "b": 0.5}
    assert value_of("rmse", samples, short) == 0.5
    assert long.weights == pytest.approx({"a": 13 / 23, "b": 10 / 23})
    assert value_of("rmse", samples, long) == pytest.approx(0.39, abs=0.005)


EVERY_METRIC = [(task, metric) for task, metrics in METRICS.items() for metric in metrics]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("task", "metric"), EVERY_METRIC)
def test_quick_scores_put_means_in_the_order_of_the_metric(task, metric, weighted):
    """The best by the quick score is the best by the metric, to the width of a bin."""
    sizes = {f"m{i}": 0.3 + 0.3 * i for i in range(8)}
    samples = samples_of(task, 1, sizes=sizes, num_rows=3000, weighted=weighted)
    quick_score = _quick_score(metric, samples["m0"])
    quick = np.array([quick_score(_averaged(metric.name, s)) for s in samples.values()])
    exact = np.array([score(metric.name, sample) for sample in samples.values()])
    goodness = exact if metric.higher_is_better else -exact

    assert np.array_equal(np.argsort(quick), np.argsort(goodness))
    if metric.name in ("roc_auc", "average_precision", "macro_roc_auc"):
        np.testing.assert_allclose(quick, exact, atol=1e-4)


@pytest.mark.parametrize(("task", "metric"), EVERY_METRIC)
def test_a_blend_is_no_worse_on_its_rows_than_its_best_member(task, metric):
    """By construction: the search starts there and keeps the best."""
    for seed in range(3):
        samples = samples_of(task, seed, sizes={"a": 1.0, "b": 1.0, "c": 2.0})
        blend = greedy_blend(samples, metric, rounds=20)
        sign = 1 if metric.higher_is_better else -1
        singles = [sign * score(metric.name, sample) for sample in samples.values()]
        assert sign * value_of(metric.name, samples, blend) >= max(singles) - 1e-4


def test_sure_and_wrong_probabilities_have_bins_too():
    """0 and 1 themselves, which have no odds, and ties."""
    truth = np.array([0.0, 1, 1, 0, 1, 0])
    prediction = np.array([0.0, 1.0, 1e-8, 1 - 1e-8, 0.7, 0.7])
    sample = Sample("binary", truth, prediction)
    metric = metric_of("binary", "roc_auc")
    assert _quick_score(metric, sample)(prediction) == pytest.approx(score("roc_auc", sample))


@given(
    values=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=9),
    picks=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)),
)
def test_a_mean_stays_between_its_members(values, picks):
    """To the last bit, so a probability stays one."""
    rows = np.array(values)
    predictions = {name: rows[:, i] for i, name in enumerate("abc")}
    weights = {name: n / sum(picks) for name, n in zip("abc", picks, strict=True)}
    mean = MeanBlend(weights=weights).of(predictions)
    used = [predictions[name] for name in "abc" if weights[name]]
    assert (mean >= np.minimum.reduce(used)).all()
    assert (mean <= np.maximum.reduce(used)).all()


def test_a_linear_stack_of_values_is_least_squares():
    """The penalty is invisible among many rows; weights count."""
    samples = samples_of(
        "regression", 0, sizes={"a": 1.0, "b": 1.5}, num_rows=20_000, weighted=True
    )
    samples = {
        name: Sample("regression", 100 + 50 * s.truth, 90 + 40 * s.prediction, s.weight)
        for name, s in samples.items()
    }
    blend = linear_blend(samples)
    first = samples["a"]
    x = np.column_stack([sample.prediction for sample in samples.values()])
    plain = LinearRegression().fit(x, first.truth, first.weight)
    found = blend.of({name: sample.prediction for name, sample in samples.items()})
    np.testing.assert_allclose(found, plain.predict(x), atol=1e-3 * np.std(first.truth))


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_a_linear_stack_corrects_members_that_are_too_sure(task):
    """Members with doubled logits: a mean cannot mend them, the stacker halves them."""
    samples = samples_of(task, 2, sizes={"a": 0.5, "b": 0.5}, num_rows=4000)

    def doubled(sample):
        odds = sample.prediction**3
        other = (1 - sample.prediction) ** 3
        shares = odds / (odds + other) if task == "binary" else odds / odds.sum(1, keepdims=True)
        return Sample(task, sample.truth, shares, sample.weight)

    sure = {name: doubled(sample) for name, sample in samples.items()}
    metric = metric_of(task, "log_loss")
    greedy = value_of("log_loss", sure, greedy_blend(sure, metric, rounds=50))
    linear = value_of("log_loss", sure, linear_blend(sure))
    assert linear < 0.98 * greedy


@pytest.mark.parametrize("task", METRICS)
def test_a_linear_stack_reads_back_exactly_and_predicts_row_by_row(task):
    """JSON holds all of it; a row's value does not depend on the rows beside it."""
    samples = samples_of(task, 4, sizes={"a": 1.0, "b": 1.5})
    blend = linear_blend(samples)
    assert isinstance(blend, LinearBlend)
    assert blend_of(blend.model_dump(mode="json")) == blend
    predictions = {name: sample.prediction for name, sample in samples.items()}
    whole = blend.of(predictions)
    for start, stop in ((0, 1), (1, 8), (8, 400)):
        part = blend.of({name: values[start:stop] for name, values in predictions.items()})
        assert np.array_equal(part, whole[start:stop])
    if task == "multiclass":
        np.testing.assert_allclose(whole.sum(axis=1), 1, rtol=1e-12)


def test_a_linear_stack_of_equal_members_gives_them_equal_coefficients():
    """What the penalty is for."""
    sample = samples_of("binary", 5, sizes={"a": 1.0})["a"]
    blend = linear_blend({"a": sample, "b": sample})
    assert blend.coefficients["a"][0][0] == pytest.approx(blend.coefficients["b"][0][0], rel=1e-6)


def test_a_linear_stack_needs_every_class():
    """With a remedy."""
    sample = samples_of("multiclass", 5, sizes={"a": 1.0})["a"]
    with pytest.raises(DataError, match=r"the classes with the codes \[1\].*`stack.method`"):
        linear_blend({"a": sample.where(sample.truth != 1)})


@pytest.mark.parametrize(
    ("blend", "text"),
    [
        (MeanBlend(weights={"b": 0.25, "c": 0.0, "a": 0.75}), "a 0.75, b 0.25"),
        (
            LinearBlend(
                link="logit", intercept=(0.1,), coefficients={"b": ((0.5,),), "a": ((-0.1,),)}
            ),
            "a -0.10, b 0.50, of logits",
        ),
    ],
)
def test_a_blend_tells_what_counts(blend, text):
    """As reports and notes show it."""
    assert str(blend) == text
