"""Reading CSV files strictly and by name, so that no row and no digit is lost without a word.

DuckDB's reader is fast and, left to itself, silent: sniffing drops rows that do not fit its guess,
``columns=`` maps by position without a look at the header, "2.7" becomes 3 in a BIGINT column. So
here the dialect is explicit, the header is read and compared by us, DuckDB splits the file into
text, and our own casts decide what is a number. A row that does not split or cast goes to the
rejects with its line, and records = rows kept + rejects is checked against a count of the bytes.
Cost: the count reads the file once more (above 1 GB/s); text first and casts after cost about a
third over DuckDB's typed reading.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

from headrace.data.csvbytes import Content, inspect, lines_of, physical_lines, reader_of, records
from headrace.data.csvtypes import (
    common_type,
    infer_types,
    parse_text,
    refuse_impossible_types,
    refuse_rounding,
    scan_text,
    text_value,
)
from headrace.data.dialect import Dialect, File, Loaded, LoadedFile, Reject
from headrace.data.engine import Engine, identifier, literal
from headrace.errors import DataError, SchemaError, nearest
from headrace.memory import format_bytes
from headrace.storage import digest_file

FAULT = "headrace fault"  # column of a loaded table: why the row is rejected; null if it is not
FILE = "headrace file"  # column of a loaded table: number of the file within the source
DELIMITERS = (",", ";", "\t", "|")
_MAX_TEXT = 300  # of a rejected line, in rejects.csv


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
    contents = [inspect(file, dialect) for file in files]
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


# --- the header ----------------------------------------------------------------------------------


def _header(file: File, dialect: Dialect) -> list[str]:
    """Return the column names of a file, read by us and checked."""
    if dialect.names:
        _refuse_bad_names(file.name, list(dialect.names))
        return list(dialect.names)
    lines = lines_of(file.path, dialect.encoding)
    for _ in range(dialect.skip):
        next(lines, "")
    names: list[str] = next(reader_of(lines, dialect), [])
    if dialect.trim:
        names = [name.strip() for name in names]
    if not any(names):
        raise DataError(f"{file.name} has no header line; give a file with one, or set `names`")
    others = [mark for mark in DELIMITERS if mark != dialect.delimiter and mark in names[0]]
    if len(names) == 1 and others:
        raise DataError(
            f"{file.name}:{dialect.skip + 1}: the header {names[0]!r} has no "
            f"{dialect.delimiter!r}, but {others[0]!r}; set `delimiter: {others[0]!r}` "
            f"for its source"
        )
    if numbers := [name for name in names if is_number(name)]:
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


def _refuse_no_rows(file: File, header: Sequence[str], content: Content) -> None:
    if content.num_records == 0:
        raise DataError(
            f"{file.name} has a header ({', '.join(header[:5])}) but no row; give a file with rows"
        )


# --- loading -------------------------------------------------------------------------------------


def _types(
    engine: Engine,
    files: Sequence[File],
    headers: Sequence[Sequence[str]],
    contents: Sequence[Content],
    dialect: Dialect,
    *,
    unify: bool,
) -> dict[str, str]:
    """Return the type of every column: declared, or fitting every value of every file."""
    types = dict.fromkeys((name for header in headers for name in header), "")
    seen: dict[str, File] = {}
    whole: list[tuple[File, Sequence[str], set[str]]] = []
    refuse_impossible_types(engine, dialect)
    for file, header, content in zip(files, headers, contents, strict=True):
        open_names = [name for name in header if name not in dialect.types]
        with _line_ends_named(file, content):
            found = infer_types(engine, file, header, open_names, dialect)
        whole.append((file, header, {name for name in found if found[name] == "BIGINT"}))
        for name, kind in found.items():
            if not kind or kind == types[name]:
                continue
            if not types[name]:
                types[name] = kind
                seen[name] = file
            elif unify:
                types[name] = common_type(types[name], kind)
            else:
                raise SchemaError(
                    f"column {name!r} is {types[name]} in {seen[name].name} and {kind} in "
                    f"{file.name}; set its type under `types`, or `unify: true`"
                )
    for file, header, names in whole:
        texts = {
            name: text_value(name, dialect)
            for name in header
            if name in names and types[name] == "DOUBLE"
        }
        refuse_rounding(engine, scan_text(file, header, dialect), texts, file.name)
    return {name: dialect.types.get(name) or kind or "VARCHAR" for name, kind in types.items()}


def _load(
    engine: Engine,
    table: str,
    number: int,
    file: File,
    header: Sequence[str],
    dialect: Dialect,
    content: Content,
    loaded: Loaded,
) -> None:
    """Read one file into ``table`` and add what was found to ``loaded``."""
    values = {name: text_value(name, dialect) for name in header}
    parsed = {name: parse_text(values[name], loaded.types[name]) for name in header}
    faults = [
        f"WHEN {values[name]} IS NOT NULL AND ({parsed[name]}) IS NULL THEN {literal(name)}"
        for name in header
        if parsed[name] != values[name]
    ]
    fault = f"CASE {' '.join(faults)} END" if faults else "NULL"
    wanted = [f"{parsed[name]} AS {identifier(name)}" for name in header]
    _drop_rejects(engine)
    (before,) = engine.row(f"SELECT count(*) FROM {table}")
    with _line_ends_named(file, content):
        engine.execute(
            f"INSERT INTO {table} BY NAME SELECT {', '.join(wanted)}, {fault} AS "
            f"{identifier(FAULT)}, {number} AS {identifier(FILE)} "
            f"FROM {scan_text(file, header, dialect, keep_rejects=True)}"
        )
    (after,) = engine.row(f"SELECT count(*) FROM {table}")
    unsplit = _unsplit(engine, file, dialect, content)
    _drop_rejects(engine)  # a source may have the name of one
    unfit = _unfit(engine, table, number, before, file, dialect, header, unsplit, loaded.types)
    num_in = _checked_count(file, dialect, content, len(header), after - before, unsplit)
    loaded.rejects += sorted([*unsplit, *unfit], key=lambda reject: reject.line)
    digest = digest_file(file.path).digest
    loaded.files.append(LoadedFile(file, digest, num_in, num_in - len(unsplit) - len(unfit)))


def _drop_rejects(engine: Engine) -> None:
    for name in ("reject_errors", "reject_scans"):
        engine.execute(f"DROP TABLE IF EXISTS temp.{name}")


@contextlib.contextmanager
def _line_ends_named(file: File, content: Content) -> Iterator[None]:
    """Turn DuckDB's "invalid state" into its cause where a file mixes line ends."""
    try:
        yield
    except DataError as error:
        if content.is_mixed and "state machine" in str(error):
            raise DataError(
                f"{file.name} mixes line ends (\\n, \\r\\n, \\r); write it with one kind"
            ) from error
        raise


