"""``headrace predict FILE -o OUT``: score new raw rows with the published package.

Rows are read, scored and written batch by batch, so memory does not grow with the file. The
predictions keep the order and number of the rows; key columns of the contract come first where the
file has them. ``OUT`` gets its name when it is whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from headrace.data.rowfile import read_rows
from headrace.errors import ConfigError, SchemaError
from headrace.models.package import Package, load_package
from headrace.storage import new_file


@dataclass(frozen=True)
class Predicted:
    """What was scored; printable."""

    source: Path
    out: Path
    num_rows: int
    targets: tuple[str, ...]
    package: str  # digest

    def __str__(self) -> str:
        names = ", ".join(self.targets)
        return (
            f"{self.num_rows:,} rows of {self.source} -> {self.out}: {names} "
            f"(package {self.package[:16]})"
        )


def predict_file(
    source: Path,
    out: Path,
    *,
    model: Path,
    delimiter: str | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> Predicted:
    """Score the rows of ``source`` (.csv, .tsv, .parquet) into ``out`` (.csv, .parquet).

    Args:
        source: Rows of the extract contract; targets and further columns are not read.
        out: Where the predictions go; see ``Package.predict`` for the columns.
        model: The package's folder.
        delimiter: Of a CSV; by default a comma, and a tab in ``.tsv``.
        on_rows: Hears the number of rows written so far.

    Raises:
        ConfigError: if a file has a suffix that says no format, or both are one file.
        DataError: if the file cannot be read, or a value is not of its type: with the line.
        SchemaError: if the columns do not fit the contract.
        IntegrityError: if the package is missing or damaged.
    """
    if out.suffix.lower() not in (".csv", ".parquet"):
        raise ConfigError(f"{out} is neither .csv nor .parquet; name the output by its format")
    if out.resolve() == source.resolve():
        raise ConfigError(f"{out} is the file to read; name another one for the predictions")
    package = load_package(model)
    batches = _scored(source, package, delimiter)
    num_rows = 0
    with new_file(out) as file:
        first = next(batches, None)
        schema = package.output_schema if first is None else first.schema
        with _writer(out, file, schema) as writer:
            while first is not None:
                writer.write_table(first)
                num_rows += first.num_rows
                if on_rows:
                    on_rows(num_rows)
                first = next(batches, None)
    targets = tuple(target.name for target in package.contract.targets)
    return Predicted(source, out, num_rows, targets, package.digest)


def _scored(source: Path, package: Package, delimiter: str | None) -> Iterator[pa.Table]:
    names = package.output_schema.names
    keys = [key for key in package.contract.named("key") if key not in names]
    labels = {category.name: category.labels for category in package.encoder.categories}
    rows = read_rows(source, package.inputs, labels=labels, carried=keys, delimiter=delimiter)
    for batch in rows:
        try:
            predicted = package.predict(batch)
        except SchemaError as error:
            raise SchemaError(f"{source}: {error}") from error
        present = [key for key in keys if key in batch.column_names]
        columns = [*(batch.column(key) for key in present), *predicted.columns]
        yield pa.Table.from_arrays(columns, names=[*present, *names])


@contextmanager
def _writer(out: Path, file: BinaryIO, schema: pa.Schema) -> Iterator[Any]:
    if out.suffix.lower() == ".parquet":
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            yield writer
    else:
        with pacsv.CSVWriter(file, schema) as writer:
            yield writer
