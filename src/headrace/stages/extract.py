"""Stage ``extract``: sources and one SQL recipe in, a table with identity, split and fold out.

Files are read strictly, databases as Arrow batches, all of it out of core in a locked-down DuckDB.
The recipe's rows are given an id, a split and a fold once; the contract says what every column is.
Memory: half of ``resources.memory_budget`` for DuckDB, which spills below ``scratch``.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import BeforeValidator, Field

from headrace.data.contract import (
    ColumnParams,
    Inferred,
    TargetParams,
    Tidied,
    infer_contract,
    see_train,
    tidy,
)
from headrace.data.dialect import Reject, write_rejects
from headrace.data.engine import Engine, identifier, identity_hash, open_engine
from headrace.data.profile import PROFILE, profile_table
from headrace.data.recipe import (
    RESULT,
    Join,
    JoinCount,
    check_joins,
    read_recipe,
    run_recipe,
)
from headrace.data.scan import (
    Found,
    Scanned,
    Source,
    SourceName,
    attached_files,
    find_files,
    readable_files,
    scan_batches,
    scan_files,
)
from headrace.data.split import PLACED, Placed, SplitParams, place_rows
from headrace.data.write import Written, split_digest, write_splits
from headrace.errors import DataError, SchemaError, nearest
from headrace.params import Bytes, Resources, Section
from headrace.record import MemoryRecorder, Recorder
from headrace.schema import CONTRACT, FOLD, ROW_ID, SPLITS, Contract, Split, arrow_type, label_text
from headrace.sources.postgresql import read_postgresql
from headrace.sources.sqlite import read_sqlite
from headrace.storage import new_folder, write_file, write_json

REPORT = "extract.json"
REJECTS = "rejects.csv"

_SPLIT = '"headrace split"'
_TIDIED, _LABELLED, _ROWS, _TRAIN = "tidied", "labelled", "rows_placed", "rows_train"


def _as_source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _as_targets(value: object) -> object:
    if isinstance(value, list):
        return {name: {} for name in value}
    if isinstance(value, Mapping):
        return {name: {} if own is None else own for name, own in value.items()}
    return value


class ExtractParams(Section):
    """Section ``extract`` of params.yaml: where rows come from, what they are, how they divide."""

    sources: Annotated[
        dict[SourceName, Annotated[Source, BeforeValidator(_as_source)]], Field(min_length=1)
    ]  # by the name the recipe uses; a plain text is a path
    recipe: str | None = None  # file with one SELECT; not set: all of the only source
    key: Annotated[tuple[str, ...], Field(strict=False)] = ()  # columns that identify a row
    targets: Annotated[dict[str, TargetParams], BeforeValidator(_as_targets), Field(min_length=1)]
    columns: dict[str, ColumnParams] = Field(default_factory=dict)  # what overrules inference
    split: SplitParams = Field(default_factory=SplitParams)
    folds: Annotated[int, Field(ge=2, le=100)] = 5
    joins: Annotated[tuple[Join, ...], Field(strict=False)] = ()  # checked before joining
    rejects_budget: Annotated[int, Field(ge=0)] = 0  # rows of CSV files that may be rejected
    sample: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of the rows, by hash of the row id
    max_categories: Annotated[int, Field(ge=2)] = 50_000
    max_spill: Bytes = 50 << 30  # disk for intermediate data


@dataclass(frozen=True)
class Extracted:
    """What ``extract`` made."""

    num_rows: dict[str, int]  # by split
    num_rejects: int
    num_without_target: int
    split_digest: str
    num_features: int

    def __str__(self) -> str:
        """One line for the terminal."""
        rows = ", ".join(f"{name} {count:,}" for name, count in self.num_rows.items() if count)
        return (
            f"{rows} rows, {self.num_features} features; {self.num_without_target:,} rows without "
            f"target left out, {self.num_rejects:,} rejected"
        )


@dataclass(frozen=True)
class Survey:
    """What the sources hold, before anything is written: for ``headrace init``."""

    contract: Contract
    reasons: dict[str, str]  # why each column has its role
    types: dict[str, dict[str, str]]  # SQL type by source and column
    profile: dict[str, dict[str, Any]]  # of all rows
    num_rows: int


@dataclass(frozen=True)
class _Prepared:
    """The recipe's rows in the engine, with all that is known of them."""

    scanned: list[Scanned]
    rejects: list[Reject]
    joins: list[JoinCount]
    num_recipe: int
    num_labelled: int
    tidied: Tidied
    inferred: Inferred


