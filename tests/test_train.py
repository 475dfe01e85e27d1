"""Stage ``train``: what it writes, that it repeats, and what it refuses before fitting."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from headrace.data.predictions import VALID_SEEN, read_predictions
from headrace.data.table import open_table
from headrace.errors import ConfigError, DataError, IntegrityError
from headrace.models.bagging import fit_plans
from headrace.models.protocol import KINDS, load_model, model_section
from headrace.record import MemoryRecorder
from headrace.stages.train import Trained, count_labels, refuse_unlearnable, train
from headrace.storage import verify_folder
from tests.halting import Halt, HaltingRecorder
from tests.train_case import (
    DELAY,
    QUICK,
    RESOURCES,
    TARGETS,
    encoded_rows,
    example_columns,
    make_case,
    table_rows,
    tree_bytes,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    make_case(folder, weight=True)
    return folder


def run(folder, model, out, *, recorder=None, **params):
    recorder = recorder or MemoryRecorder()
    result = train(
        folder / "reduce",
        folder / "encode",
        out,
        model_section(model).model_validate(QUICK.get(model, {}) | params),
        model=model,
        cache=folder / "cache",
        checkpoints=out.parent / f"checkpoints-{out.name}",
        resources=RESOURCES,
        recorder=recorder,
    )
    return result, recorder


@pytest.mark.parametrize("model", KINDS)
def test_every_row_is_predicted_once_by_a_model_that_has_not_seen_it(folder, tmp_path, model):
    result, recorder = run(folder, model, tmp_path / "out")
    verify_folder(tmp_path / "out")
    table = open_table(folder / "reduce")
    for target in TARGETS:
        found = read_predictions(tmp_path / "out", target)
        for split in ("train", "valid", "test"):
            expected = table.read(split, ["row_id", "fold"])
            of_split = found.of_split(split)
            order = np.argsort(expected["row_id"].to_numpy())
            assert np.array_equal(of_split.row_id, expected["row_id"].to_numpy()[order])
            fold = expected["fold"].fill_null(-1).to_numpy()[order]
            assert np.array_equal(of_split.fold, fold)
            for code, own in zip(of_split.seen, fold, strict=True):
                assert set(found.folds_seen[code]) == {0, 1, 2, 3, 4} - {own}
        assert found.model == model
    assert isinstance(result, Trained)
    assert str(result) == (
        f"{model} learnt delay, late, class; predicted rows: valid 150, test 130, train 600"
    )
    assert {data["context"]: data["rows"] for data in recorder.datasets} == {
        "train": 600, "valid": 150, "test": 130,
    }  # fmt: skip
    assert recorder.last_progress[:3] == (880, 880, "rows")


@pytest.mark.parametrize("model", KINDS)
def test_the_written_model_gives_the_written_predictions(folder, tmp_path, model):
    run(folder, model, tmp_path / "out")
    fitted = load_model(tmp_path / "out")
    views = make_case(tmp_path, weight=True)
    read = encoded_rows if fitted.inputs == "encoded" else table_rows
    values = fitted.predict(read(views, "test"))
    row_id = open_table(folder / "reduce").read("test", ["row_id"])["row_id"].to_numpy()
    for target in TARGETS:
        found = read_predictions(tmp_path / "out", target).of_split("test")
        order = np.argsort(found.row_id)
        assert np.array_equal(found.values[order], values[target.name][np.argsort(row_id)])


@pytest.mark.parametrize("model", KINDS)
def test_two_runs_are_byte_equal(folder, tmp_path, model):
    run(folder, model, tmp_path / "a")
    run(folder, model, tmp_path / "deeper" / "b")

    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "deeper" / "b")


@pytest.mark.parametrize("model", KINDS)
def test_labels_of_valid_and_test_rows_change_no_byte_that_was_learnt(tmp_path, model):
    """Permuted labels outside train: the same model and the same predictions."""
    files = []
    for name, seed in (("a", 1), ("b", 2)):
        change = {}
        for split, num_rows in (("valid", 150), ("test", 130)):
            own = example_columns(num_rows, seed=1 if split == "valid" else 2)
            order = np.random.default_rng(seed).permutation(num_rows)
            change[split] = {target.name: own[target.name].take(order) for target in TARGETS}
        make_case(tmp_path / name, change=change)
        run(tmp_path / name, model, tmp_path / name / "out")
        files.append(tree_bytes(tmp_path / name / "out"))

    assert files[0] == files[1]


@pytest.mark.parametrize("model", ["catboost", "nn", "baseline"])
def test_models_beat_the_prior_on_test_rows(folder, tmp_path, model):
    params = {"max_epochs": 25, "patience": 25, "learning_rate": 0.01} if model == "nn" else {}
    run(folder, model, tmp_path / "out", **params)
    table = open_table(folder / "reduce").read("test", ["row_id", "delay"])
    truth = dict(zip(table["row_id"].to_pylist(), table["delay"].to_pylist(), strict=True))
    found = read_predictions(tmp_path / "out", DELAY).of_split("test")
    y = np.array([truth[row] for row in found.row_id], dtype=np.float64)
    known = ~np.isnan(y)

    assert np.sqrt(np.mean((found.values - y)[known] ** 2)) < 0.6 * np.std(y[known])


def test_model_json_holds_what_a_person_asks_and_nothing_of_this_run(folder, tmp_path):
    run(folder, "catboost", tmp_path / "out")
    text = (tmp_path / "out" / "model.json").read_text()
    content = json.loads(text)

    assert content["members"] == [*(f"fold-{fold}" for fold in range(5)), "whole"]
    assert content["summary"]["fold-0"]["targets"]["late"]["trees"] > 1
    assert str(tmp_path) not in text
    names = {path.relative_to(tmp_path / "out").parts[0] for path in (tmp_path / "out").iterdir()}
    assert names == {"manifest.json", "model", "model.json", "predictions"}


def test_an_unknown_model_names_the_nearest(folder, tmp_path):
    with pytest.raises(ConfigError, match="'basline' is not a kind of model; nearest name: base"):
        run(folder, "basline", tmp_path / "out")


def table_columns(folder):
    return open_table(folder / "reduce").contract.features


def spoil(folder: Path, **columns):
    return make_case(folder, change={"train": columns})


def test_a_target_of_one_class_is_refused_with_the_class_that_is_absent(tmp_path):
    spoil(tmp_path, late=pa.array(["no"] * 600))
    with pytest.raises(
        DataError, match=r"target 'late': no row to learn from of the fit fold-0 .* class 'yes'"
    ):
        run(tmp_path, "baseline", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_that_only_one_fold_has_is_refused(tmp_path):
    is_stop = np.arange(600) % 5 == 4
    labels = np.where(is_stop, "c", np.array(["a", "b"])[np.arange(600) % 2])
    spoil(tmp_path, **{"class": pa.array(labels.tolist())})
    with pytest.raises(
        DataError,
        match=r"target 'class': .* the fit fold-0 has the class 'c'; .*lower `extract.folds`",
    ):
        run(tmp_path, "nn", tmp_path / "out")


def test_all_faults_of_the_targets_come_in_one_message(tmp_path):
    spoil(tmp_path, delay=pa.nulls(600, pa.float64()), late=pa.array(["no"] * 600))
    with pytest.raises(DataError) as caught:
        run(tmp_path, "catboost", tmp_path / "out")
    assert "target 'delay' has 0 labelled rows to learn from and 0 to stop on" in str(caught.value)
    assert "target 'late': no row" in str(caught.value)


def test_a_constant_regression_target_is_refused(tmp_path):
    spoil(tmp_path, delay=pa.array([2.5] * 600))
    with pytest.raises(DataError, match=r"target 'delay' has the one value 2.5 in all rows learnt"):
        run(tmp_path, "baseline", tmp_path / "out")


def plans_of(folder, *, bag="folds"):
    table = open_table(folder / "reduce")
    return fit_plans(
        table.folder,
        folder / "encode",
        folder / "cache",
        table.contract,
        range(5),
        bag=bag,
        stop_rows="inner",
        needs_stop_rows=False,
    )


def test_labels_are_counted_per_fit_and_class(folder):
    plans = plans_of(folder)
    counts = count_labels(open_table(folder / "reduce"), plans)
    table = open_table(folder / "reduce").read("train", ["fold", "class", "delay"])
    fold, labels = table["fold"].to_numpy(), np.array(table["class"].to_pylist())
    of_fit_1 = {found.target.name: found for found in counts if found.fit == "fold-1"}
    is_learnt = np.isin(fold, [0, 2, 3])  # 1 is predicted, 4 is for stopping
    values = [v for v, use in zip(table["delay"].to_pylist(), is_learnt, strict=True) if use]

    assert len(counts) == 18
    assert of_fit_1["class"].learnt_K.tolist() == [
        int((is_learnt & (labels == c)).sum()) for c in "abc"
    ]
    assert of_fit_1["class"].held_back == (fold == 4).sum()
    assert of_fit_1["delay"].learnt_K.tolist() == [sum(v is not None for v in values)]
    assert of_fit_1["delay"].low == min(v for v in values if v is not None)
    of_all = {found.target.name: found for found in counts if found.fit == "whole"}
    assert of_all["class"].learnt_K.sum() == len(fold)
    assert of_all["class"].held_back is None
    refuse_unlearnable(counts)


def test_one_labelled_row_is_too_few(folder):
    found, *_ = count_labels(open_table(folder / "reduce"), plans_of(folder, bag="none"))
    few = replace(found, learnt_K=np.array([1]), held_back=5)
    with pytest.raises(DataError, match="has 1 labelled rows to learn from and 5 to stop on;"):
        refuse_unlearnable((few,))


def test_rows_outside_train_get_two_thirds_of_the_whole_model(folder, tmp_path):
    run(folder, "catboost", tmp_path / "out")
    bag = load_model(tmp_path / "out")
    rows = open_table(folder / "reduce").read("test", ["row_id", *table_columns(folder)])
    order = np.argsort(rows["row_id"].to_numpy())
    of_folds = np.mean(
        [bag.members[f"fold-{fold}"].predict(rows)["delay"] for fold in range(5)], axis=0
    )
    expected = (of_folds + 2 * bag.members["whole"].predict(rows)["delay"]) / 3
    found = read_predictions(tmp_path / "out", DELAY).of_split("test")

    assert sum(bag.weights.values()) == pytest.approx(1)
    assert found.values == pytest.approx(expected[order], rel=1e-12)
    assert not np.allclose(expected, of_folds)


@pytest.mark.parametrize(
    ("model", "params"),
    [
        ("catboost", {"iterations": 200, "patience": 3, "learning_rate": 0.3}),
        ("nn", {"max_epochs": 30, "patience": 1, "learning_rate": 0.03}),
    ],
)
def test_the_whole_model_learns_from_every_row_as_long_as_the_others(
    folder, tmp_path, model, params
):
    """Its length is the median of theirs, whatever its own rows would say."""
    _, recorder = run(folder, model, tmp_path / "out", **params)
    members = load_model(tmp_path / "out").members
    tuned = {name: member.tuned for name, member in members.items()}
    of_folds = [tuned[f"fold-{fold}"] for fold in range(5)]

    assert recorder.recorded_params["whole/rows_learnt_from"] == 600
    assert recorder.recorded_params["whole/rows_held_back"] == 0
    assert recorder.recorded_params["fold-1/rows_held_back"] > 0
    for name, value in tuned["whole"].items():
        assert value == round(np.median([one[name] for one in of_folds]))
    assert len({tuple(one.values()) for one in of_folds}) > 1


def test_a_plateau_schedule_holds_rows_back_in_every_fit(folder, tmp_path):
    few = {"schedule": "plateau", "patience": 16, "max_epochs": 2}
    _, recorder = run(folder, "nn", tmp_path / "out", **few)
    assert recorder.recorded_params["whole/rows_held_back"] > 0


def test_a_bootstrap_weighs_no_row_that_early_stopping_looks_at(folder, monkeypatch):
    from headrace.models import catboost as module

    seen = []
    read = module._read_rows
    monkeypatch.setattr(module, "_read_rows", lambda *args: seen.append(read(*args)) or seen[-1])
    module.fit(
        replace(plans_of(folder, bag="bootstrap")[0].views),
        model_section("catboost").model_validate({"iterations": 2}),
        checkpoints=folder / "bootstrap-checkpoints",
        resources=RESOURCES,
        recorder=MemoryRecorder(),
    )
    importance = open_table(folder / "reduce").read("train", ["importance"])["importance"]

    assert seen[0].weight[seen[0].stop] == pytest.approx(importance.to_numpy()[seen[0].stop])
    assert (seen[0].weight[seen[0].learn] > 1.99 * 2).any()


def test_without_a_bag_one_model_predicts_no_train_row(folder, tmp_path):
    run(folder, "catboost", tmp_path / "out", bag="none")
    found = read_predictions(tmp_path / "out", DELAY)

    assert load_model(tmp_path / "out").kind == "catboost"
    assert len(found.of_split("train").row_id) == 0
    assert set(found.folds_seen) == {(0, 1, 2, 3, 4)}


@pytest.mark.parametrize("model", ["catboost", "nn"])
def test_a_model_that_stops_on_valid_rows_has_seen_them(folder, tmp_path, model):
    run(folder, model, tmp_path / "out", bag="none", stop_rows="valid")
    _, recorder = run(folder, model, tmp_path / "again", bag="none", stop_rows="valid")
    found = read_predictions(tmp_path / "out", DELAY)

    assert set(found.folds_seen) == {(VALID_SEEN, 0, 1, 2, 3, 4)}
    assert recorder.recorded_params["rows_learnt_from"] == 600
    assert recorder.recorded_params["rows_held_back"] == 150


@pytest.mark.parametrize("model", ["catboost", "nn"])
def test_bootstrap_samples_give_another_bag(folder, tmp_path, model):
    run(folder, model, tmp_path / "folds")
    _, recorder = run(folder, model, tmp_path / "bootstrap", bag="bootstrap")
    folds, bootstrap = (read_predictions(tmp_path / name, DELAY) for name in ("folds", "bootstrap"))
    table = open_table(folder / "reduce").read("train", ["fold", "row_id"])
    fold, row_id = table["fold"].to_numpy(), table["row_id"].to_numpy()
    views = plans_of(folder, bag="bootstrap")[2].views
    expected = int((np.isin(fold, [0, 1, 3]) & (views.counts(row_id) > 0)).sum())

    assert not np.array_equal(folds.values, bootstrap.values)
    assert recorder.recorded_params["fold-2/rows_learnt_from"] == expected
    assert expected < 0.75 * np.isin(fold, [0, 1, 3]).sum()


def test_a_run_that_is_stopped_keeps_the_fits_that_were_finished(folder, tmp_path):
    run(folder, "nn", tmp_path / "whole")
    recorder = HaltingRecorder(60)  # in the third fit
    with pytest.raises(Halt):
        run(folder, "nn", tmp_path / "cut", recorder=recorder)
    _, again = run(folder, "nn", tmp_path / "cut")

    assert [note for note in again.notes if "finished by an earlier run" in note] == [
        "fold-0 was finished by an earlier run and is kept.",
        "fold-1 was finished by an earlier run and is kept.",
    ]
    assert tree_bytes(tmp_path / "cut") == tree_bytes(tmp_path / "whole")


def test_a_finished_fit_that_is_damaged_is_made_again(folder, tmp_path):
    run(folder, "catboost", tmp_path / "out")
    whole = tree_bytes(tmp_path / "out")
    kept = tmp_path / "checkpoints-out" / "fold-2" / "fitted" / "model" / "delay.cbm"
    kept.write_bytes(kept.read_bytes()[:-9])
    _, again = run(folder, "catboost", tmp_path / "out")

    assert sum("finished by an earlier run" in note for note in again.notes) == 5
    (warned,) = [text for text in again.warnings if "damaged" in text]
    assert "delay.cbm" in warned
    assert tree_bytes(tmp_path / "out") == whole


def test_a_damaged_table_is_refused(tmp_path):
    make_case(tmp_path)
    path = tmp_path / "reduce" / "train" / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"part-00000.parquet has another digest"):
        run(tmp_path, "baseline", tmp_path / "out")


def test_damaged_shards_are_refused(tmp_path):
    make_case(tmp_path)
    path = next((tmp_path / "encode" / "train").rglob("targets.f8"))
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="is damaged"):
        run(tmp_path, "baseline", tmp_path / "out")
