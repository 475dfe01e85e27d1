"""Encoded shards as a stream of whole batches of PyTorch tensors, restartable at any batch.

Reading is thin: ``order`` says which rows the next batch has, ``shards`` copies them. A batch is
always fresh memory, so it stays as it was handed out for as long as it is held.

A ``BatchStream`` is what a training loop iterates; ``loader`` puts processes in front of it.
Both count a batch when it is handed out, not when it is read (workers read ahead), and the count
is the position: ``state_dict()`` after any step continues with the next batch, with any number of
workers. The epoch is part of the position, so each pass over the stream is a new epoch, and one
that was broken off is continued by the next pass.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from headrace.data.encoder import EncodedBatch
from headrace.data.order import KINDS, Cut, Kind, Position, RowOrder
from headrace.data.shards import Shards, open_shards
from headrace.errors import ConfigError, HeadraceError, ResourceError
from headrace.storage import digest_bytes


@dataclass(frozen=True)
class Batch:
    """Rows as tensors: B rows, N numeric inputs, C categories, T targets.

    Shapes: ``row_id`` (B,) int64; ``numeric`` (B, N) float32, NaN where missing; ``codes`` (B, C)
    int32, ready for an embedding; ``targets`` (B, T) float64, NaN where missing; ``weight`` (B,)
    float32; ``fold`` (B,) int8, -1 outside train.
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

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return Batch(*(change(getattr(self, field.name)) for field in fields(self)))


