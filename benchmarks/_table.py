"""The synthetic table of the benchmarks: 60 float32 columns, 15 texts and a binary target.

A third of the numerics is continuous noise (hardly compressible), a third has two decimals, a third
is small whole numbers. The texts have 5 to 5000 values of Zipf frequencies, and nulls. Rows are
made file by file, each from its own seed, so memory stays at one file however long the table is.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_NUMERIC = 60
CARDINALITIES = (5, 8, 12, 20, 30, 50, 80, 120, 200, 300, 500, 1000, 2000, 3000, 5000)
NUMERIC = tuple(f"x{i:02}" for i in range(NUM_NUMERIC))
TEXTS = tuple(f"s{i:02}" for i in range(len(CARDINALITIES)))
TARGET = "y"
NULL_SHARE = 0.03  # of every text column


def write_files(
    folder: Path, num_rows: int, *, num_files: int = 16, compression: str = "zstd", seed: int = 0
) -> list[Path]:
    """Write the table as Parquet files of pyarrow's defaults with ``compression``; return them.

    Args:
        folder: Made if need be; gets ``part-00000.parquet`` and so on.
        num_rows: Of all files together; they differ by at most one row.
        num_files: The memory needed is that of ``num_rows / num_files`` rows.
        compression: A codec that ``pyarrow.parquet.write_table`` knows.
        seed: Of the values. File k of n is the same for the same seed and number of rows in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [num_rows * i // num_files for i in range(num_files + 1)]
    paths = []
    for i in range(num_files):
        path = folder / f"part-{i:05}.parquet"
        rng = np.random.default_rng([seed, i])
        pq.write_table(make_rows(rng, bounds[i + 1] - bounds[i]), path, compression=compression)
        paths.append(path)
    return paths


def make_rows(rng: np.random.Generator, num_rows: int) -> pa.Table:
    """Return rows of the table in memory: ``x00`` to ``x59``, ``s00`` to ``s14`` and ``y``."""
    columns: dict[str, pa.Array] = {}
    for i, name in enumerate(NUMERIC):
        if i % 3 == 0:
            values = rng.standard_normal(num_rows, dtype=np.float32)
        elif i % 3 == 1:
            values = np.round(rng.standard_normal(num_rows) * 20, 2).astype(np.float32)
        else:
            values = rng.integers(0, 20 + 10 * i, num_rows).astype(np.float32)
        columns[name] = pa.array(values)
    for name, cardinality in zip(TEXTS, CARDINALITIES, strict=True):
        columns[name] = _texts(rng, name, cardinality, num_rows)
    signal = columns["x00"].to_numpy() + columns["x01"].to_numpy() / 20
    is_late = signal + rng.standard_normal(num_rows) > 0
    columns[TARGET] = pa.array(is_late.astype(np.int8))
    return pa.table(columns)


def _texts(rng: np.random.Generator, name: str, cardinality: int, num_rows: int) -> pa.Array:
    """Return texts like ``s03-00017``, the k-th commonest with a frequency of 1/k."""
    shares = np.cumsum(1 / np.arange(1, cardinality + 1))
    codes = np.searchsorted(shares / shares[-1], rng.random(num_rows)).astype(np.int32)
    is_null = rng.random(num_rows) < NULL_SHARE
    values = pa.array([f"{name}-{k:05}" for k in range(cardinality)])
    codes = pa.array(np.minimum(codes, cardinality - 1), mask=is_null)
    return pa.DictionaryArray.from_arrays(codes, values).cast(pa.string())
