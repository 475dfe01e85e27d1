"""Rows to predict, read from a file in batches: CSV strictly by its header's names, or Parquet.

A CSV has no types, so the contract gives them: fields are read as text and each input column is
turned into the type it had when the model was trained. What cannot be turned is an error with its
line, never a guess. An empty field is missing. So is a mark such as NA where it cannot be a value:
in numbers, booleans and times, and in a category whose labels do not include it. Blanks around a
value count only in a category that has labels with blanks around them.

Cost: a CSV is read once more before, for its encoding and its quotes; memory stays at one block.
"""

import codecs
import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from headrace.data.dialect import NULL_MARKS
from headrace.data.incoming import InputColumn, require_columns
from headrace.errors import ConfigError, DataError, SchemaError

_TRUE, _FALSE = ("true", "t", "yes", "1"), ("false", "f", "no", "0")
_BATCH_ROWS = 16_384
_BLOCK_BYTES = 2 << 20  # also the longest row; Arrow reads up to 32 blocks ahead
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_rows(
    path: Path,
    inputs: Sequence[InputColumn],
    *,
    labels: Mapping[str, Collection[str]],
    carried: Sequence[str] = (),
    delimiter: str | None = None,
) -> Iterator[pa.Table]:
    """Yield the input columns of the rows in ``path``, in their order, batch by batch.

    Args:
        path: A ``.csv``, ``.tsv`` or ``.parquet`` file; further columns are not read.
        inputs: Columns the model reads.
        labels: Per category the labels that train rows had.
        carried: Columns that are handed through as they are, where the file has them.
        delimiter: Of a CSV; by default a comma, and a tab in ``.tsv``.

    Raises:
        ConfigError: if the file has another suffix.
        DataError: if the file is missing, empty, damaged or not what its suffix says, or a value
            is not of its column's type: with the line.
        SchemaError: if an input column is missing or comes twice.
    """
    suffix = path.suffix.lower()
    if suffix not in (".parquet", *_DELIMITERS):
        raise ConfigError(
            f"{path} is neither .csv, .tsv nor .parquet; rename or convert it, so that its suffix "
            f"says how to read it"
        )
    if not path.is_file():
        raise DataError(f"{path} does not exist; name a file with the rows to predict")
    if suffix == ".parquet":
        return _read_parquet(path, inputs, carried)
    mark = delimiter or _DELIMITERS[suffix]
    return _CsvFile(path, mark, inputs, labels, carried).batches()


def _read_parquet(
    path: Path, inputs: Sequence[InputColumn], carried: Sequence[str]
) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            _require_columns(path, present, inputs)
            names = _wanted(present, inputs, carried)
            for batch in file.iter_batches(_BATCH_ROWS, columns=names):
                yield pa.Table.from_batches([batch]).select(names)
    except (pa.ArrowInvalid, OSError) as error:
        told = str(error).splitlines()[0]
        raise DataError(f"{path} is not a whole Parquet file ({told}); get it again") from error


class _CsvFile:
    """One CSV, checked when it is opened: text, quotes, header."""

    def __init__(
        self,
        path: Path,
        delimiter: str,
        inputs: Sequence[InputColumn],
        labels: Mapping[str, Collection[str]],
        carried: Sequence[str],
    ) -> None:
        self._path = path
        self._delimiter = delimiter
        self._labels = labels
        self._inputs = {column.name: column for column in inputs}
        _refuse_broken_text(path)
        header = _header(path, delimiter)
        _require_columns(path, header, inputs)
        self._num_columns = len(header)
        self._names = _wanted(header, inputs, carried)

    def batches(self) -> Iterator[pa.Table]:
        ragged: list[Any] = []

        def on_ragged(row: Any) -> str:
            ragged.append(row)
            return "error"

        num_rows = 0
        try:
            with self._open(on_ragged) as reader:
                for block in reader:
                    for start in range(0, block.num_rows, _BATCH_ROWS):
                        batch = block.slice(start, _BATCH_ROWS)
                        yield self._typed(batch, first_row=num_rows)
                        num_rows += batch.num_rows
        except pa.ArrowInvalid as error:
            raise self._fault(error, ragged) from error

    def _open(self, on_ragged: Any) -> pacsv.CSVStreamingReader:
        return pacsv.open_csv(
            self._path,
            # One thread: only then does Arrow know the number of a row at fault.
            read_options=pacsv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            parse_options=pacsv.ParseOptions(
                delimiter=self._delimiter,
                newlines_in_values=True,
                invalid_row_handler=on_ragged,
                # In a file of one column an empty line is a row with nothing in it.
                ignore_empty_lines=self._num_columns > 1,
            ),
            convert_options=pacsv.ConvertOptions(
                include_columns=self._names,
                column_types=dict.fromkeys(self._names, pa.string()),
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                null_values=[""],
            ),
        )

    def _typed(self, batch: pa.RecordBatch, *, first_row: int) -> pa.Table:
        columns = {}
        for name in self._names:
            values = batch.column(name)
            if name in self._inputs:
                values = self._convert(values, self._inputs[name], first_row)
            columns[name] = values
        return pa.table(columns)

    def _convert(self, values: pa.Array, column: InputColumn, first_row: int) -> pa.Array:
        kind = column.type
        known = self._labels.get(column.name, ())
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not is_text or all(label == label.strip() for label in known):
            values = pc.utf8_trim_whitespace(values)
        marks = [mark for mark in (*NULL_MARKS, "") if not is_text or mark not in known]
        is_null = pc.is_in(values, value_set=pa.array(marks, pa.string()))
        values = pc.if_else(is_null, pa.scalar(None, pa.string()), values)
        if is_text:
            return values
        try:
            return _parsed(values, kind)
        except pa.ArrowInvalid as error:
            raise self._value_fault(values, column, first_row) from error

    def _value_fault(self, values: pa.Array, column: InputColumn, first_row: int) -> DataError:
        for place in range(len(values)):
            one = values.slice(place, 1)
            try:
                _parsed(one, column.type)
            except pa.ArrowInvalid:
                text = str(one[0].as_py())[:80]
                line = _line_of(self._path, self._delimiter, first_row + place)
                return DataError(
                    f"{self._path}:{line}: column {column.name!r} holds {text!r}, which is no "
                    f"{column.type}; correct the value, or leave the field empty if it is unknown"
                )
        raise AssertionError("a batch failed, but none of its values")

    def _fault(self, error: pa.ArrowInvalid, ragged: Sequence[Any]) -> DataError:
        told = str(error).splitlines()[0]
        if ragged:
            row = ragged[0]
            line = _line_of(self._path, self._delimiter, row.number - 2)  # the header is row 1
            return DataError(
                f"{self._path}:{line}: {row.actual_columns} fields instead of "
                f"{row.expected_columns}; quote fields that hold {self._delimiter!r} or line ends"
            )
        if "straddling" in told:
            return DataError(
                f"{self._path}: a row is longer than {_BLOCK_BYTES >> 20} MiB; is a quote not "
                f"closed?"
            )
        return DataError(f"{self._path} cannot be read as CSV: {told}")


