"""The rows a model is most wrong about, and how they are found in the table."""

import numpy as np
import pytest

from headrace.data.lookup import rows_by_id
from headrace.data.table import open_table
from headrace.errors import DataError
from headrace.evaluation.metrics import Sample
from headrace.evaluation.worst import worst_json, worst_of, worst_rows
from headrace.schema import Target
from tests.evaluation_case import CARRIER, DELAY, LATE, Case

IDS = np.array([70, -5, 30, 2**62], np.int64)


def test_regression_by_absolute_error_and_equal_ones_by_id():
    sample = Sample("regression", np.array([1.0, 2, 3, 4]), np.array([3.0, 0, 3, 4.5]), IDS * 1.0)
    worst = worst_rows(sample, IDS, count=3)

    assert worst.row_id.tolist() == [-5, 70, 2**62]
    assert worst.loss.tolist() == [2, 2, 0.5]
    told = worst_json(worst, DELAY, "nn", {"wind": [1.5, None, "x"]})
    assert told["columns"] == ["wind"]
    assert (told["model"], told["loss"]) == ("nn", "absolute error")
    assert told["rows"][2] == {
        "row_id": str(2**62),
        "truth": 4,
        "prediction": 4.5,
        "loss": 0.5,
        "values": {"wind": "x"},
    }


def test_rows_in_parts_have_the_same_worst():
    """Whatever the parts, ties included; some parts are empty."""
    rng = np.random.default_rng(0)
    truth, row_id = rng.integers(0, 3, 300).astype(float), rng.permutation(300)
    sample = Sample("multiclass", truth, rng.dirichlet([1, 1, 1], 300).round(1))
    cuts = np.split(np.arange(300), [0, 7, 100, 100, 299])
    whole = worst_rows(sample, row_id)
    parts = worst_of((sample.where(cut), row_id[cut]) for cut in cuts)
    for name in ("row_id", "truth", "prediction", "loss"):
        assert getattr(parts, name).tolist() == getattr(whole, name).tolist()
    with pytest.raises(ValueError, match="no parts"):
        worst_of([])


def test_classes_by_the_log_of_the_true_one():
    sample = Sample("binary", np.array([1.0, 0, 1, 0]), np.array([0.1, 0.2, 0.0, 0.95]))
    worst = worst_rows(sample, IDS, count=2)

    assert worst.row_id.tolist() == [30, 2**62]
    assert worst.loss == pytest.approx(-np.log([np.finfo(float).eps, 0.05]))
    told = worst_json(worst, LATE, "nn", {})
    assert told["loss"] == "log-loss"
    assert (told["rows"][1]["truth"], told["rows"][1]["prediction"]) == (
        "no",
        pytest.approx({"no": 0.05, "yes": 0.95}),
    )
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    several = worst_rows(Sample("multiclass", np.array([0.0, 2]), probabilities), IDS[:2])
    assert several.row_id.tolist() == [-5, 70]
    assert worst_json(several, CARRIER, "nn", {})["rows"][0]["truth"] == "CC"


def test_rows_come_in_the_order_they_are_asked_for(tmp_path):
    case = Case(targets=(DELAY,), num_rows=50)
    table = open_table(case.write_table(tmp_path / "reduce"))
    wanted = case.row_id["test"][[40, 3, 17]]
    found = rows_by_id(table, "test", wanted, ["delay"])

    assert found["delay"].to_numpy() == pytest.approx(case.labels["test"]["delay"][[40, 3, 17]])
    with pytest.raises(DataError, match=r"lacks 1 test rows .* \['7'\]"):
        rows_by_id(table, "test", np.array([wanted[0], 7]), ["delay"])


def test_the_order_does_not_hang_on_how_rows_lie():
    """Shuffled rows give the same worst ones."""
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 3, (2, 500)).astype(float)
    row_id = rng.permutation(500).astype(np.int64)
    order = rng.permutation(500)
    target = Target(name="y", task="regression")
    one = worst_rows(Sample("regression", truth, prediction), row_id)
    other = worst_rows(Sample("regression", truth[order], prediction[order]), row_id[order])

    assert worst_json(one, target, "m", {}) == worst_json(other, target, "m", {})
