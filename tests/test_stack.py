"""Stage ``stack``: which rows rank, fit and judge, ids that must agree, leaks that are refused."""

import re
import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from headrace.data.predictions import (
    Predictions,
    bytes_held,
    read_predictions,
    write_predictions,
)
from headrace.errors import ConfigError, DataError, ResourceError
from headrace.evaluation.blend import blend_of
from headrace.evaluation.bootstrap import Resampling, Units
from headrace.evaluation.greedy import greedy_blend
from headrace.evaluation.metrics import Sample, metric_of
from headrace.evaluation.selection import LabelledRows, choose
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


def test_models_that_err_apart_are_blended(tmp_path):
    """Two equal models with errors of their own: the blend gains and is chosen."""
    case = Case(noise={"one": 1.0, "two": 1.0})
    stacked, out, _ = run(case, tmp_path)
    choice = stacked.choices["delay"]
    assert choice.chosen == "stack"
    assert choice.gain.low > 0
    assert choice.reason.startswith(f"the blend gains on {choice.best_single}")
    assert sum(choice.blend.weights.values()) == pytest.approx(1)
    assert 0.3 < choice.blend.weights["one"] < 0.7
    entry = read_json(out / "selection.json")["targets"]["delay"]
    assert entry["rows"] == "out_of_fold"
    assert entry["blend"]["weights"] == choice.blend.weights
    assert set(choice.out_of_fold) == {"one", "two", "stack"}
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
            **{
                name: getattr(found, name)[order]
                for name in ("row_id", "fold", "split", "values", "seen")
            },
        )

    case.write_model(members["two"], "two", shuffled)
    out = tmp_path / "stack"
    stacked = stack(table, members, out, PARAMS, resources=Resources(), recorder=MemoryRecorder())
    for target in case.targets:
        weights = stacked.choices[target.name].blend.weights
        blended = read_predictions(out, target)
        own = {m: case.predictions(target, m) for m in members}
        own = {m: found.where(found.split != SPLITS.index("train")) for m, found in own.items()}
        expected = sum(weights[m] * found.values for m, found in own.items())
        order = np.argsort(own["one"].row_id)
        np.testing.assert_allclose(blended.values, expected[order], rtol=1e-10)
        assert np.array_equal(blended.row_id, own["one"].row_id[order])
        assert {SPLITS[code] for code in blended.split} == {"valid", "test"}
        assert blended.model == "stack"


def judged(name, samples):
    rows = np.arange(len(next(iter(samples.values())).truth))
    return LabelledRows(name, samples, Units("row", rows, len(rows)), rows % 5)


def chosen_of(valid, out_of_fold, *, metric="rmse"):
    metric = metric_of(next(iter(valid.values())).task, metric)
    return choose(
        judged("valid", valid),
        judged("out_of_fold", out_of_fold) if out_of_fold else None,
        metric,
        partial(greedy_blend, metric=metric, rounds=50),
        Resampling(500, 0.95, seed=0),
        target="y",
    )


def regression(seed, *, sizes, num_rows=300, shared=0.0):
    rng = np.random.default_rng(seed)
    truth, common = rng.normal(0, 3, num_rows), rng.normal(0, shared, num_rows)
    return {
        name: Sample("regression", truth, truth + common + rng.normal(0, size, num_rows))
        for name, size in sizes.items()
    }


@pytest.mark.parametrize("rows", ["valid", "out_of_fold"])
def test_a_gain_that_may_be_noise_falls_back_to_the_best_single(rows):
    """A small gain on few rows: the interval includes 0, and the reason says so."""
    samples = regression(3, sizes={"one": 0.3, "two": 0.3}, num_rows=60, shared=1.0)
    choice = chosen_of(samples, samples if rows == "out_of_fold" else None)

    assert choice.fitted_on == rows
    assert choice.gain.low < 0 < choice.gain.high
    assert choice.chosen == choice.best_single
    assert f"on the {rows.replace('_', '-')} rows includes 0" in choice.reason
    assert "60 rows" in choice.reason


