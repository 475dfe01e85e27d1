"""Each check fires on data made to trip it, and is quiet on honest data."""

import numpy as np
import pytest

from headrace.evaluation.bootstrap import Interval, Resampling, Units
from headrace.evaluation.checks import (
    SplitValues,
    check_calibration,
    check_constant,
    check_inversion,
    check_rounding,
    check_target,
)
from headrace.evaluation.coded import Coded
from headrace.evaluation.data_checks import (
    check_drift,
    check_duplicates,
    check_single_columns,
    check_slices,
)
from headrace.evaluation.drift import Shift
from headrace.evaluation.findings import Finding, counted, worst_first
from headrace.evaluation.metrics import Sample
from headrace.evaluation.slices import find_slices
from headrace.schema import Target

DELAY = Target(name="delay", task="regression")
LATE = Target(name="late", task="binary", labels=("no", "yes"))
CARRIER = Target(name="carrier", task="multiclass", labels=("AA", "BB", "CC"))
TASKS = {"regression": DELAY, "binary": LATE, "multiclass": CARRIER}
RESAMPLING = Resampling(200, 0.95, seed=0)
NUM_ROWS = 1000
ROWS = Units("row", np.arange(NUM_ROWS), NUM_ROWS)


def honest(task, seed=0):
    """A calibrated prediction and the truth drawn from it."""
    rng = np.random.default_rng(seed)
    if task == "regression":
        prediction = rng.normal(size=NUM_ROWS)
        return Sample(task, prediction + rng.normal(size=NUM_ROWS), prediction)
    if task == "binary":
        prediction = rng.beta(2, 3, NUM_ROWS)
        return Sample(task, (rng.random(NUM_ROWS) < prediction).astype(float), prediction)
    prediction = rng.dirichlet([1, 1, 1], NUM_ROWS)
    below = rng.random(NUM_ROWS)[:, None] > prediction.cumsum(axis=1)
    return Sample(task, below.sum(axis=1).astype(float), prediction)


def of_target(task, *, moved=0.0, num_rows=3000):
    """Values of the splits; those of test are moved."""
    rng = np.random.default_rng(0)
    found = {}
    for split in ("train", "valid", "test"):
        step = moved if split == "test" else 0.0
        if task == "regression":
            values = rng.normal(size=num_rows) + step
        else:
            values = (rng.random(num_rows) < 0.3 + step).astype(float)
        found[split] = SplitValues(values, np.arange(num_rows))
    return found


@pytest.mark.parametrize("task", ["regression", "binary"])
def test_a_target_alike_in_all_splits_is_ok(task):
    found = check_target(TASKS[task], of_target(task), by_time=False)
    assert found.verdict == "ok"
    assert set(found.facts["splits"]) == {"train", "valid", "test"}
    assert set(found.facts["shifts"]) == {"train → valid", "train → test", "valid → test"}


@pytest.mark.parametrize(("task", "moved"), [("regression", 0.8), ("binary", 0.3)])
def test_a_target_that_differs_in_test_is_bad_or_by_time_a_warning(task, moved):
    found = check_target(TASKS[task], of_target(task, moved=moved), by_time=False)
    assert found.verdict == "bad"
    assert "test" in found.sentence
    by_time = check_target(TASKS[task], of_target(task, moved=moved), by_time=True)
    assert by_time.verdict == "warn"
    assert "split by time" in by_time.sentence


def test_many_rows_alone_do_not_make_a_target_differ():
    """A difference that the test is sure of and that does not matter is ok."""
    found = check_target(LATE, of_target("binary", moved=0.02, num_rows=50_000), by_time=False)
    shift = found.facts["shifts"]["train → test"]
    assert shift["p_value"] < 1e-4
    assert found.verdict == "ok"


@pytest.mark.parametrize("task", TASKS)
def test_honest_predictions_pass_every_check(task):
    sample, target = honest(task), TASKS[task]
    findings = [
        check_calibration(target, "m", sample, ROWS, RESAMPLING),
        check_inversion(target, "m", sample, ROWS, RESAMPLING),
        check_rounding(target, "m", sample.prediction),
        check_constant("m", sample.prediction, sample.truth, is_chosen=True),
    ]
    assert [one.verdict for one in findings] == ["ok"] * 4, findings


@pytest.mark.parametrize(
    ("task", "step", "verdict"),
    [
        ("regression", 0.2, "warn"),
        ("regression", 1.0, "bad"),
        ("binary", 0.08, "warn"),
        ("binary", 0.3, "bad"),
    ],
)
def test_predictions_that_are_off_as_a_whole_are_told(task, step, verdict):
    sample = honest(task)
    moved = Sample(
        task, sample.truth, np.minimum(sample.prediction + step, 1 if task == "binary" else 9)
    )
    found = check_calibration(TASKS[task], "m", moved, ROWS, RESAMPLING)
    assert found.verdict == verdict
    gap = found.facts["difference"]
    assert gap["value"] == pytest.approx(moved.prediction.mean() - moved.truth.mean())
    assert gap["ci_low"] < gap["value"] < gap["ci_high"]


