"""The types of CSV columns, as SQL over text: found from every value, read without losing a digit.

Columns without a declared type get the narrowest of a few types that *every* value of the file
fits, found in a pass over the whole file. A column that nearly fits one is refused, because that
is what a damaged or mixed column looks like. Casts are stricter than DuckDB's, which reads "2.7" as
the BIGINT 3, rounds decimals and drops the zone of a timestamp.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence

from headrace.data.csvbytes import records
from headrace.data.dialect import NULL_MARKS, Dialect, File
from headrace.data.engine import Engine, identifier, literal, literals
from headrace.errors import ConfigError, DataError

_SAMPLE_ROWS = 20_000
_NEAR_MISS = 0.9  # share of values that fit a type from which on the others count as faults
_EXACT_DIGITS = 15  # whole numbers up to so many digits are exact in a double
_EXACT_WHOLE = 1 << 53  # and up to this one
_DIGITS = r"\s*[+-]?[0-9]+\s*"
_DAY = r"\s*\d{4}-\d{1,2}-\d{1,2}"
_CLOCK = r"([ T]\d{1,2}:\d{2}(:\d{2}(\.\d{1,9})?)?)"
_ZONE = r"\s?(Z|z|UTC|[+-]\d{2}(:?\d{2})?)"
_WHOLE = {"TINYINT", "SMALLINT", "INTEGER", "INT", "BIGINT", "HUGEINT"}
_WHOLE |= {"UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "UHUGEINT"}
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


def infer_types(
    engine: Engine, file: File, header: Sequence[str], names: Sequence[str], dialect: Dialect
) -> dict[str, str]:
    """Return for each column the first type that all values fit; empty if there is no value."""
    if not names:
        return {}
    scan = scan_text(file, header, dialect)
    sample = f"(SELECT * FROM {scan} LIMIT {_SAMPLE_ROWS})"
    likely = {
        name: [kind for kind in _CANDIDATES if counts[kind] and counts[kind] >= counts[""] / 2]
        if counts[""]
        else list(_CANDIDATES)  # a sample without a value says nothing
        for name, counts in _fits(
            engine, sample, {name: list(_CANDIDATES) for name in names}, dialect
        )
    }
    found = {}
    for name, counts in _fits(engine, scan, likely, dialect):
        found[name] = _decide(file, header, name, counts, scan, engine, dialect)
    return found


def parse_text(value: str, kind: str) -> str:
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


def scan_text(
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


def text_value(name: str, dialect: Dialect) -> str:
    """Return SQL of a column's text, trimmed if the dialect says so; null where it is missing."""
    column = identifier(name)
    if not dialect.trim:
        return column
    marks = ", ".join(literal(mark) for mark in ["", *dialect.nulls])
    return f"(CASE WHEN trim({column}) NOT IN ({marks}) THEN trim({column}) END)"


def common_type(one: str, other: str) -> str:
    """Return the type that holds the values of both; text in doubt."""
    for pair, wider in (
        ({"BIGINT", "DOUBLE"}, "DOUBLE"),
        ({"DATE", "TIMESTAMP"}, "TIMESTAMP"),
    ):
        if {one, other} == pair:
            return wider
    return "VARCHAR"


def refuse_rounding(engine: Engine, relation: str, texts: Mapping[str, str], where: str) -> None:
    """Refuse whole numbers that a double does not hold, in columns that would become doubles.

    Args:
        engine: The connection that can read ``relation``.
        relation: What is selected from.
        texts: SQL of the text of each column's values.
        where: File or files, for the message.

    Raises:
        DataError: naming column, value and remedy.
    """
    if not texts:
        return
    found = engine.row(
        "SELECT "
        + ", ".join(
            f"min({text}) FILTER (regexp_full_match({text}, {literal(_DIGITS)}) AND "
            f"coalesce(abs(TRY_CAST({text} AS HUGEINT)) > {_EXACT_WHOLE}, true))"
            for text in texts.values()
        )
        + f" FROM {relation}"
    )
    for name, value in zip(texts, found, strict=True):
        if value is not None:
            raise DataError(
                f"{where}: column {name!r} has whole numbers above 2^53 ({value.strip()}) and "
                f"becomes DOUBLE, which rounds them; set `types: {{{name}: VARCHAR}}` for its "
                f"source to keep every digit, or `{name}: DOUBLE` if rounding is meant"
            )


def refuse_impossible_types(engine: Engine, dialect: Dialect) -> None:
    """Refuse declared types that DuckDB does not have."""
    for name, kind in dialect.types.items():
        try:
            engine.execute(f"SELECT CAST(NULL AS {kind})")
        except DataError as error:
            raise ConfigError(f"`types`: {name}: {kind!r} is no SQL type ({error})") from error


def _fits(
    engine: Engine, relation: str, kinds: Mapping[str, Sequence[str]], dialect: Dialect
) -> list[tuple[str, dict[str, int]]]:
    """Count, per column, the values that are there ("") and those that fit each kind."""
    keys = []
    sums = []
    for name, wanted in kinds.items():
        value = text_value(name, dialect)
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
    file: File,
    header: Sequence[str],
    name: str,
    counts: dict[str, int],
    scan: str,
    engine: Engine,
    dialect: Dialect,
) -> str:
    num_values = counts[""]
    if num_values == 0:
        return ""
    fitting = [kind for kind in _CANDIDATES if counts.get(kind) == num_values]
    if fitting and not (fitting[0] == "DOUBLE" and counts["wide"]):
        return fitting[0]
    if fitting:
        value = text_value(name, dialect)
        (fractions,) = engine.row(
            f"SELECT count(*) FROM {scan} WHERE NOT regexp_full_match({value}, {literal(_DIGITS)})"
        )
        if not fractions:  # whole numbers that 64 bits do not hold
            return "VARCHAR"
        refuse_rounding(engine, scan, {name: value}, file.name)
        return "DOUBLE"
    near = {
        kind: n for kind in _CANDIDATES if (n := counts.get(kind, 0)) >= _NEAR_MISS * num_values
    }
    if not near:
        return "VARCHAR"
    kind = max(near, key=lambda name: near[name])
    value = text_value(name, dialect)
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
        f"{examples}{_first_line(file, header, name, odd[0][0], dialect)}; {remedy}"
    )


def _first_line(file: File, header: Sequence[str], name: str, text: str, dialect: Dialect) -> str:
    position = header.index(name)
    for record in records(file, dialect, len(header)):
        row = next(csv.reader(io.StringIO(record.text), delimiter=dialect.delimiter), [])
        if len(row) > position and row[position].strip() == text.strip():
            return f", first on line {record.first_line}"
    return ""
