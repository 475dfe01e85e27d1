"""How extracted rows become a table on disk: one sorted Parquet file per split, same bytes always.

DuckDB writes equal bytes at any number of threads if each split is one COPY ordered by ``row_id``;
a partitioned COPY does not. Row groups of about 32 MB before compression, with lz4_raw, decode
twice as fast as pyarrow's zstd default (benchmarks/extract.py). Row groups are sized in rows from
the mean width of a row, because DuckDB's own limit in bytes gives up the order. Bloom filters are
left out: every reader here reads all rows, and they cost 3 % of the size and 7 % of the speed.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from headrace.data.engine import Engine, identifier, literal
from headrace.schema import FOLD, ROW_ID, SPLITS, Contract
from headrace.storage import canonical_json, digest_bytes

FILE_NAME = "part-00000.parquet"
ROW_GROUP_BYTES = 32 << 20

_VECTOR = 2048  # DuckDB's unit of rows
_MAX_GROUP_ROWS = 1 << 20
_WIDTHS = {"bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4}
_WIDTHS |= {"float": 4, "date32[day]": 4}


@dataclass(frozen=True)
class Written:
    """What was written of one split."""

    num_rows: int
    digest: str  # of the row ids and folds, in order


def write_splits(
    engine: Engine, relation: str, split: str, contract: Contract, folder: Path
) -> dict[str, Written]:
    """Write the rows of ``relation`` into ``folder``, one subfolder per split that has rows.

    Args:
        engine: May write to ``folder``.
        relation: Quoted name of a table with ``row_id``, ``fold``, the split and the columns.
        split: Quoted name of its column that holds the split's position in ``SPLITS``.
        contract: The columns, in order.
        folder: Private folder that the caller publishes when whole.
    """
    names = ", ".join(identifier(column.name) for column in contract.columns)
    group_rows = _group_rows(engine, relation, contract)
    written = {}
    for position, name in enumerate(SPLITS):
        (num_rows,) = engine.row(f"SELECT count(*) FROM {relation} WHERE {split} = {position}")
        if not num_rows:
            continue
        path = folder / name / FILE_NAME
        path.parent.mkdir()
        engine.execute(
            f"COPY (SELECT {ROW_ID}, {FOLD}, {names} FROM {relation} WHERE {split} = {position} "
            f"ORDER BY {ROW_ID}) TO {literal(str(path))} (FORMAT parquet, COMPRESSION lz4_raw, "
            f"ROW_GROUP_SIZE {group_rows}, WRITE_BLOOM_FILTER false, "
            f"KV_METADATA {{contract: {literal(contract.digest)}}})"
        )
        _check_types(path, contract)
        written[name] = Written(num_rows, _identity_digest(path))
    return written


def split_digest(written: dict[str, Written]) -> str:
    """Return one digest of which row is in which split and fold."""
    return digest_bytes(canonical_json({k: one.digest for k, one in written.items()}).encode())


def _group_rows(engine: Engine, relation: str, contract: Contract) -> int:
    texts = {
        c.name: "strlen" if c.dtype == "string" else "octet_length"  # both count bytes
        for c in contract.columns
        if c.dtype in ("string", "binary")
    }
    lists = [c.name for c in contract.columns if c.dtype.startswith("list<")]
    sums = [f"coalesce(sum({size}({identifier(n)})), 0)" for n, size in texts.items()]
    sums += [f"coalesce(sum(8 * len({identifier(n)})), 0)" for n in lists]
    num_rows, *totals = engine.row(f"SELECT {', '.join(['count(*)', *sums])} FROM {relation}")
    fixed = 9 + sum(
        _WIDTHS.get(c.dtype, 16 if c.dtype.startswith("decimal") else 8)
        for c in contract.columns
        if c.name not in texts and c.name not in lists
    )
    width = fixed + 4 * len(texts) + sum(map(int, totals)) / num_rows
    rows = int(ROW_GROUP_BYTES / width) // _VECTOR * _VECTOR
    return max(_VECTOR, min(rows, _MAX_GROUP_ROWS))


def _check_types(path: Path, contract: Contract) -> None:
    schema = pq.read_schema(path)
    for column in contract.columns:
        found = str(schema.field(column.name).type)
        assert found == column.dtype, f"{column.name} was written as {found}, not {column.dtype}"


def _identity_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=[ROW_ID, FOLD]):
            digest.update(batch.column(0).to_numpy().tobytes())
            folds = batch.column(1).fill_null(-1)
            digest.update(folds.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
