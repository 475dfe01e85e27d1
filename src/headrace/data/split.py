"""Which split and fold every row belongs to: decided once, out of core, from the rows alone.

Rows are placed by a hash of their feature values and a seed, by their group or by their date,
never by their position, so that the same rows fall the same way in any order, at any number of
threads; targets are left out of the hash, so exact duplicates stay together and labels decide
nothing. Cost: one pass over the rows, and counts per bucket of the hash in memory (4096 per
stratum).

Folds exist for train rows only, and each of those is in exactly one fold. In time, folds are
contiguous blocks, and the rows within the gap before a block go to the split ``gap``: so a block is
separated on both sides from the rows its model is fitted on, with nothing for later stages to do.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from headrace.data.engine import Engine, identifier, identity_hash, literal
from headrace.errors import ConfigError, DataError, nearest
from headrace.params import Section
from headrace.schema import ROW_ID, SPLITS

PLACED = "placed"  # table: row_id, split (position in SPLITS), fold (null outside train)

_DEFAULT_SHARE = 0.15
_GIVEN_VALID_SHARE = 0.2
_BUCKET_BITS = 12
_DAY_US = 86_400_000_000
_UNITS_US = (_DAY_US, 3_600_000_000, 60_000_000, 1_000_000, 1)
_BUCKETS_PER_FOLD = 20
_TRAIN, _VALID, _TEST, _GAP = (SPLITS.index(name) for name in ("train", "valid", "test", "gap"))


def _parse_date(value: object) -> object:
    """Take a date or a date with time, as YAML reads it or as text."""
    if isinstance(value, str):
        try:
            return datetime.datetime.fromisoformat(value)
        except ValueError as error:
            raise ValueError("not a date; write for example 2013-09-01") from error
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return datetime.datetime(value.year, value.month, value.day)
    return value


Date = Annotated[datetime.datetime, BeforeValidator(_parse_date)]
Share = Annotated[float, Field(gt=0, lt=1)]


class SplitParams(Section):
    """How rows are divided into train, valid and test.

    random: by a seeded hash of the feature values. stratified: the same with equal shares of each
    value of ``column`` (the first target with classes, if not set). grouped: whole groups, by
    ``column``. time: by the dates in ``column``. given: ``column`` holds train, valid, test or gap.
    """

    kind: Literal["random", "stratified", "grouped", "time", "given"] = "random"
    column: str | None = None
    valid: Share | None = None  # share of the rows; 0.15 unless set
    test: Share | None = None
    valid_from: Date | None = None  # time: first moment of valid, and of test
    test_from: Date | None = None
    gap_days: Annotated[float, Field(ge=0)] | None = None  # time: purged before each boundary
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        given = self.model_fields_set
        useless = {
            "random": ["column", "valid_from", "test_from", "gap_days"],
            "stratified": ["valid_from", "test_from", "gap_days"],
            "grouped": ["valid_from", "test_from", "gap_days"],
            "time": ["valid", "test", "seed"],
            "given": ["valid", "test", "valid_from", "test_from", "gap_days"],
        }[self.kind]
        if wrong := [name for name in useless if name in given]:
            raise ValueError(f"{', '.join(wrong)} cannot take effect in a {self.kind} split")
        if self.kind in ("grouped", "time", "given") and not self.column:
            raise ValueError(f"a {self.kind} split needs `column`")
        if self.kind == "time":
            if not self.valid_from or not self.test_from:
                raise ValueError("a time split needs `valid_from` and `test_from`")
            if (self.valid_from.tzinfo is None) != (self.test_from.tzinfo is None):
                raise ValueError("`valid_from` and `test_from` must both have a zone or none")
            if self.valid_from >= self.test_from:
                raise ValueError("`valid_from` must lie before `test_from`")
        if self.valid_share + self.test_share >= 1:
            raise ValueError("`valid` and `test` leave no share for train")
        return self

    @property
    def valid_share(self) -> float:
        """Share of the rows that valid gets."""
        return _DEFAULT_SHARE if self.valid is None else self.valid

    @property
    def test_share(self) -> float:
        """Share of the rows that test gets."""
        return _DEFAULT_SHARE if self.test is None else self.test

    @property
    def gap_us(self) -> int:
        """The purge gap in microseconds."""
        return round((self.gap_days or 0) * _DAY_US)


@dataclass(frozen=True)
class Placed:
    """How many rows fell where."""

    num_rows: dict[str, int]  # by split, in the order of SPLITS
    fold_rows: tuple[int, ...]  # train rows by fold
    is_valid_cut: bool  # a given split named no valid rows, so they were cut off train


def place_rows(
    engine: Engine,
    relation: str,
    params: SplitParams,
    *,
    num_folds: int,
    features: Sequence[str],
    stratum: str | None = None,
) -> Placed:
    """Decide split and fold of every row of ``relation``, into the table ``PLACED``.

    Args:
        engine: The connection that knows ``relation``.
        relation: Quoted name of a table or view with ``row_id``.
        params: How to split.
        num_folds: Folds of the train rows.
        features: Columns whose values a row's hash is made of: no target, no key.
        stratum: Column that a stratified split balances, where ``params.column`` is not set.

    Raises:
        DataError: rows without date, group or split; a split or a fold without rows.
        ConfigError: settings that do not fit the columns.
    """
    is_valid_cut = False
    if params.kind == "time":
        _place_by_time(engine, relation, params, num_folds)
    elif params.kind == "grouped":
        _place_groups(engine, relation, params, num_folds)
    else:
        hashed = _row_hash(features, params.seed)
        if params.kind == "given":
            is_valid_cut = _place_given(engine, relation, params, hashed)
        elif params.kind == "stratified":
            _place_stratified(engine, relation, params, hashed, params.column or stratum)
        else:
            _place_random(engine, relation, params, hashed)
        _fold_by_hash(engine, params.seed, num_folds, is_stratified=params.kind == "stratified")
    return _count(engine, relation, params, num_folds, is_valid_cut=is_valid_cut)


# --- by hash -------------------------------------------------------------------------------------


def _row_hash(features: Sequence[str], seed: int) -> str:
    if not features:
        raise ConfigError(
            "a split by hash needs columns that tell rows apart, and the contract has no feature; "
            "use a split of kind grouped, time or given"
        )
    return identity_hash([identifier(name) for name in features], salt=f"split {seed}")


def _place_random(engine: Engine, relation: str, params: SplitParams, hashed: str) -> None:
    # A threshold on the row's own hash: rows that come later do not move those that are there.
    test, valid = _threshold(params.test_share), _threshold(params.test_share + params.valid_share)
    split = f"CASE WHEN h < {test} THEN {_TEST} WHEN h < {valid} THEN {_VALID} ELSE {_TRAIN} END"
    engine.execute(
        f"CREATE TABLE hashed AS SELECT {ROW_ID}, ({split})::TINYINT AS split, 0 AS stratum, h "
        f"FROM (SELECT {ROW_ID}, {hashed} AS h FROM {relation})"
    )


def _place_given(engine: Engine, relation: str, params: SplitParams, hashed: str) -> bool:
    column = identifier(str(params.column))
    found = engine.rows(
        f"SELECT {column}::VARCHAR, count(*) FROM {relation} GROUP BY 1 ORDER BY 1 LIMIT 20"
    )
    names = dict(found)
    if wrong := [name for name in names if name not in SPLITS]:
        near = nearest(str(wrong[0]), SPLITS)
        raise DataError(
            f"the split column {params.column} holds {wrong}, but must hold one of "
            f"{', '.join(SPLITS)}{near}; map it with CASE in the recipe"
        )
    is_cut = "valid" not in names
    cases = [f"WHEN {literal(name)} THEN {SPLITS.index(name)}" for name in names]
    split = f"CASE given {' '.join(cases)} END"
    if is_cut:
        limit = _threshold(_GIVEN_VALID_SHARE)
        split = f"CASE WHEN ({split}) = {_TRAIN} AND h < {limit} THEN {_VALID} ELSE {split} END"
    engine.execute(
        f"CREATE TABLE hashed AS SELECT {ROW_ID}, ({split})::TINYINT AS split, 0 AS stratum, h "
        f"FROM (SELECT {ROW_ID}, {column}::VARCHAR AS given, {hashed} AS h FROM {relation})"
    )
    return is_cut


def _place_stratified(
    engine: Engine, relation: str, params: SplitParams, hashed: str, stratum: str | None
) -> None:
    if not stratum:
        raise ConfigError(
            "a stratified split needs `extract.split.column`, because no target has classes"
        )
    engine.execute(
        f"CREATE TABLE unplaced AS SELECT {ROW_ID}, {identifier(stratum)}::VARCHAR AS stratum, "
        f"{hashed} AS h FROM {relation}"
    )
    test, valid = params.test_share, params.test_share + params.valid_share
    split = (
        f"CASE WHEN share < {test} THEN {_TEST} WHEN share < {valid} THEN {_VALID} "
        f"ELSE {_TRAIN} END"
    )
    engine.execute(
        f"CREATE TABLE hashed AS SELECT u.{ROW_ID}, ({split})::TINYINT AS split, u.stratum, u.h "
        f"FROM unplaced u JOIN ({_shares('unplaced', 'h')}) s "
        f"ON u.stratum IS NOT DISTINCT FROM s.stratum AND u.h >> {64 - _BUCKET_BITS} = s.bucket"
    )
    engine.execute("DROP TABLE unplaced")


def _fold_by_hash(engine: Engine, seed: int, num_folds: int, *, is_stratified: bool) -> None:
    """Give the train rows folds of nearly equal size from a second hash; equal rows together."""
    stratum = "stratum" if is_stratified else "0"
    engine.execute(
        f"CREATE TABLE folding AS SELECT {ROW_ID}, {stratum} AS stratum, "
        f"{identity_hash(['h'], salt=f'fold {seed}')} AS h FROM hashed WHERE split = {_TRAIN}"
    )
    fold = f"least(floor(share * {num_folds}), {num_folds - 1})::TINYINT"
    engine.execute(
        f"CREATE TABLE folded AS SELECT f.{ROW_ID}, {fold} AS fold FROM folding f "
        f"JOIN ({_shares('folding', 'h')}) s "
        f"ON f.stratum IS NOT DISTINCT FROM s.stratum AND f.h >> {64 - _BUCKET_BITS} = s.bucket"
    )
    engine.execute(
        f"CREATE TABLE {PLACED} AS SELECT h.{ROW_ID}, h.split, f.fold FROM hashed h "
        f"LEFT JOIN folded f USING ({ROW_ID})"
    )
    for table in ("hashed", "folding", "folded"):
        engine.execute(f"DROP TABLE {table}")


def _shares(table: str, hashed: str) -> str:
    """Return SQL of (stratum, bucket of the hash, share of the stratum's rows up to its middle)."""
    counts = (
        f"SELECT stratum, {hashed} >> {64 - _BUCKET_BITS} AS bucket, count(*) AS n FROM {table} "
        f"GROUP BY 1, 2"
    )
    window = "OVER (PARTITION BY stratum ORDER BY bucket)"
    return (
        f"SELECT stratum, bucket, (sum(n) {window} - n / 2) / sum(n) OVER (PARTITION BY stratum) "
        f"AS share FROM ({counts})"
    )


def _threshold(share: float) -> int:
    return round(share * 2**64)


# --- by group ------------------------------------------------------------------------------------


def _place_groups(engine: Engine, relation: str, params: SplitParams, num_folds: int) -> None:
    column = identifier(str(params.column))
    (nulls,) = engine.row(f"SELECT count(*) FROM {relation} WHERE {column} IS NULL")
    if nulls:
        raise DataError(
            f"{nulls} rows have no value in the group column {params.column}; filter them or give "
            f"them a group in the recipe"
        )
    hashed = identity_hash([column], salt=f"split {params.seed}")
    engine.execute(
        f"CREATE TABLE groups AS SELECT {column} AS member, {hashed} AS h, count(*) AS n "
        f"FROM {relation} GROUP BY 1"
    )
    test, valid = params.test_share, params.test_share + params.valid_share
    # Groups in the order of their hash fill test, valid and train by their rows' middle.
    engine.execute(
        "CREATE TABLE group_splits AS SELECT member, h, n, "
        f"(CASE WHEN share < {test} THEN {_TEST} WHEN share < {valid} THEN {_VALID} "
        f"ELSE {_TRAIN} END)::TINYINT AS split FROM (SELECT *, "
        "(sum(n) OVER (ORDER BY h, member) - n / 2) / sum(n) OVER () AS share FROM groups)"
    )
    again = identity_hash(["h"], salt=f"fold {params.seed}")
    engine.execute(
        "CREATE TABLE group_folds AS SELECT member, "
        f"least(floor(share * {num_folds}), {num_folds - 1})::TINYINT AS fold FROM (SELECT member, "
        f"(sum(n) OVER (ORDER BY g, member) - n / 2) / sum(n) OVER () AS share "
        f"FROM (SELECT member, n, {again} AS g FROM group_splits WHERE split = {_TRAIN}))"
    )
    engine.execute(
        f"CREATE TABLE {PLACED} AS SELECT r.{ROW_ID}, s.split, f.fold FROM {relation} r "
        f"JOIN group_splits s ON r.{column} = s.member "
        f"LEFT JOIN group_folds f ON r.{column} = f.member"
    )
    for table in ("groups", "group_splits", "group_folds"):
        engine.execute(f"DROP TABLE {table}")


# --- by time -------------------------------------------------------------------------------------


def _place_by_time(engine: Engine, relation: str, params: SplitParams, num_folds: int) -> None:
    column = identifier(str(params.column))
    kind = dict(engine.describe(f"SELECT {column} FROM {relation}"))[str(params.column)]
    moment = _moment(params, kind, column)
    (nulls,) = engine.row(f"SELECT count(*) FROM {relation} WHERE {column} IS NULL")
    if nulls:
        raise DataError(
            f"{nulls} rows have no date in {params.column}, so they cannot be placed in time; "
            f"filter them in the recipe"
        )
    valid, test = _micros(params.valid_from), _micros(params.test_from)
    split = (
        f"CASE WHEN t >= {test} THEN {_TEST} WHEN t >= {test - params.gap_us} THEN {_GAP} "
        f"WHEN t >= {valid} THEN {_VALID} WHEN t >= {valid - params.gap_us} THEN {_GAP} "
        f"ELSE {_TRAIN} END"
    )
    engine.execute(
        f"CREATE TABLE dated AS SELECT {ROW_ID}, t, ({split})::TINYINT AS split "
        f"FROM (SELECT {ROW_ID}, {moment} AS t FROM {relation})"
    )
    starts = _block_starts(engine, num_folds)
    gap = " OR ".join(f"t BETWEEN {s - params.gap_us} AND {s - 1}" for s in starts[1:]) or "false"
    fold = " ".join(f"WHEN t >= {start} THEN {k}" for k, start in reversed(list(enumerate(starts))))
    is_purged = f"split = {_TRAIN} AND ({gap})" if params.gap_us else "false"
    engine.execute(
        f"CREATE TABLE {PLACED} AS SELECT {ROW_ID}, "
        f"(CASE WHEN {is_purged} THEN {_GAP} ELSE split END)::TINYINT AS split, "
        f"(CASE WHEN split <> {_TRAIN} OR {is_purged} THEN NULL {fold} END)::TINYINT AS fold "
        f"FROM dated"
    )
    engine.execute("DROP TABLE dated")


def _block_starts(engine: Engine, num_folds: int) -> list[int]:
    """Return the first moment of each fold's block: whole days where the rows span enough."""
    low, high = engine.row(f"SELECT min(t), max(t) FROM dated WHERE split = {_TRAIN}")
    if low is None:
        return [0]
    enough = _BUCKETS_PER_FOLD * num_folds
    unit = next(unit for unit in _UNITS_US if (high - low) // unit >= enough or unit == 1)
    base = low // unit * unit
    rows = engine.rows(
        f"SELECT fold, min(b) FROM (SELECT b, least(floor((sum(n) OVER (ORDER BY b) - n / 2) / "
        f"sum(n) OVER () * {num_folds}), {num_folds - 1})::INTEGER AS fold FROM ("
        f"SELECT (t - {base}) // {unit} AS b, count(*) AS n FROM dated WHERE split = {_TRAIN} "
        f"GROUP BY 1)) GROUP BY 1 ORDER BY 1"
    )
    return [base + int(bucket) * unit for _, bucket in rows]


def _moment(params: SplitParams, kind: str, column: str) -> str:
    has_zone = params.valid_from is not None and params.valid_from.tzinfo is not None
    if kind == "TIMESTAMP WITH TIME ZONE":
        return f"epoch_us({column})"
    if kind in ("DATE", "TIMESTAMP", "TIMESTAMP_NS"):
        if has_zone:
            raise ConfigError(
                f"`extract.split.valid_from` has a zone, but {params.column} has none; write the "
                f"date without zone"
            )
        return f"epoch_us({column}::TIMESTAMP)"
    raise ConfigError(
        f"`extract.split.column` names {params.column}, which is {kind}; a time split needs a "
        f"date or timestamp: cast it in the recipe"
    )


def _micros(moment: datetime.datetime | None) -> int:
    assert moment is not None, "checked by SplitParams"
    zoned = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    return (zoned - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(
        microseconds=1
    )


# --- counts --------------------------------------------------------------------------------------


def _count(
    engine: Engine, relation: str, params: SplitParams, num_folds: int, *, is_valid_cut: bool
) -> Placed:
    rows = dict(engine.rows(f"SELECT split, count(*) FROM {PLACED} GROUP BY 1"))
    folds = dict(
        engine.rows(f"SELECT fold, count(*) FROM {PLACED} WHERE fold IS NOT NULL GROUP BY 1")
    )
    (num_in,) = engine.row(f"SELECT count(*) FROM {relation}")
    assert sum(rows.values()) == num_in, f"{num_in} rows in, {rows} placed"
    num_rows = {name: int(rows.get(position, 0)) for position, name in enumerate(SPLITS)}
    if empty := [name for name in ("train", "valid", "test") if not num_rows[name]]:
        raise DataError(
            f"the {params.kind} split leaves no row in {' and '.join(empty)} ({num_rows})"
            f"{_advice(engine, relation, params)}"
        )
    fold_rows = tuple(int(folds.get(fold, 0)) for fold in range(num_folds))
    if not all(fold_rows):
        raise DataError(
            f"`extract.folds` is {num_folds}, but the train rows fill only "
            f"{sum(map(bool, fold_rows))} folds ({list(fold_rows)} rows); lower it"
            + (", or lower `extract.split.gap_days`" if params.gap_us else "")
        )
    assert sum(fold_rows) == num_rows["train"], f"{fold_rows} folds, {num_rows} rows"
    return Placed(num_rows, fold_rows, is_valid_cut)


def _advice(engine: Engine, relation: str, params: SplitParams) -> str:
    if params.kind == "time":
        column = identifier(str(params.column))
        low, high = engine.row(
            f"SELECT min({column})::VARCHAR, max({column})::VARCHAR FROM {relation}"
        )
        return f"; {params.column} runs from {low} to {high}: move `valid_from` or `test_from`"
    advice: dict[str, Any] = {
        "given": f"; {params.column} must name train and test rows",
        "grouped": f"; there are too few groups in {params.column}: raise `valid` or `test`",
    }
    return str(
        advice.get(params.kind, "; there are too few different rows: raise `valid` or `test`")
    )
