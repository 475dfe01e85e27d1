"""Trees: same bytes twice, resume, categories of any type, the budget of the pool."""

import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import headrace.models.catboost as catboost_kind
from headrace.data.draws import is_sampled
from headrace.errors import (
    ConfigError,
    DataError,
    DependencyError,
    IntegrityError,
    ResourceError,
    SchemaError,
)
from headrace.models.catboost import (
    CatboostParams,
    ctr_complexity,
    fit,
    inputs_of_table,
    load,
    predicted_bytes,
)
from headrace.models.protocol import StopRows
from headrace.params import Resources, parse_section
from headrace.record import MemoryRecorder
from headrace.schema import Target
from tests.encode_tables import write_table
from tests.halting import Halt, HaltingRecorder
from tests.train_case import (
    DELAY,
    LATE,
    RESOURCES,
    ROLES,
    encode_only,
    encoded_rows,
    example_columns,
    make_case,
    make_far_case,
    table_rows,
    tree_bytes,
)


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("case"), weight=True)


def fitted(views, folder, *, recorder=None, resources=RESOURCES, **params):
    recorder = recorder or MemoryRecorder()
    model = fit(
        views,
        CatboostParams(**{"device": "cpu", "iterations": 60, "patience": 20, "depth": 3, **params}),
        checkpoints=folder / "checkpoints",
        resources=resources,
        recorder=recorder,
    )
    return model, recorder


def saved(model, folder):
    folder.mkdir()
    model.save(folder)
    return tree_bytes(folder)


def test_all_three_tasks_are_learnt(views, tmp_path):
    model, recorder = fitted(views, tmp_path)
    values = model.predict(table_rows(views, "test"))
    delay, late, group = encoded_rows(views, "test").targets.T
    known = ~np.isnan(delay)
    error = np.sqrt(np.mean((values["delay"][known] - delay[known]) ** 2))
    known_late = ~np.isnan(late)
    told = model.summary["targets"]["delay"]

    assert error < 0.5 * np.nanstd(delay)
    assert np.mean((values["late"] > 0.5)[known_late] == (late > 0.5)[known_late]) > 0.85
    assert np.mean(values["class"].argmax(axis=1) == group) > 0.75
    assert np.allclose(values["class"].sum(axis=1), 1, atol=1e-12)
    assert set(told["importances"]) == {"distance", "wind", "carrier", "gate"}
    assert max(told["importances"], key=told["importances"].get) in ("distance", "carrier")
    assert told["trees"] == told["best_iteration"] + 1
    curve = [v for name, v, _ in recorder.recorded_metrics if name == "inner_loss_delay"]
    assert min(curve) == pytest.approx(told["inner_loss"])


def test_two_fits_in_different_folders_have_the_same_bytes(views, tmp_path):
    first = saved(fitted(views, tmp_path / "1")[0], tmp_path / "a")
    second = saved(fitted(views, tmp_path / "long" / "2", threads=2)[0], tmp_path / "b")
    other = saved(fitted(views, tmp_path / "3", seed=1)[0], tmp_path / "c")

    assert first == second
    assert sorted(first) == ["class.cbm", "delay.cbm", "late.cbm", "trees.json"]
    assert first["late.cbm"] != other["late.cbm"]
    assert not any(str(tmp_path).encode() in content for content in first.values())


def test_one_thread_gives_the_trees_of_two(views, tmp_path):
    rows = table_rows(views, "test")
    one, two = (fitted(views, tmp_path / str(n), threads=n)[0].predict(rows) for n in (1, 2))

    for name, values in one.items():
        assert np.array_equal(values, two[name])


def test_saved_trees_predict_the_same(views, tmp_path):
    model, _ = fitted(views, tmp_path)
    saved(model, tmp_path / "model")
    back = load(tmp_path / "model", {"summary": {"rows": 1}})
    rows = table_rows(views, "test")

    assert back.summary == {"rows": 1}
    for name, values in model.predict(rows).items():
        assert np.array_equal(values, back.predict(rows)[name])


def test_trees_that_were_read_are_saved_as_the_same_bytes(views, tmp_path):
    """As in a bag, one fit of which an earlier run has finished."""
    first = saved(fitted(views, tmp_path)[0], tmp_path / "a")

    assert saved(load(tmp_path / "a", {}), tmp_path / "b") == first


