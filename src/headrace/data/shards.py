"""Encoded shards on disk: packed rows of fixed width that are mapped into memory, not parsed.

The format is described in docs/shards.md, so that anything can read it. A split is a sequence of
shards of equal length (the last is shorter); a shard is a folder with one file of packed rows and,
again, the few short columns that are asked for as a whole (targets, weight, fold). Opening reads
no rows: two JSON files and one look at each file's length.

Every block of 1 MiB is checked against the manifest's digest when it is first touched, for a
flipped bit in a raw array is just another number. ``verify=True`` checks everything at once.
"""

import hashlib
import os
import threading
from dataclasses import dataclass, field
from io import FileIO
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from headrace.data.encoder import EncodedBatch, Encoder
from headrace.data.layout import NumericDtype, Packed, RowField, RowLayout, row_layout
from headrace.errors import DataError, IntegrityError, SchemaError, nearest
from headrace.kernels.rows import gather_rows
from headrace.params import Section
from headrace.storage import (
    BLOCK_BYTES,
    FileEntry,
    canonical_json,
    digest_bytes,
    digest_file,
    read_json,
    read_manifest,
    verify_folder,
    write_json,
)

SHARDS = "shards.json"
SHARD_SPLITS = ("train", "valid", "test")  # rows of the gap are for nobody


_ROWS = "rows.bin"
_READ_ROWS = 65_536
_PIECE_ROWS = 256  # long enough to be read fast, and a thousand of them make a window
_COLUMNS = ("targets", "weight", "fold")  # that training reads as a whole, before any batch


class ColumnFile(Section):
    """A field of the rows that each shard holds a second time, as a column of its own."""

    name: str
    file: str


class StoredError(Section):
    """How far a number stored as float16 is from what was encoded, at worst over all rows."""

    name: str
    worst: float  # in standard deviations of the input


