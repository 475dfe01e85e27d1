"""Epochs from shards and straight from Parquet beside pandas, BatchSampler, HF datasets and limits.

All variants take turns on one synthetic table; the slow ones read a part of it, and every ratio is
of CPU seconds per row. A stream is opened once, so that an epoch is one of many: the blocks are
verified in the warm-up turn, and a row says what that costs. The pandas loader reads the foreign
files (pyarrow's zstd default) whatever it is compared with: they are where its user comes from.

HF datasets is compared where it is installed (``pip install datasets``).
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import _device, _diagnose, _fresh, _resume, _window_quality
from benchmarks._folders import Folders, flights, synthetic
from benchmarks._peers import (
    BATCH_ROWS,
    BLOCK_ROWS,
    HAS_DATASETS,
    ArrowLoader,
    InMemory,
    PandasLoader,
    copy_blocks,
    decode,
    drain,
    gather,
)
from benchmarks._rates import rate_row, seconds_per_row, share_row, times_row
from benchmarks._table import TEXTS
from benchmarks.harness import Row, Timing, arguments, measure, report
from headrace.data.shards import open_shards
from headrace.data.stream import stream
from headrace.data.table import Table

PANDAS_FILES = 1  # of the foreign table: the pandas loader would take minutes on all of them
ARROW_FILES = 4  # for HF datasets
MATRIX_WIDTH = 75
STEPS = 10  # of training


def shard_rows(folders: Folders, repeats: int) -> list[Row]:
    """Epochs from shards in each order, against peers and the bare copies."""
    encoded, num_rows = folders.encoded, folders.num_rows
    files = folders.foreign.files("train")
    pandas = PandasLoader(folders.encoder)
    in_memory = InMemory(*_tensors(encoded))
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((num_rows, MATRIX_WIDTH), np.float32)
    order, blocks = rng.permutation(num_rows), rng.permutation(num_rows // BLOCK_ROWS)
    names = ("exact", "window", "block", "sequential")
    streams = {name: stream(encoded, batch_size=BATCH_ROWS, order=name) for name in names}
    timings = measure(
        {
            "pandas loader": lambda: drain(pandas.epoch(files[:PANDAS_FILES])),
            "BatchSampler over tensors": lambda: drain(in_memory.epoch()),
            "np.take gather": lambda: gather(matrix, order),
            "block copy": lambda: copy_blocks(matrix, blocks),
            **{f"shards, {name}": _epoch(batches) for name, batches in streams.items()},
            "shards, exact, dense numeric": lambda: _dense(streams["exact"]),
            "shards, exact, first epoch": lambda: drain(
                stream(encoded, batch_size=BATCH_ROWS, order="exact")
            ),
            "training step": _training(in_memory),
        },
        repeats,
    )
    slow, sampler = timings["pandas loader"], timings["BatchSampler over tensors"]
    exact, block = timings["shards, exact"], timings["shards, block"]
    return [
        times_row("shards, exact: than the pandas loader", slow, exact, must=45.0),
        times_row("shards, exact: than BatchSampler", sampler, exact, must=4.5),
        share_row("shards, exact: of np.take", exact, timings["np.take gather"], goal=0.6),
        times_row("shards, block: than the pandas loader", slow, block, must=110.0),
        share_row("shards, block: of a block copy", block, timings["block copy"], goal=0.6),
        times_row("shards, window: than the pandas loader", slow, timings["shards, window"]),
        _cost_row("loader's CPU, exact", exact, timings["training step"]),
        rate_row("pandas loader", slow),
        rate_row("BatchSampler over tensors", sampler),
        rate_row("np.take gather", timings["np.take gather"]),
        rate_row("block copy", timings["block copy"]),
        *(rate_row(name, timing) for name, timing in timings.items() if name.startswith("shards")),
    ]


def parquet_rows(folders: Folders, repeats: int) -> list[Row]:
    """Epochs straight from Parquet, encoded as they are read, against peers and the decode."""
    encoder = folders.encoder
    foreign, ours = folders.foreign, folders.ours
    pandas, arrow = PandasLoader(encoder), ArrowLoader(encoder)
    files = foreign.files("train")
    variants: dict[str, Callable[[], int]] = {
        "pandas loader": lambda: drain(pandas.epoch(files[:PANDAS_FILES])),
        "decode, foreign": lambda: decode(files, encoder.columns, TEXTS),
        "decode, ours": lambda: decode(ours.files("train"), encoder.columns, TEXTS),
        "Parquet, foreign": _direct(foreign, folders.encoded),
        "Parquet, ours": _direct(ours, folders.encoded),
    }
    if HAS_DATASETS:
        variants["HF datasets"] = lambda: drain(arrow.epoch(files[:ARROW_FILES]))
    else:
        print("HF datasets: not installed, left out (pip install datasets)")
    timings = measure(variants, repeats)
    slow = timings["pandas loader"]
    by_foreign, by_ours = timings["Parquet, foreign"], timings["Parquet, ours"]
    rows = [
        times_row("Parquet, foreign zstd: than the pandas loader", slow, by_foreign, must=8.0),
        times_row("Parquet, ours: than the pandas loader", slow, by_ours, must=12.0),
        share_row(
            "Parquet, foreign: of the decode", by_foreign, timings["decode, foreign"], goal=0.55
        ),
        share_row("Parquet, ours: of the decode", by_ours, timings["decode, ours"], goal=0.55),
        *(rate_row(name, timing) for name, timing in timings.items()),
    ]
    if HAS_DATASETS:
        row = times_row(
            "Parquet, foreign: than HF datasets", timings["HF datasets"], by_foreign, must=2.0
        )
        rows.insert(2, row)
    return rows


def fresh_rows(small: Folders, large: Folders, repeats: int) -> list[Row]:
    """Peak memory of an epoch and the time to a first batch, each in processes of their own."""
    return [
        *_fresh.memory_rows(
            "peak memory, shards, exact",
            [str(small.encoded), "exact"],
            [str(large.encoded), "exact"],
            must=1.1,
        ),
        *_fresh.memory_rows(
            "peak memory, Parquet, ours",
            [str(small.ours.folder), "window", str(small.encoded)],
            [str(large.ours.folder), "window", str(large.encoded)],
            must=1.1,
        ),
        *_fresh.opening_rows(small.encoded, large.encoded, repeats),
    ]


def flights_rows(repeats: int) -> list[Row]:
    """The example's own epochs; for reading, it is too small to judge by."""
    with flights() as folders:
        opened = [
            stream(folders.encoded, batch_size=BATCH_ROWS, order=order)
            for order in ("exact", "block")
        ]
        timings = measure(
            {
                "flights, shards, exact": _epoch(opened[0]),
                "flights, shards, block": _epoch(opened[1]),
                "flights, Parquet": _direct(folders.ours, folders.encoded),
            },
            repeats,
        )
    return [rate_row(name, timing) for name, timing in timings.items()]


