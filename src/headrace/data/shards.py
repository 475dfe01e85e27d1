"""Encoded shards on disk: raw little-endian arrays that are mapped into memory, not parsed.

The format is described in docs/shards.md, so that anything can read it. A split is a row of
shards of equal length (the last is shorter); a shard is a folder with one file per array. Opening
costs the same for any number of rows: two JSON files and one look at each file's length.

Every block of 1 MiB is checked against the manifest's digest when it is first touched, for a
flipped bit in a raw array is just another number. ``verify=True`` checks everything at once.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from headrace.data.encoder import EncodedBatch, Encoder
from headrace.errors import IntegrityError, SchemaError, nearest
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


class ArrayLayout(Section):
    """One array of every shard: its file, NumPy type and row width (none: one value per row)."""

    name: str
    file: str
    dtype: str
    width: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return np.dtype(self.dtype).itemsize * (1 if self.width is None else self.width)

    def shape(self, num_rows: int) -> tuple[int, ...]:
        """Return the shape of the array for so many rows."""
        return (num_rows,) if self.width is None else (num_rows, self.width)


class ShardSchema(Section):
    """The content of shards.json: what the arrays hold and how many rows each shard has."""

    format: Literal[1] = 1
    contract: str  # digests
    encoder: str
    numeric: Annotated[tuple[str, ...], Field(strict=False)]
    categories: Annotated[tuple[str, ...], Field(strict=False)]
    cardinalities: Annotated[tuple[int, ...], Field(strict=False)]
    targets: Annotated[tuple[str, ...], Field(strict=False)]
    arrays: Annotated[tuple[ArrayLayout, ...], Field(strict=False)]
    splits: dict[str, Annotated[tuple[int, ...], Field(strict=False)]]  # rows of each shard

    @property
    def row_bytes(self) -> int:
        """Bytes of one row over all arrays."""
        return sum(array.row_bytes for array in self.arrays)


def shard_schema(encoder: Encoder) -> ShardSchema:
    """Return the schema of the shards that ``encoder`` fills, without rows yet."""
    codes = encoder.codes_dtype.newbyteorder("<")
    return ShardSchema(
        contract=encoder.contract.digest,
        encoder=encoder.digest,
        numeric=encoder.numeric,
        categories=tuple(category.name for category in encoder.categories),
        cardinalities=encoder.cardinalities,
        targets=tuple(target.name for target in encoder.targets),
        splits={},
        arrays=(
            ArrayLayout(name="row_id", file="row_id.i64", dtype="<i8"),
            ArrayLayout(
                name="numeric", file="numeric.f32", dtype="<f4", width=len(encoder.numeric)
            ),
            ArrayLayout(
                name="codes",
                file=f"codes.u{8 * codes.itemsize}",
                dtype=codes.str,
                width=len(encoder.categories),
            ),
            ArrayLayout(
                name="targets", file="targets.f64", dtype="<f8", width=len(encoder.targets)
            ),
            ArrayLayout(name="weight", file="weight.f32", dtype="<f4"),
            ArrayLayout(name="fold", file="fold.i8", dtype="|i1"),
        ),
    )


class ShardWriter:
    """Appends encoded batches to the shards of one split; memory is the batch that comes in.

    Call within ``with``; ``sizes`` are the rows of the shards written.
    """

    def __init__(self, folder: Path, schema: ShardSchema, *, shard_bytes: int) -> None:
        self.sizes: list[int] = []
        self._folder = folder
        self._schema = schema
        self._rows_per_shard = max(1, shard_bytes // max(1, schema.row_bytes))
        self._files: list[BinaryIO] = []

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
        """Write the rows of ``batch`` after those before, beginning shards as they fill."""
        start = 0
        while start < len(batch):
            if not self.sizes or self.sizes[-1] == self._rows_per_shard:
                self._begin_shard()
            stop = min(len(batch), start + self._rows_per_shard - self.sizes[-1])
            for layout, file in zip(self._schema.arrays, self._files, strict=True):
                rows = getattr(batch, layout.name)[start:stop]
                file.write(np.ascontiguousarray(rows, layout.dtype).tobytes())
            self.sizes[-1] += stop - start
            start = stop

    def _begin_shard(self) -> None:
        self._close()
        folder = self._folder / shard_name(len(self.sizes))
        folder.mkdir(parents=True)
        self._files = [(folder / layout.file).open("wb") for layout in self._schema.arrays]
        self.sizes.append(0)

    def _close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []


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

    Holds open maps: it does not pickle. Open it where it is used.
    """

    def __init__(
        self, folder: Path, split: str, schema: ShardSchema, files: dict[str, FileEntry]
    ) -> None:
        self.folder = folder
        self.split = split
        self.schema = schema
        self.sizes = schema.splits[split]
        self.num_rows = sum(self.sizes)
        self._starts = np.array([0, *accumulate(self.sizes)], np.int64)
        self._files = files
        self._mapped: dict[tuple[int, str], _Mapped] = {}

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
        if len(rows) and (rows.min() < 0 or rows.max() >= self.num_rows):
            raise IndexError(f"rows must be in 0..{self.num_rows - 1} of {self.split}")
        return self._gather([layout.name for layout in self.schema.arrays], rows)

    def slice(self, start: int, stop: int) -> EncodedBatch:
        """Return copies of consecutive rows; see ``take``."""
        arrays = {layout.name: self._copy(layout, start, stop) for layout in self.schema.arrays}
        return EncodedBatch(**arrays)

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return one array of the whole split in memory: ``row_id``, ``fold`` and so on.

        Raises:
            SchemaError: if there is no array of that name.
        """
        for layout in self.schema.arrays:
            if layout.name == name:
                return self._copy(layout, 0, self.num_rows)
        names = [layout.name for layout in self.schema.arrays]
        raise SchemaError(f"the shards have no array {name!r}{nearest(name, names)}")

    def _gather(self, names: list[str], rows: npt.NDArray[np.int64]) -> EncodedBatch:
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        touched = np.unique(shard_of)
        if len(touched) == 1:
            local = rows - self._starts[touched[0]]
            arrays = {name: self._map(int(touched[0]), name).take(local) for name in names}
            return EncodedBatch(**arrays)
        by_shard = np.argsort(shard_of, kind="stable")
        cuts = np.searchsorted(shard_of[by_shard], touched)
        groups = np.split(by_shard, cuts[1:]) if len(touched) else []
        out = {
            layout.name: np.empty(layout.shape(len(rows)), layout.dtype)
            for layout in self.schema.arrays
        }
        for shard, places in zip(touched.tolist(), groups, strict=True):
            local = rows[places] - self._starts[shard]
            for name in names:
                out[name][places] = self._map(shard, name).take(local)
        return EncodedBatch(**out)

    def _copy(self, layout: ArrayLayout, start: int, stop: int) -> npt.NDArray[Any]:
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"rows {start}..{stop} are not in 0..{self.num_rows} of {self.split}")
        out = np.empty(layout.shape(stop - start), layout.dtype)
        for shard, first in enumerate(self._starts[:-1].tolist()):
            low, high = max(start, first), min(stop, first + self.sizes[shard])
            if low < high:
                part = self._map(shard, layout.name).slice(low - first, high - first)
                out[low - start : high - start] = part
        return out

    def _map(self, shard: int, name: str) -> "_Mapped":
        if (shard, name) not in self._mapped:
            layout = next(layout for layout in self.schema.arrays if layout.name == name)
            relative = f"{self.split}/{shard_name(shard)}/{layout.file}"
            self._mapped[shard, name] = _mapped(
                self.folder / relative, layout, self.sizes[shard], self._files[relative]
            )
        return self._mapped[shard, name]


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
    """One file as an array; its blocks are checked on first touch."""

    path: Path
    array: npt.NDArray[Any]
    raw: npt.NDArray[np.uint8]  # the same bytes
    digests: tuple[str, ...]
    row_bytes: int
    is_checked: npt.NDArray[np.bool_] = field(init=False)
    num_unchecked: int = field(init=False)

    def __post_init__(self) -> None:
        self.is_checked = np.zeros(len(self.digests), bool)
        self.num_unchecked = len(self.digests)

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return copies of rows, which the caller knows to be in range."""
        if self.num_unchecked:
            self._check(rows * self.row_bytes, (rows + 1) * self.row_bytes - 1)
        # With mode="raise" NumPy gathers through a second buffer when there is an ``out``.
        out = np.empty((len(rows), *self.array.shape[1:]), self.array.dtype)
        return np.take(self.array, rows, axis=0, out=out, mode="clip")

    def slice(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return a view of consecutive rows."""
        if self.num_unchecked and start < stop:
            first, last = start * self.row_bytes, stop * self.row_bytes - 1
            self._check(np.array([first]), np.array([last]))
        return self.array[start:stop]

    def _check(self, first_bytes: npt.NDArray[np.int64], last_bytes: npt.NDArray[np.int64]) -> None:
        # A row may lie across blocks: +1 where a touched run begins, -1 after it ends.
        size = len(self.digests) + 1
        begins = np.bincount(first_bytes // BLOCK_BYTES, minlength=size)
        ends = np.bincount(last_bytes // BLOCK_BYTES + 1, minlength=size)
        is_touched = np.cumsum(begins - ends)[:-1] > 0
        for block in np.flatnonzero(is_touched & ~self.is_checked).tolist():
            data = self.raw[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            if digest_bytes(data.tobytes()) != self.digests[block]:
                raise IntegrityError(
                    f"{self.path} is damaged: block {block} (bytes from {block * BLOCK_BYTES}) has "
                    f"another digest than when it was written. Delete the folder "
                    f"{self.path.parents[2]} and run `headrace repro`"
                )
            self.is_checked[block] = True
            self.num_unchecked -= 1


def _mapped(path: Path, layout: ArrayLayout, num_rows: int, entry: FileEntry) -> _Mapped:
    if entry.num_bytes == 0:  # an empty file cannot be mapped
        array = np.empty(layout.shape(num_rows), layout.dtype)
        return _Mapped(path, array, np.empty(0, np.uint8), (), layout.row_bytes)
    raw = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    array = raw.view(layout.dtype).reshape(layout.shape(num_rows))
    return _Mapped(path, array, raw, entry.blocks or (entry.digest,), layout.row_bytes)


def _read_schema(folder: Path, files: dict[str, FileEntry]) -> ShardSchema:
    path = folder / SHARDS
    content = read_json(path)
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != 1:
        raise IntegrityError(
            f"{path} has shard format {found}; this headrace reads format 1: "
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
        for layout in schema.arrays:
            name = f"{split}/{shard_name(shard)}/{layout.file}"
            expected = num_rows * layout.row_bytes
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
