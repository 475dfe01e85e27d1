"""``headrace power``: what test rows can tell, from predictions of valid rows or an assumption."""

import io
import shutil

import numpy as np
import pytest
import yaml
from rich.console import Console
from sklearn.metrics import log_loss, r2_score, roc_auc_score

from headrace.commands.power import power, print_power
from headrace.errors import ConfigError, DataError
from headrace.evaluation.supposed import supposed_models
from headrace.project import Project
from tests.evaluation_case import CARRIER, DELAY, LATE, Case

CONTENT = {
    "version": 1,
    "resources": {"memory_budget": "1GiB", "threads": 1},
    "models": ["baseline", "catboost"],
    "extract": {
        "sources": {"t": {"path": "t.csv"}},
        "targets": {"delay": {"task": "regression"}, "late": {"task": "binary"}},
    },
    "train": {"baseline": {}, "catboost": {}},
    "evaluate": {"num_resamples": 400},
}


def make(root, case, *, is_trained, **evaluate):
    content = CONTENT | {"evaluate": CONTENT["evaluate"] | evaluate}
    (root / "params.yaml").write_text(yaml.safe_dump(content))
    (root / "dvc.yaml").write_text("stages: {}\n")
    table, _ = case.write(root / "work")
    shutil.copytree(table, root / "data" / "reduce")
    if is_trained:
        for model in case.noise:
            case.write_model(root / "data" / "train" / model, model)
    return Project(root)


def case_of(**options):
    noise = {"baseline": 1.2, "catboost": 1.0}
    return Case(targets=(DELAY, LATE), noise=noise, **options)


def printed(found, *, metric=None, asked=None):
    text = io.StringIO()
    print_power(found, metric=metric, asked=asked, console=Console(file=text, width=200))
    return text.getvalue()


@pytest.fixture
def trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make(tmp_path, case_of(), is_trained=True)


def test_with_predictions_their_paired_spread_is_taken(trained):
    """As many valid as test days: the paired standard error of valid rows, times 2.8."""
    delay, late = power(trained, target=None, correlation=0.9)
    case = case_of()
    truth = case.labels["valid"]["delay"]
    squared = [
        (case.prediction(DELAY, model, "valid") - truth) ** 2 for model in ("baseline", "catboost")
    ]
    rng = np.random.default_rng(0)
    day = case.day["valid"]
    differences = []
    for _ in range(1000):
        counts = np.bincount(rng.integers(0, 30, 30), minlength=30)[day]
        rmse = [np.sqrt(np.average(loss, weights=counts)) for loss in squared]
        differences.append(rmse[0] - rmse[1])
    found = next(one for one in delay.found if one.metric.name == "rmse")
    assert found.median == pytest.approx(2.8016 * np.std(differences), rel=0.1)
    assert found.low == found.high == found.median  # one pair
    assert (delay.unit, delay.test.num_units, delay.test.num_rows) == ("day", 30, 600)
    assert late.primary.name == "roc_auc"
    text = printed([late])
    assert "late: 600 labelled test rows in 30 days" in text
    assert "ROC-AUC (primary)" in text
    assert "from predictions of 600 valid rows by baseline, catboost" in text


def test_the_difference_asked_for_is_turned_into_units_and_rows(trained):
    """Half the smallest detectable difference needs four times the units."""
    (late,) = power(trained, target="late", correlation=0.9)
    smallest = late.of(late.primary).median
    text = printed([late], asked=smallest / 2)
    assert "needs 120 days (about 2,400 test rows): 4 times as many as there are" in text
    assert "these are enough" in printed([late], metric="brier", asked=0.5)


def test_before_training_the_assumption_is_stated(tmp_path, monkeypatch):
    """And what is more alike can be told apart better."""
    monkeypatch.chdir(tmp_path)
    project = make(tmp_path, case_of(), is_trained=False, unit="row")
    sizes = []
    for correlation in (0.5, 0.9):
        (late,) = power(project, target="late", correlation=correlation)
        sizes.append(late.of(late.primary).median)
        assert f"errors have a correlation of {correlation:g} (--correlation)" in printed([late])
    assert sizes[0] / sizes[1] == pytest.approx(np.sqrt(0.5 / 0.1), rel=0.3)


