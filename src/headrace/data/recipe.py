"""The one SQL SELECT that turns the sources into rows: checked before, counted after.

A join that duplicates rows is the commonest silent fault of a training table, so joins can be
declared with their cardinality, which is checked on the sources before anything is joined. Rows
get their identity here: a hash of the declared key, or the one that a source gave them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from headrace.data.engine import Engine, Place, as_signed, identifier, identity_hash, source_view
from headrace.errors import ConfigError, DataError, SchemaError, nearest
from headrace.params import Section
from headrace.schema import FOLD, ROW_ID

RESULT = '"headrace result"'  # the table of what the recipe returns, row_id first

_VIEW = '"headrace recipe"'
_TOP = 5


class Join(Section):
    """A join that the recipe makes, with the cardinality it must have."""

    left: str
    right: str
    by: Annotated[tuple[str, ...], Field(strict=False)] | dict[str, str]  # or left: right
    kind: Literal["one_to_one", "many_to_one", "one_to_many", "many_to_many"]

    @model_validator(mode="after")
    def _has_keys(self) -> Self:
        if not self.by:
            raise ValueError("`by` needs at least one column")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """The left column of each key column and its right one."""
        return self.by if isinstance(self.by, dict) else {name: name for name in self.by}


@dataclass(frozen=True)
class JoinCount:
    """Rows before and after a declared join."""

    left: str
    right: str
    by: tuple[str, ...]
    kind: str
    num_left: int
    num_right: int
    num_matched: int  # left rows that have a partner
    num_inner: int  # rows of an inner join
    num_left_join: int  # rows of a left join


def read_recipe(root: Path, recipe: str | None, sources: Sequence[str]) -> Place:
    """Return the recipe's SQL and its name; without a recipe, all of the only source.

    Raises:
        ConfigError: if the file is missing, or there are several sources and no recipe.
    """
    if recipe is None:
        if len(sources) > 1:
            raise ConfigError(
                f"`extract.sources` has {len(sources)} sources ({', '.join(sources)}) and "
                f"`extract.recipe` is not set; name an SQL file that joins them"
            )
        return Place("the default recipe", f"SELECT * FROM {source_view(sources[0])}")
    path = root / recipe
    try:
        return Place(recipe, path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"`extract.recipe` names {recipe}, which does not exist; write one SELECT into it"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{recipe} is not UTF-8 text ({error}); save it as UTF-8") from error


def check_joins(
    engine: Engine, joins: Sequence[Join], sources: Mapping[str, Mapping[str, str]]
) -> list[JoinCount]:
    """Count each declared join and refuse one whose sources do not have its cardinality.

    Raises:
        ConfigError: a source that is not declared.
        SchemaError: a column that a source does not have, with the nearest name.
        DataError: keys that come more than once where they must be unique, the commonest named.
    """
    counts = []
    for join in joins:
        _refuse_unknown(join, sources)
        if join.kind in ("one_to_one", "one_to_many"):
            _refuse_duplicates(engine, join, join.left, list(join.columns))
        if join.kind in ("one_to_one", "many_to_one"):
            _refuse_duplicates(engine, join, join.right, list(join.columns.values()))
        counts.append(_count(engine, join))
    return counts


def run_recipe(engine: Engine, recipe: Place, *, key: Sequence[str]) -> int:
    """Run the recipe into the table ``RESULT`` with ``row_id`` first; return its number of rows.

    Raises:
        ConfigError: the SQL is wrong (with line and column), no single SELECT, or gives no row id
            that is a BIGINT.
        SchemaError: duplicate or reserved column names, or a key column that is not there.
        DataError: no rows, a value that cannot be computed, a key that is null or not unique.
    """
    _refuse_other_statements(engine, recipe)
    prefix = f"CREATE VIEW {_VIEW} AS "
    place = Place(recipe.name, recipe.text, len(prefix))
    types = engine.describe(recipe.text, place=recipe)
    columns = [name for name, _ in types]
    _refuse_bad_columns(recipe, columns, key)
    if not key and (kind := dict(types)[ROW_ID]) != "BIGINT":
        raise ConfigError(
            f"{recipe.name} returns a row_id of its own, of type {kind}; a row_id is a BIGINT: "
            f"rename the column with AS and set `extract.key` to it, or select the row_id of a "
            f"source"
        )
    engine.execute(f"{prefix}{recipe.text}", place=place)
    row_id = as_signed(identity_hash([identifier(name) for name in key])) if key else ROW_ID
    wanted = [identifier(name) for name in columns if name != ROW_ID]
    engine.execute(
        f"CREATE TABLE {RESULT} AS SELECT {row_id} AS {ROW_ID}, {', '.join(wanted)} FROM {_VIEW}",
        place=Place(recipe.name, "", 1 << 62),  # positions in our own text mean nothing to a user
    )
    (num_rows,) = engine.row(f"SELECT count(*) FROM {RESULT}")
    if not num_rows:
        raise DataError(
            f"{recipe.name} returns no row; check its WHERE and JOIN conditions, and run it on "
            f"the sources by hand"
        )
    _refuse_bad_identity(engine, recipe, key, num_rows)
    return int(num_rows)


def _refuse_other_statements(engine: Engine, recipe: Place) -> None:
    kinds = engine.statements(recipe.text, place=recipe)
    if kinds != ["SELECT"]:
        raise ConfigError(
            f"{recipe.name} must be one SELECT, found {kinds or 'nothing'}; write the joins and "
            f"features as one query (WITH … SELECT …)"
        )


def _refuse_bad_columns(recipe: Place, columns: Sequence[str], key: Sequence[str]) -> None:
    folded = [name.casefold() for name in columns]
    if twice := sorted({name for name in columns if folded.count(name.casefold()) > 1}):
        raise SchemaError(
            f"{recipe.name} returns the columns {twice} more than once; select each one by name, "
            f"or rename with AS"
        )
    if missing := [name for name in key if name not in columns]:
        near = "".join(nearest(name, columns) for name in missing[:1])
        raise SchemaError(
            f"`extract.key` names the columns {missing}, which {recipe.name} does not return{near}"
        )
    reserved = [name for name in columns if name.casefold() in (ROW_ID, FOLD)]
    if (key and reserved) or FOLD in folded:
        raise SchemaError(
            f"{recipe.name} returns {reserved}; row_id and fold are columns that headrace adds: "
            f"rename yours with AS"
        )
    if not key and ROW_ID not in columns:
        raise ConfigError(
            f"{recipe.name} returns no row_id and `extract.key` is empty, so rows have no "
            f"identity; set `extract.key` to the columns that identify a row, or select the "
            f"row_id of the source that has one row per result row (SELECT t.row_id, …; sources "
            f"of files have it, databases need a key)"
        )


def _refuse_bad_identity(engine: Engine, recipe: Place, key: Sequence[str], num_rows: int) -> None:
    nulls = {
        name: count
        for name in (key or [ROW_ID])
        for (count,) in engine.rows(
            f"SELECT count(*) FROM {RESULT} WHERE {identifier(name)} IS NULL"
        )
        if count
    }
    if nulls:
        raise DataError(
            f"{recipe.name}: the key is missing in some rows ({nulls}); filter them out in the "
            f"recipe or choose another `extract.key`"
        )
    (distinct,) = engine.row(f"SELECT count(*) FROM (SELECT DISTINCT {ROW_ID} FROM {RESULT})")
    if distinct == num_rows:
        return
    names = list(key) or [ROW_ID]
    columns = ", ".join(identifier(name) for name in names)
    top = engine.rows(
        f"SELECT {columns}, count(*) FROM {RESULT} GROUP BY ALL HAVING count(*) > 1 "
        f"ORDER BY count(*) DESC, {columns} LIMIT {_TOP}"
    )
    if not top:
        raise DataError(
            f"two rows with different keys {names} have the same 64-bit row id; add a column to "
            f"`extract.key`"
        )
    raise DataError(
        f"{recipe.name} returns {num_rows} rows but only {distinct} different keys {names}; "
        f"most often: {_shown(names, top)}. Declare the joins to find the one that duplicates "
        f"rows, or add columns to `extract.key`"
    )


def _refuse_unknown(join: Join, sources: Mapping[str, Mapping[str, str]]) -> None:
    sides = ((join.left, list(join.columns)), (join.right, list(join.columns.values())))
    for name, columns in sides:
        if name not in sources:
            raise ConfigError(
                f"`extract.joins` names the source {name!r}, which `extract.sources` does not "
                f"have{nearest(name, sources)}"
            )
        if missing := [column for column in columns if column not in sources[name]]:
            near = "".join(nearest(column, sources[name]) for column in missing[:1])
            raise SchemaError(
                f"`extract.joins` ({join.left} with {join.right}) names the columns {missing}, "
                f"which source {name} does not have{near}"
            )


def _refuse_duplicates(engine: Engine, join: Join, side: str, columns: Sequence[str]) -> None:
    names = ", ".join(identifier(column) for column in columns)
    present = " AND ".join(f"{identifier(column)} IS NOT NULL" for column in columns)
    groups = (
        f"SELECT {names}, count(*) AS n FROM {source_view(side)} WHERE {present} "
        f"GROUP BY {names} HAVING count(*) > 1"
    )
    num_keys, num_rows = engine.row(f"SELECT count(*), coalesce(sum(n), 0) FROM ({groups})")
    if not num_keys:
        return
    top = engine.rows(f"SELECT * FROM ({groups}) ORDER BY n DESC, {names} LIMIT {_TOP}")
    raise DataError(
        f"the join of {join.left} with {join.right} is declared {join.kind}, but {side} has "
        f"{num_keys} keys {list(columns)} more than once ({num_rows} rows); most often: "
        f"{_shown(columns, top)}. Make {side} unique in the recipe or correct `kind`"
    )


def _count(engine: Engine, join: Join) -> JoinCount:
    left, right = source_view(join.left), source_view(join.right)
    right_names = ", ".join(identifier(name) for name in join.columns.values())
    condition = " AND ".join(
        f"l.{identifier(one)} = r.{identifier(other)}" for one, other in join.columns.items()
    )
    (num_right,) = engine.row(f"SELECT count(*) FROM {right}")
    num_left, matched, inner, outer = engine.row(
        f"SELECT count(*), count(r.n), coalesce(sum(r.n), 0), sum(coalesce(r.n, 1)) "
        f"FROM {left} l LEFT JOIN (SELECT {right_names}, count(*) AS n FROM {right} "
        f"GROUP BY {right_names}) r ON {condition}"
    )
    by = tuple(one if one == other else f"{one} = {other}" for one, other in join.columns.items())
    return JoinCount(
        join.left,
        join.right,
        by,
        join.kind,
        num_left=num_left,
        num_right=num_right,
        num_matched=matched,
        num_inner=int(inner),
        num_left_join=int(outer),
    )


def _shown(names: Sequence[str], rows: Sequence[tuple[object, ...]]) -> str:
    shown = []
    for row in rows:
        values = ", ".join(f"{name}={value}" for name, value in zip(names, row, strict=False))
        shown.append(f"{values} ({row[-1]} rows)")
    return "; ".join(shown)
