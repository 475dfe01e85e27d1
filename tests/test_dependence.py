"""Partial dependence beside a computation by hand."""

import numpy as np
import pyarrow as pa
import pytest

from headrace.models.dependence import partial_dependence


def rows():
    return pa.table(
        {
            "x": pa.array([1, 2, None, 4, 100], pa.int16()),
            "kind": pa.array(["b", "a", "b", None, "c"]).dictionary_encode(),
            "is_old": pa.array([True, False, True, True, None]),
            "empty": pa.array([None] * 5, pa.float64()),
        }
    )


def predict(table):
    """Of row i: x times (1, 2, 3, 4, 5 by its place among five), and 10 more of kind b."""
    x = table["x"].cast(pa.float64()).fill_null(-1).to_numpy()
    factor = np.tile(np.arange(1.0, 6), table.num_rows // 5)
    is_b = np.array([value == "b" for value in table["kind"].to_pylist()])
    value = x * factor + 10 * is_b
    return {"y": value, "band": np.column_stack([value, -value])}


def told(column, *, is_numeric, grid_size=20):
    return partial_dependence(
        predict, rows(), column, is_numeric=is_numeric, grid_size=grid_size, num_lines=2
    )


def test_numbers_go_over_their_quantiles_in_their_own_type():
    """The mean of x times 1 to 5 is 3 x; two of five rows are of kind b."""
    found = told("x", is_numeric=True)

    assert found.grid == (1, 2, 4, 100)
    assert found.means["y"][:, 0] == pytest.approx([3 * x + 4 for x in (1, 2, 4, 100)])
    assert found.means["band"][:, 1] == pytest.approx(-found.means["y"][:, 0])
    assert found.lines["y"] == pytest.approx(np.array([[11, 12, 14, 110], [2, 4, 8, 200.0]]))
    assert "band" not in found.lines


def test_a_small_grid_keeps_both_ends():
    assert told("x", is_numeric=True, grid_size=2).grid == (1, 100)


def test_categories_go_by_frequency_missing_among_them():
    """Kind b comes first; the mean of x by factor is (1 + 4 - 3 + 16 + 500) / 5."""
    found = told("kind", is_numeric=False)

    assert found.grid == ("b", None, "a", "c")
    base = (1 + 4 - 3 + 16 + 500) / 5
    assert found.means["y"][:, 0] == pytest.approx([base + 10, base, base, base])
    assert told("kind", is_numeric=False, grid_size=1).grid == ("b",)


def test_booleans_are_numbers_and_an_empty_column_has_no_curve():
    assert told("is_old", is_numeric=True).grid == (0, 1)
    assert told("empty", is_numeric=True) is None