def extract(
    root: Path,
    out: Path,
    params: ExtractParams,
    *,
    scratch: Path,
    resources: Resources,
    recorder: Recorder,
) -> Extracted:
    """Write the table that the recipe makes of the sources, with row id, split and fold.

    Args:
        root: Folder that paths in ``params`` are relative to.
        out: Folder to write: contract, Parquet per split, report, profile, rejects.
        params: Section ``extract``.
        scratch: Folder for spill files, swept afterwards.
        resources: Memory budget and threads.
        recorder: Hears counts, warnings and progress.

    Raises:
        DataError: what the sources hold is refused; nothing is written.
        ConfigError: settings that do not fit each other or the recipe.
        ResourceError: the memory budget, the spill cap or the disk does not suffice.
    """
    found = find_files(root, params.sources)
    with (
        new_folder(out) as folder,
        _engine(found, params, scratch, resources, writable=folder.resolve()) as engine,
    ):
        prepared = _prepare(engine, root, params, found, recorder)
        placed = _place(engine, params, prepared)
        contract, useless = see_train(engine, _TRAIN, prepared.inferred.contract)
        recorder.progress(5, 7, unit="steps", detail="writing")
        written = write_splits(engine, _ROWS, _SPLIT, contract, folder)
        recorder.progress(6, 7, unit="steps", detail="profile")
        ranges = {name: own.range for name, own in params.columns.items() if own.range}
        profile = profile_table(engine, _TRAIN, contract, ranges=ranges, ranges_over=_ROWS)
        classes = _classes(engine, contract)
        write_file(folder / CONTRACT, contract.to_json())
        write_json(folder / PROFILE, profile)
        write_rejects(folder / REJECTS, prepared.rejects)
        report = _report(prepared, placed, written, classes, useless)
        write_json(folder / REPORT, report)
    _tell(recorder, params, prepared, placed, profile, useless, classes, contract)
    for source in prepared.scanned:
        for file in source.files:
            recorder.dataset(
                source.name,
                path=file.file.path,
                digest=file.digest,
                num_rows=file.num_rows_kept,
                context="source",
            )
    for name, one in written.items():
        path = out / name
        recorder.dataset(name, path=path, digest=one.digest, num_rows=one.num_rows, context=name)
    recorder.progress(7, 7, unit="steps", detail="done")
    return Extracted(
        num_rows=placed.num_rows,
        num_rejects=len(prepared.rejects),
        num_without_target=prepared.num_recipe - prepared.num_labelled,
        split_digest=report["split_digest"],
        num_features=len(contract.features),
    )


def survey(root: Path, params: ExtractParams, *, scratch: Path, resources: Resources) -> Survey:
    """Read the sources, run the recipe and infer the contract; write nothing.

    Raises:
        HeadraceError: as ``extract`` does.
    """
    found = find_files(root, params.sources)
    with _engine(found, params, scratch, resources) as engine:
        prepared = _prepare(engine, root, params, found, MemoryRecorder())
        contract, useless = see_train(engine, _LABELLED, prepared.inferred.contract)
        ranges = {name: own.range for name, own in params.columns.items() if own.range}
        profile = profile_table(engine, _LABELLED, contract, ranges=ranges)
    return Survey(
        contract=contract,
        reasons=prepared.inferred.reasons | useless,
        types={one.name: one.types for one in prepared.scanned},
        profile=profile,
        num_rows=prepared.num_labelled,
    )


@contextlib.contextmanager
def _engine(
    found: Sequence[Found],
    params: ExtractParams,
    scratch: Path,
    resources: Resources,
    *,
    writable: Path | None = None,
) -> Iterator[Engine]:
    with open_engine(
        scratch,
        memory_budget=resources.memory_budget,
        threads=resources.threads,
        max_spill=params.max_spill,
        readable=readable_files(found),
        writable=writable,
        attached=attached_files(found),
    ) as engine:
        yield engine


def _prepare(
    engine: Engine, root: Path, params: ExtractParams, found: Sequence[Found], recorder: Recorder
) -> _Prepared:
    """Scan the sources, check joins, run the recipe, infer the contract."""
    recipe = read_recipe(root, params.recipe, list(params.sources))
    scanned = []
    for position, one in enumerate(found):
        recorder.progress(0, 7, unit="steps", detail=f"source {one.name}")
        scanned.append(_scan(engine, one, with_row_id=not params.key))
        recorder.progress(position, len(found), unit="sources", detail=one.name)
    rejects = _within_budget(scanned, params.rejects_budget)
    recorder.progress(1, 7, unit="steps", detail="joins")
    joins = check_joins(engine, params.joins, {one.name: one.types for one in scanned})
    recorder.progress(2, 7, unit="steps", detail=recipe.name)
    num_recipe = run_recipe(engine, recipe, key=params.key)
    recorder.progress(3, 7, unit="steps", detail="contract")
    tidied = tidy(engine, RESULT, _TIDIED)
    dtypes = {name: dtype for name, dtype in tidied.dtypes.items() if name != ROW_ID}
    _refuse_bad_columns(params, dtypes, tidied)
    num_labelled = _label(engine, params)
    time = params.split.column if params.split.kind == "time" else None
    group = params.split.column if params.split.kind == "grouped" else None
    if params.split.kind == "given":
        dtypes.pop(str(params.split.column))  # the folders of the table say it
    inferred = infer_contract(
        engine,
        _LABELLED,
        dtypes,
        targets=params.targets,
        key=params.key,
        columns=params.columns,
        time=time,
        group=group,
        max_categories=params.max_categories,
    )
    split = Split(kind=params.split.kind, column=params.split.column)
    inferred = replace(inferred, contract=inferred.contract.model_copy(update={"split": split}))
    return _Prepared(scanned, rejects, joins, num_recipe, num_labelled, tidied, inferred)