@pytest.mark.parametrize("halt_after", [15, 70])
def test_a_halted_fit_resumes_to_the_very_same_bytes(views, tmp_path, halt_after, monkeypatch):
    """In the first target, and in the second. The snapshot is written after every tree here."""
    plain = catboost_kind._settings
    monkeypatch.setattr(
        catboost_kind,
        "_settings",
        lambda *given: {**plain(*given), "snapshot_interval": 0},
    )
    undisturbed = fitted(views, tmp_path / "whole")[0]
    whole = saved(undisturbed, tmp_path / "a")
    with pytest.raises(Halt):
        fitted(views, tmp_path / "halted", recorder=HaltingRecorder(halt_after))
    recorder = MemoryRecorder()
    model = fitted(views, tmp_path / "halted", recorder=recorder)[0]
    resumed = saved(model, tmp_path / "b")
    assert model.summary == undisturbed.summary
    curve = model.summary["curves"][0]
    assert len(curve["at"]) == len(curve["held_back"]) == len(curve["learnt"]) > 15
    assert curve["kept"] == model.summary["targets"]["delay"]["best_iteration"] + 1
    steps = [step for name, _, step in recorder.recorded_metrics if name == "train_loss_delay"]

    assert resumed == whole
    assert len(steps) < 60
    assert all(step > 1 for step in steps)


def test_a_signal_stops_training_at_once_wherever_it_strikes(views, tmp_path):
    """The handler's own exception arrives, and the snapshot is of the moment of the signal."""

    def stop(*_):
        raise Halt

    endless = {"iterations": 100_000, "patience": 100_000, "learning_rate": 1e-6}
    before = signal.signal(signal.SIGTERM, stop)
    recorder = MemoryRecorder()
    try:
        for delay_s in (0.3, 0.5):
            timer = threading.Timer(delay_s, lambda: os.kill(os.getpid(), signal.SIGTERM))
            timer.start()
            start = time.monotonic()
            with pytest.raises(Halt):
                fitted(views, tmp_path, recorder=recorder, **endless)
            assert time.monotonic() - start < 20
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    steps = [step for name, _, step in recorder.recorded_metrics if name == "train_loss_delay"]
    assert len(set(steps)) == len(steps)  # the second run goes on after the first


def test_labels_of_other_splits_change_nothing(tmp_path):
    files = []
    for name, seed in (("a", 1), ("b", 50)):
        other = example_columns(150, seed=seed)
        change = {"valid": {t: other[t] for t in ("delay", "late", "class")}}
        views = make_case(tmp_path / name, change=change)
        files.append(saved(fitted(views, tmp_path / name)[0], tmp_path / name / "model"))

    assert files[0] == files[1]


def test_only_the_folds_of_the_views_are_learnt(views, tmp_path):
    _, recorder = fitted(replace(views, folds=(1, 2, 3), stop=StopRows("fold", fold=3)), tmp_path)
    fold = encoded_rows(views, "train").fold

    assert recorder.recorded_params["rows_learnt_from"] == np.isin(fold, (1, 2)).sum()
    assert recorder.recorded_params["rows_held_back"] == (fold == 3).sum()


def test_unseen_and_missing_values_are_predicted(views, tmp_path):
    model, _ = fitted(views, tmp_path)
    rows = pa.table(
        {
            "distance": pa.array([None, np.inf, np.nan], pa.float64()),
            "wind": pa.nulls(3, pa.float64()),
            "carrier": pa.array(["never seen", None, "W"]).dictionary_encode(),
            "gate": pa.array([99, None, 1], pa.int64()),
            "more": pa.array([1, 2, 3]),
        }
    )
    values = model.predict(rows)

    assert all(np.isfinite(v).all() and len(v) == 3 for v in values.values())


def test_no_rows_give_no_predictions(views, tmp_path):
    values = fitted(views, tmp_path)[0].predict(table_rows(views, "test").slice(0, 0))

    assert {name: v.shape for name, v in values.items()} == {
        "delay": (0,), "late": (0,), "class": (0, 3),
    }  # fmt: skip


def test_rows_that_it_cannot_read_are_refused(views, tmp_path):
    model, _ = fitted(views, tmp_path)
    rows = table_rows(views, "test")
    with pytest.raises(SchemaError, match=r"lack the columns \['wind'\].*nearest name: wnd"):
        model.predict(rows.rename_columns(["distance", "wnd", "carrier", "gate"]))
    with pytest.raises(SchemaError, match="rows of the reduced table, not encoded ones"):
        model.predict(encoded_rows(views, "test"))


