"""What others do with the same rows, and the limits nobody passes: one function per epoch.

Each takes what it needs ready (fitted statistics, open tensors) and returns how many rows it
handed out, as batches that a training loop could use.
"""

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from sklearn.preprocessing import StandardScaler
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from headrace.data.encoder import MISSING, UNKNOWN, Encoder

BATCH_ROWS = 4096
DECODE_ROWS = 65_536
BLOCK_ROWS = 64
HAS_DATASETS = importlib.util.find_spec("datasets") is not None


def drain(batches: Iterable[Any]) -> int:
    """Read an epoch, let every batch go, return its rows."""
    return sum(
        len(batch[0]) if isinstance(batch, tuple | list) else len(batch) for batch in batches
    )


class PandasLoader:
    """The vectorised pandas way: ``to_pandas``, ``series.map`` and a scaler, 4096-row batches."""

    def __init__(self, encoder: Encoder) -> None:
        self.numeric = list(encoder.numeric)
        self.targets = [target.name for target in encoder.targets]
        self.codes = {
            category.name: dict(
                zip([None, *category.labels], range(MISSING, category.cardinality), strict=True)
            )
            for category in encoder.categories
        }
        self.scaler = StandardScaler()
        self.scaler.mean_ = np.array([scale.mean for scale in encoder.scales])
        self.scaler.scale_ = np.array([scale.std for scale in encoder.scales])
        self.scaler.var_ = self.scaler.scale_**2
        self.scaler.n_features_in_ = len(self.numeric)
        self.scaler.feature_names_in_ = np.array(self.numeric, object)
        self.columns = [*self.numeric, *self.codes, *self.targets]

    def epoch(self, files: Sequence[Path], *, seed: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield shuffled tensors: files in random order, rows within a batch."""
        rng = np.random.default_rng(seed)
        for i in rng.permutation(len(files)):
            with pq.ParquetFile(files[i]) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=self.columns):
                    frame = batch.to_pandas()
                    order = rng.permutation(len(frame))
                    yield (
                        torch.from_numpy(self.scaled(frame)[order]),
                        torch.from_numpy(self.mapped(frame)[order]),
                        torch.from_numpy(frame[self.targets].to_numpy(np.float32)[order]),
                    )

    def scaled(self, frame: pd.DataFrame) -> np.ndarray:
        return self.scaler.transform(frame[self.numeric]).astype(np.float32, copy=False)

    def mapped(self, frame: pd.DataFrame) -> np.ndarray:
        """Return the codes, (rows, categories) int64."""
        columns = [frame[name].map(codes).fillna(UNKNOWN) for name, codes in self.codes.items()]
        return np.column_stack([column.to_numpy(np.int64) for column in columns])


class ArrowLoader:
    """HF datasets, the best way found: a stream of Arrow batches, encoded by Arrow kernels."""

    def __init__(self, encoder: Encoder) -> None:
        self.numeric = list(encoder.numeric)
        self.targets = [target.name for target in encoder.targets]
        self.mean = np.array([scale.mean for scale in encoder.scales], np.float32)
        self.std = np.array([scale.std for scale in encoder.scales], np.float32)
        self.value_sets = value_sets(encoder)

    def epoch(self, files: Sequence[Path], *, seed: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield shuffled tensors: files in random order, rows within a batch."""
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from datasets import load_dataset

        rng = np.random.default_rng(seed)
        names = [str(files[i]) for i in rng.permutation(len(files))]
        rows = load_dataset("parquet", data_files=names, split="train", streaming=True)
        for table in rows.with_format("arrow").iter(batch_size=BATCH_ROWS):
            order = rng.permutation(table.num_rows)
            numeric = np.column_stack([table[name].to_numpy() for name in self.numeric])
            codes = [index_codes(table[name], known) for name, known in self.value_sets.items()]
            targets = np.column_stack([table[name].to_numpy() for name in self.targets])
            yield (
                torch.from_numpy(((numeric - self.mean) / self.std)[order]),
                torch.from_numpy(np.column_stack(codes)[order]),
                torch.from_numpy(targets.astype(np.float32)[order]),
            )


def value_sets(encoder: Encoder) -> dict[str, pa.Array]:
    """Return per category what ``index_codes`` looks up: null, then the labels."""
    return {c.name: pa.array([None, *c.labels], pa.string()) for c in encoder.categories}


def index_codes(texts: pa.Array | pa.ChunkedArray, value_set: pa.Array) -> np.ndarray:
    """Return the codes of texts by ``pyarrow.compute.index_in``."""
    found = pc.index_in(texts, value_set=value_set)
    return pc.fill_null(pc.add(found, MISSING), UNKNOWN).to_numpy()


class InMemory(Dataset[tuple[torch.Tensor, ...]]):
    """Encoded rows as tensors in memory, which a list of rows indexes."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, rows: list[int]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor[rows] for tensor in self.tensors)

    def epoch(self) -> Iterable[tuple[torch.Tensor, ...]]:
        """Return whole batches drawn by a BatchSampler: the best in-memory way of PyTorch."""
        sampler = BatchSampler(RandomSampler(self), BATCH_ROWS, drop_last=False)
        return DataLoader(self, sampler=sampler, batch_size=None)


def decode(files: Sequence[Path], columns: Sequence[str], texts: Sequence[str]) -> int:
    """Decode every column on one thread, texts as dictionary codes; nothing else."""
    num_rows = 0
    for path in files:
        with pq.ParquetFile(path, memory_map=True, read_dictionary=list(texts)) as file:
            for batch in file.iter_batches(DECODE_ROWS, columns=list(columns), use_threads=False):
                num_rows += batch.num_rows
    return num_rows


def gather(matrix: np.ndarray, rows: np.ndarray) -> int:
    """Copy rows of a float32 matrix in a given order, batch by batch into one buffer."""
    out = np.empty((BATCH_ROWS, matrix.shape[1]), matrix.dtype)
    for start in range(0, len(rows), BATCH_ROWS):
        part = rows[start : start + BATCH_ROWS]
        np.take(matrix, part, axis=0, mode="clip", out=out[: len(part)])
    return len(rows)


def copy_blocks(matrix: np.ndarray, blocks: np.ndarray) -> int:
    """Copy runs of 64 rows in a given order, batch by batch into one buffer."""
    width = BLOCK_ROWS * matrix.shape[1]
    whole = matrix[: len(matrix) // BLOCK_ROWS * BLOCK_ROWS].reshape(-1, width)
    return gather_blocks(whole, blocks) * BLOCK_ROWS


def gather_blocks(blocks_KW: np.ndarray, order: np.ndarray) -> int:
    """Copy whole blocks in a given order, a batch of rows at a time."""
    per_batch = BATCH_ROWS // BLOCK_ROWS
    out = np.empty((per_batch, blocks_KW.shape[1]), blocks_KW.dtype)
    for start in range(0, len(order), per_batch):
        part = order[start : start + per_batch]
        np.take(blocks_KW, part, axis=0, mode="clip", out=out[: len(part)])
    return len(order)
