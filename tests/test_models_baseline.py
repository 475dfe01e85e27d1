"""The baseline: priors by hand, and a linear model against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits

from headrace.data.shards import open_shards
from headrace.errors import IntegrityError, SchemaError
from headrace.models.baseline import BaselineParams, fit, load
from headrace.models.protocol import StopRows
from headrace.record import MemoryRecorder
from tests.encode_tables import changed, write_table
from tests.train_case import (
    DELAY,
    encode_only,
    encoded_rows,
    example_columns,
    make_case,
    make_far_case,
    table_rows,
)


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("case"), weight=True)


def fitted(views, **params):
    recorder = MemoryRecorder()
    model = fit(
        views,
        BaselineParams(**params),
        checkpoints=views.cache,
        resources=None,
        recorder=recorder,
    )
    return model, recorder


def test_the_prior_is_the_weighted_mean_and_the_weighted_shares(views):
    train, valid = encoded_rows(views, "train"), encoded_rows(views, "valid")
    values = fitted(views)[0].predict(valid)
    w = train.weight.astype(np.float64)
    known = ~np.isnan(train.targets)
    shares = [w[train.targets[:, 2] == k].sum() / w.sum() for k in range(3)]

    def mean(j):
        return np.average(train.targets[known[:, j], j], weights=w[known[:, j]])

    assert values["delay"] == pytest.approx(np.full(150, mean(0)))
    assert values["late"] == pytest.approx(np.full(150, mean(1)))
    assert values["class"] == pytest.approx(np.tile(shares, (150, 1)))


def test_only_the_folds_of_the_views_are_learnt(views):
    model, recorder = fitted(replace(views, folds=(1, 2), stop=StopRows("fold", fold=2)))
    train = encoded_rows(views, "train")
    rows = np.isin(train.fold, (1, 2)) & ~np.isnan(train.targets[:, 0])
    expected = np.average(train.targets[rows, 0], weights=train.weight[rows].astype(float))

    assert model.summary["priors"]["delay"] == [pytest.approx(expected)]
    assert recorder.recorded_params["rows_learnt_from"] == np.isin(train.fold, (1, 2)).sum()


def design(rows, num_codes):
    missing = np.isnan(rows.numeric)
    parts = [np.where(missing, 0, rows.numeric), missing]
    parts += [np.eye(count)[rows.codes[:, c]] for c, count in enumerate(num_codes)]
    return np.concatenate(parts, axis=1, dtype=np.float64)


def test_linear_is_what_scikit_learn_finds(views):
    penalty = 1e-2
    num_codes = open_shards(views.encoded, "train").cardinalities
    train, test = encoded_rows(views, "train"), encoded_rows(views, "test")
    values = fitted(views, kind="linear", penalty=penalty, max_passes=500)[0].predict(test)
    for j, name in enumerate(["delay", "late", "class"]):
        rows = train.where(~np.isnan(train.targets[:, j]))
        w, x = rows.weight.astype(np.float64), design(rows, num_codes)
        y = rows.targets[:, j].astype(np.float64)
        if name == "delay":
            mean = np.average(y, weights=w)
            std = np.sqrt(np.average((y - mean) ** 2, weights=w))
            peer = Ridge(alpha=penalty * w.sum()).fit(x, (y - mean) / std, w)
            expected = peer.predict(design(test, num_codes)) * std + mean
        else:
            peer = LogisticRegression(C=1 / (penalty * w.sum()), max_iter=5000, tol=1e-8)
            expected = peer.fit(x, y, w).predict_proba(design(test, num_codes))
            expected = expected[:, 1] if name == "late" else expected
        assert values[name] == pytest.approx(expected, abs=2e-3 * np.abs(expected).max()), name


def test_linear_beats_the_prior_by_far(views):
    test = encoded_rows(views, "test")
    known = ~np.isnan(test.targets[:, 0])
    y = test.targets[known, 0]
    errors = [
        np.std(fitted(views, kind=kind)[0].predict(test)["delay"][known] - y)
        for kind in ("prior", "linear")
    ]

    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("kind", ["prior", "linear"])
def test_a_target_far_from_zero_is_learnt_as_well(tmp_path, kind):
    """Seconds since 1970: in float32 all of them are one number."""
    near, far = make_far_case(tmp_path / "a", 0.0), make_far_case(tmp_path / "b", 1.7e9)
    expected = fitted(near, kind=kind)[0].predict(encoded_rows(near, "test"))["delay"]
    found = fitted(far, kind=kind)[0].predict(encoded_rows(far, "test"))["delay"]

    assert found - 1.7e9 == pytest.approx(expected, abs=0.01)


def test_the_number_of_cores_changes_no_bit(tmp_path):
    """BLAS divides a product by its threads, and rounds by how it was divided."""
    views = make_case(tmp_path, num_train=30_000, targets=(DELAY,))
    found = []
    for num_threads in (1, 2):
        with threadpool_limits(num_threads):
            model = fitted(views, kind="linear", max_passes=5)[0]
            found.append(model.predict(encoded_rows(views, "train"))["delay"])

    assert np.array_equal(*found)


def test_too_few_passes_are_said(views):
    recorder = fitted(views, kind="linear", max_passes=2)[1]

    assert "not converged" in recorder.warnings[0]
    assert "train.baseline.max_passes" in recorder.warnings[0]


@pytest.mark.parametrize("kind", ["prior", "linear"])
def test_a_saved_model_predicts_the_same_and_two_fits_are_equal(views, tmp_path, kind):
    test = encoded_rows(views, "test")
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        model, _ = fitted(views, kind=kind)
        model.save(tmp_path / name)
        files.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    back = load(tmp_path / "a", {})

    assert files[0] == files[1]
    for name, values in model.predict(test).items():
        assert np.array_equal(values, back.predict(test)[name])
    assert back.summary == model.summary


def test_no_rows_give_no_predictions(views):
    none = encoded_rows(views, "test").where(np.arange(0))
    for kind in ("prior", "linear"):
        values = fitted(views, kind=kind)[0].predict(none)
        assert {name: v.shape for name, v in values.items()} == {
            "delay": (0,), "late": (0,), "class": (0, 3),
        }  # fmt: skip


def test_rows_that_are_not_of_its_encoder_are_refused(views):
    model, _ = fitted(views, kind="linear")
    rows = encoded_rows(views, "test")
    with pytest.raises(SchemaError, match="reads encoded rows"):
        model.predict(table_rows(views, "test"))
    with pytest.raises(SchemaError, match="fitted on 2 and 2"):
        model.predict(changed(rows, numeric=rows.numeric[:, :1]))
    with pytest.raises(SchemaError, match="codes that the baseline has not"):
        model.predict(changed(rows, codes=rows.codes + 100))


def test_half_a_model_is_refused(views, tmp_path):
    fitted(views, kind="linear")[0].save(tmp_path)
    (tmp_path / "coefficients.safetensors").write_bytes(b"nothing")
    with pytest.raises(IntegrityError, match="does not hold a whole baseline"):
        load(tmp_path, {})


def test_a_table_without_categories_is_fine(tmp_path):
    """Numbers alone: the one-hot part is empty."""
    columns = example_columns(80, targets=(DELAY,))
    columns = {name: columns[name] for name in ("distance", "wind", "delay")}
    roles = {"distance": "numeric", "wind": "numeric", "delay": "target"}
    write_table(
        tmp_path / "reduce", {"train": columns, "valid": columns}, roles=roles, targets=(DELAY,)
    )
    views = encode_only(tmp_path)
    values = fitted(views, kind="linear")[0].predict(encoded_rows(views, "valid"))

    y = columns["delay"].to_numpy(zero_copy_only=False)
    assert np.nanmean((values["delay"] - y) ** 2) < 0.8 * np.nanvar(y)