def test_valid_rows_rank_the_models_and_out_of_fold_rows_fit_the_blend():
    """The best single is by valid rows, whatever the others say; the gain is over that one."""
    valid = regression(1, sizes={"one": 0.9, "two": 1.1})
    out_of_fold = regression(2, sizes={"one": 1.1, "two": 0.9}, num_rows=2000)
    choice = chosen_of(valid, out_of_fold)

    assert choice.best_single == "one"
    assert choice.out_of_fold["two"] < choice.out_of_fold["one"]
    assert choice.blend.weights["two"] > choice.blend.weights["one"] > 0
    gain = choice.out_of_fold["one"] - choice.out_of_fold["stack"]
    assert choice.gain.value == pytest.approx(gain)
    assert choice.chosen == "stack"


def test_a_blend_that_overfits_gains_nothing():
    """Many random members, few rows: the gain by weights of the same rows would be positive."""
    samples = regression(0, sizes={f"m{i}": 1.0 for i in range(12)}, num_rows=40, shared=0.4)
    choice = chosen_of(samples, samples)
    fitted = choice.blend.of({name: sample.prediction for name, sample in samples.items()})
    truth = samples["m0"].truth
    flattered = choice.ranking[0][1] - np.sqrt(((fitted - truth) ** 2).mean())

    assert choice.gain.value < flattered
    assert choice.out_of_fold["stack"] > np.sqrt(((fitted - truth) ** 2).mean())


def test_a_model_without_out_of_fold_rows_is_compared_on_valid_rows(tmp_path):
    """It is ranked, it is not blended, and it may be chosen; the note says so."""
    noise = {"one": 1.0, "two": 1.0, "late_comer": 0.1}
    case = Case(targets=(DELAY,), noise=noise, without_train=("late_comer",))
    stacked, out, recorder = run(case, tmp_path)
    choice = stacked.choices["delay"]

    assert choice.best_single == choice.chosen == "late_comer"
    assert choice.fitted_on == "out_of_fold"
    assert choice.blend.members == ("one", "two")
    assert choice.compared_only == ("late_comer",)
    assert "over late_comer on the valid rows is below 0" in choice.reason
    assert "without out-of-fold predictions of train rows: late_comer" in recorder.notes[-1]
    entry = read_json(out / "selection.json")["targets"]["delay"]
    assert entry["ranking"][0]["out_of_fold"] is None
    assert entry["compared_only"] == ["late_comer"]


def test_the_blend_may_beat_a_model_that_it_cannot_hold(tmp_path):
    """On valid rows, which its weights have not seen."""
    noise = {"one": 1.0, "two": 1.0, "late_comer": 0.95}
    case = Case(targets=(DELAY,), noise=noise, without_train=("late_comer",))
    stacked, _, _ = run(case, tmp_path)
    choice = stacked.choices["delay"]

    assert choice.best_single == "late_comer"
    assert choice.chosen == "stack"
    assert "gains on late_comer on the valid rows" in choice.reason


@pytest.mark.parametrize("noise", [{}, {"prior": 5.0}], ids=["none", "one"])
def test_without_two_models_out_of_fold_valid_rows_fit_the_blend(tmp_path, noise):
    """And the blend has then seen their labels."""
    case = Case(noise={"one": 1.0, "two": 1.0} | noise, without_train=("one", "two"))
    stacked, out, recorder = run(case, tmp_path)
    choice = stacked.choices["delay"]

    assert choice.fitted_on == "valid"
    assert choice.chosen == "stack"
    assert not choice.compared_only
    assert "Compared but not" not in recorder.notes[0]
    assert read_predictions(out, DELAY).folds_seen == ((-1, 0, 1, 2, 3, 4),)
    assert not [n for n, _, _ in recorder.recorded_metrics if "out_of_fold" in n]


