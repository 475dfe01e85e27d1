"""Encoded rows as a stream of whole batches of PyTorch tensors, restartable at any batch.

Reading is thin: ``order`` says which rows the next batch has, a ``RowSource`` (mapped shards, or
Parquet files that are encoded on the way) copies them, packed, into one buffer, and a batch is
views of it. A buffer is used again only when nothing of its batch is held any more, so a batch
stays as it was handed out for as long as it is held.

A ``BatchStream`` is what a training loop iterates; ``loader`` reads ahead of it, in a thread or in
processes. Both count a batch when it is handed out, not when it is read, and the count is the
position: ``state_dict()`` after any step continues with the next batch, with any number of
workers. The epoch is part of the position, so each pass over the stream is a new epoch, and one
that was broken off is continued by the next pass.
"""

import contextlib
import queue
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from headrace.data.encoder import EncodedBatch, Encoder, open_encoder
from headrace.data.layout import Buffers, Packed, RowLayout
from headrace.data.order import KINDS, Cut, Kind, Position, RowOrder
from headrace.data.parallel import put_until
from headrace.data.parquet import ParquetRows, open_parquet
from headrace.data.sampling import Sampling, sampled
from headrace.data.selection import Selection
from headrace.data.shards import Shards, ShardSchema, open_shards
from headrace.errors import ConfigError, HeadraceError, ResourceError

# Hands on packed rows, in their order: to a device, say.
Transfer: TypeAlias = Callable[[Iterable[torch.Tensor]], Iterable[torch.Tensor]]
Item = TypeVar("Item")

_DTYPES = {
    "<i8": torch.int64,
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "|u1": torch.uint8,
    "<u2": torch.uint16,
    "<u4": torch.uint32,
    "|i1": torch.int8,
}


class RowSource(Protocol):
    """Encoded rows of one split, numbered from 0; it can be sent to another process."""

    split: str
    schema: ShardSchema
    num_rows: int
    pieces: tuple[int, ...]  # lengths of the runs of rows that are best read together

    @property
    def digest(self) -> str:
        """Digest of the rows' content and its meaning."""

    @property
    def name(self) -> str:
        """Where the rows are, for messages."""

    def gather(self, rows: npt.NDArray[np.int64], out_BR: Packed) -> None:
        """Copy the given rows, packed, to the first rows of ``out_BR``."""


