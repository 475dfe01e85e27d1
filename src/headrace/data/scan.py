"""What ``sources`` declares, and each source as a view of its own name inside the engine.

Every file of a source has the same columns and types, or the difference is an error: DuckDB would
take the first file's types and read 2.7 from a later one as 3. CSV and JSON are read once into
tables of the private database; Parquet and attached DuckDB tables are read where they are.
Databases come in as Arrow batches, so that DuckDB never downloads an extension.

With no declared key a source of files also has the column ``row_id``: a hash of (digest of the
file, row in the file), given before any join; the recipe passes it on.
"""

import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from headrace.data.csvtypes import parse_text, refuse_rounding
from headrace.data.delimited import FAULT, FILE, load_files
from headrace.data.dialect import Dialect, File, LoadedFile, Reject
from headrace.data.engine import (
    Engine,
    as_signed,
    identifier,
    identity_hash,
    literal,
    literals,
    source_view,
)
from headrace.errors import ConfigError, DataError, SchemaError, nearest
from headrace.schema import ROW_ID
from headrace.storage import digest_file

Format = Literal["csv", "parquet", "json", "duckdb", "sqlite", "postgresql"]
DATABASES: tuple[Format, ...] = ("sqlite", "postgresql")

_SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".duckdb": "duckdb",
    ".sqlite": "sqlite",
    ".sqlite3": "sqlite",
}
_CSV_ONLY = ("delimiter", "quote", "names", "skip", "nulls", "encoding", "trim", "max_line")


class Source(Dialect):
    """One source of rows: files (one path or a pattern), or a table or query of a database.

    The settings of ``Dialect`` are for CSV alone; ``types`` is for CSV and JSON.
    """

    path: str | None = None  # relative to the project; may hold * and ? and **
    format: Format | None = None  # told from the file's suffix where it can be
    table: str | None = None  # of a database: table or schema.table
    query: str | None = None  # of SQLite or PostgreSQL: a SELECT instead of a table
    url: str | None = None  # of PostgreSQL, without password
    watermark: str | None = None  # of a database: a SELECT whose result changes with the data
    unify: bool = False  # whether columns and types may differ between the files

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        kind = self.kind
        given = self.model_fields_set
        if kind == "postgresql":
            if not self.url or self.path:
                raise ValueError("format postgresql needs `url` and no `path`")
            if _has_password(self.url):
                raise ValueError(
                    "the url holds a password, and this file is tracked; take it out and set "
                    "PGPASSWORD or use ~/.pgpass"
                )
        elif self.path is None or self.url:
            raise ValueError(f"format {kind} needs `path` and no `url`")
        wrong = [name for name in _CSV_ONLY if name in given and kind != "csv"]
        wrong += [name for name in ("types",) if name in given and kind not in ("csv", "json")]
        wrong += [name for name in ("unify",) if name in given and kind in (*DATABASES, "duckdb")]
        wrong += [
            name for name in ("query", "watermark") if name in given and kind not in DATABASES
        ]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} cannot take effect for format {kind}")
        is_database = kind in (*DATABASES, "duckdb")
        if is_database != (bool(self.table) or bool(self.query)) or (self.table and self.query):
            raise ValueError(
                f"format {kind} needs one of `table` and `query`"
                if is_database
                else f"`table` and `query` cannot take effect for format {kind}"
            )
        return self

    @property
    def kind(self) -> Format:
        """The declared format, or the one that the suffix of ``path`` tells."""
        if self.format:
            return self.format
        if self.url and not self.path:
            return "postgresql"
        suffixes = [suffix.lower() for suffix in Path(self.path or "").suffixes]
        if suffixes[-1:] == [".gz"]:
            suffixes.pop()
        found = _SUFFIXES.get(suffixes[-1]) if suffixes else None
        if not found:
            raise ValueError(
                f"the format of {self.path} is not told by its suffix; set `format` to one of "
                f"csv, parquet, json, duckdb, sqlite"
            )
        return found

    @property
    def dialect(self) -> Dialect:
        """The CSV part, with a tab as delimiter for .tsv files that do not say otherwise."""
        part = {name: getattr(self, name) for name in Dialect.model_fields}
        is_tabbed = ".tsv" in Path(self.path or "").suffixes
        if is_tabbed and "delimiter" not in self.model_fields_set:
            part["delimiter"] = "\t"
        return Dialect.model_construct(**part)


SourceName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]