def test_a_useless_member_gets_no_weight_and_the_best_stays_alone(tmp_path):
    """Nothing beats the best single: it is chosen, and the blend is exactly its predictions."""
    case = Case(targets=(DELAY,), noise={"noise": 80.0, "sharp": 0.01})
    stacked, out, recorder = run(case, tmp_path)
    choice = stacked.choices["delay"]
    assert choice.blend.members == ("sharp",)
    assert choice.chosen == "sharp"
    assert choice.uninformed == ("noise",)
    assert "no better than a constant: noise." in recorder.notes[0]
    assert choice.reason == "no blend beats sharp on the out-of-fold rows"
    found = read_predictions(out, DELAY)
    own = case.predictions(DELAY, "sharp")
    own = own.where(own.split != SPLITS.index("train"))
    assert found.values.tolist() == own.values[np.argsort(own.row_id)].tolist()


def test_a_doubtful_model_that_is_not_surely_worse_may_be_blended():
    """Errors as wide as the truth: R² is about 0, and one may be as good as the other."""
    noisy = regression(3, sizes={"one": 3.0, "two": 2.8, "far off": 9.0}, num_rows=60)
    choice = chosen_of(noisy, noisy)

    assert choice.uninformed == ("far off",)


def test_a_second_level_model_is_ranked_but_not_blended_on_valid_rows():
    """Its inputs have seen what the others say; blended with them it would count them twice."""
    samples = regression(2, sizes={"one": 1.0, "two": 1.1, "embedding_catboost": 0.5})
    choice = choose(
        judged("valid", samples),
        None,
        metric_of("regression", "rmse"),
        partial(greedy_blend, metric=metric_of("regression", "rmse"), rounds=10),
        Resampling(200, 0.95, seed=0),
        target="delay",
        never_blended=("embedding_catboost",),
    )

    assert choice.best_single == "embedding_catboost"
    assert set(choice.blend.members) <= {"one", "two"}
    assert choice.compared_only == ("embedding_catboost",)


def test_the_only_model_is_chosen(tmp_path):
    """And the blend of one is that one."""
    stacked, _, _ = run(Case(noise={"alone": 1.0}), tmp_path)
    assert {c.chosen for c in stacked.choices.values()} == {"alone"}
    assert stacked.choices["late"].reason == "the only model"


@pytest.mark.parametrize("method", ["greedy", "linear"])
def test_test_labels_change_nothing(tmp_path, method):
    """Permuted test labels give the same bytes, selection and blend; by either method."""
    outs = []
    for name in ("as_is", "permuted"):
        case = Case(targets=(DELAY, LATE, CARRIER), noise={"one": 1.0, "two": 1.2})
        if name == "permuted":
            order = np.random.default_rng(5).permutation(case.num_rows)
            for labels in (case.labels["test"],):
                labels.update({target: values[order] for target, values in labels.items()})
        _, out, _ = run(case, tmp_path / name, StackParams(num_resamples=200, method=method))
        outs.append(out)
    first, second = ({p.name: p.read_bytes() for p in out.rglob("*.*")} for out in outs)
    assert len(first) == 5
    assert first == second


@pytest.mark.parametrize("split", ["train", "valid"])
def test_labels_of_other_rows_do_change_the_choice(tmp_path, split):
    """The counterpart: the test above could fail."""
    selections = []
    for name in ("as_is", "permuted"):
        case = Case(noise={"one": 1.0, "two": 1.2})
        if name == "permuted":
            order = np.random.default_rng(5).permutation(case.num_rows)
            case.labels[split] = {t: v[order] for t, v in case.labels[split].items()}
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
    assert {"sharp/late/out_of_fold_log_loss", "stack/delay/out_of_fold_rmse"} <= names
    assert [data["context"] for data in recorder.datasets] == ["valid", "train"]


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