def _unsplit(engine: Engine, file: File, dialect: Dialect, content: Content) -> list[Reject]:
    """Return the rows that DuckDB could not split, each once, by physical line."""
    found = engine.rows(
        "SELECT byte_position, column_name, error_type::VARCHAR, "
        f"left(ltrim(csv_line, chr(10) || chr(13)), {_MAX_TEXT}), "
        "error_type = 'UNQUOTED VALUE' AND regexp_matches(csv_line, '[^\\n\\r][\\n\\r]+.'), "
        "error_message FROM temp.reject_errors ORDER BY byte_position"
    )
    rejects: dict[int, Reject] = {}
    lines = physical_lines(file, dialect, content, [row[0] for row in found])
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
    for record in records(file, dialect, len(header)):
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
    content: Content,
    num_columns: int,
    num_split: int,
    unsplit: Sequence[Reject],
) -> int:
    """Return the records of a file, counted twice: from its bytes and as split plus unsplit."""
    found = num_split + len(unsplit)
    if found == content.num_records:
        return found
    # Blank lines and quotes inside unquoted fields deceive the quick count; this one is exact.
    exact = sum(1 for _ in records(file, dialect, num_columns))
    if found == exact:
        return found
    raise DataError(
        f"{file.name} holds {exact} records, of which DuckDB read {num_split} and rejected "
        f"{len(unsplit)}; the file cannot be read reliably: check its quotes and line ends, or "
        f"set `quote` for its source"
    )


def is_number(text: str) -> bool:
    """Tell whether a header field is a number, so probably a value."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
