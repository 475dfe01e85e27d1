"""Stage ``stack``: weights and choice from valid rows alone, ids that must agree, leaks refused."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from headrace.data.predictions import (
    Predictions,
    bytes_held,
    read_predictions,
    write_predictions,
)
from headrace.errors import ConfigError, DataError, ResourceError
from headrace.evaluation.bootstrap import Resampling, Units
from headrace.evaluation.metrics import Sample, metric_of, score
from headrace.evaluation.selection import blend_weights, choose, mix
from headrace.params import Resources, parse_section
from headrace.record import MemoryRecorder
from headrace.schema import SPLITS, Split, Target
from headrace.stages.stack import StackParams, stack
from headrace.storage import read_json
from tests.evaluation_case import BY_TIME, CARRIER, DELAY, LATE, Case

PARAMS = StackParams(num_resamples=200)


def run(case, root, params=PARAMS, **resources):
    table, members = case.write(root)
    recorder = MemoryRecorder()
    out = root / "stack"
    stacked = stack(
        table, members, out, params, resources=Resources(**resources), recorder=recorder
    )
    return stacked, out, recorder


def regression(seed, *, sizes):
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1, 300)
    return {
        name: Sample("regression", truth, truth + rng.normal(0, size, 300))
        for name, size in sizes.items()
    }


def test_models_that_err_apart_are_blended(tmp_path):
    """Two equal models with errors of their own: the blend gains and is chosen."""
    case = Case(noise={"one": 1.0, "two": 1.0})
    stacked, out, _ = run(case, tmp_path)
    choice = stacked.choices["delay"]
    assert choice.chosen == "stack"
    assert choice.gain.low > 0
    assert choice.reason.startswith(f"the blend gains on {choice.best_single}")
    assert sum(choice.weights.values()) == pytest.approx(1)
    assert 0.3 < choice.weights["one"] < 0.7
    entry = read_json(out / "selection.json")["targets"]["delay"]
    assert entry["chosen"] == "stack"
    assert entry["metric"] == "rmse"
    assert entry["higher_is_better"] is False
    assert [line["model"] for line in entry["ranking"]] == sorted(
        case.noise, key=dict(choice.ranking).__getitem__
    )


def test_the_blend_is_the_weighted_mean_joined_by_row_id(tmp_path):
    """In every row, of both splits, whatever order the members' rows were given in."""
    case = Case(noise={"one": 1.0, "two": 1.1})
    table, members = case.write(tmp_path)
    rng = np.random.default_rng(0)

    def shuffled(found):
        order = rng.permutation(len(found.row_id))
        return replace(
            found,
            **{name: getattr(found, name)[order] for name in ("row_id", "fold", "split", "values")},
        )

    case.write_model(members["two"], "two", shuffled)
    out = tmp_path / "stack"
    stacked = stack(table, members, out, PARAMS, resources=Resources(), recorder=MemoryRecorder())
    for target in case.targets:
        weights = stacked.choices[target.name].weights
        blended = read_predictions(out, target)
        expected = sum(weights[m] * case.predictions(target, m).values for m in members)
        order = np.argsort(case.predictions(target, "one").row_id)
        np.testing.assert_allclose(blended.values, expected[order], rtol=1e-12)
        assert {SPLITS[code] for code in blended.split} == {"valid", "test"}
        assert blended.model == "stack"


def test_a_gain_that_may_be_noise_falls_back_to_the_best_single():
    """A small gain on few rows: the interval includes 0, and the reason says so."""
    rng = np.random.default_rng(3)
    truth, shared = rng.normal(0, 1, 60), rng.normal(0, 1, 60)
    samples = {
        name: Sample("regression", truth, truth + shared + rng.normal(0, 0.3, 60))
        for name in ("one", "two")
    }
    units = Units("row", np.arange(60), 60)
    choice = choose(
        samples,
        metric_of("regression", "rmse"),
        units,
        Resampling(500, 0.95, seed=0),
        rounds=50,
        target="y",
    )
    assert choice.blend_value < choice.ranking[0][1]
    assert choice.gain.low < 0 < choice.gain.value
    assert choice.chosen == choice.best_single
    assert "includes 0" in choice.reason
    assert "60 rows" in choice.reason


def test_a_useless_member_gets_no_weight_and_the_best_stays_alone(tmp_path):
    """Nothing beats the best single: it is chosen, and the blend is exactly its predictions."""
    case = Case(targets=(DELAY,), noise={"noise": 80.0, "sharp": 0.01})
    stacked, out, _ = run(case, tmp_path)
    choice = stacked.choices["delay"]
    assert choice.weights == {"noise": 0, "sharp": 1}
    assert choice.chosen == "sharp"
    assert choice.reason == "no blend beats sharp on the valid rows"
    found = read_predictions(out, DELAY)
    own = case.predictions(DELAY, "sharp")
    assert found.values.tolist() == own.values[np.argsort(own.row_id)].tolist()