def test_rounds_that_a_linear_stack_does_not_make_are_refused():
    with pytest.raises(ValueError, match="rounds is 10, but method is linear"):
        StackParams(method="linear", rounds=10)
    assert StackParams(method="linear").rounds == StackParams(rounds=50).rounds


def stack_changed(root, case, model, change):
    """Stack ``case`` with one member's predictions changed."""
    table, members = case.write(root)
    case.write_model(members[model], model, change)
    return stack(
        table, members, root / "stack", PARAMS, resources=Resources(), recorder=MemoryRecorder()
    )


def without_first_rows(split):
    def change(found):
        is_first = np.cumsum(found.split == SPLITS.index(split)) <= 3
        return found.where(~(is_first & (found.split == SPLITS.index(split))))

    return change


def test_members_with_different_rows_are_refused(tmp_path):
    """The count and the first ids, of the rows that only one of them predicts."""
    case = Case()
    first = case.row_id["valid"][0]
    with pytest.raises(
        DataError, match=rf"'plain' and 'sharp' predict different rows: 3 .*first \['{first}'"
    ):
        stack_changed(tmp_path, case, "sharp", without_first_rows("valid"))
    assert not (tmp_path / "stack").exists()


def test_a_part_of_the_train_rows_is_refused(tmp_path):
    """All or none: weights of other rows would be compared."""
    case = Case()
    with pytest.raises(
        DataError, match=r"'sharp', target 'delay': 3 labelled train rows have no prediction"
    ):
        stack_changed(tmp_path, case, "sharp", without_first_rows("train"))


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


def test_a_row_that_a_member_saw_is_refused(tmp_path):
    """In-sample predictions of train rows never reach a blend."""
    case = Case(targets=(LATE,))

    def in_sample(found):
        return replace(found, seen=np.zeros_like(found.seen))  # all folds, for every row

    first = case.row_id["train"][0]
    with pytest.raises(
        DataError, match=rf"'sharp', .*: 600 predictions .* it was fitted on.*'{first}'"
    ):
        stack_changed(tmp_path, case, "sharp", in_sample)


def test_members_of_different_fold_plans_are_refused(tmp_path):
    """Each has seen no row that it predicts, but the blend is cross-fitted over one plan."""
    case = Case(targets=(LATE,))

    def other_plan(found):
        is_train = found.fold >= 0
        fold = np.where(is_train, (found.fold + found.row_id % 2) % 5, -1).astype(np.int8)
        return replace(found, fold=fold, seen=(fold + 1).astype(np.int32))

    num_moved = int((case.row_id["train"] % 2 == 1).sum())
    with pytest.raises(DataError, match=rf"'plain' and 'sharp' {num_moved} .* different folds"):
        stack_changed(tmp_path, case, "sharp", other_plan)


def test_one_row_of_a_fold_that_its_model_saw_is_refused(tmp_path):
    """Whichever row it is."""
    case = Case(targets=(LATE,))
    row = int(np.flatnonzero(case.fold == 3)[7])

    def one_leak(found):
        seen = found.seen.copy()
        seen[row] = 1 + 2  # the model of fold 2 learnt from fold 3
        return replace(found, seen=seen)

    with pytest.raises(DataError, match=rf": 1 predictions .*\['{case.row_id['train'][row]}'\]"):
        stack_changed(tmp_path, case, "sharp", one_leak)


def test_a_model_that_stopped_on_valid_rows_is_refused(tmp_path):
    """Their labels have chosen its iteration."""
    with pytest.raises(DataError, match=r"600 predictions .*`train.sharp.stop_rows` to inner"):
        stack_changed(
            tmp_path,
            Case(targets=(LATE,)),
            "sharp",
            lambda found: replace(found, folds_seen=((-1, 0, 1, 2, 3, 4), *found.folds_seen[1:])),
        )


def test_the_stack_predicts_no_train_row_and_has_seen_all_folds(tmp_path):
    """Its weights come from all train rows."""
    _, out, _ = run(Case(targets=(LATE,)), tmp_path)
    found = read_predictions(out, LATE)

    assert len(found.of_split("train").row_id) == 0
    assert found.folds_seen == ((0, 1, 2, 3, 4),)


