"""A bootstrap sample of a table's train rows as a table of its own, written batch by batch.

What is drawn with replacement is the resampling unit (row, group, day), with all its rows. A row
that was drawn three times stands there once and weighs three times as much: copies of it could come
to lie on both sides of early stopping, and every count of labels would see them. Rows that were not
drawn are out of bag: they stand as the split ``test`` of the new table, and nothing that is fitted
on its train rows has seen them.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.data.table import Table, open_table
from headrace.schema import CONTRACT, FOLD, Column, Contract
from headrace.storage import new_folder, write_file

_BATCH_ROWS = 65_536
_WEIGHT = "bootstrap_weight"  # where the table has no weights of its own


def draw_units(num_units: int, *, seed: int, number: int) -> npt.NDArray[np.int64]:
    """Return how often sample ``number`` holds each unit: as many draws as there are units."""
    rng = np.random.default_rng([seed, number])
    return np.bincount(rng.integers(num_units, size=num_units), minlength=num_units)


def write_resample(
    source: Table, counts: npt.NDArray[np.int64], folder: Path, *, with_valid: bool
) -> Table:
    """Write the train rows of ``source`` to ``folder``, as ``counts`` (rows,) says.

    ``with_valid`` takes the valid rows along, for models that look at them.
    """
    contract = _weighted(source.contract)
    once = np.ones(source.num_rows("valid"), np.int64)
    with new_folder(folder) as private:
        write_file(private / CONTRACT, contract.to_json())
        _write(private / "train", _rows(source, "train", counts, contract))
        out_of_bag = _rows(source, "train", (counts == 0).astype(np.int64), contract)
        _write(private / "test", map(_without_fold, out_of_bag))
        if with_valid:
            _write(private / "valid", _rows(source, "valid", once, contract))
    return open_table(folder)


def _weighted(contract: Contract) -> Contract:
    """Return the contract with a weight column that holds any number."""
    if contract.weight is None:
        column = Column(name=_WEIGHT, role="weight", dtype="double", nullable=False)
        return contract.model_copy(update={"columns": (*contract.columns, column)})
    columns = tuple(
        column.model_copy(update={"dtype": "double"}) if column.role == "weight" else column
        for column in contract.columns
    )
    return contract.model_copy(update={"columns": columns})


def _rows(
    source: Table, split: str, counts: npt.NDArray[np.int64], contract: Contract
) -> Iterator[pa.RecordBatch]:
    """Yield the rows that count at all, as much heavier as they count more than once."""
    weight = contract.weight
    assert weight is not None
    start = 0
    for batch in source.batches(split, batch_rows=_BATCH_ROWS):
        own = counts[start : start + batch.num_rows]
        start += batch.num_rows
        if weight not in batch.schema.names:
            batch = batch.append_column(weight, pa.array(own.astype(np.float64)))
        else:
            place = batch.schema.get_field_index(weight)
            heavier = pc.multiply(batch.column(weight).cast(pa.float64()), pa.array(own * 1.0))
            batch = batch.set_column(place, weight, heavier)
        yield batch.filter(pa.array(own > 0))


def _without_fold(batch: pa.RecordBatch) -> pa.RecordBatch:
    place = batch.schema.get_field_index(FOLD)
    return batch.set_column(place, FOLD, pa.nulls(batch.num_rows, pa.int8()))


def _write(folder: Path, rows: Iterator[pa.RecordBatch]) -> None:
    writer = None
    for batch in rows:
        if writer is None:
            folder.mkdir()
            path = folder / "part-00000.parquet"
            writer = pq.ParquetWriter(path, batch.schema, compression="lz4")
        writer.write_batch(batch)
    if writer is not None:
        writer.close()