def _scan(engine: Engine, found: Found, *, with_row_id: bool) -> Scanned:
    source = found.source
    if source.kind == "sqlite":
        if len(found.files) > 1:
            raise DataError(
                f"source {found.name}: {source.path} matches {len(found.files)} SQLite files; "
                f"declare one source for each"
            )
        reader = read_sqlite(found.files[0].path, table=source.table, query=source.query)
    elif source.kind == "postgresql":
        reader = read_postgresql(str(source.url), table=source.table, query=source.query)
    else:
        return scan_files(engine, found, with_row_id=with_row_id)
    with reader as batches:
        return scan_batches(engine, found.name, _named(found.name, batches))


def _named(name: str, reader: pa.RecordBatchReader) -> pa.RecordBatchReader:
    columns = [column.casefold() for column in reader.schema.names]
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise SchemaError(f"source {name} has the columns {twice} more than once; rename them")
    return reader


def _within_budget(scanned: Sequence[Scanned], budget: int) -> list[Reject]:
    rejects = [reject for one in scanned for reject in one.rejects]
    if len(rejects) <= budget:
        return rejects
    shown = "; ".join(
        f"{one.file}:{one.line}: {one.column + ': ' if one.column else ''}{one.reason} "
        f"({one.text[:80]!r})"
        for one in rejects[:5]
    )
    more = f" and {len(rejects) - 5} more" if len(rejects) > 5 else ""
    raise DataError(
        f"{len(rejects)} rows cannot be read, more than extract.rejects_budget = {budget}: "
        f"{shown}{more}. Correct the files, declare other `types`, or raise the budget"
    )


def _refuse_bad_columns(params: ExtractParams, dtypes: Mapping[str, str], tidied: Tidied) -> None:
    missing = [name for name in params.targets if name not in dtypes]
    if missing:
        near = "".join(nearest(name, dtypes) for name in missing[:1])
        raise SchemaError(
            f"`extract.targets` names the columns {missing}, which the recipe does not return"
            f"{near}; it returns {list(dtypes)}"
        )
    column = params.split.column
    if column is not None and column not in dtypes:
        raise SchemaError(
            f"`extract.split.column` names {column}, which the recipe does not return"
            f"{nearest(column, dtypes)}; it returns {list(dtypes)}"
        )
    if infinite := {name: n for name, n in tidied.infinite.items() if name in params.targets}:
        raise DataError(
            f"targets are infinite in some rows ({infinite}); filter these rows or bound the "
            f"values in the recipe"
        )


def _label(engine: Engine, params: ExtractParams) -> int:
    """Make the view of rows with at least one target (and in the sample); return their number."""
    is_known = " OR ".join(f"{identifier(name)} IS NOT NULL" for name in params.targets)
    (num_labelled,) = engine.row(f"SELECT count(*) FROM {_TIDIED} WHERE {is_known}")
    if not num_labelled:
        raise DataError(
            f"the targets {list(params.targets)} are missing in every row; check the recipe"
        )
    sampled = ""
    if params.sample < 1:
        limit = round(params.sample * 2**64)
        sampled = f" AND {identity_hash([ROW_ID], salt='sample')} < {limit}"
    engine.execute(
        f"CREATE VIEW {_LABELLED} AS SELECT * FROM {_TIDIED} WHERE ({is_known}){sampled}"
    )
    return int(num_labelled)


def _place(engine: Engine, params: ExtractParams, prepared: _Prepared) -> Placed:
    """Decide splits and folds, and make the table of all rows with them."""
    contract = prepared.inferred.contract
    with_classes = [target.name for target in contract.targets if target.task != "regression"]
    placed = place_rows(
        engine,
        _LABELLED,
        params.split,
        num_folds=params.folds,
        features=contract.named("numeric", "category", "text", "vector"),
        stratum=next(iter(with_classes), None),
    )
    names = ", ".join(f"l.{identifier(column.name)}" for column in contract.columns)
    engine.execute(
        f"CREATE TABLE {_ROWS} AS SELECT l.{ROW_ID}, p.{FOLD}, p.split AS {_SPLIT}, {names} "
        f"FROM {_LABELLED} l JOIN {PLACED} p USING ({ROW_ID})"
    )
    engine.execute(f"DROP TABLE {RESULT}")
    engine.execute(
        f"CREATE VIEW {_TRAIN} AS SELECT * FROM {_ROWS} WHERE {_SPLIT} = {SPLITS.index('train')}"
    )
    return placed


