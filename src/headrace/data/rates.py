"""How fast rows go from Parquet to tensors, each step beside what memory allows at best.

A ``Task`` is an endless loop over one kind of work that says after each step how many rows it did.
``measure`` runs all of them in turn, a slice of the time each, round after round: what disturbs the
machine disturbs all of them, and the ratio of two stays what it is. Reported is the median round.

Ceilings are measured in the same rounds, on rows of the same bytes: the files' bytes read from the
page cache (decoding must read them), rows copied one after the other (encoding must write them,
a sequential epoch must copy them), blocks of rows and single rows gathered by ``np.take``. Files
and shards are read once before the clock starts, so nothing here waits for a disk.

Memory: a sample of rows, once as shards in the page cache and once as a matrix, and a sample of
decoded batches; each at most an eighth of the memory budget, and a gibibyte.
"""

import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.data.encoder import Encoder, encode_batches
from headrace.data.order import KINDS, Kind
from headrace.data.parallel import in_order
from headrace.data.shards import Shards
from headrace.data.stream import BatchStream
from headrace.data.table import Table

Steps: TypeAlias = Generator[int, None, None]

ROUNDS = 5
BATCH_ROWS = 4096  # of the batches that are read from the shards
_BLOCK_ROWS = 64  # that stay together in block order
_READ_BYTES = 1 << 20
_SHARE = 8  # of the memory budget: what each sample may take
_SAMPLE_BYTES = 1 << 30  # and never more than this, which no processor's cache holds
_WARM_S = 10.0
_READ, _DECODE = "read Parquet bytes", "decode"
_COPY, _BLOCKS, _TAKE = "copy rows in a row", "np.take of blocks", "np.take of rows"
_CEILINGS: Mapping[Kind, str] = {
    "exact": _TAKE,
    "window": _TAKE,
    "block": _BLOCKS,
    "sequential": _COPY,
}


@dataclass(frozen=True)
class Task:
    """Work that is repeated: ``steps`` goes on for ever and yields the rows of each step."""

    name: str
    row_bytes: float  # that one row has in what the work makes
    steps: Callable[[], Steps]
    ceilings: tuple[str, ...] = ()  # names of the tasks whose rows/s it is compared with
    warm_rows: int = 1  # before the clock starts: files read and verified, kernels compiled
    warm: Callable[[], Steps] | None = None  # what warms up, if not the work itself


@dataclass(frozen=True)
class Rate:
    """What one task did: medians over the rounds, and its share of each ceiling's rows/s."""

    name: str
    rows_per_s: float
    rows_per_cpu_s: float  # of this process, over all its threads
    row_bytes: float
    ceilings: tuple[tuple[str, float], ...]

    @property
    def bytes_per_s(self) -> float:
        """Bytes made in a second."""
        return self.rows_per_s * self.row_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "name": self.name,
            "rows_per_s": self.rows_per_s,
            "rows_per_cpu_s": self.rows_per_cpu_s,
            "bytes_per_s": self.bytes_per_s,
            "share_of_ceiling": dict(self.ceilings),
        }


def epoch_name(kind: Kind) -> str:
    """Return the name of the task that reads an epoch in this order."""
    return f"epoch, {kind}"


def measure(
    tasks: Sequence[Task],
    *,
    seconds: float,
    rounds: int = ROUNDS,
    tell: Callable[[str], None],
) -> tuple[Rate, ...]:
    """Run every task for about ``seconds`` in ``rounds`` slices that take turns.

    A step that has begun is finished, so a task whose step takes longer than its slice takes more.
    ``tell`` hears what is being done.
    """
    for task in tasks:
        tell(f"warming up: {task.name}")
        _slice(task.warm or task.steps, num_rows=task.warm_rows, most_s=_WARM_S)
    slices: dict[str, list[tuple[float, float]]] = {task.name: [] for task in tasks}
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        for task in tasks:
            rows, wall, cpu = _slice(task.steps, seconds=seconds / rounds)
            slices[task.name].append((rows / wall, rows / cpu))
    per_s = {name: statistics.median(rate for rate, _ in found) for name, found in slices.items()}
    per_cpu_s = {name: statistics.median(r for _, r in found) for name, found in slices.items()}
    return tuple(
        Rate(
            name=task.name,
            rows_per_s=per_s[task.name],
            rows_per_cpu_s=per_cpu_s[task.name],
            row_bytes=task.row_bytes,
            ceilings=tuple((name, per_s[task.name] / per_s[name]) for name in task.ceilings),
        )
        for task in tasks
    )