@dataclass(frozen=True)
class Found:
    """A source whose files were found: nothing of them is read yet."""

    name: str
    source: Source
    files: tuple[File, ...]


@dataclass
class Scanned:
    """What was read of one source."""

    name: str
    types: dict[str, str]
    num_rows: int
    files: list[LoadedFile] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


def find_files(root: Path, sources: Mapping[str, Source]) -> list[Found]:
    """Find the files of each source, in sorted order.

    Raises:
        DataError: naming each source whose path or pattern matches nothing.
    """
    found = []
    missing = []
    for name, source in sources.items():
        files: tuple[File, ...] = ()
        if source.path is not None:
            paths = _match(root, source.path)
            files = tuple(File(path, _shown(root, path)) for path in paths)
            if not files:
                missing.append(f"{name}: {source.path}")
        found.append(Found(name, source, files))
    if missing:
        raise DataError(
            f"no file for the sources {missing} below {root}; correct `path`, or make the file "
            f"(`headrace stage raw` makes those of the example)"
        )
    return found


def scan_files(engine: Engine, found: Found, *, with_row_id: bool) -> Scanned:
    """Make a view called like the source over its files.

    Raises:
        DataError: what the files hold cannot be read: file and line, and what to do.
        SchemaError: columns or types differ between the files, or a reserved name is used.
    """
    kind = found.source.kind
    if kind == "csv":
        scanned = _scan_csv(engine, found, with_row_id=with_row_id)
    elif kind == "json":
        scanned = _scan_json(engine, found, with_row_id=with_row_id)
    elif kind == "parquet":
        scanned = _scan_parquet(engine, found, with_row_id=with_row_id)
    else:
        scanned = _scan_duckdb(engine, found)
    return scanned


def scan_batches(engine: Engine, name: str, reader: pa.RecordBatchReader) -> Scanned:
    """Make a table called like the source from the rows of a database."""
    table = source_view(name)
    engine.load(table, reader)
    (num_rows,) = engine.row(f"SELECT count(*) FROM {table}")
    return Scanned(name, dict(engine.describe(f"SELECT * FROM {table}")), num_rows)


def attached_files(found: Iterable[Found]) -> dict[str, Path]:
    """Return the DuckDB files to attach, by the name to attach them under."""
    return {
        _attached_name(one.name): one.files[0].path for one in found if one.source.kind == "duckdb"
    }


def readable_files(found: Iterable[Found]) -> list[Path]:
    """Return the files that SQL has to read while it runs."""
    return [
        file.path
        for one in found
        if one.source.kind in ("csv", "json", "parquet")
        for file in one.files
    ]


def _scan_csv(engine: Engine, found: Found, *, with_row_id: bool) -> Scanned:
    table = _table(engine, found.name)
    source = found.source
    loaded = load_files(engine, table, found.files, source.dialect, unify=source.unify)
    _refuse_reserved(found.name, loaded.types, with_row_id=with_row_id)
    wanted = [identifier(name) for name in loaded.types]
    if with_row_id:
        starts = _starts(engine, table, len(found.files))
        digests = [file.digest for file in loaded.files]
        _refuse_twins(found, digests)
        index = f"{identifier(FILE)} + 1"
        row = f"rowid - {starts}[{index}]"
        wanted.append(_row_id(f"{literals(digests)}[{index}]", row))
    engine.execute(
        f"CREATE VIEW {source_view(found.name)} AS SELECT {', '.join(wanted)} FROM {table} "
        f"WHERE {identifier(FAULT)} IS NULL"
    )
    num_rows = sum(file.num_rows_kept for file in loaded.files)
    (seen,) = engine.row(f"SELECT count(*) FROM {source_view(found.name)}")
    assert seen == num_rows, f"{found.name}: {seen} rows in the view, {num_rows} kept"
    return Scanned(found.name, loaded.types, num_rows, loaded.files, loaded.rejects)


def _starts(engine: Engine, table: str, num_files: int) -> str:
    found = dict(
        engine.rows(
            f"SELECT {identifier(FILE)}, min(rowid) FROM {table} GROUP BY {identifier(FILE)}"
        )
    )
    return "[" + ", ".join(str(found.get(number, 0)) for number in range(num_files)) + "]"


