"""Truth and predictions of a split side by side, a batch at a time: for splits beyond memory.

Both files are sorted by row id, so one pass over both lines them up.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.data.draws import is_sampled
from headrace.data.predictions import stream_predictions
from headrace.data.table import Table
from headrace.data.truth import (
    Truth,
    UnitChoice,
    label_bytes,
    places_of,
    refuse_no_weight,
    stream_truth,
    unit_bytes,
)
from headrace.errors import DataError
from headrace.schema import Target

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Counted:
    """Rows of a split and the units that they are of."""

    num_rows: int
    num_units: int


@dataclass(frozen=True)
class SplitSize:
    """What one pass over a split says: its digest, as ``Truth.digest``, and how much is labelled.

    ``unit`` is as in ``Truth``; ``label_digest`` is that of ``label_bytes``, per
    target, ``unit_digest`` that of ``unit_bytes``.
    """

    digest: str
    unit: str
    rows: Counted
    labelled: Mapping[str, Counted]  # per target
    label_digest: Mapping[str, str]
    unit_digest: str


@dataclass(frozen=True)
class Aligned:
    """Labelled rows with their predictions; shapes as in ``Truth``, ``unit_key`` (N,)."""

    row_id: npt.NDArray[np.int64]
    label: Floats
    values: Floats
    weight: Floats | None
    unit_key: npt.NDArray[np.int64]

    def where(self, keep: npt.NDArray[np.bool_]) -> "Aligned":
        """Return the rows to keep."""
        weight = None if self.weight is None else self.weight[keep]
        return Aligned(
            self.row_id[keep], self.label[keep], self.values[keep], weight, self.unit_key[keep]
        )


def measure(table: Table, split: str, *, unit: UnitChoice, key: str) -> SplitSize:
    """Count the rows and units of a split; memory grows with the units, if those are not rows.

    Raises:
        ConfigError, DataError, IntegrityError: as ``stream_truth``, or a split without rows.
    """
    digest, of_units = hashlib.sha256(), hashlib.sha256()
    names = [target.name for target in table.contract.targets]
    all_rows, labelled = _Counter(), {name: _Counter() for name in names}
    of_labels = {name: hashlib.sha256() for name in names}
    unit_name, is_weighed = "", False
    for truth in stream_truth(table, split, unit=unit, key=key):
        digest.update(truth.row_id.astype("<i8").tobytes())
        of_units.update(unit_bytes(truth))
        unit_name = truth.unit
        is_weighed |= truth.weight is None or bool(truth.weight.any())
        is_row = unit_name == "row"
        all_rows.add(truth.unit_of_row, is_row=is_row)
        for name, counter in labelled.items():
            of_labels[name].update(label_bytes(truth, name))
            counter.add(truth.unit_of_row[~np.isnan(truth.labels[name])], is_row=is_row)
    if not all_rows.num_rows:
        raise DataError(
            f"{table.folder} has no {split} rows, and this stage needs them; "
            f"change `extract.split` in params.yaml so that {split} gets a share"
        )
    refuse_no_weight(table.contract, split, is_any=is_weighed)
    counts = {name: counter.counted for name, counter in labelled.items()}
    digests = {name: one.hexdigest() for name, one in of_labels.items()}
    return SplitSize(
        digest.hexdigest(), unit_name, all_rows.counted, counts, digests, of_units.hexdigest()
    )


def stream_aligned(
    table: Table, folder: Path, target: Target, split: str, *, unit: UnitChoice, key: str
) -> Iterator[Aligned]:
    """Yield the labelled rows of a split with the predictions of the model in ``folder``.

    Raises:
        DataError: if labelled rows have no prediction, or predictions are of rows that the split
            does not have: with the count and the first row ids.
    """
    who = f"model {folder.name!r}, target {target.name!r}"
    predictions = stream_predictions(folder, target, split)
    row_id, values = np.empty(0, np.int64), np.empty(0)
    truth: Truth | None = None
    for truth in stream_truth(table, split, unit=unit, key=key):
        while not len(row_id) or row_id[-1] < truth.row_id[-1]:
            if (more := next(predictions, None)) is None:
                break
            values = np.concatenate([values, more[1]]) if len(row_id) else more[1]
            row_id = np.concatenate([row_id, more[0]])
        num_here = int(np.searchsorted(row_id, truth.row_id[-1], side="right"))
        is_labelled = ~np.isnan(truth.labels[target.name])
        places = places_of(row_id[:num_here], truth, is_labelled, who=who)
        yield Aligned(
            row_id=truth.row_id[is_labelled],
            label=truth.labels[target.name][is_labelled],
            values=values[places],
            weight=None if truth.weight is None else truth.weight[is_labelled],
            unit_key=truth.unit_of_row[is_labelled],
        )
        row_id, values = row_id[num_here:], values[num_here:]
    if truth is not None:
        rest = next(predictions, None) if not len(row_id) else (row_id, values)
        if rest is not None:
            places_of(rest[0], truth, np.zeros(len(truth.row_id), dtype=bool), who=who)


def read_share(
    table: Table,
    folder: Path,
    target: Target,
    split: str,
    share: float,
    *,
    unit: UnitChoice,
    key: str,
    seed: int,
) -> Aligned:
    """Return about ``share`` of the rows of ``stream_aligned``: the same rows for each model."""
    parts = [
        rows.where(is_sampled(rows.row_id, share, seed=seed))
        for rows in stream_aligned(table, folder, target, split, unit=unit, key=key)
    ]
    weights = [rows.weight for rows in parts if rows.weight is not None]
    return Aligned(
        row_id=np.concatenate([rows.row_id for rows in parts]),
        label=np.concatenate([rows.label for rows in parts]),
        values=np.concatenate([rows.values for rows in parts]),
        weight=np.concatenate(weights) if weights else None,
        unit_key=np.concatenate([rows.unit_key for rows in parts]),
    )


class _Counter:
    """Counts rows and different units of them."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._num_single = 0
        self._keys = np.empty(0, np.int64)

    def add(self, unit_key: npt.NDArray[np.int64], *, is_row: bool) -> None:
        self.num_rows += len(unit_key)
        if is_row:
            self._num_single += len(unit_key)
        else:
            self._keys = np.union1d(self._keys, unit_key)

    @property
    def counted(self) -> Counted:
        return Counted(self.num_rows, self._num_single + len(self._keys))
