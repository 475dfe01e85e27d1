"""Record batches of any table on disk, one after the other, in memory that does not grow.

Four kinds are told apart by what the path is: a table folder of a stage (it has a contract;
digests are checked first), Parquet (a file, a folder of files, a glob), Arrow IPC (file or stream)
and CSV. Files of one folder or glob must have the same columns and types: a reader that takes the
first file's word for the rest turns 2.7 into 3.

CSV says nothing about types, and readers that guess from the first rows refuse or change a later
one. So a CSV is read twice, in a stream: once as text to see every value, once to convert. A
column becomes a number, a date or a time only if that keeps what is written: 00123, 1e400 and a
whole number beyond 64 bits stay text. Only an empty field is null; "NA" is text.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from headrace.data.table import open_table
from headrace.errors import DataError, SchemaError, nearest
from headrace.memory import format_bytes
from headrace.schema import CONTRACT, SPLITS

BATCH_ROWS = 65_536
_CSV_BLOCK_BYTES = 1 << 20  # the longest record; Arrow reads ahead some thirty of these
_CSV_ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt")
_ARROW_ENDINGS = (".arrow", ".feather", ".ipc", ".arrows")
_PARQUET_ENDINGS = (".parquet", ".pq")
_DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_DATE = "[0-9]{4}-[0-9]{2}-[0-9]{2}"
_TIME = r"[0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?"
# In the order in which they are tried: type, what its texts look like.
_CSV_TYPES: tuple[tuple[pa.DataType, str], ...] = (
    (pa.bool_(), "^([Tt]rue|[Ff]alse|TRUE|FALSE)$"),
    (pa.int64(), "^(0|-?[1-9][0-9]*)$"),
    (pa.float64(), r"^-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][-+]?[0-9]+)?$"),
    (pa.date32(), f"^{_DATE}$"),
    (pa.timestamp("us"), f"^{_DATE}[ T]{_TIME}$"),
)


def batches(
    path: Path | str,
    *,
    split: str | None = None,
    columns: Sequence[str] | None = None,
    delimiter: str = ",",
    batch_rows: int = BATCH_ROWS,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a table as Arrow record batches, in the order they have on disk.

    >>> sum(batch.num_rows for batch in batches("data/reduce", split="train"))  # doctest: +SKIP
    231_000

    Args:
        path: Folder of a stage's table, Parquet file, folder or glob, Arrow IPC file, CSV file.
        split: Split of a stage's table; None for all, in the order train, valid, test, gap.
        columns: Names of the columns wanted, in that order; None for all.
        delimiter: Between the fields of a CSV; it is not guessed.
        batch_rows: Most rows a batch may have.

    Raises:
        DataError: if there is no such file, or it cannot be read as what it is.
        SchemaError: if a column or split is not there, or files of one glob differ in columns.
        IntegrityError: if a stage's table is damaged.
    """
    place = Path(path)
    if (place / CONTRACT).is_file():
        return _table_batches(place, split, columns, batch_rows)
    if split is not None:
        raise SchemaError(
            f"split={split!r} asks for a part of a stage's table, which {path} is not"
        )
    if place.name.lower().endswith(_CSV_ENDINGS):
        return _csv_batches(_existing(place), columns, delimiter, batch_rows)
    if place.name.lower().endswith(_ARROW_ENDINGS):
        return _arrow_batches(_existing(place), columns, batch_rows)
    return _parquet_batches(_parquet_files(place), columns, batch_rows)