def _scan_json(engine: Engine, found: Found, *, with_row_id: bool) -> Scanned:
    table = _table(engine, found.name)
    declared = found.source.types
    schemas = [engine.describe(f"SELECT * FROM {_read_json(file)}") for file in found.files]
    types = _one_schema(found, [dict(schema) for schema in schemas])
    if unknown := [name for name in declared if name not in types]:
        near = "".join(nearest(name, types) for name in unknown[:1])
        raise SchemaError(
            f"`types` of source {found.name} names the columns {unknown}, which "
            f"{found.files[0].name} does not have{near}"
        )
    types |= declared
    as_text = [name for name, kind in declared.items() if kind.upper() != "JSON"]
    _refuse_rounded_json(engine, found, schemas, types)
    _refuse_reserved(found.name, types, with_row_id=with_row_id)
    columns = [f"{identifier(name)} {kind}" for name, kind in types.items()]
    engine.execute(f"CREATE TABLE {table} ({', '.join(columns)}, {identifier(FILE)} INTEGER)")
    loaded = []
    for number, file in enumerate(found.files):
        present = [name for name, _ in schemas[number]]
        wanted = [
            f"CAST({identifier(n)} AS {types[n]}) AS {identifier(n)}"
            for n in present
            if n not in as_text
        ]
        wanted.append(f"{number} AS {identifier(FILE)}")
        own = {name: types[name] for name in present if name in as_text}
        if own:
            _insert_declared(engine, table, file, wanted, own)
        else:
            engine.execute(
                f"INSERT INTO {table} BY NAME SELECT {', '.join(wanted)} FROM {_read_json(file)}"
            )
        (num_rows,) = engine.row(
            f"SELECT count(*) FROM {table} WHERE {identifier(FILE)} = {number}"
        )
        if not num_rows:
            raise DataError(f"{file.name} holds no row; give a file with rows")
        digest = digest_file(file.path).digest
        loaded.append(LoadedFile(file, digest, num_rows, num_rows))
    wanted = [identifier(name) for name in types]
    if with_row_id:
        digests = [file.digest for file in loaded]
        _refuse_twins(found, digests)
        index = f"{identifier(FILE)} + 1"
        row = f"rowid - {_starts(engine, table, len(found.files))}[{index}]"
        wanted.append(_row_id(f"{literals(digests)}[{index}]", row))
    engine.execute(
        f"CREATE VIEW {source_view(found.name)} AS SELECT {', '.join(wanted)} FROM {table}"
    )
    return Scanned(found.name, types, sum(file.num_rows_in for file in loaded), loaded)


def _insert_declared(
    engine: Engine, table: str, file: File, wanted: Sequence[str], own: Mapping[str, str]
) -> None:
    """Insert a JSON file whose columns ``own`` have declared types: read as text, cast exactly.

    Both readings go to tables first: rows of tables come in their order, and are joined by it.
    """
    guessed, texts = _table(engine, "json guessed"), _table(engine, "json texts")
    engine.execute(f"CREATE TABLE {guessed} AS SELECT {', '.join(wanted)} FROM {_read_json(file)}")
    engine.execute(f"CREATE TABLE {texts} AS SELECT * FROM {_read_json_text(file, list(own))}")
    (num_guessed,) = engine.row(f"SELECT count(*) FROM {guessed}")
    (num_texts,) = engine.row(f"SELECT count(*) FROM {texts}")
    assert num_guessed == num_texts, f"{file.name}: {num_guessed} rows, {num_texts} as text"
    parsed = {name: _parse_json(identifier(name), kind) for name, kind in own.items()}
    for name, kind in own.items():
        value = identifier(name)
        is_bad = f"{value} IS NOT NULL AND ({parsed[name]}) IS NULL"
        bad, row, text = engine.row(
            f"SELECT count(*), min(rowid), arg_min({value}, rowid) FROM {texts} WHERE {is_bad}"
        )
        if bad:
            raise DataError(
                f"{file.name}: column {name!r} is declared {kind} under `types`, but {bad} rows "
                f"hold something else: row {row + 1} has {text!r}; correct the file or set "
                f"`types: {{{name}: VARCHAR}}` for its source"
            )
    columns = ", ".join(f"{parsed[name]} AS {identifier(name)}" for name in own)
    engine.execute(
        f"INSERT INTO {table} BY NAME SELECT g.*, t.* FROM {guessed} g POSITIONAL JOIN "
        f"(SELECT {columns} FROM {texts}) t"
    )
    engine.execute(f"DROP TABLE {guessed}")
    engine.execute(f"DROP TABLE {texts}")


