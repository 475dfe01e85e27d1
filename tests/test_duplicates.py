"""Copies across splits are counted exactly, whatever the types, the batches and the passes."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from headrace.data.duplicates import PAIRS, find_duplicates, row_hashes

NAMES = ("a", "b", "c")


def rows_of(rng, num_rows):
    """Few different rows, with missing values, as Python has them."""
    texts = ["", "x", "y", None]
    return [
        (float(rng.integers(0, 9)), texts[rng.integers(0, 4)], [1, 2, None][rng.integers(0, 3)])
        for _ in range(num_rows)
    ]


def batch_of(rows, row_id):
    columns = list(zip(*rows, strict=True))
    return pa.record_batch(
        {
            "row_id": pa.array(row_id),
            "a": pa.array(columns[0], pa.float32()),
            "b": pa.array(columns[1], pa.string()).dictionary_encode(),
            "c": pa.array(columns[2], pa.int16()),
        }
    )


class Memory:
    """A table in memory, two batches per split."""

    def __init__(self, seed=0, sizes=(90, 40, 30)):
        rng = np.random.default_rng(seed)
        self.rows = {
            split: rows_of(rng, size)
            for split, size in zip(("train", "valid", "test"), sizes, strict=True)
        }
        self.ids = {
            split: np.sort(rng.choice(10_000, len(rows), replace=False))
            for split, rows in self.rows.items()
        }

    def num_rows(self, split):
        return len(self.rows[split])

    def batches(self, split, columns):
        half = len(self.rows[split]) // 2
        for part in (slice(None, half), slice(half, None)):
            yield batch_of(self.rows[split][part], self.ids[split][part]).select(list(columns))


@pytest.mark.parametrize("budget_bytes", [1 << 20, 1500])
def test_copies_are_counted_as_plain_python_counts_them(budget_bytes):
    """In one pass and in several."""
    table = Memory()
    found = find_duplicates(table, NAMES, budget_bytes=budget_bytes)

    for pair in PAIRS:
        known = set(table.rows[pair[0]])
        ids = [
            int(row_id)
            for row, row_id in zip(table.rows[pair[1]], table.ids[pair[1]], strict=True)
            if row in known
        ]
        assert found.copies[pair].num_rows == len(ids) > 5
        assert found.copies[pair].share == pytest.approx(len(ids) / table.num_rows(pair[1]))
        assert list(found.copies[pair].first_ids) == ids[:5]
    counts = Counter(table.rows["train"])
    assert found.repeated_in_train == sum(n for n in counts.values() if n > 1) / 90


def test_rows_of_their_own_have_no_copies():
    table = Memory()
    for number, split in enumerate(table.rows):
        table.rows[split] = [(number * 1000.0 + i, "x", 1) for i in range(len(table.rows[split]))]
    found = find_duplicates(table, NAMES, budget_bytes=1 << 20)
    assert {copies.num_rows for copies in found.copies.values()} == {0}
    assert found.repeated_in_train == 0


def test_values_that_look_alike_are_told_apart():
    """Which column, null and the empty text, ("a", "bc") and ("ab", "c")."""
    first = pa.array(["a", "ab", "", None, "x", None])
    second = pa.array(["bc", "c", "x", "x", "", None])
    assert len(set(row_hashes([first, second]).tolist())) == 6


def test_equal_numbers_are_one():
    """−0 and 0; every NaN and null."""
    hashes = row_hashes([pa.array([0.0, -0.0, float("nan"), None])])
    assert hashes[0] == hashes[1]
    assert hashes[2] == hashes[3] != hashes[0]
    codes = pa.DictionaryArray.from_arrays(pa.array([1, 0, None], pa.int8()), ["u", "v"])
    assert row_hashes([codes]).tolist() == row_hashes([pa.array(["v", "u", None])]).tolist()
