"""Stage ``reduce``: the same rows in the same order, each column in its narrowest dtype.

Two streaming passes: one looks at every value of every split, the other writes what the plan made
of it. Between them the plan is a pure decision (data/dtypes.py). Cost: the table is decoded twice,
in exchange for memory that stays at one row group however long the table is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from headrace.data.dtypes import ColumnPlan, Dtype, cast_column, plan_dtypes
from headrace.data.ranges import ColumnRange, ColumnScan, NarrowFloat, is_text
from headrace.data.table import Table, open_table
from headrace.errors import ResourceError, SchemaError, nearest
from headrace.memory import format_bytes
from headrace.params import Bytes, Resources, Section
from headrace.record import Recorder
from headrace.schema import CONTRACT, FOLD, ROW_ID, SPLITS, Contract
from headrace.storage import new_folder, write_file, write_json

PLAN = "plan.json"
_BATCH_ROWS = 65_536
_KEPT = (ROW_ID, FOLD)  # every reader knows their types
# From so many rows per distinct value on, Parquet stores a number as a code of a dictionary as
# well. That takes two thirds of the bytes at most, decoded at 60 % of the speed of plain float32;
# below that a float32 saves little or nothing as a code, so it is stored plain.
_WORTH_CODES = 4
_ONE_PAGE = {"data_page_size": 1 << 30, "max_rows_per_page": 1 << 30}


class ReduceParams(Section):
    """Section ``reduce`` of params.yaml: how much error is allowed, and which types are wished."""

    max_rel_error: Annotated[float, Field(ge=0, lt=1)] = 0.0  # per value; 0 means lossless
    # Column name → dtype, or "keep". float16 comes only this way: it is for storage, not for sums.
    overrides: Mapping[str, Dtype] = Field(default_factory=dict)
    # Distinct texts a column may have to be stored as codes.
    max_categories: Annotated[int, Field(ge=1, le=10_000_000)] = 65_536
    row_group_bytes: Bytes = 32 << 20  # of decoded values; what readers hold at a time


@dataclass(frozen=True)
class ColumnSaving:
    """One line of the result: types and bytes in memory before and after, texts included."""

    name: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    remark: str = ""


@dataclass(frozen=True)
class Reduced:
    """What ``reduce`` did; printed as a table per column with a line for all of them."""

    num_rows: int
    columns: tuple[ColumnSaving, ...]
    file_bytes_before: int
    file_bytes_after: int

    @property
    def bytes_before(self) -> int:
        """Bytes of all values in memory as they came."""
        return sum(column.bytes_before for column in self.columns)

    @property
    def bytes_after(self) -> int:
        """Bytes of all values in memory as they are now."""
        return sum(column.bytes_after for column in self.columns)

    def __str__(self) -> str:
        lines = [("column", "from", "to", "bytes before", "after", "")]
        lines += [
            (c.name, c.before, c.after, format_bytes(c.bytes_before), format_bytes(c.bytes_after),
             c.remark)
            for c in self.columns
        ]  # fmt: skip
        total = (format_bytes(self.bytes_before), format_bytes(self.bytes_after))
        lines.append(("in memory", f"{self.num_rows:,} rows", "", *total, self._share()))
        files = (format_bytes(self.file_bytes_before), format_bytes(self.file_bytes_after))
        lines.append(("on disk", "", "", *files, ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(_padded(line, widths) for line in lines)

    def _share(self) -> str:
        return f"{self.bytes_after / self.bytes_before:.0%}" if self.bytes_before else ""


def reduce(
    source: Path, out: Path, params: ReduceParams, *, resources: Resources, recorder: Recorder
) -> Reduced:
    """Rewrite the table ``source`` with the narrowest dtypes that keep ``params.max_rel_error``.

    The splits, the rows and their order stay. ``out`` also gets the contract with the new dtypes
    and ``plan.json``, the certificate of every column.

    Raises:
        SchemaError: if an override names no column, or a type that cannot hold what is there.
        ResourceError: if a row group does not fit the memory budget.
    """
    table = open_table(source)
    _require_memory(params, resources)
    ranges = scan_ranges(table, params, recorder=recorder)
    roles = {column.name: column.role for column in table.contract.columns}
    plan = plan_dtypes(
        ranges, roles, max_rel_error=params.max_rel_error, overrides=params.overrides
    )
    contract = _with_dtypes(table.contract, plan)
    with new_folder(out) as folder:
        _rewrite(table, folder, plan, contract, params, recorder)
        reduced = _summary(table, folder, plan)
        write_file(folder / CONTRACT, contract.to_json())
        write_json(folder / PLAN, _plan_json(plan, reduced, params))
    _tell(reduced, recorder)
    return reduced


def scan_ranges(
    table: Table, params: ReduceParams, *, recorder: Recorder
) -> tuple[ColumnRange, ...]:
    """Look once at every value of every split; memory stays at one batch and the categories."""
    schema = pq.read_schema(next(iter(_files(table))))
    _require_columns(table, schema, params)
    scans = [
        ColumnScan(
            column.name,
            schema.field(column.name).type,
            measure=_errors_to_measure(column.name, params),
            max_categories=_max_categories(column.name, column.role, params),
        )
        for column in table.contract.columns
    ]
    texts = [c.name for c in table.contract.columns if is_text(schema.field(c.name).type)]
    total = sum(table.num_rows(split) for split in SPLITS)
    done = 0
    for path in _files(table):
        for batch in _read(path, schema, texts):
            for scan in scans:
                scan.add(batch.column(scan.name))
            done += batch.num_rows
            recorder.progress(done, 2 * total, unit="rows", detail="looking")
    return tuple(scan.result() for scan in scans)


def _rewrite(
    table: Table,
    folder: Path,
    plan: Sequence[ColumnPlan],
    contract: Contract,
    params: ReduceParams,
    recorder: Recorder,
) -> None:
    """Write every split in the planned types."""
    source = pq.read_schema(next(iter(_files(table))))
    schema = _schema(plan, contract)
    texts = [column.name for column in plan if pa.types.is_dictionary(column.after)]
    repeated = [column.name for column in plan if column.seen.rows_per_value >= _WORTH_CODES]
    coded = [FOLD, *texts, *repeated]
    # Row ids ascend and moments lie close together, so their differences need fewer bits.
    differences = {
        field.name: "DELTA_BINARY_PACKED"
        for field in schema
        if field.name not in coded and _is_long(field.type)
    }
    total = sum(table.num_rows(split) for split in SPLITS)
    done = total
    rows_per_group = _rows_per_group(plan, params.row_group_bytes)
    for split in SPLITS:
        files = table.files(split)
        if not files:
            continue
        path = folder / split / "part-00000.parquet"
        path.parent.mkdir()
        with pq.ParquetWriter(
            path,
            schema,
            compression="lz4",
            use_dictionary=coded,
            column_encoding=differences,
            store_decimal_as_integer=True,
            **_ONE_PAGE,
        ) as writer:
            batches = (batch for file in files for batch in _read(file, source, texts))
            for group in _regroup(_cast(batches, plan, schema), rows_per_group):
                writer.write_table(group, row_group_size=rows_per_group)
                done += group.num_rows
                recorder.progress(done, 2 * total, unit="rows", detail=f"writing {split}")


def _cast(
    batches: Iterator[pa.RecordBatch], plan: Sequence[ColumnPlan], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        kept = [batch.column(name) for name in _KEPT]
        reduced = [cast_column(batch.column(column.name), column) for column in plan]
        yield pa.RecordBatch.from_arrays([*kept, *reduced], schema=schema)


def _regroup(batches: Iterator[pa.RecordBatch], num_rows: int) -> Iterator[pa.Table]:
    """Yield tables of ``num_rows`` rows each, but the last."""
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        while count + batch.num_rows >= num_rows:
            needed = num_rows - count
            yield pa.Table.from_batches([*held, batch.slice(0, needed)])
            batch, held, count = batch.slice(needed), [], 0
        if batch.num_rows:
            held.append(batch)
            count += batch.num_rows
    if held:
        yield pa.Table.from_batches(held)


def _read(path: Path, schema: pa.Schema, texts: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a file; ``texts`` as codes of dictionaries, which decodes twice as fast.

    Raises:
        SchemaError: if the file has other columns or types than the first one of the table.
    """
    with pq.ParquetFile(path, memory_map=True, read_dictionary=list(texts)) as file:
        found = pq.read_schema(path)
        if not found.equals(schema):
            raise SchemaError(
                f"{path} has the columns {found.to_string(show_schema_metadata=False)!r}, another "
                f"file of the table {schema.to_string(show_schema_metadata=False)!r}; run the "
                f"stage that wrote it again"
            )
        yield from file.iter_batches(_BATCH_ROWS)