def _parse_json(value: str, kind: str) -> str:
    """Return SQL that reads the text of a JSON value as ``kind`` exactly, or is null."""
    # Writers of JSON give whole numbers as 2.0 where the column has doubles.
    whole = f"regexp_replace({value}, '^([+-]?[0-9]+)\\.0+$', '\\1')"
    exact = parse_text(value, kind)
    return exact if exact == value else f"coalesce({exact}, {parse_text(whole, kind)})"


def _refuse_rounded_json(
    engine: Engine,
    found: Found,
    schemas: Sequence[Sequence[tuple[str, str]]],
    types: Mapping[str, str],
) -> None:
    """Refuse whole numbers above 2^53 in columns that DuckDB takes for doubles."""
    for file, schema in zip(found.files, schemas, strict=True):
        names = [
            name
            for name, _ in schema
            if types[name] in ("FLOAT", "DOUBLE") and name not in found.source.types
        ]
        if names:
            texts = {name: identifier(name) for name in names}
            refuse_rounding(engine, _read_json_text(file, names), texts, file.name)


def _read_json_text(file: File, names: Sequence[str]) -> str:
    columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in names)
    return f"read_json({literal(str(file.path))}, columns = {{{columns}}})"


def _read_json(file: File) -> str:
    # sample_size -1: the types come from every row, not from the first ones.
    return f"read_json({literal(str(file.path))}, sample_size = -1, union_by_name = true)"


def _scan_parquet(engine: Engine, found: Found, *, with_row_id: bool) -> Scanned:
    loaded, schemas = [], []
    for file in found.files:
        try:
            num_rows = pq.read_metadata(file.path).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{file.name} is not a whole Parquet file ({error}); get it again"
            ) from error
        if not num_rows:
            raise DataError(f"{file.name} holds no row; give a file with rows")
        loaded.append(LoadedFile(file, digest_file(file.path).digest, num_rows, num_rows))
        schemas.append(dict(engine.describe(f"SELECT * FROM {_read_parquet([file])}")))
    types = _one_schema(found, schemas)
    _refuse_rounded_parquet(engine, found, schemas)
    _refuse_reserved(found.name, types, with_row_id=with_row_id)
    wanted = [f"CAST({identifier(n)} AS {kind}) AS {identifier(n)}" for n, kind in types.items()]
    scan = _read_parquet(found.files, options=", union_by_name = true")
    if with_row_id:
        digests = [file.digest for file in loaded]
        _refuse_twins(found, digests)
        pairs = ", ".join(
            f"{literal(str(file.path))}: {literal(digest)}"
            for file, digest in zip(found.files, digests, strict=True)
        )
        wanted.append(_row_id(f"MAP {{{pairs}}}[filename]", "file_row_number"))
        options = ", union_by_name = true, filename = true, file_row_number = true"
        scan = _read_parquet(found.files, options=options)
    engine.execute(
        f"CREATE VIEW {source_view(found.name)} AS SELECT {', '.join(wanted)} FROM {scan}"
    )
    return Scanned(found.name, types, sum(file.num_rows_in for file in loaded), loaded)


def _refuse_rounded_parquet(
    engine: Engine, found: Found, schemas: Sequence[Mapping[str, str]]
) -> None:
    """Refuse whole numbers that DuckDB would round because another file has a float."""
    for name in {name: None for schema in schemas for name in schema}:
        kinds = {schema[name] for schema in schemas if name in schema}
        if not kinds & {"FLOAT", "DOUBLE"}:
            continue
        limit = 1 << (53 if "DOUBLE" in kinds else 24)
        for file, schema in zip(found.files, schemas, strict=True):
            if not re.fullmatch(r"U?(INTEGER|BIGINT|HUGEINT)", schema.get(name, "")):
                continue
            column = identifier(name)
            (value,) = engine.row(
                f"SELECT min({column}) FROM {_read_parquet([file])} "
                f"WHERE {column} NOT BETWEEN -{limit}::HUGEINT AND {limit}::HUGEINT"
            )
            if value is not None:
                raise DataError(
                    f"{file.name}: column {name!r} is {schema[name]} with {value} and a float in "
                    f"another file of source {found.name}, which rounds it; write the column with "
                    f"one type (as text to keep every digit) into all files"
                )


def _read_parquet(files: Sequence[File], *, options: str = "") -> str:
    return f"read_parquet({literals(str(file.path) for file in files)}{options})"


