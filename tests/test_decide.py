"""Stage ``decide``: thresholds, calibration and conformal limits, never from test rows."""

import json
import shutil

import numpy as np
import pytest
from sklearn.metrics import f1_score

from headrace.data.predictions import read_predictions
from headrace.data.table import open_table
from headrace.data.truth import line_up, read_truth
from headrace.errors import ConfigError, DataError, IntegrityError, ResourceError
from headrace.evaluation.rules import read_decisions
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.stages.decide import DecideParams, decide
from headrace.stages.evaluate import EvaluateParams, evaluate
from headrace.stages.stack import StackParams, stack
from headrace.storage import new_folder, write_json
from tests.evaluation_case import CARRIER, DELAY, LATE, Case

ALL = (DELAY, LATE, CARRIER)
FEW = 200
PARAMS = DecideParams(num_resamples=FEW)


def told(recorder=None, **resources):
    return {"resources": Resources(**resources), "recorder": recorder or MemoryRecorder()}


def run(case, root, params=PARAMS, recorder=None, **resources):
    """Write the case, stack it and decide; return the content of decisions.json."""
    table, members = case.write(root)
    stack(table, members, root / "stack", StackParams(num_resamples=FEW), **told())
    decide(
        table, members, root / "stack", root / "decide", params, **told(recorder, **resources)
    )  # fmt: skip
    return json.loads((root / "decide" / "decisions.json").read_text())


def rules_of(root):
    selection = json.loads((root / "stack" / "selection.json").read_text())["targets"]
    chosen = {name: entry["chosen"] for name, entry in selection.items()}
    return read_decisions(root / "decide", chosen).rules


def overconfident(case):
    """Make logits of ``late`` twice too large, and rare positives."""
    plain = case.prediction

    def prediction(target, model, split):
        values = plain(target, model, split)
        if target.task != "binary":
            return values
        logit = np.log(values) - np.log1p(-values)
        return 1 / (1 + np.exp(-3 * logit + 3))

    case.prediction = prediction
    return case


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("decide")
    case = overconfident(Case(targets=ALL, num_days=200, noise={"plain": 3.0, "sharp": 1.5}))
    recorder = MemoryRecorder()
    return root, run(case, root, recorder=recorder), recorder


def test_every_target_has_a_rule_for_the_chosen_model(done):
    root, content, _ = done
    chosen = json.loads((root / "stack" / "selection.json").read_text())["targets"]
    rules = rules_of(root)

    assert set(rules) == {"delay", "late", "carrier"}
    assert {name: rule.model for name, rule in rules.items()} == {
        name: entry["chosen"] for name, entry in chosen.items()
    }
    assert content["targets"]["late"]["unit"] == "day"
    assert rules["delay"].calibration is None
    assert rules["carrier"].costs is None
    assert all(rule.conformal.coverage == 0.9 for rule in rules.values())


def test_the_threshold_is_the_best_one_of_calibrated_valid_rows(done):
    """Found again by trying every probability of the valid rows."""
    root, content, _ = done
    rule = rules_of(root)["late"]
    folder = root / "stack" if rule.model == "stack" else root / "train" / rule.model
    truth = read_truth(open_table(root / "reduce"), "valid", unit="auto", key="")
    told = read_predictions(folder, LATE).of_split("valid")
    is_labelled = np.ones(len(truth.row_id), dtype=bool)
    p = rule.calibrated(told.values[line_up(told, truth, is_labelled)])
    y = truth.labels["late"]
    entry = content["targets"]["late"]["threshold"]

    best = max(f1_score(y, p >= t) for t in p)
    assert f1_score(y, p >= entry["tuned"]["value"]) == pytest.approx(best)
    assert entry["tuned"]["ci_low"] <= entry["tuned"]["value"] <= entry["tuned"]["ci_high"]
    assert entry["used"] == rule.threshold
    assert max(value for _, value in entry["curve"]) == pytest.approx(best, abs=0.02)


def test_a_distorted_probability_is_calibrated_and_the_gain_is_told(done):
    _, content, recorder = done
    found = content["targets"]["late"]["calibration"]

    assert found["chosen"] in ("temperature", "isotonic")
    assert found["gains"][found["chosen"]]["ci_low"] > 0
    assert found["gain_on_valid"] > 0
    assert found["num_rows"] == 600
    before, after = (
        np.abs(
            np.subtract(found["reliability"][w]["predicted"], found["reliability"][w]["observed"])
        )
        for w in ("before", "after")
    )
    assert after.mean() < before.mean()
    assert any("takes off the log-loss" in note for note in recorder.notes)


