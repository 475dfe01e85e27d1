"""A project's data from Python: the names of ``headrace`` itself."""

import subprocess
import sys

import pandas as pd
import pyarrow as pa
import pytest

import headrace
from headrace.errors import ConfigError, DataError, IntegrityError, SchemaError
from headrace.storage import new_folder
from tests.encode_tables import example_columns, write_table
from tests.published_case import make_case, raw_rows


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    (root / "params.yaml").write_text("version: 1\n")
    make_case(root / "data")
    return root


@pytest.fixture
def inside(project, monkeypatch):
    monkeypatch.chdir(project)
    return project


def test_all_names_load_and_are_documented():
    for name in headrace.__all__:
        value = getattr(headrace, name)
        assert name == "__version__" or value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'frames'"):
        headrace.frames  # noqa: B018


def test_importing_headrace_loads_nothing_heavy():
    program = "import headrace, sys; print(*sorted(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"pandas", "torch", "numba", "pyarrow", "mlflow"} & set(result.stdout.split())


def test_a_frame_comes_from_the_cache_the_second_time_and_says_so(inside, capsys):
    first = headrace.frame("data/reduce", split="valid", columns=["row_id", "seats", "carrier"])
    assert capsys.readouterr().err == ""
    second = headrace.frame("data/reduce", split="valid", columns=["row_id", "seats", "carrier"])
    assert "headrace: valid rows of reduce: frame from the cache in" in capsys.readouterr().err
    pd.testing.assert_frame_equal(first, second)
    assert list(first.dtypes.astype(str)) == ["int64", "uint8", "category"]
    assert len(first) == 200
    assert list((inside / ".headrace" / "cache" / "frames").glob("*.frame"))


def test_a_damaged_entry_is_warned_of_on_stderr(inside, capsys):
    headrace.frame(split="test", columns=["seats"])
    for path in (inside / ".headrace" / "cache" / "frames").glob("*.frame"):
        path.write_bytes(b"x")
    headrace.frame(split="test", columns=["seats"])
    assert "headrace: warning: a cached frame" in capsys.readouterr().err


def test_defaults_are_the_train_rows_and_all_columns_of_the_reduced_table(inside):
    frame = headrace.frame()
    assert len(frame) == 600
    names = [column.name for column in headrace.table().contract.columns]
    assert list(frame) == ["row_id", "fold", *names]
    frame.loc[:, "distance"] = 0.0  # ours to change
    assert headrace.frame()["distance"].max() > 0


def test_paths_of_stages_are_found_from_below_the_root(inside, monkeypatch):
    (inside / "notebooks").mkdir(exist_ok=True)
    monkeypatch.chdir(inside / "notebooks")
    assert headrace.table("data/reduce").num_rows("valid") == 200
    assert headrace.table(inside / "data" / "reduce").num_rows("valid") == 200
    assert sum(b.num_rows for b in headrace.batches("data/reduce", split="valid")) == 200


def test_a_table_outside_of_a_project_is_read_without_a_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "table", {"train": example_columns(20)})
    for _ in range(2):
        assert len(headrace.frame("table")) == 20
    assert capsys.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["table"]


def test_what_is_not_there_is_said(inside):
    with pytest.raises(IntegrityError, match="data/redux does not exist"):
        headrace.frame("data/redux")
    with pytest.raises(SchemaError, match="nearest name: seats"):
        headrace.frame(columns=["seat"])
    with pytest.raises(SchemaError, match="nearest name: train"):
        headrace.frame(split="trein")
    with pytest.raises((IntegrityError, ConfigError), match=r"data/nowhere"):
        headrace.model("data/nowhere")


def test_predictions_join_the_table_by_row_id(inside):
    frame = headrace.predictions("data/train/catboost", "late")
    assert {"row_id", "fold", "split", "model", "target", "folds_seen", "prediction"} == set(frame)
    assert set(frame["model"]) == {"catboost"}
    assert str(frame["fold"].dtype) == "Int8"
    valid = headrace.frame(split="valid", columns=["row_id", "late"])
    joined = valid.merge(frame, on="row_id", validate="one_to_one")
    assert len(joined) == 200
    assert joined["prediction"].between(0, 1).all()
    bands = headrace.predictions("data/stack", "band")
    assert {"class_0", "class_1", "class_2"} <= set(bands)


def test_predictions_of_another_target_name_the_nearest(inside):
    with pytest.raises(DataError, match="no predictions of 'latte'; nearest name: late"):
        headrace.predictions("data/stack", "latte")
    with pytest.raises(DataError, match="there are: band, delay, late"):
        headrace.predictions("data/stack", "zzz")


def test_damaged_predictions_are_refused(tmp_path):
    with new_folder(tmp_path / "model") as folder:
        (folder / "predictions").mkdir()
        (folder / "predictions" / "late.parquet").write_bytes(b"PAR1")
    (tmp_path / "model" / "predictions" / "late.parquet").write_bytes(b"PAR2")
    with pytest.raises(IntegrityError, match="damaged"):
        headrace.predictions(tmp_path / "model", "late")


def test_the_published_model_predicts_raw_rows(inside):
    predicted = headrace.model().predict(raw_rows(7))
    assert isinstance(predicted, pa.Table)
    assert predicted.num_rows == 7