def _scan_duckdb(engine: Engine, found: Found) -> Scanned:
    if len(found.files) > 1:
        raise ConfigError(
            f"source {found.name}: {found.source.path} matches {len(found.files)} DuckDB files; "
            f"declare one source for each"
        )
    table = ".".join(identifier(part) for part in str(found.source.table).split("."))
    database = _attached_name(found.name)
    try:
        engine.execute(
            f"CREATE VIEW {source_view(found.name)} AS SELECT * FROM {identifier(database)}.{table}"
        )
    except DataError as error:
        names = engine.rows(
            "SELECT schema_name, table_name FROM duckdb_tables() "
            f"WHERE database_name = {literal(database)} UNION ALL "
            "SELECT schema_name, view_name FROM duckdb_views() "
            f"WHERE database_name = {literal(database)} AND NOT internal ORDER BY ALL"
        )
        present = [name if schema == "main" else f"{schema}.{name}" for schema, name in names]
        if found.source.table in present:
            raise
        raise SchemaError(
            f"{found.files[0].name} has no table {found.source.table!r}"
            f"{nearest(str(found.source.table), present)}; found: {present}"
        ) from error
    (num_rows,) = engine.row(f"SELECT count(*) FROM {source_view(found.name)}")
    types = dict(engine.describe(f"SELECT * FROM {source_view(found.name)}"))
    return Scanned(found.name, types, num_rows)


def _one_schema(found: Found, schemas: Sequence[dict[str, str]]) -> dict[str, str]:
    """Return the columns that all files of a source have, or all together if it says `unify`."""
    first = schemas[0]
    faults = []
    for file, schema in zip(found.files[1:], schemas[1:], strict=True):
        for name in [*first, *(name for name in schema if name not in first)]:
            here, there = first.get(name, "no column"), schema.get(name, "no column")
            if here != there and name not in found.source.types:
                faults.append(
                    f"{name!r} is {here} in {found.files[0].name} and {there} in {file.name}"
                )
    if faults and not found.source.unify:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise SchemaError(
            f"the files of source {found.name} differ: {'; '.join(faults[:5])}{more}; make them "
            f"equal, or set `unify: true` to read them under a common type"
        )
    together: dict[str, str] = {}
    for schema in schemas:
        for name, kind in schema.items():
            together[name] = kind if together.get(name, kind) == kind else "VARCHAR"
    numeric = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "FLOAT", "DOUBLE"}
    for name in together:
        kinds = {schema[name] for schema in schemas if name in schema}
        if len(kinds) > 1 and kinds <= numeric:
            together[name] = "DOUBLE" if kinds & {"FLOAT", "DOUBLE"} else "BIGINT"
    return together


def _refuse_reserved(name: str, types: Mapping[str, str], *, with_row_id: bool) -> None:
    taken = [column for column in types if column.casefold() == ROW_ID]
    if with_row_id and taken:
        raise SchemaError(
            f"source {name} has a column {taken[0]!r}, the name headrace gives to the row's "
            f"identity; name the columns that identify a row as `extract.key`, or rename it"
        )


def _refuse_twins(found: Found, digests: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for file, digest in zip(found.files, digests, strict=True):
        if digest in seen:
            raise DataError(
                f"source {found.name}: {seen[digest]} and {file.name} have the same content, so "
                f"every row would come twice; remove one, or declare `extract.key`"
            )
        seen[digest] = file.name


def _row_id(digest: str, row: str) -> str:
    return f"{as_signed(identity_hash([digest, row]))} AS {identifier(ROW_ID)}"


def _table(engine: Engine, name: str) -> str:
    engine.execute("CREATE SCHEMA IF NOT EXISTS scanned")
    return f"scanned.{identifier(name)}"


def _attached_name(name: str) -> str:
    return f"attached {name}"


def _match(root: Path, pattern: str) -> list[Path]:
    whole = pattern if Path(pattern).is_absolute() else str(root / pattern)
    if any(mark in pattern for mark in "*?["):
        paths = [Path(path) for path in glob.glob(whole, recursive=True)]  # noqa: PTH207 absolute patterns
    else:
        paths = [Path(whole)]
    return sorted(path.resolve() for path in paths if path.is_file())


def _shown(root: Path, path: Path) -> str:
    """Return the name of a file for messages and outs: without what depends on the machine."""
    base = root.resolve()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.name


def _has_password(url: str) -> bool:
    address = url.partition("//")[2].partition("/")[0]
    return ":" in address.rpartition("@")[0] or "password=" in url