def test_a_gain_that_may_be_luck_keeps_the_default(tmp_path):
    """Balanced, calibrated: nothing beats 0.5 by accuracy, and it says so."""
    params = DecideParams(num_resamples=FEW, metric={"late": "accuracy"})
    content = run(Case(targets=(LATE,), num_rows=300, split=None), tmp_path, params)
    entry = content["targets"]["late"]["threshold"]

    assert entry["used"] == 0.5
    assert entry["gain"]["ci_low"] <= 0
    assert "0.5 is kept" in entry["reason"]


def test_costs_move_the_threshold_down_where_misses_are_dear(tmp_path):
    params = DecideParams(
        num_resamples=FEW, costs={"late": {"false_positive": 1, "false_negative": 9}}
    )
    content = run(Case(targets=(LATE,), split=None), tmp_path, params)
    entry = content["targets"]["late"]

    assert entry["objective"] == {"metric": None, "costs": [[0, 1], [9, 0]]}
    assert entry["threshold"]["used"] < 0.4
    assert entry["threshold"]["gain"]["ci_low"] > 0
    assert entry["threshold"]["value"]["value"] < entry["threshold"]["at_default"]["value"]


def test_costs_move_the_class_of_several(tmp_path):
    costs = {"AA": {"BB": 9, "CC": 9}}
    params = DecideParams(num_resamples=FEW, costs={"carrier": costs})
    content = run(Case(targets=(CARRIER,), split=None), tmp_path, params)
    rule = rules_of(tmp_path)["carrier"]

    assert content["targets"]["carrier"]["costs"]["gain"]["ci_low"] > 0
    assert rule.costs == ((0, 9, 9), (0, 0, 0), (0, 0, 0))
    assert rule.classes(np.array([[0.2, 0.5, 0.3]])).tolist() == [0]


def test_without_out_of_fold_rows_nothing_is_calibrated(tmp_path):
    case = overconfident(Case(targets=(LATE,), without_train=("plain", "sharp")))
    found = run(case, tmp_path)["targets"]["late"]["calibration"]

    assert found["chosen"] == "none"
    assert "no out-of-fold predictions" in found["reason"]


def test_labels_of_test_rows_change_no_byte(tmp_path):
    outs = []
    for name in ("one", "two"):
        case = Case(targets=ALL)
        if name == "two":
            for target in ALL:
                rng = np.random.default_rng(0)
                case.labels["test"][target.name] = rng.permutation(case.labels["test"][target.name])
        run(case, tmp_path / name)
        outs.append((tmp_path / name / "decide" / "decisions.json").read_bytes())
    assert outs[0] == outs[1]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_labels_of_other_rows_do_change_it(tmp_path, split):
    outs = []
    for name in ("one", "two"):
        case = Case(targets=(LATE,))
        if name == "two":
            case.labels[split]["late"][:40] = 1 - case.labels[split]["late"][:40]
        run(case, tmp_path / name)
        outs.append((tmp_path / name / "decide" / "decisions.json").read_bytes())
    assert outs[0] != outs[1]


def test_the_same_bytes_whatever_the_threads(done, tmp_path):
    root, _, _ = done
    members = {name: root / "train" / name for name in ("plain", "sharp")}
    decide(
        root / "reduce", members, root / "stack", tmp_path / "decide", PARAMS, **told(threads=3)
    )  # fmt: skip
    again = (tmp_path / "decide" / "decisions.json").read_bytes()
    assert again == (root / "decide" / "decisions.json").read_bytes()


def test_too_few_rows_for_the_coverage_name_the_number_needed(tmp_path):
    case = Case(targets=(DELAY,), num_rows=60)
    case.labels["valid"]["delay"][15:] = np.nan
    recorder = MemoryRecorder()
    content = run(case, tmp_path, DecideParams(num_resamples=FEW, coverage=0.95), recorder)

    assert content["targets"]["delay"]["conformal"]["limit"] is None
    assert any("15 labelled valid rows" in w and "at least 19" in w for w in recorder.warnings)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"metric": {"lat": "f1"}}, r"`decide.metric.lat`: there is no target 'lat'.*late"),
        ({"metric": {"delay": "f1"}}, r"`decide.metric.delay`: .* regression .*expected a binary"),
        ({"costs": {"delay": {"false_positive": 1}}}, r"binary or multiclass"),
        ({"costs": {"late": {"false_positive": 1}}}, r"`decide.costs.late` is .*false_negative"),
        ({"costs": {"late": {"no": {"yes": 1}}}}, r"one number for each of"),
        ({"costs": {"carrier": {"AB": {"BB": 1}}}}, r"classes \['AB'\].*AA, BB, CC"),
        ({"costs": {"carrier": {"AA": 1}}}, r"\['AA'\] have a number, expected"),
        ({"costs": {"carrier": {"AA": {"AA": 1}}}}, r"right prediction costs nothing"),
        ({"costs": {"carrier": {"AA": {"BB": 0}}}}, r"all costs are 0"),
    ],
)
def test_what_cannot_be_decided_is_refused(done, tmp_path, params, message):
    root, _, _ = done
    with pytest.raises(ConfigError, match=message):
        decide(
            root / "reduce", {}, root / "stack", tmp_path / "out", DecideParams(**params), **told()
        )  # fmt: skip


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"coverage": 1.0}, "coverage"),
        ({"coverage": 0.0}, "coverage"),
        ({"metric": {"late": "roc_auc"}}, "metric"),
        ({"metric": {"late": "f1"}, "costs": {"late": {"false_positive": 1}}}, "keep one of them"),
        ({"costs": {"late": {"false_positive": -1}}}, "costs"),
    ],
)
def test_the_section_refuses_what_cannot_be(params, message):
    with pytest.raises(ValueError, match=message):
        DecideParams(**params)