def _classes(engine: Engine, contract: Contract) -> dict[str, dict[str, dict[str, int]]]:
    """Count the classes of each target in each split.

    Raises:
        DataError: a class that no train row has.
    """
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for target in contract.targets:
        if target.task == "regression":
            continue
        column = identifier(target.name)
        rows = engine.rows(
            f"SELECT {_SPLIT}, {column}, count(*) FROM {_ROWS} WHERE {column} IS NOT NULL "
            f"GROUP BY 1, 2"
        )
        dtype = arrow_type(contract.column(target.name).dtype)
        labels = label_text(pa.array([value for _, value, _ in rows], dtype)).to_pylist()
        of_split = {name: dict.fromkeys(target.labels, 0) for name in SPLITS}
        for (position, _, count), label in zip(rows, labels, strict=True):
            of_split[SPLITS[position]][label] += count
        if lacking := [label for label, count in of_split["train"].items() if not count]:
            raise DataError(
                f"target {target.name} has the classes {lacking} in no train row, so no model can "
                f"learn them; split otherwise (stratified?) or group them in the recipe"
            )
        counts[target.name] = of_split
    return counts


def _report(
    prepared: _Prepared,
    placed: Placed,
    written: Mapping[str, Written],
    classes: Mapping[str, Any],
    useless: Mapping[str, str],
) -> dict[str, Any]:
    sources = {
        one.name: {
            "rows": one.num_rows,
            "rejected": len(one.rejects),
            "files": [
                {
                    "name": file.file.name,
                    "digest": file.digest,
                    "rows_in": file.num_rows_in,
                    "rows_kept": file.num_rows_kept,
                }
                for file in one.files
            ],
        }
        for one in prepared.scanned
    }
    return {
        "format": 1,
        "sources": sources,
        "joins": [asdict(join) for join in prepared.joins],
        "rows": {
            "recipe": prepared.num_recipe,
            "without_target": prepared.num_recipe - prepared.num_labelled,
            "kept": sum(placed.num_rows.values()),
        },
        "splits": {
            name: {"rows": one.num_rows, "digest": one.digest} for name, one in written.items()
        },
        "split_digest": split_digest(dict(written)),
        "folds": list(placed.fold_rows),
        "classes": classes,
        "reasons": prepared.inferred.reasons,
        "without_information": useless,
        "infinite_as_missing": prepared.tidied.infinite,
    }


def _tell(
    recorder: Recorder,
    params: ExtractParams,
    prepared: _Prepared,
    placed: Placed,
    profile: Mapping[str, Mapping[str, Any]],
    useless: Mapping[str, str],
    classes: Mapping[str, Mapping[str, Mapping[str, int]]],
    contract: Contract,
) -> None:
    """Say what a person should know about the rows."""
    recorder.metrics({f"rows/{name}": float(count) for name, count in placed.num_rows.items()})
    dates = [c.name for c in contract.columns if c.dtype.startswith(("date", "timestamp"))]
    if dates and params.split.kind in ("random", "stratified"):
        recorder.warn(
            f"the split is {params.split.kind}, but the table has dates ({', '.join(dates)}): if "
            f"rows are predicted forward in time, a split of kind time is the honest one"
        )
    if infinite := prepared.tidied.infinite:
        recorder.warn(f"infinite values were made missing: {infinite}")
    if useless:
        recorder.warn(
            "columns without information were put aside: "
            + "; ".join(f"{name} ({why})" for name, why in useless.items())
        )
    outside = {
        name: entry["outside_range"]["count"]
        for name, entry in profile.items()
        if entry.get("outside_range", {}).get("count")
    }
    if outside:
        recorder.warn(f"values outside their declared range: {outside}")
    for target, splits in classes.items():
        for name in ("valid", "test"):
            if lacking := [label for label, count in splits[name].items() if not count]:
                recorder.warn(f"target {target} has the classes {lacking} in no {name} row")
    if placed.is_valid_cut:
        recorder.note(
            "The given split names no valid rows: a fifth of the train rows became valid."
        )
    if prepared.rejects:
        recorder.note(f"{len(prepared.rejects)} rows were rejected; see {REJECTS}.")
    for join in prepared.joins:
        recorder.note(
            f"Join {join.left} with {join.right} on {', '.join(join.by)} ({join.kind}): "
            f"{join.num_left:,} rows before, {join.num_matched:,} matched, "
            f"{join.num_left_join:,} after a left join, {join.num_inner:,} after an inner join."
        )
