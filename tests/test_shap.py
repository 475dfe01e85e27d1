"""SHAP values add up to the predictions, of one fit and of a bag."""

import numpy as np
import pytest

from headrace.models.bagging import BaggedModel
from headrace.models.catboost import CatboostParams, fit
from headrace.models.shap import shap_summary, shap_values
from headrace.record import MemoryRecorder
from headrace.schema import Target
from tests.train_case import QUICK, RESOURCES, TARGETS, make_case, table_rows

WIDE = Target(name="delay", task="regression")


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """Two fits of the same rows with other seeds, and the rows to explain."""
    root = tmp_path_factory.mktemp("shap")
    views = make_case(root)
    members = {
        name: fit(
            views,
            CatboostParams(**QUICK["catboost"], seed=seed),
            checkpoints=root / name,
            resources=RESOURCES,
            recorder=MemoryRecorder(),
        )
        for seed, name in enumerate(("fold-0", "whole"))
    }
    return members, table_rows(views, "valid")


def raw(values):
    """Return log-odds, up to a constant per row for several classes."""
    return np.log(values / (1 - values)) if values.ndim == 1 else np.log(values)


def test_of_one_fit_they_add_up_to_what_is_predicted(fits):
    members, rows = fits
    model = members["whole"]
    found, predicted = shap_values(model, rows), model.predict(rows)
    sums = {name: one.values_BFO.sum(axis=1) + one.base_O for name, one in found.items()}

    assert sums["delay"][:, 0] == pytest.approx(predicted["delay"])
    assert sums["late"][:, 0] == pytest.approx(raw(predicted["late"]))
    of_class = sums["class"] - sums["class"].mean(axis=1, keepdims=True)
    expected = raw(predicted["class"])
    assert of_class == pytest.approx(expected - expected.mean(axis=1, keepdims=True))


def test_of_a_bag_they_add_up_to_the_mean_of_its_fits(fits):
    members, rows = fits
    bag = BaggedModel(members)
    found = shap_values(bag, rows)
    delay = found["delay"].values_BFO.sum(axis=1) + found["delay"].base_O
    late = found["late"].values_BFO.sum(axis=1) + found["late"].base_O
    log_odds = np.average(
        [raw(one.predict(rows)["late"]) for one in members.values()],
        axis=0,
        weights=list(bag.weights.values()),
    )

    assert delay[:, 0] == pytest.approx(bag.predict(rows)["delay"])
    assert late[:, 0] == pytest.approx(log_odds)


def test_of_a_joint_model_each_target_has_its_unit(tmp_path):
    targets = (WIDE, Target(name="twice", task="regression"))
    views = make_two_targets(tmp_path, targets)
    model = fit(
        views,
        CatboostParams(**QUICK["catboost"], joint=True, device="cpu"),
        checkpoints=tmp_path / "checkpoints",
        resources=RESOURCES,
        recorder=MemoryRecorder(),
    )
    rows = table_rows(views, "valid")
    found, predicted = shap_values(model, rows), model.predict(rows)

    for target in targets:
        one = found[target.name]
        sums = one.values_BFO.sum(axis=1) + one.base_O
        assert sums[:, 0] == pytest.approx(predicted[target.name])


def make_two_targets(folder, targets):
    """Write a case of two regressions, the second a thousand times the first."""
    import pyarrow.compute as pc

    from tests.encode_tables import write_table
    from tests.train_case import ROLES, encode_only, example_columns

    splits = {}
    for seed, (split, num_rows) in enumerate({"train": 400, "valid": 50, "test": 50}.items()):
        columns = example_columns(num_rows, seed=seed, targets=(WIDE,))
        splits[split] = columns | {"twice": pc.multiply(columns["delay"], 1000)}
    roles = ROLES | {target.name: "target" for target in targets}
    write_table(folder / "reduce", splits, roles=roles, targets=targets)
    return encode_only(folder)


def test_the_summary_ranks_inputs_and_keeps_some_points(fits):
    members, rows = fits
    found = shap_summary(
        BaggedModel(members), rows, categories=("carrier", "gate"), num_columns=2, num_points=7
    )
    delay = found["delay"]
    values = shap_values(BaggedModel(members), rows)["delay"]

    assert set(found) == {target.name for target in TARGETS}
    assert set(delay["points"]) == {"distance", "carrier"}
    column = values.columns.index("distance")
    assert delay["points"]["distance"]["shap"] == pytest.approx(values.values_BFO[:7, column, 0])
    assert delay["mean_abs"]["distance"] == pytest.approx(
        np.abs(values.values_BFO[:, column, 0]).mean()
    )
    order = np.argsort(np.argsort(rows["distance"].to_numpy()))
    assert delay["points"]["distance"]["height"] == pytest.approx(
        order[:7] / (len(order) - 1), abs=1e-3
    )