def others_rows(quick: bool) -> list[Row]:
    """Resuming in mid-epoch, diagnosis and the device, each from its own module."""
    with flights() as folders:
        diagnosed = _diagnose.rows(folders.encoded, quick=quick)
    return [*_resume.rows(quick), *diagnosed, *_device.rows(quick)]


def _epoch(batches: Any) -> Callable[[], int]:
    return lambda: drain(batches)


def _dense(batches: Any) -> int:
    """An epoch whose consumer copies the numbers out of the packed rows."""
    return sum(len(batch.numeric.contiguous()) for batch in batches)


def _direct(table: Table, encoded: Path) -> Callable[[], int]:
    batches = _fresh.opened(str(table.folder), "window", str(encoded))

    def epoch() -> int:
        batches.source = copy.copy(batches.source)  # without what it has decoded so far
        return drain(batches)

    return epoch


def _tensors(encoded: Path) -> tuple[torch.Tensor, ...]:
    """The whole encoded table as tensors in memory, as somebody would hold it."""
    shards = open_shards(encoded, "train")
    whole = stream(encoded, batch_size=shards.num_rows, order="sequential")
    batch = next(iter(whole))
    return batch.numeric.contiguous(), batch.codes.long(), batch.targets.float().contiguous()


def _training(in_memory: InMemory) -> Callable[[], int]:
    """Steps of an MLP 256-128 on batches that are there: forward, backward and Adam."""
    numeric, codes, targets = (t[: STEPS * BATCH_ROWS] for t in in_memory.tensors)
    x = torch.cat([numeric.nan_to_num(), codes.float() / 1000], dim=1)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(x.shape[1], 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1)
    )
    optimizer = torch.optim.Adam(network.parameters())

    def steps() -> int:
        for start in range(0, len(x), BATCH_ROWS):
            part = slice(start, start + BATCH_ROWS)
            loss = nn.functional.mse_loss(network(x[part]), targets[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return len(x)

    return steps


def _cost_row(figure: str, loader: Timing, step: Timing) -> Row:
    pairs = zip(seconds_per_row(loader), seconds_per_row(step), strict=True)
    shares = sorted(a / b for a, b in pairs)
    reference = f"an MLP 256-128's step, cpu, 1 thread; {shares[0]:.1%}-{shares[-1]:.1%}"
    median = shares[len(shares) // 2]
    return Row(figure, median, "of the step", None, 0.05, False, reference)


def main() -> int:
    args = arguments(__doc__)
    torch.set_num_threads(1)
    num_rows, repeats = (200_000, 3) if args.quick else (2_000_000, 5)
    with synthetic(num_rows // 4) as small, synthetic(num_rows) as large:
        rows = shard_rows(large, repeats)
        rows += parquet_rows(large, repeats)
        rows += fresh_rows(small, large, repeats)
    rows += flights_rows(repeats)
    rows += _window_quality.rows(args.quick)
    rows += others_rows(args.quick)
    return report(rows, args)


if __name__ == "__main__":
    sys.exit(main())