def test_the_only_model_is_chosen(tmp_path):
    """And the blend of one is that one."""
    stacked, _, _ = run(Case(noise={"alone": 1.0}), tmp_path)
    assert {c.chosen for c in stacked.choices.values()} == {"alone"}
    assert stacked.choices["late"].reason == "the only model"


def test_greedy_selection_equals_a_plain_twin():
    """Ten rounds by hand: start from the best, add what helps the mean most, keep the best mean."""
    samples = regression(3, sizes={"a": 1.0, "b": 1.2, "c": 3.0})
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
    found = blend_weights(samples, metric, best_single="a", rounds=10)
    assert found == {name: best.count(name) / len(best) for name in samples}
    assert blend_weights(samples, metric, best_single="a", rounds=1) == {"a": 1, "b": 0, "c": 0}


def test_a_blend_is_no_worse_on_valid_than_the_best_single():
    """By construction: the search starts there and keeps the best."""
    for seed in range(5):
        samples = regression(seed, sizes={"a": 1.0, "b": 1.0, "c": 2.0})
        metric = metric_of("regression", "mae")
        weights = blend_weights(samples, metric, best_single="a", rounds=20)
        mixed = mix({name: s.prediction for name, s in samples.items()}, weights)
        truth = samples["a"].truth
        assert score("mae", Sample("regression", truth, mixed)) <= score("mae", samples["a"])


def test_test_labels_change_nothing(tmp_path):
    """Permuted test labels give the same bytes, selection and blend."""
    outs = []
    for name in ("as_is", "permuted"):
        case = Case(targets=(DELAY, LATE, CARRIER), noise={"one": 1.0, "two": 1.2})
        if name == "permuted":
            order = np.random.default_rng(5).permutation(case.num_rows)
            for labels in (case.labels["test"],):
                labels.update({target: values[order] for target, values in labels.items()})
        _, out, _ = run(case, tmp_path / name)
        outs.append(out)
    first, second = ({p.name: p.read_bytes() for p in out.rglob("*.*")} for out in outs)
    assert len(first) == 5
    assert first == second


def test_valid_labels_do_change_the_choice(tmp_path):
    """The counterpart: the test above could fail."""
    selections = []
    for name in ("as_is", "permuted"):
        case = Case(noise={"one": 1.0, "two": 1.2})
        if name == "permuted":
            order = np.random.default_rng(5).permutation(case.num_rows)
            case.labels["valid"] = {t: v[order] for t, v in case.labels["valid"].items()}
        _, out, _ = run(case, tmp_path / name)
        selections.append((out / "selection.json").read_bytes())
    assert selections[0] != selections[1]


