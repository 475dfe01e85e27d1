"""Stage interpret: what it asks the fitted models, and what it writes."""

import numpy as np
import pyarrow as pa
import pytest

from headrace.errors import ConfigError, IntegrityError
from headrace.models.protocol import load_model, model_section
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.stages.evaluate import EvaluateParams, evaluate
from headrace.stages.interpret import InterpretParams, interpret
from headrace.stages.stack import StackParams, stack
from headrace.stages.train import train
from headrace.storage import read_json
from tests.encode_tables import write_table
from tests.train_case import (
    DELAY,
    LATE,
    QUICK,
    ROLES,
    TARGETS,
    encode_only,
    example_columns,
    make_case,
    tree_bytes,
)

MODELS = ("baseline", "catboost", "nn", "tabnet")
PARAMS = InterpretParams(rows=200, repeats=2, num_resamples=200)


def told(recorder=None):
    return {"resources": Resources(), "recorder": recorder or MemoryRecorder()}


def trained(root, models, **changes):
    """Train ``models`` on the table below ``root`` and choose; return root and members."""
    members = {}
    for model in models:
        params = model_section(model)(**(QUICK[model] | changes.get(model, {})))
        members[model] = root / "train" / model
        train(
            root / "reduce", root / "encode", members[model], params,
            model=model, cache=root / "cache", checkpoints=root / "checkpoints" / model, **told(),
        )  # fmt: skip
    stack(root / "reduce", members, root / "stack", StackParams(), **told())
    return root, members


