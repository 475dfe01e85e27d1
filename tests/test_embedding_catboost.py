"""Trees on a bag of networks: out-of-fold features, folds seen through them, the saved model."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.data.encoder import open_encoder
from headrace.data.predictions import VALID_SEEN, read_predictions
from headrace.data.table import open_table
from headrace.errors import ConfigError, DataError, SchemaError
from headrace.models.bagging import BaggedModel
from headrace.models.embedding_catboost import (
    EmbeddingCatboostParams,
    network_features,
)
from headrace.models.package import load_package
from headrace.models.protocol import load_model, model_section
from headrace.params import parse_section
from headrace.record import MemoryRecorder
from headrace.stages.decide import DecideParams, decide
from headrace.stages.embedding_catboost import embedding_catboost
from headrace.stages.evaluate import EvaluateParams, evaluate
from headrace.stages.interpret import InterpretParams, interpret
from headrace.stages.publish import PublishParams, publish
from headrace.stages.stack import StackParams, stack
from headrace.stages.train import train
from headrace.storage import read_json, verify_folder
from tests import published_case
from tests.halting import Halt, HaltingRecorder
from tests.train_case import (
    DELAY,
    RESOURCES,
    TARGETS,
    encoded_rows,
    example_columns,
    make_case,
    table_rows,
    tree_bytes,
    views_of,
)

QUICK = {"max_epochs": 3, "batch_rows": 64}
FEATURES = ("predictions", "embeddings")


def train_networks(folder, **params):
    section = {"members": 1, "numbers": "plain", "hidden_sizes": [16], **QUICK, **params}
    train(
        folder / "reduce",
        folder / "encode",
        folder / "nn",
        model_section("nn").model_validate(section),
        model="nn",
        cache=folder / "cache",
        checkpoints=folder / "checkpoints-nn",
        resources=RESOURCES,
        recorder=MemoryRecorder(),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    make_case(folder, weight=True)
    train_networks(folder)
    return folder


def run(folder, out, *, recorder=None, **params):
    recorder = recorder or MemoryRecorder()
    result = embedding_catboost(
        folder / "reduce",
        folder / "encode",
        folder / "nn",
        out,
        EmbeddingCatboostParams.model_validate({"iterations": 30, "depth": 3, **params}),
        cache=folder / "cache",
        checkpoints=out.parent / f"checkpoints-{out.name}",
        resources=RESOURCES,
        recorder=recorder,
    )
    return result, recorder


def features_of(folder, rows, kind="predictions"):
    """The features of rows of the table, whose ids and folds are among their columns."""
    shown = open_table(folder / "reduce").read("valid", open_encoder(folder / "encode").inputs)
    features = network_features(
        load_model(folder / "nn"), open_encoder(folder / "encode"), kind, shown
    )
    added = features.added_to(rows)
    names = [name for name in added.column_names if name not in rows.column_names]
    return {name: added[name].to_numpy() for name in names}


def all_rows(folder, split):
    table = open_table(folder / "reduce")
    return table.read(split, ["row_id", "fold", *table.contract.features])


@pytest.mark.parametrize("features", FEATURES)
def test_valid_and_test_rows_are_predicted_by_a_model_that_has_seen_all_folds(
    folder, tmp_path, features
):
    result, _ = run(folder, tmp_path / "out", features=features)
    verify_folder(tmp_path / "out")
    for target in TARGETS:
        found = read_predictions(tmp_path / "out", target)
        assert found.model == "embedding_catboost"
        assert len(found.of_split("train").row_id) == 0
        assert set(found.folds_seen) == {(0, 1, 2, 3, 4)}
        for split in ("valid", "test"):
            expected = np.sort(all_rows(folder, split)["row_id"].to_numpy())
            assert np.array_equal(found.of_split(split).row_id, expected)
    assert str(result) == (
        "embedding_catboost learnt delay, late, class; predicted rows: valid 150, test 130"
    )


def test_what_the_networks_have_seen_the_trees_have_seen(folder, tmp_path):
    """The labels of valid rows, on which the networks were stopped, are passed on."""
    make_case(tmp_path, weight=True)
    train_networks(tmp_path, stop_rows="valid")
    run(tmp_path, tmp_path / "out")

    assert read_predictions(tmp_path / "out", DELAY).folds_seen == ((VALID_SEEN, 0, 1, 2, 3, 4),)


def test_a_train_row_gets_the_out_of_fold_prediction_and_others_the_mean_of_all(folder):
    for split in ("train", "valid"):
        rows = all_rows(folder, split)
        found = features_of(folder, rows)
        order = np.argsort(rows["row_id"].to_numpy())
        for target in TARGETS[:2]:
            told = read_predictions(folder / "nn", target).of_split(split)
            assert found[f"nn/{target.name}"][order] == pytest.approx(told.values, rel=1e-5)
        classes = read_predictions(folder / "nn", TARGETS[2]).of_split(split).values
        for place in range(3):
            assert found[f"nn/class/{place}"][order] == pytest.approx(classes[:, place], rel=1e-5)


@pytest.mark.parametrize("features", FEATURES)
def test_rows_in_another_order_have_the_same_features(folder, features):
    rows = all_rows(folder, "train")
    order = np.random.default_rng(0).permutation(rows.num_rows)
    plain = features_of(folder, rows, features)
    shuffled = features_of(folder, rows.take(pa.array(order)), features)

    assert list(plain) == list(shuffled)
    for name, values in plain.items():
        assert shuffled[name] == pytest.approx(values[order], rel=1e-4, abs=1e-5)


def test_embeddings_of_different_networks_lie_in_one_space(folder, tmp_path):
    """A network from another seed has other axes; turned, its embeddings lie nearer."""
    make_case(tmp_path, weight=True)
    train_networks(tmp_path, seed=1)
    own, other = (load_model(where / "nn").members["fold-0"] for where in (folder, tmp_path))
    encoder = open_encoder(folder / "encode")
    shown = open_table(folder / "reduce").read("valid", encoder.inputs)
    bag = BaggedModel({"fold-0": own, "fold-1": other})
    spaces = network_features(bag, encoder, "embeddings", shown).spaces
    rows = encoded_rows(views_of(folder), "test")
    first, plain = (network.embed(rows).astype(np.float64) for network in (own, other))
    turned = spaces["fold-1"].map(plain)

    assert spaces["fold-0"].map(first) == pytest.approx(first, abs=1e-6)
    assert apart(first, turned) < 0.6 * apart(first, plain)
    assert spread(turned) == pytest.approx(spread(plain))  # turned, and not squeezed


def apart(left, right):
    return np.linalg.norm((left - left.mean(axis=0)) - (right - right.mean(axis=0)))


def spread(embedding):
    return np.linalg.norm(embedding - embedding.mean(axis=0))


@pytest.mark.parametrize("features", FEATURES)
def test_the_written_model_reads_raw_rows_and_gives_the_written_predictions(
    folder, tmp_path, features
):
    run(folder, tmp_path / "out", features=features)
    fitted = load_model(tmp_path / "out")
    values = fitted.predict(table_rows(views_of(folder), "test"))
    row_id = all_rows(folder, "test")["row_id"].to_numpy()

    assert fitted.inputs == "table"
    for target in TARGETS:
        found = read_predictions(tmp_path / "out", target).of_split("test")
        expected = values[target.name][np.argsort(row_id)]
        assert found.values == pytest.approx(expected, rel=1e-4, abs=1e-6)
    with pytest.raises(SchemaError, match="rows of the reduced table, not encoded ones"):
        fitted.predict(encoded_rows(views_of(folder), "test"))


@pytest.mark.parametrize("features", FEATURES)
def test_two_runs_are_byte_equal(folder, tmp_path, features):
    run(folder, tmp_path / "a", features=features)
    run(folder, tmp_path / "deeper" / "b", features=features)

    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "deeper" / "b")


def test_labels_of_valid_and_test_rows_change_no_byte(tmp_path):
    files = []
    for name, seed in (("a", 1), ("b", 2)):
        change = {}
        for split, num_rows in (("valid", 150), ("test", 130)):
            own = example_columns(num_rows, seed=1 if split == "valid" else 2)
            order = np.random.default_rng(seed).permutation(num_rows)
            change[split] = {target.name: own[target.name].take(order) for target in TARGETS}
        make_case(tmp_path / name, change=change)
        train_networks(tmp_path / name)
        run(tmp_path / name, tmp_path / name / "out", features="embeddings")
        files.append(tree_bytes(tmp_path / name / "out"))

    assert files[0] == files[1]


def test_importances_name_the_features(folder, tmp_path):
    result, _ = run(folder, tmp_path / "out")
    importances = result.summary["fold-0"]["targets"]["delay"]["importances"]

    assert set(importances) == {
        "distance", "wind", "carrier", "gate",
        "nn/delay", "nn/late", "nn/class/0", "nn/class/1", "nn/class/2",
    }  # fmt: skip


def test_the_weight_of_the_networks_is_how_readily_they_are_asked(folder, tmp_path):
    told = {}
    for weight in (1.0, 0.02):
        result, _ = run(folder, tmp_path / str(weight), network_weight=weight)
        importances = result.summary["fold-0"]["targets"]["delay"]["importances"]
        told[weight] = sum(v for name, v in importances.items() if name.startswith("nn/"))

    assert told[0.02] < 0.5 * told[1.0]
    given = {"device": "cuda"}
    with pytest.raises(ConfigError, match=r"`network_weight` is 0.02, which works on the CPU only"):
        parse_section(EmbeddingCatboostParams, given, key="x", path=tmp_path / "params.yaml")


def test_a_run_that_is_stopped_keeps_the_fits_that_were_finished(folder, tmp_path):
    run(folder, tmp_path / "whole")
    with pytest.raises(Halt):
        run(folder, tmp_path / "cut", recorder=HaltingRecorder(150))
    _, again = run(folder, tmp_path / "cut")

    assert "fold-0 was finished by an earlier run and is kept." in again.notes
    assert tree_bytes(tmp_path / "cut") == tree_bytes(tmp_path / "whole")


def test_without_a_bag_there_is_one_model(folder, tmp_path):
    run(folder, tmp_path / "out", bag="none")

    assert list(load_model(tmp_path / "out").trees.members) == ["all"]


def test_networks_that_are_no_bag_are_refused(tmp_path):
    make_case(tmp_path)
    train_networks(tmp_path, bag="none")
    with pytest.raises(ConfigError, match=r"set `train\.nn\.bag` to folds or bootstrap"):
        run(tmp_path, tmp_path / "out")


def test_a_column_that_is_called_like_a_feature_is_refused(folder):
    rows = all_rows(folder, "valid")
    with pytest.raises(DataError, match=r"has the columns \['nn/delay'\], as the features"):
        features_of(folder, rows.append_column("nn/delay", rows["row_id"]))


def test_messages_name_the_section(folder, tmp_path):
    _, recorder = run(folder, tmp_path / "out", pool_budget=100_000)

    assert any("`embedding_catboost.pool_budget`" in text for text in recorder.warnings)


@pytest.mark.parametrize("features", FEATURES)
def test_what_the_networks_say_is_written_under_the_row_ids(folder, tmp_path, features):
    """Of every row of every split, and the same for rows in another order."""
    run(folder, tmp_path / "out", features=features)
    rng = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        found = pq.read_table(tmp_path / "out" / "vectors" / f"{split}.parquet")
        rows = all_rows(folder, split)
        assert found["row_id"].equals(rows["row_id"])
        assert found["fold"].equals(rows["fold"])
        assert found["model"].unique().to_pylist() == ["nn"]
        mixed = rows.take(pa.array(rng.permutation(rows.num_rows)))
        columns = features_of(folder, mixed, features)
        of_row = dict(
            zip(mixed["row_id"].to_pylist(), np.column_stack(list(columns.values())), strict=True)
        )
        expected = np.stack([of_row[row_id] for row_id in found["row_id"].to_pylist()])
        assert np.array(found["vector"].to_pylist()) == pytest.approx(expected, abs=1e-5)


def test_it_is_compared_and_published_like_any_model_and_never_blended(tmp_path):
    """Networks that learnt little lose to it, so it is chosen; its package reads raw rows."""
    published_case.make_case(tmp_path)
    train_networks(tmp_path, max_epochs=1)
    run(tmp_path, tmp_path / "out", iterations=150)
    members = {"nn": tmp_path / "nn", "embedding_catboost": tmp_path / "out"}
    told = {"resources": RESOURCES, "recorder": MemoryRecorder()}
    table, stacked = tmp_path / "reduce", tmp_path / "stack-both"
    stack(table, members, stacked, StackParams(), **told)
    asked = tmp_path / "interpret"
    interpret(table, tmp_path / "encode", members, stacked, asked, InterpretParams(), **told)
    evaluate(
        table, members, stacked, tmp_path / "evaluate", EvaluateParams(), interpretation=asked,
        **told,
    )  # fmt: skip
    decided = tmp_path / "decide-both"
    decide(table, members, stacked, decided, DecideParams(), **told)
    publish(
        table, tmp_path / "encode", members, stacked, decided, tmp_path / "package",
        PublishParams(), **told,
    )  # fmt: skip
    selection = read_json(stacked / "selection.json")["targets"]
    compared = read_json(tmp_path / "evaluate" / "comparison.json")["targets"]
    package = load_package(tmp_path / "package")

    for name, entry in selection.items():
        assert entry["chosen"] == "embedding_catboost"
        assert entry["compared_only"] == ["embedding_catboost"]
        assert set(compared[name]["models"]) == {"nn", "embedding_catboost", "stack"}
    importances = read_json(asked / "importances.json")["models"]["embedding_catboost"]
    assert "distance" in importances["delay"]
    assert "nn/delay" not in importances["delay"]  # what the table has is shuffled, not features
    shap = read_json(asked / "shap.json")["models"]
    assert {"distance", "nn/delay"} <= set(shap["embedding_catboost"]["delay"]["mean_abs"])
    assert package.description.members == ("embedding_catboost",)
    assert {"catboost", "safetensors", "torch"} <= {
        re.split(r"[<>=~!]", line)[0]
        for line in (tmp_path / "package" / "requirements.txt").read_text().splitlines()
    }
    truth = open_table(table).read("test", ["delay"])["delay"].to_numpy()
    rows = published_case.raw_columns(150, seed=2)
    predicted = package.predict(
        pa.table({column.name: rows[column.name] for column in package.inputs})
    )
    error = predicted["delay"].to_numpy() - truth
    assert np.sqrt(np.mean(error**2)) < 0.7 * np.std(truth)