@pytest.mark.parametrize(
    "values",
    [
        pa.array([3, 3, None, 4]),
        pa.array([3.0, 3.0, None, 4.0]),
        pa.array([3.0, 3.0, np.nan, 4.0]),
        pa.array(["3", "3", None, "4"]),
        pa.array(["3", "3", None, "4"]).dictionary_encode(),
        pa.array([3, 3, None, 4], pa.int8()).dictionary_encode(),
    ],
)
def test_a_category_is_its_text_whatever_its_type(values):
    frame = inputs_of_table(pa.table({"c": values}), ["c"], ["c"])

    assert frame["c"].tolist() == ["3", "3", "__NA__", "4"]
    assert str(frame["c"].dtype) == "category"


def test_a_boolean_is_a_number_or_a_category_by_its_role():
    table = pa.table({"n": pa.array([True, None]), "c": pa.array([True, None])})
    frame = inputs_of_table(table, ["n", "c"], ["c"])

    assert frame["n"].dtype == np.float32
    assert frame["n"].tolist()[0] == 1.0
    assert np.isnan(frame["n"].tolist()[1])
    assert frame["c"].tolist() == ["true", "__NA__"]


def test_the_whole_pool_fits_by_default_and_is_said(views, tmp_path):
    views = replace(views, cache=tmp_path / "cache")
    _, recorder = fitted(views, tmp_path)

    assert recorder.recorded_params["sample_share"] == 1.0
    assert recorder.warnings == []
    assert recorder.recorded_params["cache_hit"] is False
    assert fitted(views, tmp_path / "2")[1].recorded_params["cache_hit"] is True


def test_beyond_the_pool_budget_a_declared_sample_is_learnt(views, tmp_path):
    needed = predicted_bytes(600, views.contract, max_ctr_complexity=1)
    params = {"pool_budget": needed // 2, "max_ctr_complexity": 1}
    model, recorder = fitted(views, tmp_path / "1", **params)
    used = recorder.recorded_params["rows_learnt_from"] + recorder.recorded_params["rows_held_back"]

    assert recorder.recorded_params["sample_share"] == pytest.approx(0.5, abs=0.01)
    assert used == pytest.approx(300, abs=60)
    assert "about 300 of 600 train rows" in recorder.warnings[0]
    assert "train.catboost.pool_budget" in recorder.warnings[0]
    assert model.summary["rows"] == 300
    again, _ = fitted(views, tmp_path / "2", **params)
    assert saved(model, tmp_path / "a") == saved(again, tmp_path / "b")


def test_categories_are_combined_where_that_costs_little(views, tmp_path):
    params = CatboostParams()
    few, many = (ctr_complexity(params, rows, views.contract) for rows in (250_000, 250_001))
    own = ctr_complexity(CatboostParams(max_ctr_complexity=2), 250_001, views.contract)
    bytes_of = {
        one: predicted_bytes(600, views.contract, max_ctr_complexity=one) for one in (1, 2, None)
    }

    assert (few, many, own) == (4, 1, 2)
    assert bytes_of[1] < bytes_of[2] == bytes_of[None]
    assert fitted(views, tmp_path)[1].recorded_params["max_ctr_complexity"] == 4


def test_the_sample_is_by_row_and_not_by_position():
    row_id = np.arange(-5000, 5000, dtype=np.int64) * 7919
    keep = is_sampled(row_id, 0.3, seed=0)
    order = np.random.default_rng(0).permutation(len(row_id))

    assert keep.mean() == pytest.approx(0.3, abs=0.02)
    assert np.array_equal(is_sampled(row_id[order], 0.3, seed=0), keep[order])
    assert np.array_equal(is_sampled(row_id, 0.6, seed=0) & keep, keep)
    assert (is_sampled(row_id, 0.3, seed=1) != keep).mean() > 0.3
    assert is_sampled(row_id, 1.0, seed=0).all()
    assert not is_sampled(row_id, 0.0, seed=0).any()


def test_a_memory_budget_that_cannot_hold_the_pool_is_refused_before_reading(views, tmp_path):
    resources = Resources(memory_budget=100_000)
    with pytest.raises(ResourceError, match=r"about .* KiB for 600 train rows, .*pool_budget") as e:
        fitted(views, tmp_path, resources=resources)
    assert "resources.memory_budget" in str(e.value)


def test_what_catboost_refuses_is_one_message(tmp_path):
    views = make_case(tmp_path, targets=(LATE,))
    with pytest.raises(DataError, match="catboost cannot learn target 'late': "):
        fitted(replace(views, folds=(4, 9), stop=StopRows("fold", fold=9)), tmp_path)


def test_a_gpu_that_is_not_there_is_refused(views, tmp_path, monkeypatch):
    monkeypatch.setattr(catboost_kind, "_GPU_DRIVER", tmp_path / "absent")
    with pytest.raises(
        DependencyError, match=r"`train\.catboost\.device` is 'cuda', but CatBoost finds no GPU"
    ):
        fitted(views, tmp_path, device="cuda")


def test_half_a_model_is_refused(views, tmp_path):
    saved(fitted(views, tmp_path)[0], tmp_path / "model")
    (tmp_path / "model" / "late.cbm").write_bytes(b"nothing")
    with pytest.raises(IntegrityError, match="does not hold whole trees"):
        load(tmp_path / "model", {})


def test_a_mistyped_parameter_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"`train.catboost.dept` .*nearest name: depth"):
        parse_section(CatboostParams, {"dept": 3}, key="train.catboost", path=tmp_path / "p.yaml")


