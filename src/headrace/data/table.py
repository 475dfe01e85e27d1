"""Reading a stage's table: verified once, then streamed as Arrow record batches.

A table is a folder: ``contract.json``, ``manifest.json`` and one folder of Parquet files per split
(``train/part-00000.parquet``, …). Each file holds ``row_id``, ``fold`` and the contract's columns,
sorted by ``row_id`` over the files of a split. A split without rows has no folder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from headrace.errors import DataError, IntegrityError, SchemaError, nearest
from headrace.schema import FOLD, ROW_ID, SPLITS, Contract, read_contract
from headrace.storage import folder_digest, verify_folder


@dataclass(frozen=True)
class Span:
    """Consecutive row groups of one file: what one thread decodes at a time."""

    path: Path
    metadata: Any  # of the file, parsed once
    columns: frozenset[str]  # names of its columns
    texts: frozenset[str]  # those of text
    row_groups: tuple[int, ...]
    num_rows: int
    stamp: tuple[int, int]  # bytes of the file and time of its last change, when it was opened

    def batches(
        self, columns: Sequence[str], *, batch_rows: int, dictionaries: Sequence[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows in order; memory stays at a batch.

        ``dictionaries`` are the text columns to be read as codes and the few texts they stand
        for, as the file has them: half the time, and no text is built per row.

        Raises:
            IntegrityError: if the file is damaged, gone, or was changed since it was opened.
        """
        self.refuse_changed()
        try:
            with pq.ParquetFile(
                self.path,
                metadata=self.metadata,
                memory_map=True,
                read_dictionary=[name for name in dictionaries if name in self.texts] or None,
            ) as file:
                yield from file.iter_batches(
                    batch_rows,
                    row_groups=list(self.row_groups),
                    columns=list(columns),
                    use_threads=False,
                )
        except pa.ArrowMemoryError:
            raise
        except (OSError, pa.ArrowException) as error:
            self.refuse_changed()
            raise IntegrityError(
                f"{self.path} cannot be decoded in the row groups {list(self.row_groups)} "
                f"({error}); write the file again"
            ) from error
        self.refuse_changed()

    def refuse_changed(self) -> None:
        """Check that the file is still the one that was opened.

        Raises:
            IntegrityError: if its length or time of change is another, or if it is gone.
        """
        try:
            stamp = _stamp(self.path)
        except OSError as error:
            raise IntegrityError(
                f"{self.path} was opened and cannot be reached any more ({error.strerror}); put it "
                f"back, or open the files again"
            ) from error
        if stamp != self.stamp:
            raise IntegrityError(
                f"{self.path} was changed after it was opened; leave the files alone while they "
                f"are read, and open them again"
            )


def file_spans(path: Path, *, span_rows: int) -> list[Span]:
    """Cut a Parquet file into spans of at least ``span_rows`` rows; the last may be shorter.

    Raises:
        DataError: if it is not a Parquet file, or cannot be read.
    """
    try:
        stamp = _stamp(path)
        metadata = pq.read_metadata(path, memory_map=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}); write it again") from error
    schema = metadata.schema.to_arrow_schema()
    texts = frozenset(
        field.name
        for field in schema
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
    )
    columns = frozenset(schema.names)
    spans: list[Span] = []
    groups: list[int] = []
    num_rows = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        num_rows += metadata.row_group(group).num_rows
        if num_rows >= span_rows or group == metadata.num_row_groups - 1:
            spans.append(Span(path, metadata, columns, texts, tuple(groups), num_rows, stamp))
            groups, num_rows = [], 0
    return spans


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Table:
    """A verified table folder; nothing of its rows is in memory."""

    folder: Path
    contract: Contract
    digest: str  # of all its content

    def files(self, split: str) -> list[Path]:
        """Return the Parquet files of ``split`` in row order; empty if the split has no rows."""
        if split not in SPLITS:
            raise SchemaError(f"{split!r} is not a split{nearest(split, SPLITS)}")
        return sorted((self.folder / split).glob("*.parquet"))

    def num_rows(self, split: str) -> int:
        """Return the number of rows of ``split``."""
        return sum(pq.read_metadata(path).num_rows for path in self.files(split))

    def batches(
        self, split: str, columns: Sequence[str] | None = None, *, batch_rows: int = 65_536
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of ``split`` in row order; memory stays at one row group.

        Raises:
            SchemaError: if a column is not in the table, with the nearest name.
        """
        self._require(columns)
        for path in self.files(split):
            with pq.ParquetFile(path, memory_map=True) as file:
                yield from file.iter_batches(
                    batch_rows, columns=None if columns is None else list(columns)
                )

    def first(self, split: str, columns: Sequence[str], count: int) -> pa.Table:
        """Return the first rows of ``split``, at most ``count``; without columns if it has none.

        Raises:
            SchemaError: if a column is not in the table, with the nearest name.
        """
        parts: list[pa.RecordBatch] = []
        for batch in self.batches(split, columns, batch_rows=count):
            parts.append(batch)
            if sum(part.num_rows for part in parts) >= count:
                break
        if not parts:
            return pa.table({})
        return pa.Table.from_batches(parts).unify_dictionaries().slice(0, count)

    def spans(
        self, split: str, columns: Sequence[str] | None = None, *, span_rows: int = 65_536
    ) -> list[Span]:
        """Return the spans of ``split`` in row order, to be decoded by as many threads as wanted.

        Raises:
            SchemaError: if a column is not in the table, with the nearest name.
        """
        self._require(columns)
        return [
            span for path in self.files(split) for span in file_spans(path, span_rows=span_rows)
        ]

    def read(self, split: str, columns: Sequence[str]) -> pa.Table:
        """Return whole columns of ``split`` in memory: for row ids, targets, times, groups."""
        self._require(columns)
        files = self.files(split)
        if not files:
            first = next(path for name in SPLITS for path in self.files(name))
            return pq.read_schema(first).empty_table().select(list(columns))
        parts = [pq.read_table(path, columns=list(columns)) for path in files]
        return pa.concat_tables(parts).unify_dictionaries()

    def _require(self, columns: Sequence[str] | None) -> None:
        present = [ROW_ID, FOLD, *(column.name for column in self.contract.columns)]
        missing = [name for name in columns or () if name not in present]
        if missing:
            near = "".join(nearest(name, present) for name in missing[:1])
            raise SchemaError(f"{self.folder} lacks the columns {missing}{near}")


def open_table(folder: Path) -> Table:
    """Verify the digests of a table folder and return a reader of it.

    Raises:
        IntegrityError: if the folder is missing, unfinished or damaged.
    """
    if not folder.is_dir():
        raise IntegrityError(f"{folder} does not exist; run `headrace repro` to make it")
    verify_folder(folder)
    table = Table(folder, read_contract(folder), folder_digest(folder))
    if not any(table.files(split) for split in SPLITS):
        raise IntegrityError(f"{folder} holds no Parquet file in any split; make it again")
    return table