@dataclass(frozen=True)
class Batch:
    """Rows as tensors: B rows, N numeric inputs, C categories, T targets.

    Shapes: ``row_id`` (B,) int64; ``numeric`` (B, N) float32, NaN where missing; ``codes`` (B, C)
    int32, ready for an embedding; ``targets`` (B, T) float64, NaN where missing; ``weight`` (B,)
    float32; ``fold`` (B,) int8, -1 outside train. All but ``codes`` are views of one buffer.
    """

    row_id: torch.Tensor
    numeric: torch.Tensor
    codes: torch.Tensor
    targets: torch.Tensor
    weight: torch.Tensor
    fold: torch.Tensor

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.row_id)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; a DataLoader calls it by this name."""
        return self._map(torch.Tensor.pin_memory)

    def split(self, sizes: list[int]) -> list["Batch"]:
        """Return consecutive parts of so many rows each, as views; together they are the batch."""
        parts = (getattr(self, field.name).split(sizes) for field in fields(self))
        return [Batch(*tensors) for tensors in zip(*parts, strict=True)]

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(*(change(getattr(self, field.name)) for field in fields(self)))


class BatchStream(IterableDataset[Batch]):
    """The batches of one split, epoch after epoch; iterating continues at ``position``.

    In the main process each pass yields what is left of the current epoch and moves the position.
    In a DataLoader of your own with workers, every pass begins at the position that was last set
    by ``set_position``, for nobody counts there: set each epoch, or use ``loader``, which counts.

    Args:
        source: what the stage ``encode`` wrote, or any ``RowSource``.
        split: train, valid or test, of an encoded folder.
        batch_size: rows per batch on each rank.
        order: exact, window, block or sequential; see ``headrace.data.order``.
        sampling: None for each row once, in ``order``; ``weighted`` for rows drawn by their weight,
            ``balanced:TARGET`` for the classes of a target in turn: see ``headrace.data.sampling``.
        seed: of the order; it has no effect on ``sequential``.
        rows: which rows of the split, as a mask or as ascending positions; all if None.
        rank: this process among ``num_ranks`` that share every epoch.
        num_ranks: see ``rank``.
        least_tail: rows under which an epoch's tail joins the batch before it; None: two per rank.
        window_rows: rows that are mixed at a time, for ``window``: random pieces of the whole set,
            each a run of rows (256 of shards, a span of row groups of Parquet).
        block_rows: consecutive rows that stay together, for ``block``.
        contract_digest: of the contract the reader expects, refused if another.

    Raises:
        ConfigError: if a setting is out of range, ``rows`` does not fit the split, or a batch is
            larger than the set (in sequential order that is one short batch).
        IntegrityError: if the shards are missing or damaged.
    """

    def __init__(
        self,
        source: Path | str | RowSource,
        *,
        split: str = "train",
        batch_size: int,
        order: Kind = "exact",
        sampling: str | None = None,
        seed: int = 0,
        rows: npt.ArrayLike | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        least_tail: int | None = None,
        window_rows: int = 262_144,
        block_rows: int = 64,
        contract_digest: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(source, str | Path):
            source = open_shards(Path(source), split, contract_digest=contract_digest)
        self.source: RowSource = source
        self.schema = source.schema
        self.rank = rank
        self.sampling = sampling
        self._rows = None if rows is None else _selection(rows, source)
        sizes = source.pieces if self._rows is None else self._rows.counts(source.pieces)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_ranks", num_ranks, 1),
            ("least_tail", 2 if least_tail is None else least_tail, 1),
            ("window_rows", window_rows, 1),
            ("block_rows", block_rows, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be at least {least}")
        if order not in KINDS:
            raise ConfigError(f"order is {order!r}; it must be one of {', '.join(KINDS)}")
        if not 0 <= rank < num_ranks:
            raise ConfigError(
                f"rank is {rank}; it must be from 0 to num_ranks - 1 = {num_ranks - 1}"
            )
        if order != "sequential" and batch_size * num_ranks > sum(sizes) > 0:
            raise ConfigError(
                f"a batch of {batch_size} rows on {num_ranks} ranks is larger than the set, which "
                f"has {sum(sizes)} rows ({source.split} of {source.name}); set a smaller batch_size"
            )
        if isinstance(source, ParquetRows) and (sampling or order not in ("window", "sequential")):
            raise ConfigError(
                f"{source.name} is encoded while it is streamed, which the order "
                f"{sampling or order!r} would do again for each batch; use order='window', or "
                f"encode the table once"
            )
        window_pieces = -(-window_rows // max(1, *sizes, 1))  # at least so many rows
        if isinstance(source, ParquetRows):
            source.hold(window_pieces if order == "window" else 1)
        self._order = RowOrder(order, sizes, seed, window_pieces, block_rows)
        self._sampling = _sampling(sampling, source, seed, self._rows)
        drawn = self._order if self._sampling is None else self._sampling
        self.cut = Cut(drawn.num_rows, batch_size, num_ranks, least_tail)
        # In shared memory, so that workers that outlive an epoch see where the next one starts.
        self._start = torch.zeros(2, dtype=torch.int64)
        self._start.share_memory_()  # type: ignore[no-untyped-call]
        self._position = Position()
        self._buffers = Buffers(self.schema.rows)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch over all ranks."""
        return self.cut.num_rows

    @property
    def chosen(self) -> Selection | None:
        """Which rows of the source the epochs are made of; all if None."""
        return self._rows

    @property
    def max_rows(self) -> int:
        """Rows of the largest batch on this rank: the last may have some more than the others."""
        bounds = [self.cut.bounds(batch, self.rank) for batch in {0, max(0, len(self) - 1)}]
        return max(end - first for first, end in bounds) if len(self) else 0

    @property
    def position(self) -> Position:
        """The epoch, and how many of its batches were handed out."""
        return self._position

    def set_position(self, epoch: int, batches: int = 0) -> None:
        """Continue at batch ``batches`` of ``epoch``.

        Raises:
            ConfigError: if there is no such batch.
        """
        if epoch < 0 or not 0 <= batches <= len(self):
            raise ConfigError(
                f"position (epoch {epoch}, {batches} batches used) is not in this stream, whose "
                f"epochs have {len(self)} batches"
            )
        self._position = Position(epoch, batches)
        if batches == len(self) > 0:
            self._position = Position(epoch + 1)
        self._start[:] = torch.tensor(self._position)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and all that gives it its meaning, as plain JSON values."""
        return {**self._identity(), "epoch": self.position.epoch, "batches": self.position.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another stream of the same rows and order was.

        The number of workers may differ, and that of ranks if the global batch keeps its size.

        Raises:
            ConfigError: if the state is of other rows or of another order, naming what differs.
        """
        differs = {
            name: f"{state.get(name)} there, {value} here"
            for name, value in self._identity().items()
            if state.get(name) != value
        }
        if differs:
            raise ConfigError(f"the saved position is of another stream: {differs}")
        self.set_position(int(state["epoch"]), int(state["batches"]))

    def counted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Hand on batches and move the position with each, before the consumer sees it.

        The start that workers read stays: one of them may not have begun yet.
        """
        for batch in batches:
            epoch, used = self._position
            is_last = used + 1 == len(self)
            self._position = Position(epoch + 1) if is_last else Position(epoch, used + 1)
            yield batch

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return self.cut.num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield what is left of the current epoch, or this worker's part of it."""
        info = get_worker_info()
        if info is None:
            yield from self.through(_as_it_is)
        else:
            yield from self.unpacked(self.packed_from_start(info.id, info.num_workers))

    def through(self, transfer: Transfer) -> Iterator[Batch]:
        """Yield what is left of the current epoch; packed rows go through ``transfer`` first."""
        packed = map(torch.from_numpy, self.packed(self._position))
        yield from self.counted(self.unpacked(transfer(packed)))

    def packed(self, position: Position, worker: int = 0, num_workers: int = 1) -> Iterator[Packed]:
        """Yield a worker's batches of one epoch from ``position`` on as packed rows (B, R).

        ``unpack`` makes them tensors. Nothing is counted, nothing is moved.
        """
        for rows in self.row_batches(position, worker, num_workers):
            out_BR = self._buffers.take(len(rows))
            self.source.gather(rows, out_BR)
            yield out_BR

    def row_batches(
        self, position: Position, worker: int = 0, num_workers: int = 1
    ) -> Iterator[npt.NDArray[np.int64]]:
        """Yield which rows of the source a worker's batches have, from ``position`` on."""
        for batch in self.cut.share(position.batches, worker, num_workers):
            yield self.row_numbers(position.epoch, *self.cut.bounds(batch, self.rank))

    def row_numbers(self, epoch: int, first: int, end: int) -> npt.NDArray[np.int64]:
        """Return which rows of the source stand at the places ``first`` to ``end`` of an epoch."""
        if self._sampling is not None:
            return self._sampling.rows(epoch, first, end)
        rows = self._order.rows(epoch, first, end)
        return rows if self._rows is None else self._rows.rows(rows)

    def packed_from_start(self, worker: int, num_workers: int) -> Iterator[torch.Tensor]:
        """Yield a worker process's batches from the position that was last set, packed."""
        epoch, batches = self._start.tolist()
        yield from map(torch.from_numpy, self.packed(Position(epoch, batches), worker, num_workers))

    def unpacked(self, packed: Iterable[torch.Tensor]) -> Iterator[Batch]:
        """Yield packed rows as batches."""
        for packed_BR in packed:
            yield unpack(packed_BR, self.schema.rows)

    def samples(self) -> "SampleStream":
        """Return the same rows one by one, for a loop that makes its own batches."""
        return SampleStream(self)

    def _identity(self) -> dict[str, Any]:
        return {
            "format": 1,
            "data": self.source.digest,
            "split": self.source.split,
            "rows": "all" if self._rows is None else self._rows.digest,
            "order": self._order.kind,
            "sampling": self.sampling,
            "seed": self._order.seed,
            "window_pieces": self._order.window_pieces,
            "block_rows": self._order.block_rows,
            "global_batch": self.cut.global_rows,
            "epoch_batches": len(self),  # more ranks may join a tail that fewer leave alone
        }


