"""Parquet files as encoded rows, without shards: decoded and encoded while they are streamed.

For a first look, for files that are read once, and for those there is no room to encode. The files
are cut into spans of row groups, which take the place of shards: the order ``window`` decodes a few
spans, mixes their rows, and goes on to the next few. Decoding costs an epoch 10 to 20 times what
reading shards costs, in every epoch again, and orders that jump over all rows would decode
everything for every batch, so they are refused. Memory: the packed rows of a window or two.

Ranks and worker processes each decode what they mix: several threads are the way to use cores here.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.data.encoder import Encoder
from headrace.data.layout import Packed
from headrace.data.shards import SHARDS, ShardSchema, shard_schema
from headrace.data.table import Span, file_spans, open_table
from headrace.errors import DataError
from headrace.kernels.rows import gather_rows
from headrace.schema import CONTRACT, ROW_ID
from headrace.storage import canonical_json, digest_bytes

SPAN_ROWS = 65_536
_BATCH_ROWS = 65_536


class ParquetRows:
    """The rows of Parquet files in their order, encoded when they are asked for.

    Args:
        spans: What to read, in row order.
        encoder: Fitted on a table with these columns.
        split: Name of the split, for messages.
        name: Where the files are, for messages.
        digest: Of the files' content.
        threads: Spans that are decoded at a time.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        encoder: Encoder,
        *,
        split: str,
        name: str,
        digest: str,
        threads: int,
    ) -> None:
        self.split = split
        self.name = name
        self.digest = digest_bytes(f"{digest} {encoder.digest}".encode())
        self.sizes = tuple(span.num_rows for span in spans)
        self.num_rows = sum(self.sizes)
        self.pieces = self.sizes
        self.schema: ShardSchema = shard_schema(encoder)
        self._encoder = encoder
        self._spans = tuple(spans)
        self._threads = threads
        self._starts = np.array([0, *accumulate(self.sizes)], np.int64)
        self._held: dict[int, Packed] = {}  # the spans used last, latest at the end
        self._free: list[Packed] = []  # buffers of spans that were dropped

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": {}, "_free": []}

    def gather(self, rows: npt.NDArray[np.int64], out_BR: Packed) -> None:
        """Copy the given rows, packed, to the first of the contiguous ``out_BR``.

        Raises:
            IndexError: if a row is not below ``num_rows``.
            SchemaError: if the files lack a column, or one has a type that does not fit.
        """
        if not len(rows):
            return
        if rows.min() < 0 or rows.max() >= self.num_rows:
            raise IndexError(f"rows must be in 0..{self.num_rows - 1} of {self.name}")
        needed = np.unique(np.searchsorted(self._starts, rows, side="right") - 1).tolist()
        self._hold(needed)
        addresses = np.zeros(len(self.sizes), np.uint64)
        for span in needed:
            addresses[span] = self._held[span].ctypes.data
        gather_rows(addresses, self._starts, rows, out_BR[: len(rows)])

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return one field of all rows in memory; decodes every file."""
        parts = [self.schema.rows.split(self._decode(i))[name] for i in range(len(self._spans))]
        return np.concatenate(parts)

    def keep(self, num_spans: int) -> None:
        """Drop the spans used longest ago, down to ``num_spans``."""
        for span in list(self._held)[: max(0, len(self._held) - num_spans)]:
            self._free.append(self._held.pop(span))

    def _hold(self, needed: list[int]) -> None:
        for span in needed:
            if span in self._held:
                self._held[span] = self._held.pop(span)
        missing = [span for span in needed if span not in self._held]
        if not missing:
            return
        self.keep(len(needed) - len(missing))  # of earlier windows nothing is needed any more
        if self._threads == 1 or len(missing) == 1:
            self._held |= {span: self._decode(span) for span in missing}
            return
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            self._held |= zip(missing, pool.map(self._decode, missing), strict=True)

    def _buffer(self, num_rows: int) -> Packed:
        """Return memory for a span; a fresh one costs page faults, up to as much as filling it."""
        while self._free:
            free = self._free.pop()  # one too short is let go
            if len(free) >= num_rows:
                return free[:num_rows]
        return self.schema.rows.empty(num_rows)

    def _decode(self, place: int) -> Packed:
        span = self._spans[place]
        present = span.columns
        columns = [name for name in self._encoder.columns if name in present]
        packed_BR = self._buffer(span.num_rows)
        start = 0
        for batch in span.batches(
            columns, batch_rows=_BATCH_ROWS, dictionaries=self.schema.categories
        ):
            part = packed_BR[start : start + batch.num_rows]
            self._encoder.fill(batch, part)
            if ROW_ID not in present:  # then rows are numbered through, over all files
                self.schema.rows.split(part)[ROW_ID][:] += self._starts[place] + start
            start += batch.num_rows
        return packed_BR


def open_parquet(source: Path, split: str, encoder: Encoder, *, threads: int = 1) -> ParquetRows:
    """Open a stage's table, or a Parquet file, folder or pattern, to be encoded on the way.

    ``split`` chooses among those of a stage's table; of other files all rows are read.

    Raises:
        DataError: if there is no Parquet file, or one cannot be read.
        IntegrityError: if a stage's table is damaged.
    """
    if (source / CONTRACT).is_file():
        if (source / SHARDS).is_file():
            raise DataError(f"{source} holds shards; stream it without an encoder")
        table = open_table(source)
        files, digest = table.files(split), table.digest
    else:
        files = _found(source)
        digest = digest_bytes(canonical_json([_file_digest(path) for path in files]).encode())
    spans = [span for path in files for span in file_spans(path, span_rows=SPAN_ROWS)]
    return ParquetRows(
        spans, encoder, split=split, name=str(source), digest=digest, threads=threads
    )


def _found(source: Path) -> list[Path]:
    if source.is_dir():
        files = sorted(source.rglob("*.parquet"))
    elif source.is_file():
        files = [source]
    else:
        files = sorted(source.parent.glob(source.name)) if source.parent.is_dir() else []
    if not files:
        raise DataError(f"{source} names no Parquet file; give a file, a folder or a pattern")
    return files


def _file_digest(path: Path) -> str:
    """Digest of a file's name, length and footer, which says where everything is and its ranges."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        if tail[-4:] != b"PAR1":
            raise DataError(f"{path} is not a whole Parquet file; write it again")
        file.seek(max(0, size - 8 - int.from_bytes(tail[:4], "little")))
        return hashlib.sha256(f"{path.name} {size} ".encode() + file.read()).hexdigest()
