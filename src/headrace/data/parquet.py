"""Parquet files as encoded rows, without shards: decoded and encoded while they are streamed.

For a first look, for files that are read once, and for those there is no room to encode. The files
are cut into spans of row groups, which take the place of shards: the order ``window`` decodes a few
spans, mixes their rows, and goes on to the next few. Decoding costs an epoch 10 to 20 times what
reading shards costs, in every epoch again, and orders that jump over all rows would decode
everything for every batch, so they are refused. Memory: the packed rows of one window.

Weights and targets are checked as the stage ``encode`` checks them, when their span is decoded.
One thing differs from shards: train rows without any label are not left out, for that would take a
pass over the files before the first batch. They come with NaN targets, which count for no loss.

Files of one's own have no manifest. That they are the same as those of a saved position is known
by the digest of all their bytes, read at about 1 GB/s when a state is first saved or loaded, not
before. That they do not change while they are streamed is known by length and time of change.

Ranks and worker processes each decode what they mix: several threads are the way to use cores here.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.data.encoder import Encoder
from headrace.data.layout import Packed
from headrace.data.shards import SHARDS, ShardSchema, shard_schema
from headrace.data.table import Span, file_spans, open_table
from headrace.data.usable import refuse_unusable
from headrace.errors import DataError
from headrace.kernels.rows import gather_rows
from headrace.schema import CONTRACT, ROW_ID
from headrace.storage import canonical_json, digest_bytes, digest_file

SPAN_ROWS = 65_536
_BATCH_ROWS = 65_536
_WINDOW_ROWS = 262_144  # that a stream mixes unless it says otherwise


class ParquetRows:
    """The rows of Parquet files in their order, encoded when they are asked for.

    Several threads may ask: one is served at a time.

    Args:
        spans: What to read, in row order.
        encoder: Fitted on a table with these columns.
        split: Name of the split, for messages.
        name: Where the files are, for messages.
        content: Digest of the files' content; None to read them for it when it is asked for.
        threads: Spans that are decoded at a time.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        encoder: Encoder,
        *,
        split: str,
        name: str,
        content: str | None,
        threads: int,
    ) -> None:
        self.split = split
        self.name = name
        self.sizes = tuple(span.num_rows for span in spans)
        self.num_rows = sum(self.sizes)
        self.pieces = self.sizes
        self.schema: ShardSchema = shard_schema(encoder)
        self._encoder = encoder
        self._spans = tuple(spans)
        self._content = content
        self._threads = threads
        self._starts = np.array([0, *accumulate(self.sizes)], np.int64)
        self._num_held = -(-_WINDOW_ROWS // max(1, *self.sizes, 1))
        self._held: dict[int, Packed] = {}  # the spans used last, latest at the end
        self._lock = threading.Lock()  # of what is held

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_lock"}
        return state | {"_held": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @cached_property
    def digest(self) -> str:
        """Digest of the rows' content and its meaning; of files of one's own, reads them once.

        Raises:
            IntegrityError: if a file changed since it was opened.
        """
        content = self._content
        if content is None:
            firsts = {span.path: span for span in self._spans}  # in row order
            content = digest_bytes(canonical_json([_digest(s) for s in firsts.values()]).encode())
        return digest_bytes(f"{content} {self._encoder.digest}".encode())

    def hold(self, num_spans: int) -> None:
        """Hold ``num_spans`` decoded spans, which an order uses in turn; more if a batch has more.

        With fewer than an order mixes, small batches decode the same spans again and again.
        """
        self._num_held = num_spans

    def gather(self, rows: npt.NDArray[np.int64], out_BR: Packed) -> None:
        """Copy the given rows, packed, to the first of the contiguous ``out_BR``.

        Raises:
            IndexError: if a row is not below ``num_rows``.
            SchemaError: if the files lack a column, or one has a type that does not fit.
            DataError: if a weight or a target is not usable.
            IntegrityError: if a file is damaged, or changed since it was opened.
        """
        if not len(rows):
            return
        if rows.min() < 0 or rows.max() >= self.num_rows:
            raise IndexError(f"rows must be in 0..{self.num_rows - 1} of {self.name}")
        spans_B = np.searchsorted(self._starts, rows, side="right") - 1
        with self._lock:
            is_held = np.zeros(len(self.sizes), bool)
            is_held[list(self._held)] = True
            # Where a batch crosses into the next window, the rows of the old one are copied first:
            # then nothing needs it any more, and its memory takes the new one.
            missing_B = ~is_held[spans_B]
            num_ready = int(missing_B.argmax()) if missing_B.any() else len(rows)
            for part in (slice(0, num_ready), slice(num_ready, len(rows))):
                self._gather(rows[part], spans_B[part], out_BR[part])

    def _gather(
        self, rows: npt.NDArray[np.int64], spans_B: npt.NDArray[np.int64], out_BR: Packed
    ) -> None:
        if not len(rows):
            return
        needed = np.flatnonzero(np.bincount(spans_B)).tolist()
        self._hold(needed)
        addresses = np.zeros(len(self.sizes), np.uint64)
        for span in needed:
            addresses[span] = self._held[span].ctypes.data
        gather_rows(addresses, self._starts, rows, out_BR)

    def _hold(self, needed: list[int]) -> None:
        for span in needed:
            if span in self._held:
                self._held[span] = self._held.pop(span)
        missing = [span for span in needed if span not in self._held]
        if not missing:
            return
        free = self._drop(max(self._num_held, len(needed)) - len(missing))
        buffers = [self._buffer(self.sizes[span], free) for span in missing]
        del free
        if self._threads == 1 or len(missing) == 1:
            self._held |= zip(missing, map(self._decode, missing, buffers), strict=True)
            return
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            decoded = pool.map(self._decode, missing, buffers)
            self._held |= zip(missing, decoded, strict=True)

    def _drop(self, num_kept: int) -> list[Packed]:
        """Let go the spans used longest ago, down to ``num_kept``; return their memory."""
        num_dropped = max(0, len(self._held) - num_kept)
        return [self._held.pop(span) for span in list(self._held)[:num_dropped]]

    def _buffer(self, num_rows: int, free: list[Packed]) -> Packed:
        """Return memory for a span; a fresh one costs page faults, up to as much as filling it."""
        for place, buffer in enumerate(free):
            if len(buffer) >= num_rows:
                return free.pop(place)[:num_rows]
        return self.schema.rows.empty(num_rows)

    def _decode(self, place: int, packed_BR: Packed) -> Packed:
        span = self._spans[place]
        present = span.columns
        columns = [name for name in self._encoder.columns if name in present]
        start = 0
        for rows in span.batches(
            columns, batch_rows=_BATCH_ROWS, dictionaries=self.schema.categories
        ):
            part = packed_BR[start : start + rows.num_rows]
            batch, _ = self._encoder.fill(rows, part)
            if ROW_ID not in present:  # then rows are numbered through, over all files
                batch.row_id[:] += self._starts[place] + start
            refuse_unusable(batch, self._encoder, str(span.path))
            start += rows.num_rows
        return packed_BR


def open_parquet(source: Path, split: str, encoder: Encoder, *, threads: int = 1) -> ParquetRows:
    """Open a stage's table, or a Parquet file, folder or pattern, to be encoded on the way.

    ``split`` chooses among those of a stage's table; of other files all rows are read.

    Raises:
        DataError: if there is no Parquet file, or one cannot be read.
        IntegrityError: if a stage's table is damaged.
    """
    content = None
    if (source / CONTRACT).is_file():
        if (source / SHARDS).is_file():
            raise DataError(f"{source} holds shards; stream it without an encoder")
        table = open_table(source)
        files, content = table.files(split), table.digest
    else:
        files = _found(source)
    spans = [span for path in files for span in file_spans(path, span_rows=SPAN_ROWS)]
    return ParquetRows(
        spans, encoder, split=split, name=str(source), content=content, threads=threads
    )


def _digest(span: Span) -> str:
    """Return the digest of a span's whole file, which is still the one that was opened."""
    span.refuse_changed()
    digest = digest_file(span.path).digest
    span.refuse_changed()
    return digest


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