def test_the_class_that_is_most_off_is_named():
    sample = honest("multiclass")
    tilted = sample.prediction * [1, 1, 3]
    tilted /= tilted.sum(axis=1, keepdims=True)
    found = check_calibration(
        CARRIER, "m", Sample("multiclass", sample.truth, tilted), ROWS, RESAMPLING
    )
    assert found.verdict == "bad"
    assert "of 'CC'" in found.sentence


def test_few_units_leave_calibration_unknown():
    units = Units("day", np.arange(NUM_ROWS) % 2, 2)
    found = check_calibration(DELAY, "m", honest("regression"), units, RESAMPLING)
    assert found.verdict == "unknown"
    assert "needs at least" in found.sentence


def test_rounded_predictions_are_told_and_labels_are_bad():
    sample = honest("binary")
    rounded = check_rounding(LATE, "m", sample.prediction.round(1))
    assert rounded.verdict == "warn"
    assert "1 decimals" in rounded.sentence
    counts = np.unique(sample.prediction.round(1), return_counts=True)[1]
    pairs = (counts * (counts - 1)).sum() / (NUM_ROWS * (NUM_ROWS - 1))
    assert rounded.facts["tied_pairs"] == pytest.approx(pairs)
    labels = check_rounding(LATE, "m", sample.prediction.round())
    assert labels.verdict == "bad"
    assert "labels and no probabilities" in labels.sentence


@pytest.mark.parametrize("task", TASKS)
def test_opposite_predictions_are_bad(task):
    sample = honest(task)
    if task == "multiclass":
        opposite = np.roll(sample.prediction, 1, axis=1)
    else:
        opposite = -sample.prediction if task == "regression" else 1 - sample.prediction
    found = check_inversion(
        TASKS[task], "m", Sample(task, sample.truth, opposite), ROWS, RESAMPLING
    )
    assert found.verdict == "bad"


def test_predictions_that_know_nothing_are_not_inverted():
    """Their ROC-AUC is below a half in half of the draws: the interval decides."""
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(20):
        truth = (rng.random(NUM_ROWS) < 0.5).astype(float)
        sample = Sample("binary", truth, 0.5 + 0.01 * rng.normal(size=NUM_ROWS))
        verdicts.append(check_inversion(LATE, "m", sample, ROWS, RESAMPLING).verdict)
    assert verdicts.count("bad") <= 3


def test_the_correlation_has_the_interval_of_its_resamples():
    """Of rows with weights; bca has what it needs."""
    sample = honest("regression")
    weighed = Sample("regression", sample.truth, sample.prediction, np.ones(NUM_ROWS) * 2)
    bca = Resampling(400, 0.95, seed=0, method="bca")
    found = check_inversion(DELAY, "m", weighed, ROWS, bca).facts
    expected = np.corrcoef(sample.truth, sample.prediction)[0, 1]
    assert found["value"] == pytest.approx(expected)
    # Fisher's interval
    low, high = np.tanh(np.arctanh(expected) + np.array([-1.96, 1.96]) / np.sqrt(NUM_ROWS - 3))
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((low, high), abs=0.01)


@pytest.mark.parametrize("task", TASKS)
def test_constants_are_bad(task):
    sample = honest(task)
    constant = np.repeat(sample.prediction[:1], NUM_ROWS, axis=0)
    assert check_constant("m", constant, sample.truth, is_chosen=True).verdict == "bad"
    assert check_constant("m", constant, sample.truth, is_chosen=False).verdict == "warn"
    assert check_rounding(TASKS[task], "m", constant).verdict == "unknown"
    same = Sample(task, sample.truth, constant)
    assert check_inversion(TASKS[task], "m", same, ROWS, RESAMPLING).verdict != "bad"
    nearly = constant + 1e-5 * sample.prediction
    assert check_constant("m", nearly, sample.truth, is_chosen=True).verdict == "warn"


@pytest.mark.parametrize(
    ("low", "by_time", "model", "pair", "verdict"),
    [
        (0.5, False, "", ("train", "test"), "ok"),
        (0.6, False, "", ("train", "test"), "warn"),
        (0.8, False, "", ("train", "test"), "bad"),
        (0.8, True, "", ("train", "test"), "warn"),
        (0.8, False, "m", ("train", "test"), "warn"),  # by fold models
        (0.8, False, "m", ("valid", "test"), "bad"),
    ],
)
def test_drift_is_judged_by_the_lower_bound(low, by_time, model, pair, verdict):
    shifts = [Shift("month", 2.0, 0.0, 0.9), Shift("x", 0.1, 0.2, 0.1)]
    area = Interval(low + 0.02, low, low + 0.04)
    found = check_drift(pair, area, shifts, ROWS, 1000, by_time=by_time, model=model)
    assert found.verdict == verdict
    assert ("drift is expected" in found.sentence) == by_time
    assert ("month (2)" in found.sentence) == (verdict != "ok")
    assert f"[{low:.3f}, {low + 0.04:.3f}]" in found.sentence


