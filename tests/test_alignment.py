"""Truth and predictions read side by side: the same rows, units and digest as read at once."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace.data.predictions as predictions_module
from headrace.data.alignment import measure, read_share, stream_aligned
from headrace.data.predictions import read_predictions
from headrace.data.table import Table, open_table
from headrace.data.truth import label_bytes, line_up, read_truth
from headrace.errors import DataError, IntegrityError
from headrace.schema import read_contract
from headrace.storage import digest_bytes
from tests.evaluation_case import CARRIER, LATE, Case

KEY = "evaluate.unit"


@pytest.fixture
def case(tmp_path, monkeypatch):
    """Test rows in four files, predictions in batches of 47 rows; some labels are missing."""
    monkeypatch.setattr(predictions_module, "_BATCH_ROWS", 47)
    case = Case(targets=(LATE, CARRIER), groups=("plane",), has_weight=True)
    case.labels["test"]["late"][100:180] = np.nan
    table, members = case.write(tmp_path)
    folder = table / "test"
    rows = pq.read_table(folder / "part-00000.parquet")
    for number, (start, stop) in enumerate([(0, 1), (1, 150), (150, 151), (151, 600)]):
        pq.write_table(rows.slice(start, stop - start), folder / f"part-{number:05}.parquet")
    return Table(table, read_contract(table), "digest"), members["sharp"]


@pytest.mark.parametrize("unit", ["row", "day", "group"])
@pytest.mark.parametrize("target", [LATE, CARRIER])
def test_rows_come_as_if_read_at_once(case, unit, target):
    """Labels, predictions, weights, units and digest."""
    table, folder = case
    truth = read_truth(table, "test", unit=unit, key=KEY)
    is_labelled = ~np.isnan(truth.labels[target.name])
    predictions = read_predictions(folder, target).of_split("test")
    values = predictions.values[line_up(predictions, truth, is_labelled)]
    parts = list(stream_aligned(table, folder, target, "test", unit=unit, key=KEY))
    assert len(parts) == 4
    np.testing.assert_array_equal(
        np.concatenate([part.row_id for part in parts]), truth.row_id[is_labelled]
    )
    np.testing.assert_array_equal(
        np.concatenate([part.label for part in parts]), truth.labels[target.name][is_labelled]
    )
    np.testing.assert_array_equal(np.concatenate([part.values for part in parts]), values)
    np.testing.assert_array_equal(
        np.concatenate([part.weight for part in parts]), truth.weight[is_labelled]
    )
    keys = np.concatenate([part.unit_key for part in parts])
    codes = truth.unit_of_row[is_labelled]
    num_units = len(np.unique(codes))
    assert (
        len(np.unique(keys)) == num_units == len(np.unique(np.column_stack([keys, codes]), axis=0))
    )
    size = measure(table, "test", unit=unit, key=KEY)
    assert (size.digest, size.unit, size.rows.num_rows) == (truth.digest, truth.unit, 600)
    assert size.label_digest[target.name] == digest_bytes(label_bytes(truth, target.name))
    assert size.rows.num_units == len(np.unique(truth.unit_of_row))
    assert size.labelled[target.name].num_rows == is_labelled.sum()
    assert size.labelled[target.name].num_units == num_units


def test_a_share_of_the_rows_is_the_same_for_each_model(case):
    """About a third, drawn by row id; predictions stay with their rows."""
    table, folder = case
    settings = {"unit": "day", "key": KEY}
    shares = [
        read_share(table, each, LATE, "test", 0.3, seed=1, **settings)
        for each in (folder, folder.parent / "plain")
    ]
    assert shares[0].row_id.tolist() == shares[1].row_id.tolist()
    assert 0.2 * 520 < len(shares[0].row_id) < 0.4 * 520
    assert shares[0].values.tolist() != shares[1].values.tolist()
    whole = read_share(table, folder, LATE, "test", 1.0, seed=1, **settings)
    assert len(whole.row_id) == 520
    places = np.searchsorted(whole.row_id, shares[0].row_id)
    for name in ("label", "values", "weight", "unit_key"):
        expected = getattr(whole, name)[places]
        np.testing.assert_array_equal(getattr(shares[0], name), expected)


def test_null_and_text_units_have_keys_of_their_own(case):
    """An absent group is one more group, and no text is taken for it."""
    table, _ = case
    rows = pq.read_table(table.folder / "test" / "part-00003.parquet")
    names = pa.array(["a", "", None, "None", "a"] + ["b"] * (rows.num_rows - 5))
    place = rows.schema.get_field_index("plane")
    changed = rows.set_column(place, "plane", names)
    for path in table.files("test"):
        path.unlink()
    pq.write_table(changed, table.folder / "test" / "part-00000.parquet")
    assert measure(table, "test", unit="group", key=KEY).rows.num_units == 5


def test_rows_out_of_order_are_refused(case):
    """One pass over both files works on sorted ones only."""
    table, folder = case
    path = table.files("test")[3]
    rows = pq.read_table(path)
    pq.write_table(rows.take(pa.array(np.arange(rows.num_rows)[::-1])), path)
    with pytest.raises(IntegrityError, match="test rows are not sorted by row id"):
        measure(table, "test", unit="row", key=KEY)
    with pytest.raises(IntegrityError, match="test rows are not sorted by row id"):
        list(stream_aligned(table, folder, LATE, "test", unit="row", key=KEY))


def test_predictions_out_of_order_are_refused(case):
    """Likewise."""
    table, folder = case
    path = folder / "predictions" / "late.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.take(pa.array(np.arange(rows.num_rows)[::-1])), path)
    with pytest.raises(IntegrityError, match=r"late\.parquet is not sorted by row id"):
        list(stream_aligned(table, folder, LATE, "test", unit="row", key=KEY))


def test_an_empty_split_or_no_weight_is_refused(case, tmp_path):
    """As where rows are read at once."""
    table, _ = case
    other = Case(targets=(LATE,), has_weight=True)
    other.weight[:] = 0
    with pytest.raises(DataError, match="weight column 'w' is 0 in all test rows"):
        measure(open_table(other.write_table(tmp_path / "zero")), "test", unit="row", key=KEY)
    for path in table.files("test"):
        path.unlink()
    with pytest.raises(DataError, match="has no test rows"):
        measure(table, "test", unit="row", key=KEY)
