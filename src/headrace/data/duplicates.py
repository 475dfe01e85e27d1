"""Rows whose feature values come again in another split: what a model can know by heart.

Every row's feature values become one 64-bit hash, a batch at a time. The hashes of a few passes are
compared in memory: so many passes over the table that the hashes of one fit the budget (17 bytes a
row, and as much again to sort them). Of a billion rows, hashes let a few strangers look alike.

A split by a hash of the feature values keeps equal rows together, so it has none. In time, by group
or as given, it may have many. Coarse columns repeat by themselves, so how many train rows repeat
within train stands beside.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.data.draws import mixed
from headrace.data.table import Table
from headrace.schema import ROW_ID

Hashes: TypeAlias = npt.NDArray[np.uint64]

SHOWN_IDS = 5
_SPLITS = ("train", "valid", "test")
PAIRS = (("train", "valid"), ("train", "test"), ("valid", "test"))
_BYTES_PER_ROW = 2 * (8 + 8 + 1)
_MISSING = np.uint64(0x5BD1E995_9D1B58D7)


@dataclass(frozen=True)
class Copies:
    """Rows of the later split that the earlier has, too; the smallest of their ids."""

    num_rows: int
    share: float  # of the later split's rows
    first_ids: tuple[int, ...]


@dataclass(frozen=True)
class Duplicates:
    """Copies of each pair of splits, and the share of train rows that repeat within train."""

    copies: Mapping[tuple[str, str], Copies]
    repeated_in_train: float
    num_rows: Mapping[str, int]


def find_duplicates(table: Table, columns: Sequence[str], *, budget_bytes: int) -> Duplicates:
    """Count the rows that share all values of ``columns`` with a row of another split."""
    num_rows = {split: table.num_rows(split) for split in _SPLITS}
    num_passes = max(1, math.ceil(sum(num_rows.values()) * _BYTES_PER_ROW / budget_bytes))
    counts = dict.fromkeys(PAIRS, 0)
    ids = dict.fromkeys(PAIRS, np.empty(0, np.int64))
    num_repeated = 0
    for number in range(num_passes):
        hashes, row_id, split = _read(table, columns, number, num_passes)
        of_value, place = np.unique(hashes, return_inverse=True)
        of_split = [
            np.bincount(place[split == k], minlength=len(of_value)) for k in range(len(_SPLITS))
        ]
        num_repeated += int(of_split[0][of_split[0] > 1].sum())
        for pair in PAIRS:
            earlier, later = (_SPLITS.index(name) for name in pair)
            is_copy = (split == later) & (of_split[earlier] > 0)[place]
            counts[pair] += int(is_copy.sum())
            ids[pair] = np.sort(np.concatenate([ids[pair], row_id[is_copy]]))[:SHOWN_IDS]
    return Duplicates(
        {
            pair: Copies(
                counts[pair], counts[pair] / max(1, num_rows[pair[1]]), tuple(ids[pair].tolist())
            )
            for pair in PAIRS
        },
        num_repeated / max(1, num_rows["train"]),
        num_rows,
    )


def _read(
    table: Table, columns: Sequence[str], number: int, num_passes: int
) -> tuple[Hashes, npt.NDArray[np.int64], npt.NDArray[np.int8]]:
    """Return hash, row id and split of the rows whose hash falls in pass ``number``."""
    parts = list(_parts(table, columns, number, num_passes))
    hashes, row_id, split = zip(*parts, strict=True)
    return np.concatenate(hashes), np.concatenate(row_id), np.concatenate(split)


def _parts(
    table: Table, columns: Sequence[str], number: int, num_passes: int
) -> Iterator[tuple[Hashes, npt.NDArray[np.int64], npt.NDArray[np.int8]]]:
    for code, split in enumerate(_SPLITS):
        for batch in table.batches(split, [ROW_ID, *columns]):
            hashes = row_hashes([batch[name] for name in columns])
            is_here = hashes % np.uint64(num_passes) == number
            row_id = batch[ROW_ID].to_numpy()[is_here]
            yield hashes[is_here], row_id, np.full(len(row_id), code, np.int8)


def row_hashes(columns: Sequence[pa.Array]) -> Hashes:
    """Return the hash of each row's values, in the order of the columns.

    Equal numbers have equal hashes, −0 and 0, too; so have all NaN and nulls.
    """
    total = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        total = mixed(total * np.uint64(0x9E3779B97F4A7C15) + _value_hashes(column))
    return total


def _value_hashes(column: pa.Array) -> Hashes:
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        numbers = column.cast(pa.int8()) if pa.types.is_boolean(kind) else column
        bits = numbers.fill_null(0).to_numpy(zero_copy_only=False).astype(np.uint64)
        return np.where(_is_null(column), _MISSING, mixed(bits))
    if pa.types.is_floating(kind):
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False) + 0.0  # −0 becomes 0
        return np.where(np.isnan(values), _MISSING, mixed(values.view(np.uint64)))
    if not pa.types.is_dictionary(kind):
        column = column.dictionary_encode()
    texts = column.dictionary.cast(pa.string()).to_pylist()
    of_text = np.array([_MISSING if text is None else _text_hash(text) for text in (*texts, None)])
    codes = column.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.where(_is_null(column), _MISSING, of_text[codes])


def _is_null(column: pa.Array) -> npt.NDArray[np.bool_]:
    is_null: npt.NDArray[np.bool_] = pc.is_null(column).to_numpy(zero_copy_only=False)
    return is_null


def _text_hash(text: str) -> np.uint64:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