def test_a_target_far_from_zero_is_learnt_as_well(tmp_path):
    """Seconds since 1970: in float32 all of them are one number."""
    near, far = make_far_case(tmp_path / "a", 0.0), make_far_case(tmp_path / "b", 1.7e9)
    expected = fitted(near, tmp_path / "near")[0].predict(table_rows(near, "test"))["delay"]
    model = fitted(far, tmp_path / "far")[0]
    saved(model, tmp_path / "saved")
    found = load(tmp_path / "saved", {}).predict(table_rows(far, "test"))["delay"]

    assert np.std(expected) > 10
    assert found - 1.7e9 == pytest.approx(expected, abs=0.5)


def test_one_target_alone(tmp_path):
    views = make_case(tmp_path, targets=(DELAY,))

    assert list(fitted(views, tmp_path)[0].predict(table_rows(views, "valid"))) == ["delay"]


COST = Target(name="cost", task="regression")


def two_regressions(folder, *, lacking):
    """A table whose ``cost`` is some millionths of ``wind``; if wanted, a tenth lacks ``delay``."""
    splits = {}
    for seed, (split, num_rows) in enumerate({"train": 600, "valid": 150, "test": 130}.items()):
        columns = example_columns(num_rows, seed=seed, targets=(DELAY,))
        columns["cost"] = pc.multiply(pc.fill_null(columns["wind"], 0.0), 1e-6)
        if not lacking:
            columns["delay"] = pc.fill_null(columns["delay"], 10.0)
        splits[split] = columns
    roles = ROLES | {"delay": "target", "cost": "target"}
    write_table(folder / "reduce", splits, roles=roles, targets=(DELAY, COST))
    return encode_only(folder)


@pytest.mark.parametrize("lacking", [False, True])
def test_one_joint_model_learns_targets_of_any_unit(tmp_path, lacking):
    """The error of each counts in its own spread, or the one in millionths would not be learnt."""
    views = two_regressions(tmp_path, lacking=lacking)
    model, recorder = fitted(views, tmp_path, joint=True, iterations=150)
    files = saved(model, tmp_path / "model")
    back = load(tmp_path / "model", {"summary": {}})
    rows = table_rows(views, "test")
    values = back.predict(rows)

    assert sorted(files) == ["joint.cbm", "trees.json"]
    for place, name in enumerate(("delay", "cost")):
        truth = encoded_rows(views, "test").targets[:, place]
        known = ~np.isnan(truth)
        error = np.sqrt(np.mean((values[name] - truth)[known] ** 2))
        assert error < 0.5 * np.std(truth[known])
        assert np.array_equal(values[name], model.predict(rows)[name])
        assert model.summary["targets"][name]["trees"] > 1
    assert any(name == "inner_loss_joint" for name, _, _ in recorder.recorded_metrics)


def test_joint_trees_are_refused_where_they_cannot_be(views, tmp_path):
    with pytest.raises(
        ConfigError, match=r"`train.catboost.joint` is true, but \['late', 'class'\] have classes"
    ):
        fitted(views, tmp_path, joint=True)
    alone = make_case(tmp_path / "alone", targets=(DELAY,))
    with pytest.raises(ConfigError, match="but 'delay' is the only target"):
        fitted(alone, tmp_path, joint=True)
    wanted = {"joint": True, "device": "cuda"}
    with pytest.raises(ConfigError, match=r"`joint` is True, which works on the CPU only, and"):
        parse_section(CatboostParams, wanted, key="train.catboost", path=tmp_path / "p.yaml")
