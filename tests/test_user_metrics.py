"""Metrics of one's own: as good as any other, and each way to fail has its message."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from headrace.errors import ConfigError
from headrace.evaluation.bootstrap import Resampling, Units, bootstrap, estimate
from headrace.evaluation.metrics import Sample
from headrace.evaluation.resamples import read_resamples
from headrace.evaluation.user_metrics import (
    UserMetricParams,
    load_user_metrics,
    score_user_metrics,
)
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.schema import Target
from headrace.stages.evaluate import EvaluateParams, evaluate
from headrace.stages.stack import StackParams, stack
from headrace.storage import read_json
from tests.evaluation_case import CARRIER, DELAY, LATE, Case

METRICS_FILE = '''
import numpy as np


def own_mae(truth, prediction, weights):
    """Mean distance, as one would write it."""
    return np.average(np.abs(truth - prediction), weights=weights)


def share_of_class(truth, prediction, weights):
    return np.average(prediction.argmax(axis=1) == truth, weights=weights)


def needs_all(truth, prediction, weights):
    return 1.0 if weights[0] > 0 else np.nan


def raises(truth, prediction, weights):
    return [][0]


def is_nan(truth, prediction, weights):
    return np.float64(0) / 0


def says(truth, prediction, weights):
    return "good"


def writes(truth, prediction, weights):
    truth[0] = 0
    return 1.0


number = 3
'''


def own(function, **more):
    return {"function": f"metrics.py:{function}", "higher_is_better": False, **more}


def run(case, root, user_metrics, **params):
    root.mkdir(exist_ok=True)
    (root / "metrics.py").write_text(METRICS_FILE)
    table, members = case.write(root)
    resources, recorder = Resources(), MemoryRecorder()
    stack(
        table, members, root / "stack", StackParams(num_resamples=200),
        resources=resources, recorder=recorder,
    )  # fmt: skip
    section = EvaluateParams(num_resamples=200, user_metrics=user_metrics, **params)
    evaluate(
        table, members, root / "stack", root / "evaluate", section,
        resources=resources, recorder=recorder, root=root,
    )  # fmt: skip
    return root / "evaluate", recorder


def scored(tmp_path, function, sample, units, resampling):
    (tmp_path / "metrics.py").write_text(METRICS_FILE)
    params = {"own": UserMetricParams(**own(function))}
    metrics = load_user_metrics(tmp_path, params, [DELAY])["delay"]
    first = bootstrap(sample, units, resampling, threshold=0.5)
    return score_user_metrics(metrics, first, sample, units, resampling, who="model 'm'")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_units", [300, 40])
def test_the_same_formula_has_the_same_value_on_every_resample(tmp_path, weighted, num_units):
    """Of MAE written by hand: by rows and by groups of them, with and without weights."""
    rng = np.random.default_rng(3)
    truth, noise = rng.normal(size=(2, 300))
    weight = rng.uniform(0.1, 3, 300) if weighted else None
    units = Units("group", rng.permutation(np.arange(300) % num_units), num_units)
    resampling = Resampling(200, 0.95, 7)
    sample = Sample("regression", truth, truth + noise, weight)
    found = scored(tmp_path, "own_mae", sample, units, resampling)

    assert found.points["own"] == pytest.approx(found.points["mae"], abs=1e-12)
    assert found.resamples["own"] == pytest.approx(found.resamples["mae"], abs=1e-12)
    one, other = (estimate(name, found, units, resampling) for name in ("own", "mae"))
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-12)


def test_resamples_without_a_value_are_counted(tmp_path):
    """Rows as units: the first one is missing from about 37 % of them, so there is no interval."""
    rng = np.random.default_rng(3)
    truth = rng.normal(size=50)
    units, resampling = Units("row", np.arange(50), 50), Resampling(400, 0.95, 7)
    sample = Sample("regression", truth, truth + 1)
    found = scored(tmp_path, "needs_all", sample, units, resampling)
    told = estimate("own", found, units, resampling)

    assert told.value == 1.0
    assert 100 < told.num_undefined < 200
    assert told.reason == f"undefined in {told.num_undefined} of 400 resamples"


def test_a_user_metric_stands_beside_the_others(tmp_path):
    """In JSON with interval, difference and pairs, in the report, in the record; of its targets."""
    case = Case(targets=(DELAY, CARRIER), has_weight=True)
    case.labels["test"]["delay"][:50] = np.nan
    metrics = {
        "my_mae": own("own_mae", targets=["delay"]),
        "share": own("share_of_class", targets=["carrier"]) | {"higher_is_better": True},
    }
    out, recorder = run(case, tmp_path, metrics)
    targets = read_json(out / "comparison.json")["targets"]
    told = {one["name"]: one for one in targets["delay"]["metrics"]}["my_mae"]
    plain = targets["delay"]["models"]["plain"]

    assert told["meaning"] == "Mean distance, as one would write it."
    assert told["higher_is_better"] is False
    for key in ("value", "ci_low", "ci_high", "standard_error"):
        assert plain["my_mae"][key] == pytest.approx(plain["mae"][key], abs=1e-9)
    assert plain["my_mae"]["verdict"] == plain["mae"]["verdict"] == "worse"
    pairs = targets["delay"]["pairs"]
    assert [p["p_holm"] for p in pairs["my_mae"]] == [p["p_holm"] for p in pairs["mae"]]
    share = targets["carrier"]["models"]["sharp"]
    assert share["share"]["value"] == pytest.approx(share["accuracy"]["value"], abs=1e-9)
    assert "share" not in plain
    assert "my_mae" in read_json(out / "metrics.json")["delay"]["stack"]
    assert "my_mae" in read_resamples(out / "resamples.parquet")["delay"]["sharp"].resamples
    assert "my_mae" in (out / "report.html").read_text()
    assert "my_mae" in (out / "pairs.csv").read_text()
    assert "plain/delay/my_mae_ci_low" in {name for name, _, _ in recorder.recorded_metrics}


def test_a_stream_says_that_it_has_no_rows_to_give(tmp_path):
    """No value, and why; the other metrics are as without it."""
    metrics = {"my_mae": own("own_mae")}
    out, _ = run(Case(targets=(DELAY,)), tmp_path, metrics, resampling="poisson")
    plain = read_json(out / "comparison.json")["targets"]["delay"]["models"]["plain"]

    assert (plain["my_mae"]["value"], plain["my_mae"]["reason"]) == (
        None, "needs all rows in memory",
    )  # fmt: skip
    assert plain["mae"]["ci_low"] < plain["mae"]["value"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", r"failed for model 'plain', target 'late': IndexError: .*returns one number"),
        ("says", r"failed for model 'plain', .*: ValueError: could not convert .*'good'"),
        ("writes", r"failed for model 'plain', .*read-only"),
        ("is_nan", r"gave nan for model 'plain', target 'late', 600 rows; .*mend it"),
        ("own_maes", r"`evaluate.user_metrics.mine`: metrics.py has no .*'own_maes'.*own_mae"),
        ("number", r"metrics.py has no function 'number'"),
    ],
)
def test_a_function_that_is_no_metric_ends_the_stage(tmp_path, function, message):
    """Named, with what it did and what to do."""
    with pytest.raises(ConfigError, match=message):
        run(Case(targets=(LATE,)), tmp_path, {"mine": own(function)})


def test_files_and_targets_that_are_not_there_are_named(tmp_path):
    """Before anything is read."""
    lost = {"mine": UserMetricParams(**own("f") | {"function": "lost.py:f"})}
    with pytest.raises(ConfigError, match=r"`evaluate.user_metrics.mine`: .*lost.py does not"):
        load_user_metrics(tmp_path, lost, [LATE])
    (tmp_path / "lost.py").write_text("import numpy\n1 / 0\n")
    with pytest.raises(ConfigError, match=r"lost.py fails: ZeroDivisionError"):
        load_user_metrics(tmp_path, lost, [LATE])
    (tmp_path / "metrics.py").write_text(METRICS_FILE)
    other = {"mine": UserMetricParams(**own("own_mae", targets=["lat"]))}
    with pytest.raises(ConfigError, match=r"mine.targets`: there is no target 'lat'.*late"):
        load_user_metrics(tmp_path, other, [LATE])


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"mae": own("f")}, "mae: headrace has metrics of these names"),
        ({"a/b": own("f")}, "should match pattern"),
        ({"mine": {"function": "metrics.py", "higher_is_better": True}}, "should match pattern"),
        ({"mine": {"function": "metrics.py:f"}}, "higher_is_better"),
        ({"mine": own("f") | {"function": "../metrics.py:f"}}, "must lie inside the project"),
        ({"mine": own("f") | {"function": "/metrics.py:f"}}, "must lie inside the project"),
    ],
)
def test_entries_that_cannot_be_are_refused(metrics, message):
    """A taken name, an odd one, no function, no direction, a file outside the project."""
    with pytest.raises(ValidationError, match=message):
        EvaluateParams(user_metrics=metrics)


def test_the_example_of_the_page_works(tmp_path):
    """The function and the section of docs/metrics.md, as they stand there."""
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    _, _, after = page.partition("## A metric of your own")
    code, section = re.findall(r"```(?:python|yaml)\n(.+?)```", after, flags=re.DOTALL)
    (tmp_path / "metrics.py").write_text(code)
    params = EvaluateParams(**yaml.safe_load(section)["evaluate"])
    target = Target(name="arr_delay", task="regression")
    (metric,) = load_user_metrics(tmp_path, params.user_metrics, [target])["arr_delay"]

    found = metric.function(np.array([10.0, 10.0]), np.array([8.0, 14.0]), np.array([1.0, 3.0]))
    assert found == pytest.approx((6 + 3 * 4) / 4)
    assert metric.metric.meaning.startswith("Mean cost: ")