def _parsed(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_boolean(kind):
        return _booleans(values)
    values = pc.replace_substring_regex(values, r"^\+", "")
    if not pa.types.is_integer(kind):
        return values.cast(kind)
    wide = pa.uint64() if kind == pa.uint64() else pa.int64()
    try:
        return values.cast(wide)
    except pa.ArrowInvalid:  # 3.0, as pandas writes whole numbers beside a null
        return pc.replace_substring_regex(values, r"\.0*$", "").cast(wide)


def _booleans(values: pa.Array) -> pa.Array:
    text = pc.utf8_lower(values)
    is_true = pc.is_in(text, value_set=pa.array(_TRUE))
    is_known = pc.or_(is_true, pc.is_in(text, value_set=pa.array(_FALSE)))
    if not pc.all(pc.or_(is_known, pc.is_null(values))).as_py():
        raise pa.ArrowInvalid("neither true nor false")
    return pc.if_else(pc.is_null(values), pa.scalar(None, pa.bool_()), is_true)


def _wanted(
    present: Sequence[str], inputs: Sequence[InputColumn], carried: Sequence[str]
) -> list[str]:
    names = [name for name in carried if name in present]
    return list(dict.fromkeys([*names, *(column.name for column in inputs)]))


def _require_columns(path: Path, present: Sequence[str], inputs: Sequence[InputColumn]) -> None:
    try:
        require_columns(present, inputs)
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from error


def _header(path: Path, delimiter: str) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, delimiter=delimiter), [])
    if not any(names):
        raise DataError(f"{path} has no header line; the columns are found by their names in it")
    others = [mark for mark in (",", ";", "\t", "|") if mark != delimiter and mark in names[0]]
    if len(names) == 1 and others:
        raise DataError(
            f"{path}:1: the header {names[0]!r} has no {delimiter!r}, but {others[0]!r}; "
            f"give --delimiter {others[0]!r}"
        )
    return names


def _refuse_broken_text(path: Path) -> None:
    """Read the bytes once: Arrow would take an open quote, or a NUL, for a value."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, num_quotes, is_empty = 1, 0, True
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            if is_empty and block[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{path} is UTF-16 text; save it as UTF-8")
            if b"\0" in block:
                at = line + block[: block.index(b"\0")].count(b"\n")
                raise DataError(f"{path}:{at}: holds a NUL byte; the file is damaged, or no CSV")
            try:
                decoder.decode(block, final=len(block) < _BLOCK_BYTES)
            except UnicodeDecodeError as error:
                at = line + block[: error.start].count(b"\n")
                raise DataError(
                    f"{path}:{at}: is not UTF-8 text ({error.reason}); save the file as UTF-8"
                ) from error
            line += block.count(b"\n")
            num_quotes += block.count(b'"')
            is_empty = False
    if is_empty:
        raise DataError(f"{path} is empty; give a file with a header line and rows")
    if num_quotes % 2:
        raise DataError(f"{path}: a quote is opened and not closed; close it, or double it")


def _line_of(path: Path, delimiter: str, row: int) -> int:
    """Return the line on which data row ``row`` (from 0) begins: slow, for faults only."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        header = next(reader, [])
        first, num_rows = reader.line_num + 1, 0
        for fields in reader:
            if fields or len(header) == 1:  # Arrow skips empty lines, but in a single column
                if num_rows == row:
                    break
                num_rows += 1
            first = reader.line_num + 1
    return first