class SampleStream(IterableDataset[dict[str, torch.Tensor]]):
    """The rows of a stream one by one, in its order: tensors by name, for PyTorch's own collation.

    Iterating moves the position of the stream as iterating that would: by whole batches. Whole
    batches are 10 to 100 times as fast; this is for code that expects single samples.
    """

    def __init__(self, batches: BatchStream) -> None:
        super().__init__()
        self.batches = batches

    def __len__(self) -> int:
        """Rows of an epoch on this rank."""
        batches = self.batches
        bounds = (batches.cut.bounds(batch, batches.rank) for batch in range(len(batches)))
        return sum(end - first for first, end in bounds)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield what is left of the current epoch, or this worker's part of it."""
        names = [field.name for field in fields(Batch)]
        for batch in self.batches:
            columns = [getattr(batch, name).unbind() for name in names]
            for values in zip(*columns, strict=True):
                yield dict(zip(names, values, strict=True))


class BatchLoader:
    """A stream with reading ahead of it; the same batches in the same order.

    Iterate it like the stream: each pass is what is left of the current epoch. A thread of this
    process reads ahead, or worker processes do: these are started fresh (spawn, so the script needs
    its ``if __name__ == "__main__":``) and stay for the following epochs. Batches are counted where
    they are handed out. Workers that die are started again once in a pass.
    """

    def __init__(
        self,
        stream: BatchStream,
        *,
        num_workers: int,
        read_ahead: int,
        timeout_s: float,
        warn: Callable[[str], None],
    ) -> None:
        self.stream = stream
        self._num_workers = num_workers
        self._read_ahead = read_ahead
        self._timeout_s = timeout_s
        self._warn = warn
        self._processes: DataLoader[torch.Tensor | HeadraceError] | None = None

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self.stream)

    def __iter__(self) -> Iterator[Batch]:
        """Yield what is left of the current epoch.

        Raises:
            ResourceError: if worker processes died twice or did not answer in time, with the
                position from which the stream can be continued.
        """
        yield from self.through(_as_it_is)

    def through(self, transfer: Transfer) -> Iterator[Batch]:
        """Yield what is left of the current epoch; packed rows go through ``transfer`` first."""
        if self._num_workers:
            yield from self._by_workers(transfer)
        elif self._read_ahead:
            packed = _ahead(self.stream.packed(self.stream.position), self._read_ahead)
            moved = transfer(map(torch.from_numpy, packed))
            yield from self.stream.counted(self.stream.unpacked(moved))
        else:
            yield from self.stream.through(transfer)

    def close(self) -> None:
        """Stop the worker processes; the next pass starts new ones."""
        running = getattr(self._processes, "_iterator", None)
        self._processes = None
        if running is not None:
            # Left to its __del__, torch may raise there that a worker died, which nobody can catch.
            with contextlib.suppress(RuntimeError):
                running._shutdown_workers()

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream; see ``BatchStream.state_dict``."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another stream was; see ``BatchStream.load_state_dict``."""
        self.stream.load_state_dict(state)

    def _by_workers(self, transfer: Transfer) -> Iterator[Batch]:
        is_retried = False
        epoch = self.stream.position.epoch
        while self.stream.position.epoch == epoch:
            self.stream.set_position(*self.stream.position)  # where workers begin
            try:
                yield from self._pass(transfer)
            except _WorkerError as error:
                what = (
                    f"a worker process that reads {self.stream.source.name} failed ({error}) after "
                    f"{tuple(self.stream.position)} (epoch, batches)"
                )
                if is_retried or error.is_hung:
                    raise ResourceError(
                        f"{what}. Set `resources.workers` to 0 to read without workers"
                    ) from error.__cause__
                is_retried = True
                self._warn(f"{what}; the workers are started again")
            if not len(self.stream):
                return

    def _pass(self, transfer: Transfer) -> Iterator[Batch]:
        """Yield what the running workers have; any failure of theirs is a ``_WorkerError``."""
        moved = transfer(self._from_workers())
        yield from self.stream.counted(self.stream.unpacked(moved))

    def _from_workers(self) -> Iterator[torch.Tensor]:
        # In exact order the first batches check nearly all blocks of the set.
        row_bytes = self.stream.schema.rows.row_bytes
        checking_s = self.stream.source.num_rows * row_bytes / _CHECKED_BYTES_PER_S
        watch = _Watch(
            self._timeout_s,
            first_s=self._timeout_s + checking_s,
            num_first=self._num_workers,
            on_excess=self._kill,
        )
        try:
            with watch:
                for item in watch.timed(self._workers()):
                    if isinstance(item, HeadraceError):  # as the worker met it
                        raise item
                    yield item
        except HeadraceError:
            self.close()
            raise
        except (RuntimeError, ConnectionError, EOFError) as error:
            self._kill()
            self.close()
            if watch.is_over:
                message = f"no answer within {self._timeout_s:g} seconds"
                raise _WorkerError(message, is_hung=True) from error
            raise _WorkerError(str(error), is_hung=False) from error

    def _kill(self) -> None:
        for process in getattr(getattr(self._processes, "_iterator", None), "_workers", ()):
            process.kill()  # a process that hangs does not hear that it should end

    def _workers(self) -> Iterator[torch.Tensor | HeadraceError]:
        if self._processes is None:
            self._processes = DataLoader(
                _PackedStream(self.stream),
                batch_size=None,
                num_workers=self._num_workers,
                multiprocessing_context="spawn",
                persistent_workers=True,
                collate_fn=_as_it_is,
            )
        with _child_signals_kept():
            iterator = iter(self._processes)
        yield from iterator