class ShardSchema(Section):
    """The content of shards.json: how a row is laid out and how many rows each shard has."""

    format: Literal[2] = 2
    contract: str  # digest
    encoder: str  # digest
    numeric: Annotated[tuple[str, ...], Field(strict=False)]
    categories: Annotated[tuple[str, ...], Field(strict=False)]
    cardinalities: Annotated[tuple[int, ...], Field(strict=False)]
    targets: Annotated[tuple[str, ...], Field(strict=False)]
    rows: RowLayout
    columns: Annotated[tuple[ColumnFile, ...], Field(strict=False)]
    splits: dict[str, Annotated[tuple[int, ...], Field(strict=False)]]  # rows of each shard
    float16_errors: Annotated[tuple[StoredError, ...], Field(strict=False)] = ()

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row on disk, columns included."""
        return self.rows.row_bytes + sum(
            self.rows.field(column.name).num_bytes for column in self.columns
        )

    def files(self) -> list[tuple[str, int]]:
        """Return the files of each shard and the bytes a row takes in them."""
        columns = [(c.file, self.rows.field(c.name).num_bytes) for c in self.columns]
        return [(_ROWS, self.rows.row_bytes), *columns]


def shard_schema(encoder: Encoder, *, numeric: NumericDtype = "<f4") -> ShardSchema:
    """Return the schema of the shards that ``encoder`` fills, without rows yet.

    ``numeric`` is the type numbers are stored in: float16 halves their bytes and loses digits.
    """
    rows = row_layout(
        num_targets=len(encoder.targets),
        num_numeric=len(encoder.numeric),
        num_codes=len(encoder.categories),
        codes=encoder.layout.field("codes").dtype,
        numeric=numeric,
    )
    return ShardSchema(
        contract=encoder.contract.digest,
        encoder=encoder.digest,
        numeric=encoder.numeric,
        categories=tuple(category.name for category in encoder.categories),
        cardinalities=encoder.cardinalities,
        targets=tuple(target.name for target in encoder.targets),
        rows=rows,
        columns=tuple(
            ColumnFile(name=name, file=f"{name}.{rows.field(name).dtype[1:]}") for name in _COLUMNS
        ),
        splits={},
    )


class ShardWriter:
    """Appends encoded batches to the shards of one split; memory is the batch that comes in.

    Call within ``with``; ``sizes`` are the rows of the shards written. Where numbers are stored as
    float16, ``worst`` (N,) is the largest distance of one from what was encoded.

    ``num_rows``: how many rows will come at most. Their space is reserved when a shard is begun:
    writing then costs half, and a full disk is noticed before the work.
    """

    def __init__(
        self, folder: Path, schema: ShardSchema, *, shard_bytes: int, num_rows: int
    ) -> None:
        self.sizes: list[int] = []
        self.worst = np.zeros(len(schema.numeric))
        self._folder = folder
        self._schema = schema
        self._rows_per_shard = max(1, shard_bytes // schema.bytes_per_row)
        self._num_rows = num_rows
        self._files: list[FileIO] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def append(self, batch: EncodedBatch) -> None:
        """Write the rows of ``batch`` after those before, beginning shards as they fill.

        Raises:
            DataError: if a number is too large for float16, where numbers are stored as such.
        """
        packed = batch.packed
        if batch.layout != self._schema.rows:
            packed = self._repacked(batch)
        columns = [np.ascontiguousarray(getattr(batch, c.name)) for c in self._schema.columns]
        start = 0
        while start < len(batch):
            if not self.sizes or self.sizes[-1] == self._rows_per_shard:
                self._begin_shard()
            stop = min(len(batch), start + self._rows_per_shard - self.sizes[-1])
            for rows, file in zip((packed, *columns), self._files, strict=True):
                _write_all(file, rows[start:stop])
            self.sizes[-1] += stop - start
            start = stop

    def _repacked(self, batch: EncodedBatch) -> Packed:
        packed = self._schema.rows.empty(len(batch))
        for name, view in self._schema.rows.split(packed).items():
            with np.errstate(over="ignore"):
                view[...] = getattr(batch, name)
            if name == "numeric" and view.dtype == np.float16:
                self._compare(batch, view)
        return packed

    def _compare(self, batch: EncodedBatch, stored_BN: npt.NDArray[np.float16]) -> None:
        is_beyond_BN = np.isinf(stored_BN)
        if is_beyond_BN.any():
            row, column = (int(place[0]) for place in np.nonzero(is_beyond_BN))
            raise DataError(
                f"{self._schema.numeric[column]} is {batch.numeric[row, column]:g} standard "
                f"deviations from its mean in the row {batch.row_id[row]}, which float16 cannot "
                f"hold; set `encode.numeric` to float32, or clip the column in the SQL recipe"
            )
        error_BN = np.abs(stored_BN.astype(np.float32) - batch.numeric)
        self.worst = np.fmax(self.worst, np.fmax.reduce(error_BN, axis=0, initial=0.0))

    def _begin_shard(self) -> None:
        self._close()
        folder = self._folder / shard_name(len(self.sizes))
        folder.mkdir(parents=True)
        num_rows = min(self._rows_per_shard, self._num_rows - sum(self.sizes))
        for name, row_bytes in self._schema.files():
            self._files.append((folder / name).open("wb", buffering=0))
            if row_bytes and hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(self._files[-1].fileno(), 0, num_rows * row_bytes)
        self.sizes.append(0)

    def _close(self) -> None:
        for file in self._files:
            file.truncate()  # where the rows end: fewer may have come
            file.close()
        self._files = []


def _write_all(file: FileIO, rows: npt.NDArray[Any]) -> None:
    rest = rows.data.cast("B") if rows.size else memoryview(b"")
    while len(rest):
        rest = rest[file.write(rest) :]


def write_schema(folder: Path, schema: ShardSchema) -> None:
    """Write shards.json into ``folder``."""
    write_json(folder / SHARDS, schema.model_dump(mode="json"))


def shard_name(index: int) -> str:
    """Return the folder name of a shard.

    >>> shard_name(3)
    'shard-00003'
    """
    return f"shard-{index:05d}"


class Shards:
    """The rows of one split, numbered from 0 over its shards; arrays are mapped on first use.

    Sent to another process it opens and checks its files there.
    """

    def __init__(
        self, folder: Path, split: str, schema: ShardSchema, files: dict[str, FileEntry]
    ) -> None:
        self.folder = folder
        self.split = split
        self.schema = schema
        self.sizes = schema.splits[split]
        self.num_rows = sum(self.sizes)
        self.pieces = _pieces(self.num_rows)
        self._starts = np.array([0, *accumulate(self.sizes)], np.int64)
        self._files = files
        self._maps: list[_Mapped] = []  # of the packed rows, once a row is asked for
        self._addresses = np.empty(0, np.uint64)
        self._opening = threading.Lock()
        self._num_unchecked = len(self.sizes)  # shards that have a block nobody looked at

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_opening"}
        closed = {
            "_maps": [],
            "_addresses": np.empty(0, np.uint64),
            "_num_unchecked": len(self.sizes),
        }
        return state | closed

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opening = threading.Lock()

    @property
    def name(self) -> str:
        """The folder, for messages."""
        return str(self.folder)

    @property
    def numeric(self) -> tuple[str, ...]:
        """Names of the numeric inputs."""
        return self.schema.numeric

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the categories."""
        return self.schema.categories

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Number of codes of each category, the two reserved ones included."""
        return self.schema.cardinalities

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets."""
        return self.schema.targets

    @property
    def digest(self) -> str:
        """Digest of the split's content and its meaning, taken from the manifest."""
        prefix = f"{self.split}/"
        named = {name: e.digest for name, e in self._files.items() if name.startswith(prefix)}
        return digest_bytes(canonical_json({**named, SHARDS: self._files[SHARDS].digest}).encode())

    def take(self, rows: npt.NDArray[np.int64]) -> EncodedBatch:
        """Return copies of the given rows, in their order.

        Raises:
            IndexError: if a row is not below ``num_rows``.
            IntegrityError: if a block touched for the first time is damaged.
        """
        packed_BR = np.empty((len(rows), self.schema.rows.row_bytes), np.uint8)
        self.gather(rows, packed_BR)
        return EncodedBatch(packed_BR, self.schema.rows)

    def gather(self, rows: npt.NDArray[np.int64], out_BR: Packed) -> None:
        """Copy the given rows, packed, to the first of the contiguous ``out_BR``; see ``take``."""
        if not len(rows):
            return
        if rows.min() < 0 or rows.max() >= self.num_rows:
            raise IndexError(f"rows must be in 0..{self.num_rows - 1} of {self.split}")
        if len(self._maps) < len(self.sizes):
            self._open()
        if self._num_unchecked:
            self._check(rows)
        gather_rows(self._addresses, self._starts, rows, out_BR[: len(rows)])

    def slice(self, start: int, stop: int) -> EncodedBatch:
        """Return copies of consecutive rows; see ``take``."""
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows {start}..{stop} are not in 0..{self.num_rows} of {self.split}")
        return self.take(np.arange(start, stop, dtype=np.int64))

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return one field of the whole split in memory: ``targets``, ``fold`` and so on.

        Raises:
            SchemaError: if there is no field of that name.
        """
        names = [field.name for field in self.schema.rows.fields]
        if name not in names:
            raise SchemaError(f"the shards have no field {name!r}{nearest(name, names)}")
        field = self.schema.rows.field(name)
        if any(column.name == name for column in self.schema.columns):
            parts = [self.column(name, shard) for shard in range(len(self.sizes))]
            return np.concatenate([np.empty(_shape(field, 0), field.dtype), *parts])
        out = np.empty(_shape(field, self.num_rows), field.dtype)
        for first in range(0, self.num_rows, _READ_ROWS):
            stop = min(self.num_rows, first + _READ_ROWS)
            out[first:stop] = self.schema.rows.split(self.slice(first, stop).packed)[name]
        return out

    def column(self, name: str, shard: int) -> npt.NDArray[Any]:
        """Return a field that shards hold as a column of its own, mapped: targets, weight, fold.

        Raises:
            IntegrityError: if it is damaged.
        """
        file = next(column.file for column in self.schema.columns if column.name == name)
        field, num_rows = self.schema.rows.field(name), self.sizes[shard]
        mapped = self._mapped(shard, file, num_rows * field.num_bytes)
        mapped.check_all()
        return mapped.raw.view(field.dtype).reshape(_shape(field, num_rows))

    def _open(self) -> None:
        width = self.schema.rows.row_bytes
        with self._opening:
            if len(self._maps) == len(self.sizes):  # another thread was first, and gathers already
                return
            maps = [
                self._mapped(shard, _ROWS, num_rows * width)
                for shard, num_rows in enumerate(self.sizes)
            ]
            # Threads go by ``_maps``: it comes last, and holds the memory of the addresses.
            self._addresses = np.array([mapped.raw.ctypes.data for mapped in maps], np.uint64)
            self._maps = maps

    def _mapped(self, shard: int, file: str, num_bytes: int) -> "_Mapped":
        name = f"{self.split}/{shard_name(shard)}/{file}"
        path, entry = self.folder / name, self._files[name]
        if num_bytes == 0:  # an empty file cannot be mapped
            return _Mapped(path, np.empty(0, np.uint8), ())
        raw = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
        return _Mapped(path, raw, entry.blocks or (entry.digest,))

    def _check(self, rows: npt.NDArray[np.int64]) -> None:
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        width = self.schema.rows.row_bytes
        for shard in np.unique(shard_of).tolist():
            mapped = self._maps[shard]
            if mapped.num_unchecked:
                first = (rows[shard_of == shard] - self._starts[shard]) * width
                mapped.check(first, first + width - 1)
        self._num_unchecked = sum(mapped.num_unchecked > 0 for mapped in self._maps)


def open_shards(
    folder: Path, split: str, *, contract_digest: str | None = None, verify: bool = False
) -> Shards:
    """Open one split of an encoded folder; its rows are read as they are asked for.

    ``contract_digest``: of the contract the reader expects (a model's), refused if another.
    ``verify``: check every byte of the folder now, not the blocks on first touch.

    Raises:
        IntegrityError: if the folder is missing, unfinished, of another format or contract, or
            a file of the split is missing, unlisted or has another length.
        SchemaError: if there is no such split.
    """
    if not folder.is_dir():
        raise IntegrityError(f"{folder} does not exist; run `headrace repro` to make it")
    files = dict(verify_folder(folder) if verify else read_manifest(folder))
    schema = _read_schema(folder, files)
    if split not in schema.splits:
        raise SchemaError(f"{folder} has no split {split!r}{nearest(split, schema.splits)}")
    if contract_digest is not None and contract_digest != schema.contract:
        raise IntegrityError(
            f"{folder} was encoded under the contract {schema.contract[:12]}, the reader was made "
            f"for {contract_digest[:12]}; encode and train again from the same table"
        )
    _refuse_incomplete(folder, split, schema, files)
    return Shards(folder, split, schema, files)


@dataclass
class _Mapped:
    """The bytes of one file; its blocks are checked on first touch."""

    path: Path
    raw: npt.NDArray[np.uint8]
    digests: tuple[str, ...]
    is_checked: npt.NDArray[np.bool_] = field(init=False)
    num_unchecked: int = field(init=False)

    def __post_init__(self) -> None:
        self.is_checked = np.zeros(len(self.digests), bool)
        self.num_unchecked = len(self.digests)

    def check_all(self) -> None:
        """Check every block that was not looked at yet."""
        self._check_blocks(np.flatnonzero(~self.is_checked))

    def check(self, first_bytes: npt.NDArray[np.int64], last_bytes: npt.NDArray[np.int64]) -> None:
        """Check the blocks between each pair of bytes, both included."""
        # A row may lie across blocks: +1 where a touched run begins, -1 after it ends.
        size = len(self.digests) + 1
        begins = np.bincount(first_bytes // BLOCK_BYTES, minlength=size)
        ends = np.bincount(last_bytes // BLOCK_BYTES + 1, minlength=size)
        is_touched = np.cumsum(begins - ends)[:-1] > 0
        self._check_blocks(np.flatnonzero(is_touched & ~self.is_checked))

    def _check_blocks(self, blocks: npt.NDArray[np.int64]) -> None:
        for block in blocks.tolist():
            data = self.raw[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            if hashlib.sha256(data.data).hexdigest() != self.digests[block]:
                raise IntegrityError(
                    f"{self.path} is damaged: block {block} (bytes from {block * BLOCK_BYTES}) has "
                    f"another digest than when it was written. Delete the folder "
                    f"{self.path.parents[2]} and run `headrace repro`"
                )
            self.is_checked[block] = True
        # Counted anew, not down: two threads may have checked the same block.
        self.num_unchecked = int(np.count_nonzero(~self.is_checked))


def _pieces(num_rows: int) -> tuple[int, ...]:
    full, rest = divmod(num_rows, _PIECE_ROWS)
    return (_PIECE_ROWS,) * full + ((rest,) if rest else ())


def _shape(field: RowField, num_rows: int) -> tuple[int, ...]:
    return (num_rows,) if field.width is None else (num_rows, field.width)


def _read_schema(folder: Path, files: dict[str, FileEntry]) -> ShardSchema:
    path = folder / SHARDS
    content = read_json(path)
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != 2:
        raise IntegrityError(
            f"{path} has shard format {found}; this headrace reads format 2: "
            f"run `headrace repro` to encode again"
        )
    if SHARDS not in files or digest_file(path).digest != files[SHARDS].digest:
        raise IntegrityError(
            f"{path} is not the file its manifest lists; delete the folder and run `headrace repro`"
        )
    try:
        return ShardSchema.model_validate(content)
    except ValidationError as error:
        raise IntegrityError(f"{path} does not describe shards ({error})") from error


def _refuse_incomplete(
    folder: Path, split: str, schema: ShardSchema, files: dict[str, FileEntry]
) -> None:
    faults = []
    for shard, num_rows in enumerate(schema.splits[split]):
        for file, width in schema.files():
            name = f"{split}/{shard_name(shard)}/{file}"
            expected = num_rows * width
            path = folder / name
            if name not in files or files[name].num_bytes != expected:
                faults.append(f"{name} is not in the manifest with {expected} bytes")
            elif not path.is_file():
                faults.append(f"{name} is missing")
            elif path.stat().st_size != expected:
                faults.append(f"{name} has {path.stat().st_size} bytes instead of {expected}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise IntegrityError(
            f"{folder} is damaged: {'; '.join(faults[:5])}{more}. "
            f"Delete the folder and run `headrace repro`"
        )