def test_one_class_or_no_label_in_valid_rows_is_refused(tmp_path):
    case = Case(targets=(LATE,))
    table, members = case.write(tmp_path / "fine")
    stack(table, members, tmp_path / "stack", StackParams(num_resamples=FEW), **told())
    for name, label, message in (
        ("one", 1.0, "all 600 labelled valid rows are of the class 'yes'"),
        ("none", np.nan, "no label in any of the 600 valid rows"),
    ):
        case.labels["valid"]["late"] = np.full(600, label)
        other = case.write_table(tmp_path / name)
        with pytest.raises(DataError, match=message):
            decide(other, members, tmp_path / "stack", tmp_path / "out", PARAMS, **told())


def test_a_budget_too_small_is_refused_with_the_figure(done, tmp_path):
    root, _, _ = done
    members = {name: root / "train" / name for name in ("plain", "sharp")}
    with pytest.raises(ResourceError, match="stage decide needs about"):
        decide(
            root / "reduce", members, root / "stack", tmp_path / "out", PARAMS,
            **told(memory_budget=1 << 14),
        )  # fmt: skip


def test_damaged_decisions_and_those_of_other_targets_are_refused(done, tmp_path):
    root, _, _ = done
    with pytest.raises(IntegrityError, match=r"is for the targets and models .*headrace repro"):
        read_decisions(root / "decide", {"late": "sharp"})
    shutil.copytree(root / "decide", tmp_path / "decide")
    (tmp_path / "decide" / "decisions.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"decisions\.json"):
        read_decisions(tmp_path / "decide", {})


def judge(root, out, resampling="auto", **more):
    members = {name: root / "train" / name for name in ("plain", "sharp")}
    params = EvaluateParams(num_resamples=FEW, resampling=resampling)
    evaluate(root / "reduce", members, root / "stack", out, params, **more, **told())
    return json.loads((out / "decisions.json").read_text())["targets"]


def test_evaluate_measures_the_decisions_on_test_rows(done, tmp_path):
    root, content, _ = done
    found = judge(root, tmp_path / "out", decisions=root / "decide")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["late"]
    late = found["late"]

    assert set(found) == {"delay", "late", "carrier"}
    assert late["threshold"]["used"] == content["targets"]["late"]["threshold"]["used"]
    assert late["metrics"]["f1"]["default"] == metrics[late["model"]]["f1"]
    assert late["log_loss"]["raw"] == metrics[late["model"]]["log_loss"]
    assert late["log_loss"]["gain"]["ci_low"] > 0
    for name in found:
        coverage = found[name]["conformal"]["coverage"]
        assert coverage["ci_low"] < 0.93
        assert coverage["ci_high"] > 0.87
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Measured, not guaranteed" in page
    assert "F1 by threshold, valid rows" in page


def test_streamed_test_rows_are_measured_alike(done, tmp_path):
    root, _, _ = done
    whole = judge(root, tmp_path / "whole", decisions=root / "decide")
    streamed = judge(root, tmp_path / "streamed", "poisson", decisions=root / "decide")

    for name, entry in whole.items():
        one, other = (e["conformal"]["coverage"] for e in (entry, streamed[name]))
        assert one["value"] == other["value"]
        assert one["ci_low"] == pytest.approx(other["ci_low"], abs=0.02)


def test_decisions_for_another_model_are_not_measured(done, tmp_path):
    root, content, _ = done
    targets = {name: entry | {"model": "other"} for name, entry in content["targets"].items()}
    with new_folder(tmp_path / "decide") as folder:
        write_json(folder / "decisions.json", content | {"targets": targets})
    with pytest.raises(IntegrityError, match=r"targets and models .*'other'.*headrace repro"):
        judge(root, tmp_path / "out", decisions=tmp_path / "decide")
