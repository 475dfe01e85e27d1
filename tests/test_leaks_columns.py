"""Columns that give a target away are named, honest ones are not."""

import numpy as np
import pyarrow as pa
import pytest

from headrace.data.leaks import suspicious_columns
from headrace.errors import DataError
from headrace.record import MemoryRecorder
from headrace.stages.encode import EncodeParams, encode
from tests.train_case import RESOURCES, encoded_rows, example_columns, make_case

NUM_ROWS = 600


def found(tmp_path, columns, *, leaks="warn"):
    """Encode the case with changed train columns; return the warnings about leaks."""
    make_case(tmp_path, change={"train": columns})
    recorder = MemoryRecorder()
    encode(
        tmp_path / "reduce",
        tmp_path / "again",
        EncodeParams(leaks=leaks),
        resources=RESOURCES,
        recorder=recorder,
    )
    return [text for text in recorder.warnings if "alone predicts" in text]


def delays():
    return np.array(example_columns(NUM_ROWS)["delay"].to_pylist(), dtype=np.float64)


def late(where=("no", "yes")):
    labels = example_columns(NUM_ROWS)["late"].to_pylist()
    return [None if label is None else where[label == "yes"] for label in labels]


def test_an_honest_table_raises_no_suspicion(tmp_path):
    assert found(tmp_path, {}) == []


@pytest.mark.parametrize(
    "leak",
    [
        lambda y: 3 * y - 7,
        lambda y: np.where(np.arange(NUM_ROWS) % 4 == 0, np.nan, y),  # a quarter is missing
    ],
    ids=["line", "with gaps"],
)
def test_a_number_that_is_the_answer_is_named(tmp_path, leak):
    (warning,) = found(tmp_path, {"wind": pa.array(leak(delays()), from_pandas=True)})

    assert "column 'wind' alone predicts target 'delay' with R² 1.0000 (" in warning
    assert "set `extract.columns.wind.role` to ignore, or `encode.leaks` to allow" in warning


def test_a_category_that_is_the_answer_is_named(tmp_path):
    gate = [None if label is None else int(label) for label in late(("1", "2"))]
    (warning,) = found(tmp_path, {"gate": pa.array(gate)})

    assert "column 'gate' alone predicts target 'late' with ROC-AUC 1.0000" in warning


def test_missing_values_that_are_the_answer_are_named(tmp_path):
    wind = [None if label == "yes" else 0.5 + i for i, label in enumerate(late())]
    (warning,) = found(tmp_path, {"wind": pa.array(wind)})

    assert "column 'wind' alone predicts target 'late'" in warning


def test_stop_refuses_and_writes_nothing(tmp_path):
    with pytest.raises(DataError, match=r"column 'wind' alone .*set `extract.columns.wind.role`"):
        found(tmp_path, {"wind": pa.array(delays(), from_pandas=True)}, leaks="stop")
    assert not (tmp_path / "again").exists()


def test_allow_says_nothing(tmp_path):
    columns = {"wind": pa.array(delays(), from_pandas=True)}

    assert found(tmp_path, columns, leaks="allow") == []


def test_ids_and_rare_labels_do_not_look_like_leaks(tmp_path):
    """Each row's own label of a category predicts it in-sample, and nothing on other rows."""
    views = make_case(tmp_path, change={"train": {"distance": pa.array(np.arange(600.0))}})
    rows = encoded_rows(views, "train")
    targets = views.contract.targets

    assert (
        suspicious_columns(
            rows, numeric=("distance", "wind"), categories=("carrier", "gate"), targets=targets
        )
        == ()
    )