@contextlib.contextmanager
def _child_signals_kept() -> Iterator[None]:
    """Put back the handler of SIGCHLD that PyTorch replaces.

    PyTorch's raises, wherever the main thread is, that a worker died: in the middle of the loop's
    own work. Without it the death is noticed where the worker is asked for its next batch.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if is_main and before is not None:
            signal.signal(signal.SIGCHLD, before)


_CHECKED_BYTES_PER_S = 100e6  # a cautious guess: a tenth of what one core does


class _WorkerError(Exception):
    """Worker processes failed; the position is that of the last batch handed out."""

    def __init__(self, message: str, *, is_hung: bool) -> None:
        super().__init__(message)
        self.is_hung = is_hung


class _Watch:
    """Calls back from a thread of its own when one item of an iterator takes too long.

    PyTorch's own time-out ends waiting for a message, but a message can arrive in part, or with a
    handle that only the worker can redeem; both wait for ever if the worker has stopped.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        first_s: float,
        num_first: int,
        on_excess: Callable[[], None],
    ) -> None:
        self.is_over = False
        self._timeout_s = timeout_s
        self._first_s = first_s  # for the first ``num_first`` items
        self._num_first = num_first
        self._on_excess = on_excess
        self._since: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        """Hand on ``items``; only the waiting for each counts."""
        while True:
            self._since = time.monotonic()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._since = None
            self._num_first -= 1
            yield item
            del item

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            since = self._since
            allowed_s = self._first_s if self._num_first > 0 else self._timeout_s
            if since is not None and time.monotonic() - since > allowed_s:
                self.is_over = True
                self._on_excess()
                return