def test_another_metric_can_be_asked_for(tmp_path):
    """Per target; the others keep their default."""
    params = StackParams(num_resamples=200, metric={"late": "log_loss"})
    stacked, _, recorder = run(Case(), tmp_path, params)
    assert stacked.choices["late"].metric.name == "log_loss"
    assert stacked.choices["delay"].metric.name == "rmse"
    names = {name for name, _, _ in recorder.recorded_metrics}
    assert {"sharp/late/valid_log_loss", "stack/late/valid_log_loss"} <= names
    assert recorder.datasets[0]["context"] == "valid"


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ({"lat": "log_loss"}, r"`stack.metric.lat`: there is no target 'lat'; nearest name: late"),
        ({"late": "rmse"}, r"`stack.metric.late`: 'rmse' is no metric of a binary target"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(tmp_path, metric, message):
    """Before anything is read."""
    with pytest.raises(ConfigError, match=message):
        run(Case(), tmp_path, StackParams(metric=metric))


def test_the_section_refuses_what_it_does_not_know(tmp_path):
    """Key and nearest name."""
    with pytest.raises(ConfigError, match=r"`stack.round` is not a known .*nearest name: rounds"):
        parse_section(StackParams, {"round": 3}, key="stack", path=tmp_path)


def test_members_with_different_rows_are_refused(tmp_path):
    """The count and the first ids, of the rows that only one of them predicts."""
    case = Case()
    table, members = case.write(tmp_path)

    def shortened(found):
        return replace(
            found,
            row_id=found.row_id[3:],
            fold=found.fold[3:],
            split=found.split[3:],
            values=found.values[3:],
            seen=found.seen[3:],
        )

    case.write_model(members["sharp"], "sharp", shortened)
    first = case.row_id["valid"][0]
    with pytest.raises(
        DataError, match=rf"'plain' and 'sharp' predict different rows: 3 .*first \['{first}'"
    ):
        stack(
            table,
            members,
            tmp_path / "stack",
            PARAMS,
            resources=Resources(),
            recorder=MemoryRecorder(),
        )
    assert not (tmp_path / "stack").exists()


def test_rows_without_a_prediction_are_refused(tmp_path):
    """Where all members lack them, the table shows it."""
    case = Case(targets=(LATE,), noise={"sharp": 1.0})
    table, members = case.write(tmp_path)

    def renamed(found):
        return replace(found, row_id=found.row_id + (found.split == SPLITS.index("valid")))

    case.write_model(members["sharp"], "sharp", renamed)
    with pytest.raises(DataError, match=r"model 'sharp', target 'late': \d+ predictions are of"):
        stack(
            table,
            members,
            tmp_path / "stack",
            PARAMS,
            resources=Resources(),
            recorder=MemoryRecorder(),
        )


def with_train_rows(found, *, seen):
    """Add two train rows of fold 0 and 1, predicted by models that saw ``seen``."""
    return replace(
        found,
        row_id=np.concatenate([found.row_id, [5, 6]]),
        fold=np.concatenate([found.fold, np.array([0, 1], np.int8)]),
        split=np.concatenate([found.split, np.full(2, SPLITS.index("train"), np.int8)]),
        values=np.concatenate([found.values, [0.25, 0.75]]),
        folds_seen=(*found.folds_seen, *seen),
        seen=np.concatenate([found.seen, np.array([1, 2], np.int32)]),
    )


def test_a_row_that_a_member_saw_is_refused(tmp_path):
    """In-sample predictions of train rows never reach a blend."""
    case = Case(targets=(LATE,), noise={"sharp": 1.0})
    table, members = case.write(tmp_path)
    case.write_model(
        members["sharp"], "sharp", lambda found: with_train_rows(found, seen=((1, 2), (1, 2)))
    )
    with pytest.raises(DataError, match=r"1 predictions are of rows that it was fitted on.*'6'"):
        stack(
            table,
            members,
            tmp_path / "stack",
            PARAMS,
            resources=Resources(),
            recorder=MemoryRecorder(),
        )


def test_out_of_fold_rows_are_blended_with_the_union_of_what_was_seen(tmp_path):
    """What a member has seen, its blend has seen."""
    case = Case(targets=(LATE,), noise={"one": 1.0, "two": 1.0})
    table, members = case.write(tmp_path)
    for model, seen in (("one", ((1,), (0,))), ("two", ((1, 2), (2,)))):
        case.write_model(
            members[model], model, lambda found, seen=seen: with_train_rows(found, seen=seen)
        )
    out = tmp_path / "stack"
    stack(table, members, out, PARAMS, resources=Resources(), recorder=MemoryRecorder())
    train = read_predictions(out, LATE).of_split("train")
    assert [train.folds_seen[code] for code in train.seen] == [(1, 2), (0, 2)]
    assert train.values == pytest.approx([0.25, 0.75])


def test_missing_labels_are_left_out(tmp_path):
    """The choice is by labelled rows; a target without any is refused."""
    case = Case()
    case.labels["valid"]["late"][: case.num_rows // 2] = np.nan
    stacked, _, _ = run(case, tmp_path / "half")
    assert np.isfinite(stacked.choices["late"].blend_value)

    case.labels["valid"]["late"][:] = np.nan
    with pytest.raises(DataError, match="target 'late' has no label in any of the 600 valid rows"):
        run(case, tmp_path / "none")


def test_one_class_on_valid_is_refused_with_a_remedy(tmp_path):
    """ROC-AUC has no value there; log-loss has."""
    case = Case(targets=(LATE,))
    case.labels["valid"]["late"][:] = 1
    with pytest.raises(DataError, match=r"only one class is present.*`stack.metric.late`"):
        run(case, tmp_path / "auc")
    params = StackParams(num_resamples=200, metric={"late": "log_loss"})
    stacked, _, _ = run(case, tmp_path / "log_loss", params)
    assert stacked.choices["late"].chosen


def test_a_budget_too_small_is_refused_with_the_figure(tmp_path):
    """Before rows are read."""
    with pytest.raises(ResourceError, match=r"stage stack needs about .*memory_budget"):
        run(Case(), tmp_path, memory_budget=4096)


def reason(root, *, unit="auto", **case):
    stacked, _, _ = run(
        Case(targets=(DELAY,), noise={"one": 1.0, "two": 1.0}, **case),
        root,
        StackParams(num_resamples=200, unit=unit),
    )
    return stacked.choices["delay"].reason


@pytest.mark.parametrize(
    ("split", "unit", "expected"),
    [
        (BY_TIME, "auto", "30 days"),  # although there is a group
        (BY_TIME, "row", "600 rows"),
        (BY_TIME, "group", "7 shops"),  # the only one
        (Split(kind="random"), "auto", "600 rows"),  # although there is a time
        (Split(kind="stratified", column="shop"), "auto", "600 rows"),
        (Split(kind="given", column="part"), "auto", "600 rows"),
        (Split(kind="random"), "day", "30 days"),
        (Split(kind="grouped", column="shop"), "auto", "7 shops"),
        (None, "auto", "600 rows"),
    ],
)
def test_units_follow_the_split_or_the_parameter(tmp_path, split, unit, expected):
    """Auto is what the split kept together; a unit asked for is taken."""
    assert expected in reason(tmp_path, split=split, unit=unit, groups=("shop",))


@pytest.mark.parametrize("unit", ["auto", "group"])
def test_of_two_groups_the_one_that_split_the_rows_is_resampled(tmp_path, unit):
    """Not the first in the table."""
    split = Split(kind="grouped", column="zone")
    assert "8 zones" in reason(tmp_path, split=split, unit=unit, groups=("shop", "zone"))


@pytest.mark.parametrize("unit", ["auto", "day"])
def test_of_two_times_the_one_that_split_the_rows_is_resampled(tmp_path, unit):
    """Not the first in the table."""
    assert "30 days" in reason(tmp_path, unit=unit, more_times=("born",))


def test_a_unit_that_no_column_or_two_columns_have_is_refused(tmp_path):
    """With the candidates and a remedy."""
    with pytest.raises(ConfigError, match=r"`stack.unit` is group, but the data contract has no"):
        reason(tmp_path / "none", unit="group")
    with pytest.raises(ConfigError, match=r"group columns \['shop', 'zone'\].*`extract.columns`"):
        reason(tmp_path / "groups", unit="group", groups=("shop", "zone"))
    with pytest.raises(ConfigError, match=r"`stack.unit` is day.* time columns \['born', 'when'\]"):
        reason(tmp_path / "times", unit="day", split=None, more_times=("born",))


def test_a_target_of_one_name_in_a_contract_is_what_is_judged(tmp_path):
    """Labels are read through the contract: swapped labels swap the positive class."""
    swapped = Target(name="late", task="binary", labels=("yes", "no"))
    case = Case(targets=(swapped,), noise={"sharp": 0.5})
    stacked, _, _ = run(case, tmp_path)
    assert stacked.choices["late"].ranking[0][1] > 0.9


def test_predictions_hold_no_object_per_row(tmp_path):
    """Read and written in the bytes that are forecast, and a batch; lists of folds stay exact."""
    num_rows = 400_000
    rng = np.random.default_rng(0)
    folds_seen = ((1, 2), (), (0, 2), (0, 1))
    written = Predictions(
        model="sharp",
        target="late",
        row_id=rng.permutation(num_rows),
        fold=np.zeros(num_rows, np.int8),
        split=np.zeros(num_rows, np.int8),
        values=rng.random(num_rows),
        folds_seen=folds_seen,
        seen=np.sort(rng.integers(0, 4, num_rows)).astype(np.int32),
    )
    tracemalloc.start()
    write_predictions(tmp_path, written, LATE)
    peak_written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    found = read_predictions(tmp_path, LATE)
    peak_read = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    held = bytes_held(tmp_path, LATE)
    assert held == num_rows * 22
    assert peak_read < held + (8 << 20)
    assert peak_written < 2 * held + (8 << 20)
    order = np.argsort(written.row_id)
    assert found.row_id.tolist() == list(range(num_rows))
    assert set(found.folds_seen) == set(folds_seen)
    code_of = np.array([folds_seen.index(folds) for folds in found.folds_seen])
    np.testing.assert_array_equal(code_of[found.seen], written.seen[order])
    np.testing.assert_array_equal(found.values, written.values[order])


def test_the_forecast_counts_all_rows_that_members_predict(tmp_path):
    """Not those of valid alone: whole files are read."""
    case = Case(targets=(LATE,), noise={"one": 1.0, "two": 1.0})
    table, members = case.write(tmp_path)

    more = 50_000

    def with_many_train_rows(found):
        return replace(
            found,
            row_id=np.concatenate([found.row_id, np.arange(more)]),
            fold=np.concatenate([found.fold, np.zeros(more, np.int8)]),
            split=np.concatenate([found.split, np.zeros(more, np.int8)]),
            values=np.concatenate([found.values, np.full(more, 0.5)]),
            seen=np.concatenate([found.seen, np.zeros(more, np.int32)]),
        )

    case.write_model(members["one"], "one", with_many_train_rows)
    with pytest.raises(ResourceError, match=r"needs about \d+\.\d MiB"):
        stack(
            table,
            members,
            tmp_path / "stack",
            PARAMS,
            resources=Resources(memory_budget=4096),
            recorder=MemoryRecorder(),
        )