def test_drift_without_an_interval_is_unknown():
    area = Interval(None, None, None, reason="of one of the splits there are only 2 days")
    found = check_drift(("train", "test"), area, [], ROWS, 10, by_time=False)
    assert found.verdict == "unknown"
    assert "only 2 days" in found.sentence


@pytest.mark.parametrize(
    ("count", "repeated", "verdict"),
    [(0, 0.5, "ok"), (5, 0.001, "warn"), (30, 0.0, "bad"), (30, 0.4, "warn")],
)
def test_copies_are_judged_beside_what_repeats_anyway(count, repeated, verdict):
    found = check_duplicates(("train", "test"), count, count / 1000, [-7, 8][:count], repeated)
    assert found.verdict == verdict
    assert ("first row ids: -7, 8" in found.sentence) == (count > 0)
    assert found.facts["first_row_ids"] == ["-7", "8"][:count]


@pytest.mark.parametrize(
    ("best", "suspicious", "of_model", "verdict"),
    [
        (0.6, [], 0.8, "ok"),
        (0.79, [], 0.8, "warn"),
        (0.79, [], None, "ok"),
        (0.9999, ["x"], 0.9999, "bad"),
    ],
)
def test_a_column_nearly_as_good_as_the_model_is_told(best, suspicious, of_model, verdict):
    columns = {"x": best, "z": 0.55}
    found = check_single_columns("late", "ROC-AUC", columns, suspicious, "m", of_model)
    assert found.verdict == verdict
    assert found.facts["column"] == "x"


def test_slices_are_counted_and_an_empty_one_has_a_reason():
    sample = honest("regression")
    code = (np.arange(NUM_ROWS) < 200).astype(float)
    bad = Sample("regression", sample.truth, sample.prediction + 3 * code)
    column = Coded("c", "category", code, ("good", "bad"))
    found = find_slices(bad, ROWS, [column], RESAMPLING)
    told = check_slices("m", found, NUM_ROWS, ROWS)
    assert told.verdict == "warn"
    assert "On 1 of 2 slices" in told.sentence
    assert "first where c is bad" in told.sentence
    quiet = find_slices(sample, ROWS, [column], RESAMPLING)
    assert check_slices("m", quiet, NUM_ROWS, ROWS).verdict == "ok"
    alone = Coded("one", "category", code * 0, ("all",))
    nothing = find_slices(sample, ROWS, [alone], RESAMPLING)
    told = check_slices("m", nothing, NUM_ROWS, ROWS)
    assert told.verdict == "unknown"
    assert "no slice of one leaves 50 rows" in told.sentence


def test_harder_rows_are_not_called_a_fault_of_the_model():
    """A model that knows its chances, beside one that is too sure in the same slice."""
    rng = np.random.default_rng(0)
    is_hard = np.arange(NUM_ROWS) < 400
    p = np.where(is_hard, rng.uniform(0.4, 0.6, NUM_ROWS), rng.choice([0.03, 0.97], NUM_ROWS))
    truth = (rng.random(NUM_ROWS) < p).astype(float)
    column = Coded("c", "category", is_hard.astype(float), ("easy", "hard"))
    verdicts = {}
    for name, given in {
        "knows": p,
        "sure": np.where(is_hard, p.round(), p).clip(0.03, 0.97),
    }.items():
        found = find_slices(Sample("binary", truth, given), ROWS, [column], RESAMPLING)
        told = check_slices("m", found, NUM_ROWS, ROWS)
        verdicts[name] = told.verdict
        worst = found.worst[0]
        entropy = -given * np.log(given) - (1 - given) * np.log(1 - given)
        assert (worst.label, worst.p_holm < 1e-6) == ("hard", True)
        assert worst.expected == pytest.approx(entropy[is_hard].mean())
        assert (worst.p_off < 0.05) == (name == "sure")
    assert verdicts == {"knows": "ok", "sure": "warn"}


def test_findings_are_sorted_counted_and_rounded():
    findings = [
        Finding("a", "m", "ok", "fine"),
        Finding("b", "m", "bad", "not fine", {"x": [1 / 3], "n": 2}),
    ]
    assert [one.check for one in worst_first(findings)] == ["b", "a"]
    assert counted(findings) == "1 bad, 0 warn, 0 unknown, 1 ok"
    assert findings[1].to_json()["facts"] == {"x": [0.333333333333], "n": 2}