def data_tasks(
    table: Table, encoder: Encoder, shards: Shards, *, threads: int, budget_bytes: int
) -> tuple[Task, ...]:
    """Return the tasks of the way from Parquet to batches, each after its ceiling.

    ``shards`` are the train rows of ``table`` as ``encoder`` made them.
    """
    room = min(budget_bytes // _SHARE, _SAMPLE_BYTES)
    return (
        *_parquet_tasks(table, encoder, threads=threads, room=room),
        *_epoch_tasks(shards, room=room),
    )


def _parquet_tasks(table: Table, encoder: Encoder, *, threads: int, room: int) -> Iterator[Task]:
    files, num_rows = table.files("train"), table.num_rows("train")
    file_bytes = sum(path.stat().st_size for path in files) / num_rows
    held = _held_batches(table, encoder, room)
    decoded_bytes = sum(rows.nbytes for rows in held) / sum(rows.num_rows for rows in held)
    encoded_bytes = encoder.layout.row_bytes

    def decode() -> Steps:
        while True:
            yield from encode_batches(
                table, "train", encoder.columns, lambda rows: rows.num_rows, threads=threads
            )

    def encode_decoded() -> Steps:
        while True:
            yield from in_order(
                held, lambda rows: iter([len(encoder.transform(rows))]), threads=threads
            )

    def encode() -> Steps:
        while True:
            yield from encode_batches(
                table,
                "train",
                encoder.columns,
                lambda rows: len(encoder.transform(rows)),
                threads=threads,
            )

    yield Task(_READ, file_bytes, lambda: _read_files(files, file_bytes), warm_rows=num_rows)
    yield Task(_DECODE, decoded_bytes, decode, (_READ,))
    yield Task("encode what is decoded", encoded_bytes, encode_decoded, (_COPY,))
    yield Task("decode and encode", encoded_bytes, encode, (_DECODE,))


def _epoch_tasks(shards: Shards, *, room: int) -> Iterator[Task]:
    row_bytes = shards.schema.rows.row_bytes
    # A set larger than the sample is measured on its first rows: the others may be on a disk.
    num_rows = min(shards.num_rows, max(BATCH_ROWS, room // row_bytes))
    rows = None if num_rows == shards.num_rows else np.arange(num_rows)
    batch_rows = min(BATCH_ROWS, num_rows)
    matrix_BR = np.full((num_rows, row_bytes), 1, np.uint8)

    def epochs(kind: Kind) -> Callable[[], Steps]:
        stream = BatchStream(
            shards.folder,
            batch_size=batch_rows,
            order=kind,
            rows=rows,
            block_rows=_BLOCK_ROWS,
            contract_digest=shards.schema.contract,
        )

        def steps() -> Steps:
            while True:
                for batch in stream:
                    yield len(batch)

        return steps

    yield Task(_COPY, row_bytes, lambda: _copy(matrix_BR), warm_rows=num_rows)
    yield Task(_BLOCKS, row_bytes, lambda: _take(matrix_BR, _BLOCK_ROWS), warm_rows=num_rows)
    yield Task(_TAKE, row_bytes, lambda: _take(matrix_BR, 1), warm_rows=num_rows)
    for kind in KINDS:
        yield Task(
            epoch_name(kind), row_bytes, epochs(kind), (_CEILINGS[kind],), warm_rows=num_rows
        )


def _slice(
    work: Callable[[], Steps], *, num_rows: int = 0, seconds: float = 0.0, most_s: float = math.inf
) -> tuple[int, float, float]:
    """Run at least one step, ``num_rows`` and ``seconds``; return rows, seconds, CPU seconds."""
    done = 0
    with closing(work()) as steps:
        began, cpu_began = time.perf_counter(), time.process_time()
        for rows in steps:
            done += rows
            spent = time.perf_counter() - began
            if (done >= num_rows and spent >= seconds) or spent >= most_s:
                break
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return done, max(wall, 1e-9), max(cpu, 1e-9)


def _held_batches(table: Table, encoder: Encoder, room: int) -> list[pa.RecordBatch]:
    """Return decoded batches from the beginning of the table, at least one."""
    held: list[pa.RecordBatch] = []
    num_bytes = 0
    batches = encode_batches(table, "train", encoder.columns, lambda rows: rows, threads=1)
    for rows in batches:
        held.append(rows)
        num_bytes += rows.nbytes
        if num_bytes >= room:
            break
    return held


def _read_files(files: Sequence[Path], row_bytes: float) -> Steps:
    """Read files for ever; a step is as many rows as its bytes are worth."""
    buffer = bytearray(_READ_BYTES)
    num_bytes, told = 0, 0
    for path in cycle(files):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                num_bytes += count
                rows = int(num_bytes / row_bytes) - told
                told += rows
                yield rows


def _copy(matrix_BR: npt.NDArray[np.uint8]) -> Steps:
    out_BR = np.empty((BATCH_ROWS, matrix_BR.shape[1]), np.uint8)
    while True:
        for first in range(0, len(matrix_BR), BATCH_ROWS):
            rows = matrix_BR[first : first + BATCH_ROWS]
            out_BR[: len(rows)] = rows
            yield len(rows)


def _take(matrix_BR: npt.NDArray[np.uint8], block_rows: int) -> Steps:
    """Gather blocks of rows in random order, batch by batch, into one buffer."""
    block_rows = min(block_rows, len(matrix_BR))
    num_blocks = len(matrix_BR) // block_rows
    blocks = matrix_BR[: num_blocks * block_rows].reshape(num_blocks, -1)
    order = np.random.default_rng(0).permutation(num_blocks)
    batch = max(1, BATCH_ROWS // block_rows)
    out = np.empty((batch, blocks.shape[1]), np.uint8)
    while True:
        for first in range(0, num_blocks, batch):
            chosen = order[first : first + batch]
            # With mode="raise" NumPy gathers through a second buffer when there is an ``out``.
            np.take(blocks, chosen, axis=0, out=out[: len(chosen)], mode="clip")
            yield len(chosen) * block_rows