def run(case, out, params=PARAMS, recorder=None):
    root, members = case
    return interpret(
        root / "reduce", root / "encode", members, root / "stack", out, params, **told(recorder)
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Four kinds of models; the networks are no bags."""
    root = tmp_path_factory.mktemp("interpret")
    make_case(root)
    return trained(root, MODELS, nn={"bag": "none"}, tabnet={"bag": "none"})


@pytest.fixture(scope="module")
def out(case):
    folder = case[0] / "interpret"
    run(case, folder)
    return folder


def test_every_model_has_importances_of_every_column(out):
    found = read_json(out / "importances.json")

    assert list(found["models"]) == sorted(MODELS)
    assert (found["num_rows"], found["unit"], found["num_units"]) == (150, "row", 150)
    for model in ("baseline", "catboost"):
        for target in ("delay", "late", "class"):
            columns = found["models"][model][target]
            assert set(columns) == {"distance", "wind", "carrier", "gate"}
            assert min(columns["distance"]["ci_low"], columns["carrier"]["ci_low"]) > 0.05
            assert columns["wind"]["ci_low"] <= 0 <= columns["wind"]["ci_high"]


def test_dependence_is_of_the_best_single_model_in_the_columns_own_values(case, out):
    """Its mean over the rows is what the model says of these rows with the value in all of them."""
    best = read_json(case[0] / "stack" / "selection.json")["targets"]
    found = read_json(out / "dependence.json")["targets"]

    assert {target: entry["model"] for target, entry in found.items()} == {
        target: entry["best_single"] for target, entry in best.items()
    }
    assert {len(entry["means"]) for entry in found["class"]["columns"]} == {3}
    curves = {entry["column"]: entry for entry in found["delay"]["columns"]}
    distance, carrier = curves["distance"], curves["carrier"]
    assert len(distance["grid"]) == 20
    assert 200 < distance["grid"][0] < 400 < 600 < distance["grid"][-1] < 900
    assert distance["means"][0][-1] > distance["means"][0][0] + 60  # 30 for each 100 of distance
    assert set(carrier["grid"]) == {"W", "X", "Y", "Z", None}
    assert len(distance["lines"]) == 10


def test_shap_and_attention_are_of_the_kinds_that_have_them(out):
    shap, attention = read_json(out / "shap.json"), read_json(out / "attention.json")

    assert (list(shap["models"]), list(attention["models"])) == (["catboost"], ["tabnet"])
    delay = shap["models"]["catboost"]["delay"]
    assert set(delay["mean_abs"]) == {"distance", "wind", "carrier", "gate"}
    assert set(delay["points"]["distance"]["height"]) >= {0, 1}
    assert set(delay["points"]["carrier"]["height"]) == {None}
    assert shap["models"]["catboost"]["class"]["points"] == {}
    steps = attention["models"]["tabnet"]["masks"]
    assert np.array(steps).shape == (2, 4, 16)
    assert np.array(steps).sum(axis=1) == pytest.approx(np.ones((2, 16)), abs=1e-3)
    assert "P(late = yes)" in attention["models"]["tabnet"]["correlations"]


def test_the_same_inputs_give_the_same_bytes_whatever_the_threads(case, out, tmp_path):
    root, members = case
    interpret(
        root / "reduce", root / "encode", members, root / "stack", tmp_path / "again", PARAMS,
        resources=Resources(threads=1), recorder=MemoryRecorder(),
    )  # fmt: skip

    assert tree_bytes(tmp_path / "again") == tree_bytes(out)


def test_labels_of_test_rows_are_not_read(case, out, tmp_path):
    """Without its test rows the table gives the same answers."""
    root, members = case
    splits = {
        split: example_columns(num_rows, seed=seed)
        for seed, (split, num_rows) in enumerate({"train": 600, "valid": 150}.items())
    }
    roles = ROLES | {target.name: "target" for target in TARGETS}
    write_table(tmp_path / "reduce", splits, roles=roles, targets=TARGETS)
    interpret(
        tmp_path / "reduce", root / "encode", members, root / "stack", tmp_path / "out", PARAMS,
        **told(),
    )  # fmt: skip

    assert tree_bytes(tmp_path / "out") == tree_bytes(out)


def test_columns_alike_are_grouped_and_told(tmp_path):
    """The distance in metres too: trees use either, and only both together matter fully."""
    splits = {}
    for seed, (split, num_rows) in enumerate({"train": 600, "valid": 300, "test": 30}.items()):
        columns = example_columns(num_rows, seed=seed, targets=(DELAY, LATE))
        distance = columns.pop("distance").to_numpy()
        noise = np.random.default_rng(seed).normal(0, 5, (2, num_rows))
        splits[split] = {
            "miles": pa.array(distance + noise[0]),
            "metres": pa.array(1609 * (distance + noise[1])),
        } | columns
    roles = {name: role for name, role in ROLES.items() if name not in ("distance", "importance")}
    roles |= {"miles": "numeric", "metres": "numeric", "delay": "target", "late": "target"}
    write_table(tmp_path / "reduce", splits, roles=roles, targets=(DELAY, LATE))
    encode_only(tmp_path)
    case = trained(tmp_path, ("catboost",), catboost={"learning_rate": 0.2})
    recorder = MemoryRecorder()
    run(case, tmp_path / "out", PARAMS.model_copy(update={"rows": 300}), recorder)
    found = read_json(tmp_path / "out" / "importances.json")
    delay = found["models"]["catboost"]["delay"]

    assert found["groups"] == {"miles + metres": ["miles", "metres"]}
    assert found["alike"][0]["correlation"] > 0.98
    assert delay["miles + metres"]["ci_low"] > 0.5
    assert (
        max(delay["miles"]["ci_high"], delay["metres"]["ci_high"])
        < (delay["miles + metres"]["ci_low"])
    )
    assert any("miles, metres go together" in note for note in recorder.notes)

    named = PARAMS.model_copy(update={"groups": {"length": ("metres", "miles", "wind")}})
    run(case, tmp_path / "named", named, recorder)
    assert read_json(tmp_path / "named" / "importances.json")["groups"] == {
        "length": ["metres", "miles", "wind"]
    }
    assert any("as 'length'" in note for note in recorder.notes)


def test_wide_tables_and_large_bags_are_judged_on_fewer_rows(case, tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.stages.interpret._VALUES", 4 * 4 * 2 * 14 * 130)
    monkeypatch.setattr("headrace.stages.interpret._LEAST_ROWS", 10)
    run(case, tmp_path / "out")

    assert read_json(tmp_path / "out" / "importances.json")["num_rows"] == 130
    assert len(load_model(case[1]["catboost"]).members) == 6


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"far": ("distanc", "wind")}, r"interpret.groups.far.*distanc.*nearest name: distance"),
        ({"far": ("delay", "wind")}, r"no model learns from"),
        ({"wind": ("distance", "wind")}, r"called like a column"),
    ],
)
def test_groups_that_cannot_be_are_refused(case, tmp_path, groups, message):
    with pytest.raises(ConfigError, match=message):
        run(case, tmp_path / "out", PARAMS.model_copy(update={"groups": groups}))


def test_a_damaged_model_is_refused(case, tmp_path):
    (tmp_path / "catboost").mkdir()
    with pytest.raises(IntegrityError):
        run((case[0], {"catboost": tmp_path / "catboost"}), tmp_path / "out")


def test_the_report_shows_it(case, out, tmp_path):
    """Sections of every target, and of the run; the worst errors show the most important columns.

    Another interval of the metrics asks no model again: the files of interpret are only read.
    """
    root, members = case
    evaluate(
        root / "reduce", members, root / "stack", tmp_path / "evaluate",
        EvaluateParams(num_resamples=200), interpretation=out, **told(),
    )  # fmt: skip
    page = (tmp_path / "evaluate" / "report.html").read_text()
    errors = read_json(tmp_path / "evaluate" / "errors.json")["targets"]

    for number in (1, 2, 3):
        for anchor in ("importance", "partial-dependence", "errors"):
            assert f'id="target-{number}-{anchor}"' in page
    assert 'id="run-attention"' in page
    assert set(errors["delay"]["columns"]) == {"distance", "carrier", "wind", "gate"}
    assert set(errors["delay"]["columns"][:2]) == {"distance", "carrier"}