def _table_batches(
    folder: Path, split: str | None, columns: Sequence[str] | None, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    table = open_table(folder)
    if split is not None:
        table.files(split)  # refuses an unknown name before the first batch
    names = SPLITS if split is None else (split,)
    return (
        batch for name in names for batch in table.batches(name, columns, batch_rows=batch_rows)
    )


def _parquet_batches(
    files: Sequence[Path], columns: Sequence[str] | None, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    first = _parquet_schema(files[0])
    _require(columns, first.names, files[0])
    faults = []
    for path in files[1:]:
        found = _parquet_schema(path)
        if not found.equals(first):
            faults.append(f"{path} ({_difference(first, found)})")
    if faults:
        raise SchemaError(
            f"files that are read as one table differ from {files[0]}: {'; '.join(faults[:5])}; "
            f"convert them, or read them one by one"
        )
    return _read_parquet(files, columns, batch_rows)


def _read_parquet(
    files: Sequence[Path], columns: Sequence[str] | None, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    names = None if columns is None else list(columns)
    for path in files:
        with _named_faults(path, "Parquet"), pq.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_rows, columns=names):
                yield batch if names is None else batch.select(names)


def _parquet_files(place: Path) -> list[Path]:
    """Files in name order; names that begin with a dot or underscore are somebody's unfinished."""
    if place.is_file():
        return [place]
    if place.is_dir():
        found = [p for ending in _PARQUET_ENDINGS for p in place.rglob(f"*{ending}")]
        found = [p for p in found if not _is_hidden(p.relative_to(place))]
    else:
        anchor = Path(place.anchor)
        pattern = str(place.relative_to(anchor)) if place.anchor else str(place)
        is_glob = any(character in pattern for character in "*?[")
        found = [p for p in anchor.glob(pattern) if p.is_file()] if is_glob else []
        found = [p for p in found if not p.name.startswith((".", "_"))]
    if not found:
        raise DataError(
            f"{place} is no file and matches none; batches are read from a stage's folder, Parquet "
            f"files, folders and globs, Arrow files ({', '.join(_ARROW_ENDINGS)}) and CSV "
            f"({', '.join(_CSV_ENDINGS)})"
        )
    return sorted(found)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _parquet_schema(path: Path) -> pa.Schema:
    with _named_faults(path, "Parquet"):
        return pq.read_schema(path)


def _arrow_batches(
    path: Path, columns: Sequence[str] | None, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    with _named_faults(path, "Arrow IPC"), pa.memory_map(str(path)) as source:
        schema = _open_arrow(source).schema
    _require(columns, schema.names, path)
    return _read_arrow(path, columns, batch_rows)


def _read_arrow(
    path: Path, columns: Sequence[str] | None, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    with _named_faults(path, "Arrow IPC"), pa.memory_map(str(path)) as source:
        for batch in _arrow_stream(_open_arrow(source)):
            wanted = batch if columns is None else batch.select(list(columns))
            for start in range(0, wanted.num_rows, batch_rows):
                yield wanted.slice(start, batch_rows)


def _open_arrow(source: pa.NativeFile) -> pa.RecordBatchFileReader | pa.RecordBatchStreamReader:
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:  # not the file form, so the stream form or neither
        source.seek(0)
        return pa.ipc.open_stream(source)


def _arrow_stream(
    reader: pa.RecordBatchFileReader | pa.RecordBatchStreamReader,
) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.RecordBatchFileReader):
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return iter(reader)


def _csv_batches(
    path: Path, columns: Sequence[str] | None, delimiter: str, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    names = _csv_header(path, delimiter)
    _require(columns, names, path)
    types = _csv_types(path, names, delimiter)
    return _read_csv(path, types, columns, delimiter, batch_rows)


def _read_csv(
    path: Path,
    types: dict[str, pa.DataType],
    columns: Sequence[str] | None,
    delimiter: str,
    batch_rows: int,
) -> Iterator[pa.RecordBatch]:
    for batch in _open_csv(path, types, delimiter):
        wanted = batch if columns is None else batch.select(list(columns))
        for start in range(0, wanted.num_rows, batch_rows):
            yield wanted.slice(start, batch_rows)


def _csv_header(path: Path, delimiter: str) -> list[str]:
    """The names in the first line, or why they are not usable."""
    try:
        with pa.input_stream(str(path)) as source:
            text = io.TextIOWrapper(source, encoding="utf-8-sig", newline="")
            names = next(csv.reader(text, delimiter=delimiter), [])
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    if not names:
        raise DataError(f"{path} is empty; a CSV begins with a line of column names")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} names the columns {twice} more than once; rename them")
    if "" in names:
        raise DataError(f"{path} has no name for column {names.index('') + 1}; name it")
    others = [f"{_DELIMITERS[d]} {d!r}" for d in _DELIMITERS if d != delimiter and d in names[0]]
    if len(names) == 1 and others:
        raise DataError(
            f"{path} has one column called {names[0]!r}; is it delimited by {others[0]}? Then say "
            f"so with delimiter=…"
        )
    return names


def _csv_types(path: Path, names: Sequence[str], delimiter: str) -> dict[str, pa.DataType]:
    """Look at every value: the first type of each column that keeps all its texts."""
    _require_closed_quotes(path)
    candidates = {name: list(_CSV_TYPES) for name in names}
    has_value = dict.fromkeys(names, False)
    for batch in _open_csv(path, dict.fromkeys(names, pa.string()), delimiter):
        for name in names:
            texts = batch.column(name).drop_null()
            if len(texts):
                has_value[name] = True
                candidates[name] = [c for c in candidates[name] if _fits(texts, *c)]
    return {
        name: candidates[name][0][0] if has_value[name] and candidates[name] else pa.string()
        for name in names
    }


def _fits(texts: pa.Array, dtype: pa.DataType, pattern: str) -> bool:
    if not pc.all(pc.match_substring_regex(texts, pattern)).as_py():
        return False
    if pa.types.is_boolean(dtype):
        return True
    try:
        values = texts.cast(dtype)
    except pa.ArrowInvalid:  # looks like one and is none: beyond 64 bits, February 30th
        return False
    return not pa.types.is_floating(dtype) or bool(pc.all(pc.is_finite(values)).as_py())


def _open_csv(
    path: Path, types: dict[str, pa.DataType], delimiter: str
) -> Iterator[pa.RecordBatch]:
    with _named_faults(path, "CSV"), pa.input_stream(str(path)) as source:
        reader = pa_csv.open_csv(
            source,
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES),
            parse_options=pa_csv.ParseOptions(
                delimiter=delimiter,
                newlines_in_values=True,
                ignore_empty_lines=len(types) > 1,  # with one column an empty line is a null
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types=types,
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                true_values=["true", "True", "TRUE"],
                false_values=["false", "False", "FALSE"],
            ),
        )
        yield from reader


def _require_closed_quotes(path: Path) -> None:
    """An open quote swallows the rest of the file into one field, and Arrow takes that."""
    num_quotes = 0
    with pa.input_stream(str(path)) as source:
        while block := source.read(_CSV_BLOCK_BYTES):
            num_quotes += block.count(b'"')
    if num_quotes % 2:
        raise DataError(
            f'{path} has an odd number of quotes ("), so one is opened and not closed; close it, '
            f"and write a quote within a field as two"
        )


@contextmanager
def _named_faults(path: Path, form: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        if "straddling" in reason:
            reason = (
                f"a record is longer than {format_bytes(_CSV_BLOCK_BYTES)}; is a quote missing?"
            )
        raise DataError(f"{path} cannot be read as {form}: {reason}") from error


def _require(columns: Sequence[str] | None, present: Sequence[str], path: Path) -> None:
    missing = [name for name in columns or () if name not in present]
    if missing:
        raise SchemaError(f"{path} lacks the columns {missing}{nearest(missing[0], present)}")


def _difference(first: pa.Schema, found: pa.Schema) -> str:
    lacks = [name for name in first.names if name not in found.names]
    more = [name for name in found.names if name not in first.names]
    other = [
        f"{field.name} is {found.field(field.name).type}, not {field.type}"
        for field in first
        if field.name in found.names and found.field(field.name).type != field.type
    ]
    parts = [f"lacks {lacks}"] if lacks else []
    parts += [f"has also {more}"] if more else []
    return "; ".join([*parts, *other]) or "has them in another order"


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path} does not exist; check the path")
    return path