class BatchStream(IterableDataset[Batch]):
    """The batches of one split, epoch after epoch; iterating continues at ``position``.

    In the main process each pass yields what is left of the current epoch and moves the position.
    In a DataLoader of your own with workers, every pass begins at the position that was last set
    by ``set_position``, for nobody counts there: set each epoch, or use ``loader``, which counts.

    Args:
        folder: what the stage ``encode`` wrote.
        split: train, valid or test.
        batch_size: rows per batch on each rank. A set with fewer rows is one short batch.
        order: exact, window, block or sequential; see ``headrace.data.order``.
        seed: of the order; it has no effect on ``sequential``.
        rows: which rows of the split, as a mask or as ascending positions; all if None.
        rank: this process among ``num_ranks`` that share every epoch.
        num_ranks: see ``rank``.
        window_shards: shards that are mixed at a time, for ``window``.
        block_rows: consecutive rows that stay together, for ``block``.
        contract_digest: of the contract the reader expects, refused if another.

    Raises:
        ConfigError: if a setting is out of range, or ``rows`` does not fit the split.
        IntegrityError: if the shards are missing or damaged.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        split: str = "train",
        batch_size: int,
        order: Kind = "exact",
        seed: int = 0,
        rows: npt.ArrayLike | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        window_shards: int = 4,
        block_rows: int = 64,
        contract_digest: str | None = None,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.split = split
        self.rank = rank
        self._shards: Shards | None = open_shards(
            self.folder, split, contract_digest=contract_digest
        )
        self.schema = self._shards.schema
        self._rows = None if rows is None else _row_numbers(rows, self._shards)
        self._rows_digest = "all" if self._rows is None else digest_bytes(self._rows.tobytes())
        sizes = self._shards.sizes if self._rows is None else _sizes(self._rows, self._shards)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_ranks", num_ranks, 1),
            ("window_shards", window_shards, 1),
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
        self.order = RowOrder(order, sizes, seed, window_shards, block_rows)
        self.cut = Cut(sum(sizes), batch_size, num_ranks)
        # In shared memory, so that workers that outlive an epoch see where the next one starts.
        self._start = torch.zeros(2, dtype=torch.int64)
        self._start.share_memory_()  # type: ignore[no-untyped-call]
        self._position = Position()

    @property
    def num_rows(self) -> int:
        """Rows of an epoch over all ranks."""
        return self.cut.num_rows

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
            yield from self.counted(self._batches(self._position, 0, 1))
        else:
            epoch, batches = self._start.tolist()
            yield from self._batches(Position(epoch, batches), info.id, info.num_workers)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": None}  # maps are opened where they are used

    def _batches(self, position: Position, worker: int, num_workers: int) -> Iterator[Batch]:
        shards = self._opened()
        for batch in self.cut.share(position.batches, worker, num_workers):
            first, end = self.cut.bounds(batch, self.rank)
            yield to_tensors(self._read(shards, position.epoch, first, end))

    def _read(self, shards: Shards, epoch: int, first: int, end: int) -> EncodedBatch:
        if self.order.kind == "sequential" and self._rows is None:
            return shards.slice(first, end)
        rows = self.order.rows(epoch, first, end)
        return shards.take(rows if self._rows is None else self._rows[rows])

    def _opened(self) -> Shards:
        if self._shards is None:
            self._shards = open_shards(
                self.folder, self.split, contract_digest=self.schema.contract
            )
        return self._shards

    def _identity(self) -> dict[str, Any]:
        return {
            "format": 1,
            "data": self._opened().digest,
            "split": self.split,
            "rows": self._rows_digest,
            "order": self.order.kind,
            "seed": self.order.seed,
            "window_shards": self.order.window_shards,
            "block_rows": self.order.block_rows,
            "global_batch": self.cut.global_rows,
        }


_SIGNAL_S = 0.5


class BatchLoader:
    """A stream with reading processes in front of it; the same batches in the same order.

    Iterate it like the stream: each pass is what is left of the current epoch. Worker processes
    are started fresh (spawn, so the script needs its ``if __name__ == "__main__":``) and stay for
    the following epochs. Batches are counted where they are handed out.
    """

    def __init__(self, stream: BatchStream, *, num_workers: int, timeout_s: float) -> None:
        self.stream = stream
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._processes: DataLoader[Batch] | None = None

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self.stream)

    def __iter__(self) -> Iterator[Batch]:
        """Yield what is left of the current epoch.

        Raises:
            ResourceError: if a worker process died or did not answer in time, with the position
                from which the stream can be continued.
        """
        if self._num_workers == 0:
            yield from self.stream
            return
        self.stream.set_position(*self.stream.position)  # where workers begin
        try:
            try:
                yield from self.stream.counted(self._workers())
            except (ConnectionError, EOFError):
                # Torch tells of the same death by a signal that raises wherever Python is: here,
                # not while the error is being made.
                time.sleep(_SIGNAL_S)
                raise
        except HeadraceError:
            self.close()
            raise
        except (RuntimeError, ConnectionError, EOFError) as error:
            self.close()
            raise ResourceError(
                f"a worker process that reads {self.stream.folder} failed ({error}); the stream is "
                f"at {self.stream.position}. Set `resources.workers` to 0 to read without workers"
            ) from error

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

    def _workers(self) -> Iterator[Batch]:
        if self._processes is None:
            self._processes = DataLoader(
                self.stream,
                batch_size=None,
                num_workers=self._num_workers,
                multiprocessing_context="spawn",
                persistent_workers=True,
                timeout=self._timeout_s,
                collate_fn=_as_it_is,
            )
        yield from self._processes


def stream(
    folder: Path | str = "data/encode",
    *,
    batch_size: int,
    split: str = "train",
    order: Kind = "exact",
    seed: int = 0,
    rows: npt.ArrayLike | None = None,
) -> BatchStream:
    """Return the batches of an encoded folder, for any PyTorch loop; see ``BatchStream``.

    Each pass over it is the next epoch, in another order.
    """
    return BatchStream(
        folder, split=split, batch_size=batch_size, order=order, seed=seed, rows=rows
    )


def loader(batches: BatchStream, *, num_workers: int, timeout_s: float = 120.0) -> BatchLoader:
    """Return a loader that reads ``batches`` with processes of its own; 0 reads in this one.

    ``timeout_s``: how long one batch may take, starting the process included.
    """
    if num_workers < 0 or timeout_s <= 0:
        raise ConfigError(
            f"num_workers is {num_workers} and timeout_s {timeout_s}; they must be at least 0 and "
            f"above 0"
        )
    return BatchLoader(batches, num_workers=num_workers, timeout_s=timeout_s)


def to_tensors(rows: EncodedBatch) -> Batch:
    """Return rows as tensors; arrays that are fresh and writable are not copied."""
    return Batch(
        row_id=torch.from_numpy(rows.row_id),
        numeric=torch.from_numpy(rows.numeric),
        codes=torch.from_numpy(rows.codes.astype(np.int32)),
        targets=torch.from_numpy(rows.targets),
        weight=torch.from_numpy(rows.weight),
        fold=torch.from_numpy(rows.fold),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _row_numbers(rows: npt.ArrayLike, shards: Shards) -> npt.NDArray[np.int64]:
    given = np.asarray(rows)
    where = f"`rows` of split {shards.split!r} ({shards.num_rows} rows)"
    if given.ndim != 1 or (given.dtype == bool and len(given) != shards.num_rows):
        raise ConfigError(f"{where} has shape {given.shape}; a mask has one entry per row")
    if given.dtype != bool and not np.issubdtype(given.dtype, np.integer) and len(given):
        raise ConfigError(f"{where} is {given.dtype}; give a mask or row numbers")
    numbers = np.flatnonzero(given) if given.dtype == bool else given.astype(np.int64)
    if len(numbers) and (
        numbers[0] < 0 or numbers[-1] >= shards.num_rows or (np.diff(numbers) <= 0).any()
    ):
        raise ConfigError(f"{where} must be ascending row numbers of the split, each once")
    return np.ascontiguousarray(numbers, np.int64)


def _sizes(rows: npt.NDArray[np.int64], shards: Shards) -> tuple[int, ...]:
    ends = np.cumsum(shards.sizes)
    counts = np.diff(np.searchsorted(rows, ends, side="left"), prepend=0)
    return tuple(counts.tolist())