class _PackedStream(IterableDataset[torch.Tensor | HeadraceError]):
    """What a worker process of ``BatchLoader`` reads: one tensor a batch to hand over.

    An error that has its message is handed over too: raised, PyTorch would wrap it in a traceback.
    """

    def __init__(self, batches: BatchStream) -> None:
        super().__init__()
        self._batches = batches

    def __iter__(self) -> Iterator[torch.Tensor | HeadraceError]:
        info = get_worker_info()
        assert info is not None, "only worker processes iterate this"
        try:
            yield from self._batches.packed_from_start(info.id, info.num_workers)
        except HeadraceError as error:
            yield error


def _ahead(items: Iterator[Packed], num_ahead: int) -> Iterator[Packed]:
    """Yield ``items``, computed by a thread that runs ``num_ahead`` items before the consumer."""
    ready: queue.Queue[Packed | BaseException | None] = queue.Queue(maxsize=num_ahead)
    is_over = threading.Event()

    def read() -> None:
        try:
            for item in items:
                is_wanted = put_until(is_over, ready, item)
                del item  # a buffer the thread still held could not be used again
                if not is_wanted:
                    return
            put_until(is_over, ready, None)
        except BaseException as error:  # noqa: BLE001 - raised by the consumer
            put_until(is_over, ready, error)

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            del item
    finally:
        is_over.set()
        thread.join()


_POLL_S = 0.1