def _files(table: Table) -> Iterator[Path]:
    for split in SPLITS:
        yield from table.files(split)


def _schema(plan: Sequence[ColumnPlan], contract: Contract) -> pa.Schema:
    """Return the types to write; a column without nulls is said to have none.

    Arrow then decodes no levels and casts narrow integers without looking for nulls: the whole
    table decodes 1.25 times as fast.
    """
    fields = [pa.field(ROW_ID, pa.int64(), nullable=False), pa.field(FOLD, pa.int8())]
    fields += [
        pa.field(column.name, column.after, nullable=column.seen.num_missing(column.after) > 0)
        for column in plan
    ]
    return pa.schema(fields, metadata={"headrace.contract": contract.digest})


def _is_long(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_int64(dtype) or pa.types.is_timestamp(dtype))


def _rows_per_group(plan: Sequence[ColumnPlan], group_bytes: int) -> int:
    """Rows whose values take about ``group_bytes``; the same on every machine."""
    bits = 8 * 8 + 8  # row id and fold
    for column in plan:
        seen, after = column.seen, column.after
        if pa.types.is_dictionary(after):
            bits += after.index_type.bit_width
        elif pa.types.is_primitive(after):
            bits += after.bit_width
        else:
            bits += 8 * (seen.bytes_as(after) // max(1, seen.num_rows))
    return max(1, 8 * group_bytes // bits)


def _with_dtypes(contract: Contract, plan: Sequence[ColumnPlan]) -> Contract:
    after = {column.name: str(column.after) for column in plan}
    columns = tuple(c.model_copy(update={"dtype": after[c.name]}) for c in contract.columns)
    return contract.model_copy(update={"columns": columns})


def _summary(table: Table, folder: Path, plan: Sequence[ColumnPlan]) -> Reduced:
    return Reduced(
        num_rows=plan[0].seen.num_rows,
        columns=tuple(
            ColumnSaving(
                name=column.name,
                before=_short(column.before),
                after=_short(column.after),
                bytes_before=column.bytes_before,
                bytes_after=column.bytes_after,
                remark=column.remark,
            )
            for column in plan
        ),
        file_bytes_before=sum(path.stat().st_size for path in _files(table)),
        file_bytes_after=sum(path.stat().st_size for path in folder.rglob("*.parquet")),
    )


def _plan_json(
    plan: Sequence[ColumnPlan], reduced: Reduced, params: ReduceParams
) -> dict[str, object]:
    return {
        "format": 1,
        "max_rel_error": params.max_rel_error,
        "rows": reduced.num_rows,
        "bytes_before": reduced.bytes_before,
        "bytes_after": reduced.bytes_after,
        "columns": {column.name: column.certificate() for column in plan},
    }


def _tell(reduced: Reduced, recorder: Recorder) -> None:
    recorder.metrics(
        {"bytes_before": float(reduced.bytes_before), "bytes_after": float(reduced.bytes_after)}
    )
    recorder.note(f"```\n{reduced}\n```")
    remarked = [f"{c.name} {c.remark}" for c in reduced.columns if c.remark]
    if remarked:
        recorder.warn(f"reduce: {'; '.join(remarked)}")


def _require_memory(params: ReduceParams, resources: Resources) -> None:
    # Measured: 250 to 280 MiB at the default, for 0.5 to 17 million rows.
    needed = 6 * params.row_group_bytes + (96 << 20)
    if resources.memory_budget < needed:
        raise ResourceError(
            f"reduce needs {format_bytes(needed)} for row groups of "
            f"{format_bytes(params.row_group_bytes)}, and `resources.memory_budget` leaves "
            f"{format_bytes(resources.memory_budget)}; raise it, or lower `reduce.row_group_bytes`"
        )


def _require_columns(table: Table, schema: pa.Schema, params: ReduceParams) -> None:
    """Refuse before the first pass what would only come up after it."""
    names = [column.name for column in table.contract.columns]
    missing = [name for name in [*_KEPT, *names] if name not in schema.names]
    if missing:
        raise SchemaError(
            f"{table.folder} lacks the columns {missing} that its {CONTRACT} lists; "
            f"run the stage that wrote it again"
        )
    unknown = [name for name in params.overrides if name not in names]
    if unknown:
        raise SchemaError(
            f"`reduce.overrides` in params.yaml names {unknown}, which {table.folder} does not "
            f"have{nearest(unknown[0], names)}"
        )


def _errors_to_measure(name: str, params: ReduceParams) -> tuple[NarrowFloat, ...]:
    wish = params.overrides.get(name)
    if wish == "float16" or wish == "float32":
        return (wish,)
    return ("float32",) if params.max_rel_error > 0 else ()


def _max_categories(name: str, role: str, params: ReduceParams) -> int:
    is_spelled_out = role in ("text", "vector") and params.overrides.get(name) != "category"
    return 0 if is_spelled_out else params.max_categories


def _short(dtype: pa.DataType) -> str:
    if pa.types.is_dictionary(dtype):
        return f"category ({dtype.index_type} codes)"
    return str(dtype)


def _padded(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        text.rjust(width) if 3 <= i <= 4 else text.ljust(width)
        for i, (text, width) in enumerate(zip(line, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