@pytest.mark.parametrize(
    ("target", "metric"), [(DELAY, "rmse"), (LATE, "roc_auc"), (CARRIER, "log_loss")]
)
def test_a_member_of_random_predictions_gets_no_weight_and_changes_nothing(
    tmp_path, target, metric
):
    """Beside two that complement each other; the mean of the three would lose far more."""
    noise = {"one": 1.0, "two": 1.2}
    case = Case(targets=(target,), noise=noise, num_rows=2000)
    plain = run(case, tmp_path / "plain")[0].choices[target.name]
    table, members = case.write(tmp_path / "more")
    rng = np.random.default_rng(7)
    more = case.write_model(
        tmp_path / "more" / "train" / "random",
        "one",
        lambda found: replace(found, values=rng.permutation(found.values)),
    )
    stacked = stack(
        table,
        {**members, "random": more},
        tmp_path / "more" / "stack",
        PARAMS,
        resources=Resources(),
        recorder=MemoryRecorder(),
    )
    found = stacked.choices[target.name]

    assert found.metric.name == metric
    assert found.uninformed == ("random",)
    assert "random" not in found.blend.members
    assert found.chosen == plain.chosen == "stack"
    assert found.blend_value == pytest.approx(plain.blend_value, rel=1e-3)
    assert found.out_of_fold["stack"] == pytest.approx(plain.out_of_fold["stack"], rel=1e-3)


@pytest.mark.parametrize("target", [DELAY, LATE, CARRIER])
def test_a_linear_stack_is_written_as_it_predicts(tmp_path, target):
    """From selection.json alone come the very values of its predictions file."""
    case = Case(targets=(target,), noise={"one": 1.0, "two": 1.2})
    _, out, recorder = run(case, tmp_path, StackParams(num_resamples=200, method="linear"))
    entry = read_json(out / "selection.json")["targets"][target.name]
    blend = blend_of(entry["blend"])
    own = {name: read_predictions(tmp_path / "train" / name, target) for name in case.noise}
    values = {
        name: found.values[found.split != SPLITS.index("train")] for name, found in own.items()
    }

    assert entry["blend"]["kind"] == "linear"
    assert np.array_equal(read_predictions(out, target).values, blend.of(values))
    assert entry["chosen"] == "stack"
    assert recorder.recorded_params[f"{target.name}/blend"] == str(blend)


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


def test_the_forecast_counts_train_rows(tmp_path):
    """Out-of-fold predictions are most of what is held."""
    found = []
    for name, without_train in (("all", ()), ("none", ("plain", "sharp"))):
        case = Case(targets=(LATE,), num_rows=5000, without_train=without_train)
        with pytest.raises(ResourceError, match="stage stack needs about") as caught:
            run(case, tmp_path / name, memory_budget=4096)
        found.append(float(re.search(r"about ([0-9.]+) MiB", str(caught.value))[1]))
    assert found[0] > found[1] + 2 * 5000 * 22 / 2**20 - 0.1


def test_the_peak_stays_within_the_forecast(tmp_path):
    """Measured at a size where the forecast is not all overhead."""
    case = Case(targets=(CARRIER,), num_rows=30_000, noise={"a": 1.0, "b": 1.1, "c": 1.2})
    table, members = case.write(tmp_path)
    with pytest.raises(ResourceError) as caught:
        run(case, tmp_path / "small", memory_budget=4096)
    forecast = float(re.search(r"about ([0-9.]+) MiB", str(caught.value))[1])
    tracemalloc.start()
    stack(
        table,
        members,
        tmp_path / "stack",
        StackParams(num_resamples=200, rounds=5),
        resources=Resources(),
        recorder=MemoryRecorder(),
    )
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()

    assert 0.3 * forecast < peak < forecast
