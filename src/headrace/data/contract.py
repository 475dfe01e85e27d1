"""From the recipe's columns to the data contract: types, roles, targets, and why.

Roles are guessed from types, counts and names, with a reason for each that a person can review,
and every guess can be overruled. Nothing is guessed from labels. What no model may see is settled
here: infinities become missing and are counted, columns without information are put aside by name,
and types that later stages cannot hold are cast exactly or refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import pyarrow as pa
from pydantic import Field, model_validator

from headrace.data.engine import Engine, identifier
from headrace.errors import ConfigError, DataError, SchemaError, nearest
from headrace.params import Section
from headrace.schema import Column, Contract, Role, Target, Task, arrow_type, label_text

MAX_CLASSES = 1000

_EXACT = {  # DuckDB type -> Arrow type that its Parquet file reads back as
    "BOOLEAN": "bool",
    "TINYINT": "int8",
    "SMALLINT": "int16",
    "INTEGER": "int32",
    "BIGINT": "int64",
    "UTINYINT": "uint8",
    "USMALLINT": "uint16",
    "UINTEGER": "uint32",
    "UBIGINT": "uint64",
    "FLOAT": "float",
    "DOUBLE": "double",
    "VARCHAR": "string",
    "BLOB": "binary",
    "DATE": "date32[day]",
    "TIME": "time64[us]",
    "TIMESTAMP": "timestamp[us]",
    "TIMESTAMP_NS": "timestamp[ns]",
    "TIMESTAMP WITH TIME ZONE": "timestamp[us, tz=UTC]",
}
_CAST = {  # DuckDB type -> the exact type it is cast to
    "HUGEINT": "BIGINT",  # Parquet has no 128-bit integer: DuckDB would write a double
    "UHUGEINT": "UBIGINT",
    "JSON": "VARCHAR",
    "UUID": "VARCHAR",
    "TIMESTAMP_S": "TIMESTAMP",
    "TIMESTAMP_MS": "TIMESTAMP",
    '"NULL"': "VARCHAR",
}
_WEIGHT_NAMES = ("sample_weight", "row_weight", "case_weight", "instance_weight", "obs_weight")
_WEIGHT_HINTS = ("weight", "weights", "fnlwgt")
_ID_NAME = re.compile(
    r"(^|[_\s.])(id|uuid|guid|key|index|idx|nr|no|number|rowid)$|^unnamed: 0$", re.I
)
_MIN_UNIQUE = 20  # below so many rows, that all values differ says nothing
_UNIQUE_SHARE = 0.95
_TEXT_LENGTH = 50  # mean characters from which text is free text
_TEXT_WORDS = 5
_MAX_CLASS_GUESS = 20  # whole numbers with at most so many values are taken for classes


class TargetParams(Section):
    """What is to be predicted from one column; both are found from the data where not given."""

    task: Task | None = None
    labels: Annotated[tuple[str, ...], Field(strict=False)] = ()  # labels[1] is the positive class


class ColumnParams(Section):
    """What is declared of one column of the recipe; the rest is inferred."""

    role: Role | None = None
    dtype: str | None = None  # the Arrow type it must have; a change in the data is an error
    note: str | None = None  # unit or remark
    range: Annotated[tuple[float, float] | None, Field(strict=False)] = None  # allowed values

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        if self.range and self.range[0] > self.range[1]:
            raise ValueError(f"range {list(self.range)} has its ends swapped")
        return self


@dataclass(frozen=True)
class Tidied:
    """The columns of a relation in types that Parquet and Arrow hold exactly."""

    dtypes: dict[str, str]  # Arrow type by column
    infinite: dict[str, int]  # columns with infinities, which became missing, and how many


@dataclass(frozen=True)
class Inferred:
    """A contract without ranges, and why each column has its role."""

    contract: Contract
    reasons: dict[str, str]


@dataclass(frozen=True)
class _Seen:
    """Counts of one column over all rows."""

    num_rows: int
    num_values: int
    num_distinct: int
    low: Any = None
    high: Any = None
    num_characters: int = 0
    num_blanks: int = 0
    num_dates: int = 0  # texts that are ISO dates


def tidy(engine: Engine, relation: str, view: str, *, drop: Sequence[str] = ()) -> Tidied:
    """Make ``view`` over ``relation`` with exact types; infinities and NaN become missing.

    Args:
        engine: The connection.
        relation: Quoted name of a table or view.
        view: Quoted name of the view to make.
        drop: Columns that are not wanted.

    Raises:
        SchemaError: a column of a type that cannot be stored, with what to do.
    """
    columns = [pair for pair in engine.describe(f"SELECT * FROM {relation}") if pair[0] not in drop]
    dtypes: dict[str, str] = {}
    wanted, faults, floats = [], [], []
    for name, kind in columns:
        target = _stored_type(kind)
        dtype = _dtype(target)
        if dtype is None:
            faults.append(f"{name} ({kind})")
            continue
        dtypes[name] = dtype
        column = identifier(name)
        if dtype in ("float", "double"):
            floats.append(name)
            wanted.append(f"CASE WHEN isfinite({column}) THEN {column} END AS {column}")
        elif target != kind:
            wanted.append(f"CAST({column} AS {target}) AS {column}")
        else:
            wanted.append(column)
    if faults:
        raise SchemaError(
            f"the recipe returns columns of types that cannot be stored: {', '.join(faults)}; cast "
            f"them, take single fields of a STRUCT, or leave them out"
        )
    infinite = _infinite(engine, relation, floats)
    engine.execute(f"CREATE VIEW {view} AS SELECT {', '.join(wanted)} FROM {relation}")
    return Tidied(dtypes, infinite)


def infer_contract(
    engine: Engine,
    relation: str,
    dtypes: Mapping[str, str],
    *,
    targets: Mapping[str, TargetParams],
    key: Sequence[str] = (),
    columns: Mapping[str, ColumnParams] | None = None,
    time: str | None = None,
    group: str | None = None,
    max_categories: int = 50_000,
) -> Inferred:
    """Return the contract of the rows of ``relation``, and the reason for each role.

    Args:
        engine: The connection that knows ``relation``.
        relation: Quoted name of a table or view, tidied; its rows have at least one target.
        dtypes: Its columns and their Arrow types (from ``tidy``), in order.
        targets: What is to be predicted.
        key: Columns that identify a row; one may be a feature too, if a role is declared for it.
        columns: What is declared of single columns.
        time: Column by which rows are split in time.
        group: Column whose rows stay together in a split.
        max_categories: Distinct values above which a text column is put aside.

    Raises:
        SchemaError: a declared column that is not there or has another type, naming both sides.
        DataError: a target that is all missing, has one class, or whose classes do not fit.
        ConfigError: declarations that contradict each other.
    """
    declared = columns or {}
    _refuse_missing(dtypes, "targets", targets)
    _refuse_missing(dtypes, "columns", declared)
    _refuse_other_types(dtypes, declared)
    _refuse_impossible_ranges(dtypes, declared)
    seen = _look(engine, relation, dtypes)
    found: list[Column] = []
    reasons: dict[str, str] = {}
    fixed: dict[str, Role] = {time: "time"} if time else {}
    fixed |= {group: "group"} if group and group not in targets else {}
    fixed |= dict.fromkeys(targets, "target")
    _refuse_contradictions(declared, fixed, key)
    for name, dtype in dtypes.items():
        own = declared.get(name) or ColumnParams()
        role, note, reason = _guess(name, dtype, seen[name], max_categories)
        if name in key:
            role, note, reason = "key", "", "declared in `extract.key`"
        if own.role:
            role, note, reason = own.role, "", "declared in params.yaml"
        if name in fixed:
            role, note, reason = fixed[name], "", f"declared as {fixed[name]}"
        _refuse_impossible_role(engine, relation, name, dtype, role, seen[name], max_categories)
        reasons[name] = reason
        found.append(
            Column(
                name=name,
                role=role,
                dtype=dtype,
                nullable=seen[name].num_values < seen[name].num_rows,
                note=own.note if own.note is not None else note,
            )
        )
    made = []
    for name, params in targets.items():
        target, reason = _target(engine, relation, name, dtypes[name], seen[name], params)
        made.append(target)
        reasons[name] = reason
    contract = Contract(columns=tuple(found), targets=tuple(made))
    if not contract.features and not contract.named("text", "vector"):
        raise DataError(
            f"no column is left to learn from: {reasons}; declare roles under `extract.columns`"
        )
    return Inferred(contract, reasons)


def see_train(engine: Engine, relation: str, contract: Contract) -> tuple[Contract, dict[str, str]]:
    """Fill in what the train rows show, and put features without information aside.

    Returns:
        The contract with ranges and cardinalities, and for each feature put aside the reason.
    """
    dtypes = {column.name: column.dtype for column in contract.columns}
    seen = _look(engine, relation, dtypes)
    columns, useless = [], {}
    for column in contract.columns:
        one = seen[column.name]
        changes: dict[str, Any] = {}
        if column.role in ("numeric", "category", "text", "vector") and one.num_distinct <= 1:
            why = "no value in any train row"
            if one.num_distinct == 1:
                is_mixed = one.num_values < one.num_rows
                why = "the same value in every train row"
                why = "" if is_mixed else why  # value or missing: that can tell something
            if why:
                useless[column.name] = why
                changes |= {"role": "ignore", "note": why}
        if _is_number(column.dtype) and one.num_values:
            changes |= {"low": float(one.low), "high": float(one.high)}
        if column.role == "category":
            changes["cardinality"] = one.num_distinct
        columns.append(column.model_copy(update=changes))
    return contract.model_copy(update={"columns": tuple(columns)}), useless


# --- types ---------------------------------------------------------------------------------------


def _stored_type(kind: str) -> str:
    if kind in _CAST:
        return _CAST[kind]
    if kind.startswith("ENUM("):
        return "VARCHAR"
    if match := re.fullmatch(r"(.+)\[\d+\]", kind):  # fixed-size array -> list
        return f"{match[1]}[]"
    return kind


def _dtype(kind: str) -> str | None:
    if kind in _EXACT:
        return _EXACT[kind]
    if match := re.fullmatch(r"DECIMAL\((\d+),(\d+)\)", kind):
        return f"decimal128({match[1]}, {match[2]})"
    if kind.endswith("[]") and kind.removesuffix("[]") in _EXACT:
        item = _EXACT[kind.removesuffix("[]")]
        return f"list<element: {item}>" if _is_number(item) else None
    return None


def _is_whole(dtype: str) -> bool:
    return dtype.startswith(("int", "uint"))


def _is_number(dtype: str) -> bool:
    return _is_whole(dtype) or dtype in ("float", "double") or dtype.startswith("decimal")


def _is_time(dtype: str) -> bool:
    return dtype.startswith(("date", "timestamp"))


def _infinite(engine: Engine, relation: str, floats: Sequence[str]) -> dict[str, int]:
    if not floats:
        return {}
    counts = ", ".join(f"count(*) FILTER (isinf({identifier(name)}))" for name in floats)
    row = engine.row(f"SELECT {counts} FROM {relation}")
    return {name: count for name, count in zip(floats, row, strict=True) if count}


# --- roles ---------------------------------------------------------------------------------------


def _look(engine: Engine, relation: str, dtypes: Mapping[str, str]) -> dict[str, _Seen]:
    """Count what the guesses need; exact and the same at any number of threads."""
    wanted = ["count(*)"]
    for name, dtype in dtypes.items():
        column = identifier(name)
        wanted.append(f"count({column})")
        is_ordered = _is_number(dtype)
        wanted += [f"min({column})", f"max({column})"] if is_ordered else ["NULL", "NULL"]
        if dtype == "string":
            date = f"regexp_full_match({column}, '\\d{{4}}-\\d{{1,2}}-\\d{{1,2}}([ T].*)?')"
            wanted += [
                f"coalesce(sum(length({column})), 0)",
                f"coalesce(sum(length({column}) - length(replace({column}, ' ', ''))), 0)",
                f"count(*) FILTER ({date})",
            ]
        else:
            wanted += ["0", "0", "0"]
    row = engine.row(f"SELECT {', '.join(wanted)} FROM {relation}")
    num_rows = int(row[0])
    seen = {}
    for position, name in enumerate(dtypes):
        values = row[1 + 6 * position : 7 + 6 * position]
        (distinct,) = engine.row(
            f"SELECT count(*) FROM (SELECT DISTINCT {identifier(name)} AS v FROM {relation}) "
            f"WHERE v IS NOT NULL"
        )
        seen[name] = _Seen(
            num_rows, int(values[0]), distinct, values[1], values[2], *map(int, values[3:])
        )
    return seen


def _guess(name: str, dtype: str, seen: _Seen, max_categories: int) -> tuple[Role, str, str]:
    """Return role, note and reason of a column that nothing is declared of."""
    if seen.num_values == 0:
        return "ignore", "no value in any row", "no value in any row"
    if _is_time(dtype):
        note = "a date: derive features from it in the recipe (hour, weekday, age)"
        return "ignore", note, f"{dtype}; {note}"
    if dtype.startswith("list<"):
        return "vector", "", f"a list of numbers ({dtype})"
    if dtype == "bool":
        return "category", "", "true or false"
    if dtype in ("binary", "time64[us]"):
        return "ignore", f"{dtype} is no feature", f"{dtype} is no feature"
    is_unique = seen.num_values >= _MIN_UNIQUE and (
        seen.num_distinct >= _UNIQUE_SHARE * seen.num_values
    )
    if _is_number(dtype):
        return _guess_number(name, dtype, seen, is_unique=is_unique)
    return _guess_text(seen, max_categories, is_unique=is_unique)


def _guess_number(name: str, dtype: str, seen: _Seen, *, is_unique: bool) -> tuple[Role, str, str]:
    low_name = name.casefold()
    if low_name in _WEIGHT_NAMES and seen.num_values == seen.num_rows and seen.low >= 0:
        return "weight", "", f"named {name}, never missing, never negative"
    if _is_whole(dtype):
        is_counter = is_unique and seen.high - seen.low + 1 == seen.num_distinct == seen.num_rows
        if is_counter or (is_unique and _ID_NAME.search(name)):
            note = "looks like a row number or identifier"
            reason = f"{note}: {seen.num_distinct} different values in {seen.num_rows} rows"
            return "ignore", note, f"{reason}; add it to `extract.key` if it identifies the row"
        if _ID_NAME.search(name):
            return (
                "category",
                "",
                f"whole numbers named like an identifier, {seen.num_distinct} ids",
            )
    if low_name in _WEIGHT_HINTS:
        return "numeric", "", "a number; set `role: weight` if it is the weight of the row"
    return "numeric", "", f"a number ({dtype})"


def _guess_text(seen: _Seen, max_categories: int, *, is_unique: bool) -> tuple[Role, str, str]:
    mean_length = seen.num_characters / seen.num_values
    mean_words = 1 + seen.num_blanks / seen.num_values
    if seen.num_dates >= _UNIQUE_SHARE * seen.num_values:
        note = "text that holds dates: cast it in the recipe and derive features"
        return "ignore", note, note
    is_varied = seen.num_distinct > max(_MIN_UNIQUE, seen.num_values // 20)
    if is_varied and (mean_length >= _TEXT_LENGTH or mean_words >= _TEXT_WORDS):
        reason = f"free text: {mean_length:.0f} characters, {mean_words:.1f} words in the mean"
        return "text", "", reason
    if is_unique:
        note = "looks like an identifier"
        share = f"{seen.num_distinct} different values in {seen.num_values} rows"
        return "ignore", note, f"{note}: {share}; add it to `extract.key` if it identifies the row"
    if seen.num_distinct > max_categories:
        note = f"{seen.num_distinct} different values, more than max_categories"
        return "ignore", note, f"{note} = {max_categories}; group them in the recipe"
    return "category", "", f"text with {seen.num_distinct} different values"


def _refuse_missing(dtypes: Mapping[str, str], key: str, names: Mapping[str, object]) -> None:
    if missing := [name for name in names if name not in dtypes]:
        near = "".join(nearest(name, dtypes) for name in missing[:1])
        raise SchemaError(
            f"`extract.{key}` names the columns {missing}, which the recipe does not return"
            f"{near}; it returns {list(dtypes)}"
        )


def _refuse_other_types(dtypes: Mapping[str, str], declared: Mapping[str, ColumnParams]) -> None:
    faults = [
        f"{name} is declared {own.dtype}, the recipe returns {dtypes[name]}"
        for name, own in declared.items()
        if own.dtype and own.dtype != dtypes[name]
    ]
    if faults:
        raise SchemaError(
            f"columns have another type than `extract.columns` says: {'; '.join(faults)}; cast "
            f"them in the recipe, or correct the contract in params.yaml if the change is meant"
        )


def _refuse_impossible_ranges(
    dtypes: Mapping[str, str], declared: Mapping[str, ColumnParams]
) -> None:
    faults = [
        f"{name} ({dtypes[name]})"
        for name, own in declared.items()
        if own.range and not _is_number(dtypes[name])
    ]
    if faults:
        raise SchemaError(
            f"`extract.columns` declares a `range` of columns that are no numbers: "
            f"{', '.join(faults)}; cast them in the recipe, or take the range away"
        )


def _refuse_contradictions(
    declared: Mapping[str, ColumnParams], fixed: Mapping[str, Role], key: Sequence[str]
) -> None:
    places = {"target": "extract.targets", "key": "extract.key"}
    for name, own in declared.items():
        role = fixed.get(name, "key" if name in key and own.role == "key" else None)
        if own.role in places and role != own.role:
            raise ConfigError(
                f"`extract.columns.{name}.role` is {own.role}, but `{places[own.role]}` does not "
                f"have {name}; add it there"
            )
        if role and own.role not in (None, role):
            place = places.get(role, "extract.split.column")
            raise ConfigError(
                f"`{place}` makes {name} the {role}, but `extract.columns.{name}.role` says "
                f"{own.role}; keep one"
            )
    if both := [name for name in key if fixed.get(name) == "target"]:
        raise ConfigError(f"{both} are in `extract.key` and in `extract.targets`; keep one")


def _refuse_impossible_role(
    engine: Engine,
    relation: str,
    name: str,
    dtype: str,
    role: Role,
    seen: _Seen,
    max_categories: int,
) -> None:
    wrong = {
        "numeric": not (_is_number(dtype) or dtype == "bool"),
        "weight": not _is_number(dtype),
        "time": not _is_time(dtype),
        "text": dtype != "string",
        "vector": not dtype.startswith("list<"),
        "category": dtype.startswith("list<") or dtype == "binary",
    }
    if wrong.get(role):
        raise SchemaError(
            f"column {name} is declared {role}, but the recipe returns {dtype}; cast it in the "
            f"recipe or correct its role"
        )
    if role == "category" and dtype.startswith("time64"):
        raise SchemaError(
            f"column {name} is declared category, but the recipe returns {dtype}, which no model "
            f"reads; cast it to VARCHAR or to minutes in the recipe, or set `role: ignore`"
        )
    if role == "category" and seen.num_distinct > max_categories:
        raise DataError(
            f"category {name} has {seen.num_distinct} different values, more than "
            f"`extract.max_categories` = {max_categories}; group rare ones in the recipe, raise "
            f"it, or set `role: ignore`"
        )
    if role == "weight":
        column = identifier(name)
        (bad,) = engine.row(
            f"SELECT count(*) FROM {relation} WHERE {column} IS NULL OR {column} < 0"
        )
        if bad:
            raise DataError(
                f"weight {name} is missing or negative in {bad} rows; correct it in the recipe"
            )


# --- targets -------------------------------------------------------------------------------------


def _target(
    engine: Engine, relation: str, name: str, dtype: str, seen: _Seen, params: TargetParams
) -> tuple[Target, str]:
    if seen.num_values == 0:
        raise DataError(f"target {name} is missing in every row; check the recipe")
    if _is_time(dtype) or dtype.startswith("list<") or dtype == "binary":
        raise SchemaError(f"target {name} is {dtype}; a target must be a number, text or boolean")
    task, reason = params.task, "declared in params.yaml"
    if task is None:
        task, reason = _guess_task(dtype, seen, params)
    if task == "regression":
        if params.labels:
            raise ConfigError(f"`extract.targets.{name}` is a regression and cannot have labels")
        if not _is_number(dtype):
            raise SchemaError(
                f"target {name} is {dtype}, but its task is regression; cast it to a number in "
                f"the recipe or correct the task"
            )
        if seen.num_distinct < 2:
            raise DataError(f"target {name} is {seen.low} in every row; there is nothing to learn")
        return Target(name=name, task=task), reason
    labels = _labels(engine, relation, name, dtype, seen, params)
    expected = "two" if task == "binary" else "three or more"
    if (len(labels) == 2) != (task == "binary"):
        raise DataError(
            f"target {name} has {len(labels)} classes {list(labels[:10])}, but its task is {task}, "
            f"which has {expected}; correct `extract.targets.{name}.task` or the recipe"
        )
    return Target(name=name, task=task, labels=labels), reason


def _guess_task(dtype: str, seen: _Seen, params: TargetParams) -> tuple[Task, str]:
    count = len(params.labels) or seen.num_distinct
    if count <= 2 and (params.labels or not _is_number(dtype) or _is_whole(dtype)):
        return "binary", f"{count} different values ({dtype})"
    if params.labels or not _is_number(dtype):
        return "multiclass", f"{count} different values ({dtype})"
    if count == 2 and (seen.low, seen.high) == (0, 1):
        return "binary", "only 0 and 1"
    if _is_whole(dtype) and count <= _MAX_CLASS_GUESS:
        return (
            "multiclass",
            f"whole numbers with only {count} different values; set `task: regression` if they "
            f"are amounts",
        )
    return "regression", f"numbers with {count} different values"


def _labels(
    engine: Engine, relation: str, name: str, dtype: str, seen: _Seen, params: TargetParams
) -> tuple[str, ...]:
    if seen.num_distinct > MAX_CLASSES:
        raise DataError(
            f"target {name} has {seen.num_distinct} classes, more than {MAX_CLASSES}; group them "
            f"in the recipe, or set its task to regression if it is a number"
        )
    column = identifier(name)
    values = [
        value
        for (value,) in engine.rows(
            f"SELECT DISTINCT {column} FROM {relation} WHERE {column} IS NOT NULL"
        )
    ]
    found = label_text(pa.array(values, arrow_type(dtype))).drop_null().to_pylist()
    if len(found) == 1:
        raise DataError(
            f"target {name} has the single class {found[0]!r} in all its rows; there is nothing "
            f"to learn"
        )
    if not params.labels:
        return tuple(sorted(found, key=_label_order(found)))
    if sorted(params.labels) != sorted(found):
        raise DataError(
            f"target {name} has the classes {sorted(found)}, but `extract.targets.{name}.labels` "
            f"says {sorted(params.labels)}; correct one of them"
        )
    return params.labels


def _label_order(labels: Sequence[str]) -> Any:
    try:
        numbers = {label: float(label) for label in labels}
    except ValueError:
        return str
    return lambda label: (numbers[label], label)
