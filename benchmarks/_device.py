"""Rows into a CUDA device beside the copy ceiling, how busy it is in training, and a long epoch.

Where there is no CUDA device there are no rows. The long epoch is 60 million rows of 75 cells,
written here from the rows of the synthetic table over and over: loading does not care.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._folders import Folders, synthetic
from benchmarks._peers import BATCH_ROWS
from benchmarks._rates import rate_row, share_row
from benchmarks.harness import Row, measure
from headrace.data.encoder import EncodedBatch, Encoder
from headrace.data.shards import ShardWriter, open_shards, write_schema
from headrace.data.stream import BatchStream, loader, stream
from headrace.data.transfer import to_device
from headrace.models.nn import NnParams, fit
from headrace.models.protocol import StopRows, TrainViews
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.storage import new_folder

LONG_ROWS = 60_000_000
SHARD_BYTES = 256 << 20


def rows(quick: bool) -> list[Row]:
    """Return the figures of a CUDA device; none where there is none."""
    if not torch.cuda.is_available():
        print("no CUDA device: rows of the device are left out")
        return []
    num_rows, repeats = (200_000, 3) if quick else (2_000_000, 5)
    with synthetic(num_rows) as folders:
        found = [*_copy_rows(folders, repeats), _busy_row(folders)]
        if not quick:
            found.append(_long_row(folders))
    return found


def _copy_rows(folders: Folders, repeats: int) -> list[Row]:
    """Epochs into the device beside copies of one pinned batch as often as it takes."""
    streams = {
        order: stream(folders.encoded, batch_size=BATCH_ROWS, order=order)
        for order in ("exact", "block")
    }
    row_bytes = streams["exact"].schema.rows.row_bytes
    pinned = torch.empty((BATCH_ROWS, row_bytes), dtype=torch.uint8).pin_memory()

    def ceiling() -> int:
        target = torch.empty_like(pinned, device="cuda")
        for _ in range(folders.num_rows // BATCH_ROWS):
            target.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()
        return folders.num_rows // BATCH_ROWS * BATCH_ROWS

    timings = measure(
        {
            "copies of a pinned batch": ceiling,
            "into the device, exact": lambda: _drain(streams["exact"]),
            "into the device, block": lambda: _drain(streams["block"]),
        },
        repeats,
    )
    top = timings.pop("copies of a pinned batch")
    shares = [
        share_row(f"{name}: of the copies", timing, top, clock="wall")
        for name, timing in timings.items()
    ]
    rates = [
        rate_row(name, timing, clock="wall") for name, timing in {top.name: top, **timings}.items()
    ]
    return [*shares, *rates]


def _busy_row(folders: Folders) -> Row:
    """Share of a training of the default network in which a kernel or a copy is under way."""
    table = folders.ours
    folds = (0, 1, 2, 3, 4)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with tempfile.TemporaryDirectory() as name, torch.profiler.profile(activities=activities) as p:
        views = TrainViews(
            table.folder, folders.encoded, Path(name), table.contract, folds, StopRows("fold", 4)
        )
        fit(
            views,
            NnParams(threads=1, max_epochs=2),
            checkpoints=Path(name) / "checkpoints",
            resources=Resources(),
            recorder=MemoryRecorder(),
        )
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in p.events() if _is_on_device(e))
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    share = busy / (end - spans[0][0])
    return Row("device busy, default nn", share, "of the time", goal=0.95, reference="profiler")


def _is_on_device(event: Any) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA


def _long_row(folders: Folders) -> Row:
    with tempfile.TemporaryDirectory() as name:
        _write_long(folders.encoded, Path(name) / "long", LONG_ROWS)
        batches = stream(Path(name) / "long", batch_size=8 * BATCH_ROWS, order="exact")
        start = time.perf_counter()
        num_rows = _drain(batches)
        seconds = time.perf_counter() - start
    assert num_rows == LONG_ROWS
    return Row("one epoch of 60M x 75, loading", seconds, "s", None, 60.0, False, "wall, exact")


def _write_long(encoded: Path, out: Path, num_rows: int) -> None:
    """Write shards of ``num_rows`` rows, those of ``encoded`` again and again."""
    shards = open_shards(encoded, "train")
    some = shards.slice(0, min(100_000, shards.num_rows))
    with new_folder(out) as folder:
        Encoder.load(encoded).save(folder)
        with ShardWriter(
            folder / "train", shards.schema, shard_bytes=SHARD_BYTES, num_rows=num_rows
        ) as writer:
            for first in range(0, num_rows, len(some)):
                part = np.ascontiguousarray(some.packed[: num_rows - first])
                writer.append(EncodedBatch(part, some.layout))
        splits = {"train": tuple(writer.sizes), "valid": (), "test": ()}
        write_schema(folder, shards.schema.model_copy(update={"splits": splits}))


def _drain(batches: BatchStream) -> int:
    there = to_device(loader(batches), "cuda", mode="prefetch")
    num_rows = sum(len(batch) for batch in there)
    torch.cuda.synchronize()
    return num_rows