def test_a_larger_test_set_tells_smaller_differences(tmp_path, monkeypatch):
    """By the root of its units, whatever the valid rows' number."""
    monkeypatch.chdir(tmp_path)
    found = []
    for num_days in (30, 120):
        root = tmp_path / str(num_days)
        root.mkdir()
        case = case_of()
        case.day["test"] = np.arange(600) % num_days
        project = make(root, case, is_trained=True)
        monkeypatch.chdir(root)
        (late,) = power(project, target="late", correlation=0.9)
        found.append(late.of(late.primary).median)
    assert found[0] / found[1] == pytest.approx(2)


def test_models_of_other_rows_are_as_if_not_trained(trained):
    """After another split the old predictions are of no use."""
    other = case_of(seed=5)
    for model in other.noise:
        shutil.rmtree(trained.data(f"train@{model}"))
        other.write_model(trained.data(f"train@{model}"), model)
    (late,) = power(trained, target="late", correlation=0.9)
    assert "this is an assumption" in late.basis


def test_without_a_table_the_command_that_makes_one_is_named(tmp_path, monkeypatch):
    """No model is needed for it."""
    monkeypatch.chdir(tmp_path)
    project = make(tmp_path, case_of(), is_trained=False)
    shutil.rmtree(project.data("reduce"))
    with pytest.raises(DataError, match=r"there is no table yet: .*`headrace repro reduce`"):
        power(project, target=None, correlation=0.9)


def test_wrong_questions_are_refused(trained):
    """Target, metric, difference, correlation: by name and value."""
    with pytest.raises(ConfigError, match=r"--target 'lat' is no target.*late"):
        power(trained, target="lat", correlation=0.9)
    with pytest.raises(ConfigError, match=r"--correlation is 1"):
        power(trained, target=None, correlation=1)
    (late,) = power(trained, target="late", correlation=0.9)
    with pytest.raises(ConfigError, match="--metric 'auc' is none of target 'late'"):
        printed([late], metric="auc", asked=0.1)
    with pytest.raises(ConfigError, match="--difference is 0"):
        printed([late], asked=0)


def test_few_units_are_said(tmp_path, monkeypatch):
    """The standard error itself is too small then."""
    monkeypatch.chdir(tmp_path)
    project = make(tmp_path, case_of(num_days=10), is_trained=True)
    text = printed(power(project, target="late", correlation=0.9))
    assert "with only 10 days the real ones are larger" in text


def test_supposed_models_are_as_good_as_they_say():
    """Skill, correlation of their errors, and calibration, on many rows."""
    rng = np.random.default_rng(0)
    truth = rng.gamma(2.0, 3.0, 40_000)
    told = {"weight": None, "correlation": 0.9, "seed": 1}
    one, other = supposed_models("regression", truth, num_classes=2, **told).values()
    assert r2_score(truth, one.prediction) == pytest.approx(0.5, abs=0.02)
    noise = [
        s.prediction - s.prediction.mean() - 0.5 * (truth - truth.mean()) for s in (one, other)
    ]
    assert np.corrcoef(noise)[0, 1] == pytest.approx(0.9, abs=0.01)

    label = (rng.random(40_000) < 0.2).astype(float)
    one, _ = supposed_models("binary", label, num_classes=2, **told).values()
    assert roc_auc_score(label, one.prediction) == pytest.approx(0.8, abs=0.01)
    for low in (0.1, 0.3, 0.5):
        rows = (one.prediction > low) & (one.prediction < low + 0.2)
        assert label[rows].mean() == pytest.approx(one.prediction[rows].mean(), abs=0.03)

    code = rng.integers(0, 3, 40_000).astype(float)
    one, _ = supposed_models("multiclass", code, num_classes=3, **told).values()
    assert one.prediction.sum(axis=1) == pytest.approx(np.ones(40_000))
    assert log_loss(code, one.prediction) < np.log(3) - 0.1


def test_a_target_of_several_classes_has_a_power_too(tmp_path, monkeypatch):
    """Every metric of its task."""
    monkeypatch.chdir(tmp_path)
    content = Case(targets=(CARRIER,), noise={"baseline": 1.0, "catboost": 2.0})
    project = make(tmp_path, content, is_trained=False)
    (found,) = power(project, target=None, correlation=0.9)
    assert {one.metric.name for one in found.found} >= {"log_loss", "accuracy", "macro_f1"}