def stream(
    source: Path | str = "data/encode",
    *,
    batch_size: int,
    split: str = "train",
    order: Kind | None = None,
    sampling: str | None = None,
    seed: int = 0,
    rows: npt.ArrayLike | None = None,
    encoder: Encoder | Path | str | None = None,
    threads: int = 1,
) -> BatchStream:
    """Return the batches of an encoded folder, or of Parquet files with ``encoder``.

    The arguments are those of ``headrace.stream``, which also finds a project's folders.
    """
    if encoder is None:
        return BatchStream(
            source,
            split=split,
            batch_size=batch_size,
            order=order or "exact",
            sampling=sampling,
            seed=seed,
            rows=rows,
        )
    fitted = encoder if isinstance(encoder, Encoder) else open_encoder(Path(encoder))
    return BatchStream(
        open_parquet(Path(source), split, fitted, threads=threads),
        batch_size=batch_size,
        order=order or "window",
        sampling=sampling,
        seed=seed,
        rows=rows,
    )


def loader(
    batches: BatchStream,
    *,
    num_workers: int = 0,
    read_ahead: int = 2,
    timeout_s: float = 120.0,
    warn: Callable[[str], None] = warnings.warn,
) -> BatchLoader:
    """Return a loader that reads ``batches`` before they are asked for.

    Args:
        batches: What to read; its position moves as batches are handed out.
        num_workers: Processes that read; 0 reads in this one.
        read_ahead: Without workers, the batches a thread of this process reads ahead; 0 for none.
        timeout_s: How long one batch of a worker may take, starting the process included; the first
            ones have more time, for they check the blocks of the set.
        warn: Hears that workers died and are started again.

    Raises:
        ConfigError: if a setting is out of range.
    """
    if num_workers < 0 or read_ahead < 0 or timeout_s <= 0:
        raise ConfigError(
            f"num_workers is {num_workers}, read_ahead {read_ahead} and timeout_s {timeout_s}; "
            f"they must be at least 0, at least 0 and above 0"
        )
    return BatchLoader(
        batches, num_workers=num_workers, read_ahead=read_ahead, timeout_s=timeout_s, warn=warn
    )


def unpack(packed_BR: torch.Tensor, layout: RowLayout) -> Batch:
    """Return packed rows (B, R) uint8, on any device, as a batch that is views of them.

    Codes become int32, and numbers stored as float16 float32: these are copies.
    """
    parts = {}
    for field in layout.fields:
        dtype = _DTYPES[field.dtype]
        if field.width == 0 or not len(packed_BR):  # PyTorch cannot view no bytes as another type
            shape = (len(packed_BR), 1 if field.width is None else field.width)
            view = packed_BR.new_empty(shape, dtype=dtype)
        else:
            view = packed_BR[:, field.offset : field.offset + field.num_bytes].view(dtype)
        parts[field.name] = view[:, 0] if field.width is None else view
    parts["codes"] = _widened(parts["codes"])
    parts["numeric"] = parts["numeric"].float()
    return Batch(**parts)


def _widened(codes_BC: torch.Tensor) -> torch.Tensor:
    if codes_BC.device.type != "cpu":
        return codes_BC.to(torch.int32)
    # Not by PyTorch: it wakes its threads for these few bytes, which took up to 500 times as long.
    return torch.from_numpy(codes_BC.numpy().astype(np.int32))


def to_tensors(rows: EncodedBatch) -> Batch:
    """Return encoded rows as tensors; see ``unpack``."""
    return unpack(torch.from_numpy(rows.packed), rows.layout)


def _as_it_is(batch: Any) -> Any:
    return batch


def _sampling(
    sampling: str | None, source: RowSource, seed: int, rows: Selection | None
) -> Sampling | None:
    if sampling is None:
        return None
    if not isinstance(source, Shards):
        raise ConfigError(f"sampling {sampling!r} needs an encoded folder; {source.name} is none")
    return sampled(sampling, source, seed=seed, chosen=rows)


def _selection(rows: npt.ArrayLike, source: RowSource) -> Selection:
    given = np.asarray(rows)
    where = f"`rows` of split {source.split!r} ({source.num_rows} rows)"
    if given.ndim != 1 or (given.dtype == bool and len(given) != source.num_rows):
        raise ConfigError(f"{where} has shape {given.shape}; a mask has one entry per row")
    if given.dtype != bool and not np.issubdtype(given.dtype, np.integer) and len(given):
        raise ConfigError(f"{where} is {given.dtype}; give a mask or row numbers")
    if given.dtype == bool:
        return Selection.from_mask(given)
    return Selection.from_rows(given.astype(np.int64), source.num_rows)
