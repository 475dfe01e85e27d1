"""Reading CSV files strictly and by name, so that no row and no digit is lost without a word.

DuckDB's reader is fast and, left to itself, silent: sniffing drops rows that do not fit its guess,
``columns=`` maps by position without a look at the header, "2.7" becomes 3 in a BIGINT column. So
here the dialect is explicit, the header is read and compared by us, DuckDB splits the file into
text, and our own casts decide what is a number. A row that does not split or cast goes to the
rejects with its line; the records of each file are counted a second time from its bytes, and
records = rows kept + rejects is checked. Cost: the second count reads the file once more (above
1 GB/s), text first and casts after cost about a third over DuckDB's typed reading.

Columns without a declared type get the narrowest of a few types that *every* value of the file
fits, found in a pass over the whole file. A column that nearly fits one is refused, because that
is what a damaged or mixed column looks like.
"""

import codecs
import contextlib
import csv
import gzip
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from headrace.data.engine import Engine, identifier, literal, literals
from headrace.errors import ConfigError, DataError, SchemaError, nearest
from headrace.memory import format_bytes
from headrace.params import Bytes, Section
from headrace.storage import digest_file

FAULT = "headrace fault"  # column of a loaded table: why the row is rejected; null if it is not
FILE = "headrace file"  # column of a loaded table: number of the file within the source
NULL_MARKS = ("NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "?", "-")

_DELIMITERS = (",", ";", "\t", "|")
_BLOCK_BYTES = 4 << 20
_SAMPLE_ROWS = 20_000
_GUESS_ROWS = 200_000
_NEAR_MISS = 0.9  # share of values that fit a type from which on the others count as faults
_MAX_TEXT = 300  # of a rejected line, in rejects.csv
_EXACT_DIGITS = 15  # whole numbers up to so many digits are exact in a double

_TYPE = re.compile(r"^[A-Za-z][A-Za-z0-9_ ]*(\(\s*\d+\s*(,\s*\d+\s*)?\))?$")
_DAY = r"\s*\d{4}-\d{1,2}-\d{1,2}"
_CLOCK = r"([ T]\d{1,2}:\d{2}(:\d{2}(\.\d{1,9})?)?)"
_ZONE = r"\s?(Z|z|UTC|[+-]\d{2}(:?\d{2})?)"
_WHOLE = {"TINYINT", "SMALLINT", "INTEGER", "INT", "BIGINT", "HUGEINT"}
_WHOLE |= {"UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "UHUGEINT"}


def _known_type(value: str) -> str:
    if not _TYPE.match(value):
        raise ValueError("not an SQL type; write for example BIGINT, DOUBLE, VARCHAR, DATE")
    return value


SqlType = Annotated[str, AfterValidator(_known_type)]


class Dialect(Section):
    """How the CSV files of a source are written, and the types of their columns by name.

    An empty field is always missing; ``nulls`` names further texts that mean missing.
    """

    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    quote: Annotated[str, Field(max_length=1)] = '"'  # empty: fields are never quoted
    names: Annotated[tuple[str, ...], Field(strict=False)] = ()  # for files without a header line
    skip: Annotated[int, Field(ge=0)] = 0  # lines before the header or the first row
    nulls: Annotated[tuple[str, ...], Field(strict=False)] = ()
    encoding: Literal["utf-8", "latin-1", "utf-16"] = "utf-8"
    trim: bool = False  # cut blanks around every value
    max_line: Bytes = 2 << 20  # a longer line is a fault
    types: dict[str, SqlType] = Field(
        default_factory=dict
    )  # SQL types by column; found from all values where not given

    @model_validator(mode="after")
    def _marks_differ(self) -> Self:
        if self.quote == self.delimiter:
            raise ValueError("quote and delimiter must differ")
        return self


@dataclass(frozen=True)
class Reject:
    """A row that was not read: where it is, which column is at fault, why, and its text."""

    file: str
    line: int
    column: str
    reason: str
    text: str


@dataclass(frozen=True)
class File:
    """A file of a source: its path, and its name as messages and outs call it."""

    path: Path
    name: str


@dataclass(frozen=True)
class LoadedFile:
    """What was read from one file."""

    file: File
    digest: str
    num_rows_in: int
    num_rows_kept: int


@dataclass
class Loaded:
    """What was read from the files of one source."""

    types: dict[str, str]
    files: list[LoadedFile] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


@dataclass(frozen=True)
class _Content:
    """What a pass over the bytes of a file found."""

    num_records: int  # without header and skipped lines
    newline: str
    is_mixed: bool  # several kinds of line ends


def load_files(
    engine: Engine, table: str, files: Sequence[File], dialect: Dialect, *, unify: bool
) -> Loaded:
    """Read CSV files into ``table`` (a quoted name), typed, in order, with ``FAULT`` and ``FILE``.

    Rows at fault by type stay in the table with a text in ``FAULT``; rows that could not be split
    are not in it. Both are in the rejects. The caller decides how many are too many.

    Args:
        engine: May read the files.
        table: Quoted name of the table to create.
        files: Files of one source, in their fixed order.
        dialect: How they are written.
        unify: Whether columns and types may differ between the files.

    Raises:
        DataError: empty file, wrong encoding, wrong delimiter, mixed line ends, unterminated
            quote, a column that nearly fits a type, counts that disagree: with file and line.
        SchemaError: a duplicate or unexpected header, types that differ between files.
    """
    contents = [_inspect(file, dialect) for file in files]
    headers = [_header(file, dialect) for file in files]
    _refuse_unknown_types(files[0], headers, dialect)
    if not unify:
        _refuse_other_headers(files, headers)
    for file, header, content in zip(files, headers, contents, strict=True):
        _refuse_no_rows(file, header, content)
    types = _types(engine, files, headers, contents, dialect, unify=unify)
    columns = [f"{identifier(name)} {kind}" for name, kind in types.items()]
    engine.execute(
        f"CREATE TABLE {table} ({', '.join(columns)}, {identifier(FAULT)} VARCHAR, "
        f"{identifier(FILE)} INTEGER)"
    )
    loaded = Loaded(types)
    for number, (file, header, content) in enumerate(zip(files, headers, contents, strict=True)):
        _load(engine, table, number, file, header, dialect, content, loaded)
    return loaded


def propose_dialect(path: Path) -> Dialect:
    """Guess how the CSV file ``path`` is written, from its first rows, for a person to review.

    Never used to read: what is proposed is written into params.yaml, and read strictly by it.
    """
    file = File(path, path.name)
    encoding = _guess_encoding(path)
    lines = []
    for _, line in zip(range(200), _lines(path, encoding), strict=False):
        lines.append(line)
    if not lines:
        raise DataError(f"{file.name} is empty; give a file with a header line and rows")
    counts = {mark: _even_count(lines, mark) for mark in _DELIMITERS}
    delimiter = max(counts, key=lambda mark: counts[mark])
    rows = list(csv.reader(lines[:-1] or lines, delimiter=delimiter))
    is_headless = any(_is_number(value) for value in rows[0])
    names = tuple(f"column_{i + 1}" for i in range(len(rows[0]))) if is_headless else ()
    has_blanks = any(value != value.strip() for row in rows[1:] for value in row)
    nulls = _guess_nulls(path, encoding, delimiter)
    return Dialect(
        delimiter=delimiter if counts[delimiter] else ",",
        names=names,
        nulls=tuple(sorted(nulls)),
        encoding=encoding,
        trim=has_blanks,
    )


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """Write ``rejects.csv``: one line per rejected row; with only a header if there is none."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "line", "column", "reason", "text"])
        for reject in rejects:
            writer.writerow([reject.file, reject.line, reject.column, reject.reason, reject.text])


# --- the bytes of a file -------------------------------------------------------------------------


def _inspect(file: File, dialect: Dialect) -> _Content:
    """Check encoding and NUL bytes and count the records, in one pass over the decoded bytes."""
    quote = dialect.quote.encode()
    newline, last, is_inside, num_ends = b"", b"", False, 0
    num_feeds, num_returns, num_pairs = 0, 0, 0
    for block in _blocks(file, dialect):
        if not newline:
            newline = b"\n" if b"\n" in block or b"\r" not in block else b"\r"
        ends, is_inside = _ends_outside_quotes(block, newline, quote, is_inside)
        num_ends += ends
        num_feeds += block.count(b"\n")
        num_returns += block.count(b"\r")
        num_pairs += block.count(b"\r\n") + (last == b"\r" and block[:1] == b"\n")
        last = block[-1:] or last
    if not last:
        raise DataError(f"{file.name} is empty; give a file with a header line and rows")
    num_records = num_ends + (last != newline or is_inside) - dialect.skip - (not dialect.names)
    kinds = (num_pairs, num_feeds - num_pairs, num_returns - num_pairs)
    return _Content(max(num_records, 0), newline.decode(), sum(map(bool, kinds)) > 1)


def _blocks(file: File, dialect: Dialect) -> Iterator[bytes]:
    """Yield the content of a file as UTF-8 bytes, without NUL, without a byte order mark."""
    decoder = codecs.getincrementaldecoder(dialect.encoding)()
    line, is_first = 1, True
    for raw in _raw_blocks(file.path):
        block = raw
        if is_first and dialect.encoding != "utf-16" and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{file.name} is UTF-16 text; set `encoding: utf-16` for its source")
        try:
            text = decoder.decode(raw)
        except UnicodeDecodeError as error:
            at = line + raw[: error.start].count(b"\n")
            found = raw[error.start : error.start + 1].hex()
            raise DataError(
                f"{file.name}:{at}: the byte 0x{found} is not {dialect.encoding} text; if the "
                f"file is Latin-1, set `encoding: latin-1` for its source"
            ) from error
        if dialect.encoding != "utf-8":
            block = text.encode()
        if is_first:
            block = block.removeprefix(codecs.BOM_UTF8)
        if b"\0" in block:
            at = line + block[: block.index(b"\0")].count(b"\n")
            raise DataError(
                f"{file.name}:{at}: holds a NUL byte, which no text file has; the file is "
                f"damaged, or no CSV, or UTF-16 (then set `encoding: utf-16`)"
            )
        line += block.count(b"\n")
        is_first = False
        yield block


def _raw_blocks(path: Path) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); get it again") from error


def _open(path: Path) -> io.BufferedReader | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path, encoding: str) -> Iterator[str]:
    """Yield the physical lines of a file with their ends, without a byte order mark."""
    codec = "utf-8-sig" if encoding == "utf-8" else encoding
    with _open(path) as binary, io.TextIOWrapper(binary, encoding=codec, newline="") as text:
        yield from text


def _reader(lines: Iterator[str], dialect: Dialect) -> Any:
    if not dialect.quote:
        return csv.reader(lines, delimiter=dialect.delimiter, quoting=csv.QUOTE_NONE)
    return csv.reader(lines, delimiter=dialect.delimiter, quotechar=dialect.quote)


def _ends_outside_quotes(
    block: bytes, newline: bytes, quote: bytes, is_inside: bool
) -> tuple[int, bool]:
    if not quote or quote not in block:
        return (0 if is_inside else block.count(newline)), is_inside
    codes = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(codes == quote[0])
    ends = np.flatnonzero(codes == newline[0])
    is_outside = (np.searchsorted(quotes, ends) + is_inside) % 2 == 0
    return int(is_outside.sum()), bool((len(quotes) + is_inside) % 2)


@dataclass(frozen=True)
class _Record:
    first_line: int
    last_line: int
    text: str


def _records(file: File, dialect: Dialect, num_columns: int) -> Iterator[_Record]:
    """Yield the records after the header with their physical lines: slow, for faults only."""
    csv.field_size_limit(2**31 - 1)
    lines = _lines(file.path, dialect.encoding)
    for _ in range(dialect.skip):
        next(lines, "")
    taken: list[str] = []

    def tap() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    reader = _reader(tap(), dialect)
    is_header = not dialect.names
    first = dialect.skip + 1
    for row in reader:
        last = dialect.skip + reader.line_num
        if not is_header and (row or num_columns == 1):
            yield _Record(first, last, "".join(taken).rstrip("\r\n"))
        is_header = False
        first = last + 1
        taken.clear()


# --- the header ----------------------------------------------------------------------------------


def _header(file: File, dialect: Dialect) -> list[str]:
    """Return the column names of a file, read by us and checked."""
    if dialect.names:
        _refuse_bad_names(file.name, list(dialect.names))
        return list(dialect.names)
    lines = _lines(file.path, dialect.encoding)
    for _ in range(dialect.skip):
        next(lines, "")
    names: list[str] = next(_reader(lines, dialect), [])
    if dialect.trim:
        names = [name.strip() for name in names]
    if not any(names):
        raise DataError(f"{file.name} has no header line; give a file with one, or set `names`")
    others = [mark for mark in _DELIMITERS if mark != dialect.delimiter and mark in names[0]]
    if len(names) == 1 and others:
        raise DataError(
            f"{file.name}:{dialect.skip + 1}: the header {names[0]!r} has no "
            f"{dialect.delimiter!r}, but {others[0]!r}; set `delimiter: {others[0]!r}` "
            f"for its source"
        )
    if numbers := [name for name in names if _is_number(name)]:
        raise DataError(
            f"{file.name}:{dialect.skip + 1}: the header holds the numbers {numbers[:3]}, so the "
            f"file seems to have no header line; give its columns as `names` (if they are names "
            f"after all, give `names` and `skip: {dialect.skip + 1}`)"
        )
    _refuse_bad_names(file.name, names)
    return names


def _refuse_bad_names(file: str, names: list[str]) -> None:
    if nameless := [i + 1 for i, name in enumerate(names) if not name]:
        raise SchemaError(f"{file}: the header has no name for the columns {nameless}; name them")
    folded = [name.casefold() for name in names]
    if twice := [name for name, low in zip(names, folded, strict=True) if folded.count(low) > 1]:
        raise SchemaError(
            f"{file}: the header has the same name more than once: {twice} (SQL takes upper and "
            f"lower case for the same); rename one"
        )


def _refuse_unknown_types(first: File, headers: Sequence[Sequence[str]], dialect: Dialect) -> None:
    present = {name for header in headers for name in header}
    if unknown := [name for name in dialect.types if name not in present]:
        near = "".join(nearest(name, present) for name in unknown[:1])
        raise SchemaError(
            f"`types` names the columns {unknown}, which the header of {first.name} does not "
            f"have{near}; found: {sorted(present)}"
        )


def _refuse_other_headers(files: Sequence[File], headers: Sequence[Sequence[str]]) -> None:
    first = set(headers[0])
    for file, header in zip(files[1:], headers[1:], strict=True):
        lacks, adds = sorted(first - set(header)), sorted(set(header) - first)
        if lacks or adds:
            raise SchemaError(
                f"{file.name} has another header than {files[0].name}: lacks {lacks}, adds {adds};"
                f" make them equal, or set `unify: true` to read what is lacking as missing"
            )


def _refuse_no_rows(file: File, header: Sequence[str], content: _Content) -> None:
    if content.num_records == 0:
        raise DataError(
            f"{file.name} has a header ({', '.join(header[:5])}) but no row; give a file with rows"
        )


# --- types ---------------------------------------------------------------------------------------


def _types(
    engine: Engine,
    files: Sequence[File],
    headers: Sequence[Sequence[str]],
    contents: Sequence[_Content],
    dialect: Dialect,
    *,
    unify: bool,
) -> dict[str, str]:
    """Return the type of every column: declared, or fitting every value of every file."""
    types = dict.fromkeys((name for header in headers for name in header), "")
    seen: dict[str, File] = {}
    _refuse_impossible_types(engine, dialect)
    for file, header, content in zip(files, headers, contents, strict=True):
        open_names = [name for name in header if name not in dialect.types]
        with _line_ends_named(file, content):
            found = _infer(engine, file, header, open_names, dialect)
        for name, kind in found.items():
            if not kind or kind == types[name]:
                continue
            if not types[name]:
                types[name] = kind
                seen[name] = file
            elif unify:
                types[name] = _common(types[name], kind)
            else:
                raise SchemaError(
                    f"column {name!r} is {types[name]} in {seen[name].name} and {kind} in "
                    f"{file.name}; set its type under `types`, or `unify: true`"
                )
    return {name: dialect.types.get(name) or kind or "VARCHAR" for name, kind in types.items()}


def _infer(
    engine: Engine, file: File, header: Sequence[str], names: Sequence[str], dialect: Dialect
) -> dict[str, str]:
    """Return for each column the first type that all values fit; empty if there is no value."""
    if not names:
        return {}
    scan = _scan(file, header, dialect)
    sample = f"(SELECT * FROM {scan} LIMIT {_SAMPLE_ROWS})"
    likely = {
        name: [kind for kind in _CANDIDATES if counts[kind] and counts[kind] >= counts[""] / 2]
        for name, counts in _fits(
            engine, sample, {name: list(_CANDIDATES) for name in names}, dialect
        )
    }
    found = {}
    for name, counts in _fits(engine, scan, likely, dialect):
        found[name] = _decide(file, name, counts, scan, engine, dialect)
    return found


def _fits(
    engine: Engine, relation: str, kinds: Mapping[str, Sequence[str]], dialect: Dialect
) -> list[tuple[str, dict[str, int]]]:
    """Count, per column, the values that are there ("") and those that fit each kind."""
    keys = []
    sums = []
    for name, wanted in kinds.items():
        value = _value(name, dialect)
        keys.append((name, ""))
        sums.append(f"count({value})")
        for kind in wanted:
            keys.append((name, kind))
            sums.append(f"count(*) FILTER ({_CANDIDATES[kind].format(x=value)})")
        keys.append((name, "wide"))
        sums.append(
            f"count(*) FILTER (regexp_full_match({value}, "
            f"'\\s*[+-]?[0-9]{{{_EXACT_DIGITS + 1},}}\\s*'))"
        )
    counted = engine.row(f"SELECT {', '.join(sums)} FROM {relation}")
    result: dict[str, dict[str, int]] = {name: {} for name in kinds}
    for (name, kind), count in zip(keys, counted, strict=True):
        result[name][kind] = count
    return list(result.items())


def _decide(
    file: File, name: str, counts: dict[str, int], scan: str, engine: Engine, dialect: Dialect
) -> str:
    num_values = counts[""]
    if num_values == 0:
        return ""
    fitting = [kind for kind in _CANDIDATES if counts.get(kind) == num_values]
    if fitting and not (fitting[0] == "DOUBLE" and counts["wide"]):
        return fitting[0]
    if fitting:  # whole numbers that neither a double nor 64 bits hold exactly
        return "VARCHAR"
    near = {
        kind: n for kind in _CANDIDATES if (n := counts.get(kind, 0)) >= _NEAR_MISS * num_values
    }
    if not near:
        return "VARCHAR"
    kind = max(near, key=lambda name: near[name])
    value = _value(name, dialect)
    odd = engine.rows(
        f"SELECT {value}, count(*) FROM {scan} WHERE {value} IS NOT NULL "
        f"AND NOT ({_CANDIDATES[kind].format(x=value)}) GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 5"
    )
    marks = [text for text, _ in odd if text in NULL_MARKS]
    remedy = (
        f"if {marks} means missing, set `nulls: {marks}` for its source"
        if marks
        else f"set `types: {{{name}: {kind}}}` to reject these rows or `{name}: VARCHAR` to keep "
        f"them as text"
    )
    examples = ", ".join(f"{text!r} ({count} times)" for text, count in odd)
    raise DataError(
        f"{file.name}: column {name!r} is {kind} in {near[kind]} of {num_values} rows, but has "
        f"{examples}{_first_line(file, name, odd[0][0], dialect)}; {remedy}"
    )


def _first_line(file: File, name: str, text: str, dialect: Dialect) -> str:
    header = _header(file, dialect)
    position = header.index(name)
    for record in _records(file, dialect, len(header)):
        row = next(csv.reader(io.StringIO(record.text), delimiter=dialect.delimiter), [])
        if len(row) > position and row[position].strip() == text.strip():
            return f", first on line {record.first_line}"
    return ""


def _refuse_impossible_types(engine: Engine, dialect: Dialect) -> None:
    for name, kind in dialect.types.items():
        try:
            engine.execute(f"SELECT CAST(NULL AS {kind})")
        except DataError as error:
            raise ConfigError(f"`types`: {name}: {kind!r} is no SQL type ({error})") from error


def _common(one: str, other: str) -> str:
    for pair, wider in (
        ({"BIGINT", "DOUBLE"}, "DOUBLE"),
        ({"DATE", "TIMESTAMP"}, "TIMESTAMP"),
    ):
        if {one, other} == pair:
            return wider
    return "VARCHAR"


_CANDIDATES = {  # in the order of preference; {x} is the text of a value
    "BOOLEAN": "lower({x}) IN ('true', 'false')",
    "BIGINT": "regexp_full_match({x}, '[+-]?(0|[1-9][0-9]*)') "
    "AND TRY_CAST({x} AS BIGINT) IS NOT NULL",
    "DOUBLE": "TRY_CAST({x} AS DOUBLE) IS NOT NULL AND NOT contains({x}, '_') "
    "AND NOT regexp_full_match({x}, '[+-]?0[0-9].*')",
    "DATE": f"regexp_full_match({{x}}, '{_DAY.replace('{', '{{').replace('}', '}}')}') "
    "AND TRY_CAST({x} AS DATE) IS NOT NULL",
    "TIMESTAMP": "regexp_full_match({x}, "
    f"'{(_DAY + _CLOCK).replace('{', '{{').replace('}', '}}')}') "
    "AND TRY_CAST({x} AS TIMESTAMP) IS NOT NULL",
    "TIMESTAMPTZ": "regexp_full_match({x}, "
    f"'{(_DAY + _CLOCK + _ZONE).replace('{', '{{').replace('}', '}}')}') "
    "AND TRY_CAST({x} AS TIMESTAMPTZ) IS NOT NULL",
}


def _parse(value: str, kind: str) -> str:
    """Return SQL that reads text as ``kind`` exactly, or is null: no rounding, no lost zone."""
    upper = kind.upper().strip()
    plain = f"TRY_CAST({value} AS {kind})"
    decimal = re.match(r"(?:DECIMAL|NUMERIC)\s*\(\s*\d+\s*,\s*(\d+)\s*\)", upper)
    pattern = ""
    if upper in ("VARCHAR", "TEXT", "STRING"):
        return value
    if upper in _WHOLE:
        pattern = r"\s*[+-]?[0-9]+\s*"
    elif decimal:
        pattern = rf"\s*[+-]?[0-9]*(\.[0-9]{{0,{decimal[1]}}})?\s*"
    elif upper == "DATE":
        pattern = _DAY + r"\s*"
    elif upper in ("TIMESTAMP", "DATETIME"):
        pattern = _DAY + _CLOCK + r"?\s*"
    elif upper in ("TIMESTAMPTZ", "TIMESTAMP WITH TIME ZONE"):
        pattern = _DAY + _CLOCK + _ZONE + r"\s*"
    elif upper in ("DOUBLE", "FLOAT", "REAL"):
        return f"CASE WHEN NOT contains({value}, '_') THEN {plain} END"
    if not pattern:
        return plain
    return f"CASE WHEN regexp_full_match({value}, {literal(pattern)}) THEN {plain} END"


# --- loading -------------------------------------------------------------------------------------


def _load(
    engine: Engine,
    table: str,
    number: int,
    file: File,
    header: Sequence[str],
    dialect: Dialect,
    content: _Content,
    loaded: Loaded,
) -> None:
    """Read one file into ``table`` and add what was found to ``loaded``."""
    values = {name: _value(name, dialect) for name in header}
    parsed = {name: _parse(values[name], loaded.types[name]) for name in header}
    faults = [
        f"WHEN {values[name]} IS NOT NULL AND ({parsed[name]}) IS NULL THEN {literal(name)}"
        for name in header
        if parsed[name] != values[name]
    ]
    fault = f"CASE {' '.join(faults)} END" if faults else "NULL"
    wanted = [f"{parsed[name]} AS {identifier(name)}" for name in header]
    for name in ("reject_errors", "reject_scans"):
        engine.execute(f"DROP TABLE IF EXISTS {name}")
    (before,) = engine.row(f"SELECT count(*) FROM {table}")
    with _line_ends_named(file, content):
        engine.execute(
            f"INSERT INTO {table} BY NAME SELECT {', '.join(wanted)}, {fault} AS "
            f"{identifier(FAULT)}, {number} AS {identifier(FILE)} "
            f"FROM {_scan(file, header, dialect, keep_rejects=True)}"
        )
    (after,) = engine.row(f"SELECT count(*) FROM {table}")
    unsplit = _unsplit(engine, file, dialect, content)
    unfit = _unfit(engine, table, number, before, file, dialect, header, unsplit, loaded.types)
    num_in = _checked_count(file, dialect, content, len(header), after - before, unsplit)
    loaded.rejects += sorted([*unsplit, *unfit], key=lambda reject: reject.line)
    digest = digest_file(file.path).digest
    loaded.files.append(LoadedFile(file, digest, num_in, num_in - len(unsplit) - len(unfit)))


@contextlib.contextmanager
def _line_ends_named(file: File, content: _Content) -> Iterator[None]:
    """Turn DuckDB's "invalid state" into its cause where a file mixes line ends."""
    try:
        yield
    except DataError as error:
        if content.is_mixed and "state machine" in str(error):
            raise DataError(
                f"{file.name} mixes line ends (\\n, \\r\\n, \\r); write it with one kind"
            ) from error
        raise


def _scan(
    file: File, header: Sequence[str], dialect: Dialect, *, keep_rejects: bool = False
) -> str:
    """Return the ``read_csv`` call that splits a file into text columns and guesses nothing."""
    columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in header)
    options = {
        "auto_detect": "false",
        "columns": "{" + columns + "}",
        "header": "false" if dialect.names else "true",
        "delim": literal(dialect.delimiter),
        "quote": literal(dialect.quote),
        "escape": literal(dialect.quote),
        "skip": str(dialect.skip),
        "nullstr": literals(["", *dialect.nulls]),
        "encoding": literal(dialect.encoding),
        "max_line_size": str(dialect.max_line),
    }
    # While only types are looked for, rows that do not split are passed over; loading names them.
    options |= (
        {"store_rejects": "true", "rejects_limit": "0"}
        if keep_rejects
        else {"ignore_errors": "true"}
    )
    given = ", ".join(f"{name} = {value}" for name, value in options.items())
    return f"read_csv({literal(str(file.path))}, {given})"


def _value(name: str, dialect: Dialect) -> str:
    column = identifier(name)
    if not dialect.trim:
        return column
    marks = ", ".join(literal(mark) for mark in ["", *dialect.nulls])
    return f"(CASE WHEN trim({column}) NOT IN ({marks}) THEN trim({column}) END)"


def _unsplit(engine: Engine, file: File, dialect: Dialect, content: _Content) -> list[Reject]:
    """Return the rows that DuckDB could not split, each once, by physical line."""
    found = engine.rows(
        "SELECT byte_position, column_name, error_type::VARCHAR, "
        f"left(ltrim(csv_line, chr(10) || chr(13)), {_MAX_TEXT}), "
        "error_type = 'UNQUOTED VALUE' AND regexp_matches(csv_line, '[^\\n\\r][\\n\\r]+.'), "
        "error_message FROM reject_errors ORDER BY byte_position"
    )
    rejects: dict[int, Reject] = {}
    lines = _physical_lines(file, dialect, content, [row[0] for row in found])
    for (_, column, kind, text, is_open, message), line in zip(found, lines, strict=True):
        if is_open:
            raise DataError(
                f"{file.name}:{line}: a quote is opened and never closed properly, so the rows "
                f"after it would be lost; close it, or set `quote` for its source"
            )
        if kind == "LINE SIZE OVER MAXIMUM":
            message = (
                f"longer than max_line = {format_bytes(dialect.max_line)}; "
                f"raise `max_line` for its source if that is right"
            )
        reason = f"{kind.lower()}: {message}"
        rejects.setdefault(line, Reject(file.name, line, column or "", reason, text.strip("\r\n")))
    return list(rejects.values())


def _physical_lines(
    file: File, dialect: Dialect, content: _Content, positions: Sequence[int]
) -> list[int]:
    """Return the line that holds the byte before each of the ascending ``positions``."""
    if not positions:
        return []
    newline = content.newline.encode()
    lines = []
    start, line, waiting = 0, 1, list(positions)
    has_mark = dialect.encoding == "utf-8" and next(_raw_blocks(file.path))[:3] == codecs.BOM_UTF8
    shift = 3 if has_mark else 0
    for block in _blocks(file, dialect):
        while waiting and waiting[0] - 1 - shift < start + len(block):
            lines.append(line + block[: max(waiting.pop(0) - 1 - shift - start, 0)].count(newline))
        line += block.count(newline)
        start += len(block)
    return lines + [line] * len(waiting)


def _unfit(
    engine: Engine,
    table: str,
    number: int,
    before: int,
    file: File,
    dialect: Dialect,
    header: Sequence[str],
    unsplit: Sequence[Reject],
    types: Mapping[str, str],
) -> list[Reject]:
    """Return the rows of one file whose values do not fit their types."""
    fault, of_file = identifier(FAULT), identifier(FILE)
    found = dict(
        engine.rows(
            f"SELECT rowid - {before}, {fault} FROM {table} "
            f"WHERE {fault} IS NOT NULL AND {of_file} = {number}"
        )
    )
    if not found:
        return []
    skipped = {reject.line for reject in unsplit}
    rejects = []
    position = -1
    for record in _records(file, dialect, len(header)):
        if not skipped.isdisjoint(range(record.first_line, record.last_line + 1)):
            continue
        position += 1
        if position in found:
            column = found[position]
            reason = f"not {types[column]}"
            text = record.text[:_MAX_TEXT]
            rejects.append(Reject(file.name, record.first_line, column, reason, text))
    return rejects


def _checked_count(
    file: File,
    dialect: Dialect,
    content: _Content,
    num_columns: int,
    num_split: int,
    unsplit: Sequence[Reject],
) -> int:
    """Return the records of a file, counted twice: from its bytes and as split plus unsplit."""
    found = num_split + len(unsplit)
    if found == content.num_records:
        return found
    # Blank lines and quotes inside unquoted fields deceive the quick count; this one is exact.
    exact = sum(1 for _ in _records(file, dialect, num_columns))
    if found == exact:
        return found
    raise DataError(
        f"{file.name} holds {exact} records, of which DuckDB read {num_split} and rejected "
        f"{len(unsplit)}; the file cannot be read reliably: check its quotes and line ends, or "
        f"set `quote` for its source"
    )


# --- proposals -----------------------------------------------------------------------------------


def _guess_encoding(path: Path) -> Literal["utf-8", "latin-1", "utf-16"]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for number, block in enumerate(_raw_blocks(path)):
        if number == 0 and block[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return "utf-16"
        try:
            decoder.decode(block)
        except UnicodeDecodeError:
            return "latin-1"
    return "utf-8"


def _guess_nulls(path: Path, encoding: str, delimiter: str) -> set[str]:
    """Return the null marks that stand alone in a field of the first rows."""
    found: set[str] = set()
    rows = csv.reader(_lines(path, encoding), delimiter=delimiter)
    for _, row in zip(range(_GUESS_ROWS), rows, strict=False):
        found.update({value.strip() for value in row}.intersection(NULL_MARKS))
    return found - {"-"}


def _even_count(lines: Sequence[str], mark: str) -> float:
    counts = [len(row) - 1 for row in csv.reader(lines, delimiter=mark) if row]
    common = max(set(counts), key=counts.count)
    return common * counts.count(common) / len(counts)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
