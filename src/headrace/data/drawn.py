"""A bounded sample of the rows of every split, with what the sanity checks look at.

Which rows are drawn hangs on their ids and a seed alone, so labels, columns and the predictions of
every model are drawn apart, a batch at a time, and still are of the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.data.draws import is_sampled
from headrace.data.predictions import stream_predictions
from headrace.data.table import Table
from headrace.data.truth import Truth, UnitChoice, stream_truth
from headrace.schema import ROW_ID, Target

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DrawnRows:
    """Drawn rows of one split, in the order of their ids.

    Shapes: ``row_id`` (N,); ``labels`` per target (N,), NaN where missing; ``weight`` (N,) or None;
    ``unit_key`` (N,) the key of the row's resampling unit, whose name is ``unit``; ``columns`` has
    N rows. ``share`` of the ``num_rows`` rows of the split were asked for, by ``seed``.
    """

    split: str
    num_rows: int
    share: float
    seed: int
    row_id: npt.NDArray[np.int64]
    labels: dict[str, Floats]
    weight: Floats | None
    unit: str
    unit_key: npt.NDArray[np.int64]
    columns: pa.Table


def draw_rows(
    table: Table,
    split: str,
    columns: Sequence[str],
    *,
    count: int,
    seed: int,
    unit: UnitChoice,
    key: str,
) -> DrawnRows:
    """Return about ``count`` rows of ``split``, all if it has no more; ``key`` as in the truth.

    Raises:
        ConfigError, DataError: as ``stream_truth``.
    """
    num_rows = table.num_rows(split)
    share = min(1.0, count / max(1, num_rows))
    truths = [
        _kept(truth, is_sampled(truth.row_id, share, seed=seed))
        for truth in stream_truth(table, split, unit=unit, key=key)
    ]
    weights = [truth.weight for truth in truths if truth.weight is not None]
    names = [target.name for target in table.contract.targets]
    return DrawnRows(
        split=split,
        num_rows=num_rows,
        share=share,
        seed=seed,
        row_id=np.concatenate([truth.row_id for truth in truths]),
        labels={name: np.concatenate([t.labels[name] for t in truths]) for name in names},
        weight=np.concatenate(weights) if weights else None,
        unit=truths[0].unit,
        unit_key=np.concatenate([truth.unit_of_row for truth in truths]),
        columns=_columns(table, split, columns, share, seed),
    )


def drawn_predictions(folder: Path, target: Target, rows: DrawnRows) -> Floats:
    """Return a model's predictions of ``rows``, (N,) or (N, classes); NaN for rows it has none of.

    Raises:
        IntegrityError: if the file is missing, or its row ids do not rise.
    """
    width = () if target.task != "multiclass" else (target.num_outputs,)
    values = np.full((len(rows.row_id), *width), np.nan)
    for row_id, predicted in stream_predictions(folder, target, rows.split):
        is_drawn = is_sampled(row_id, rows.share, seed=rows.seed)
        place = np.searchsorted(rows.row_id, row_id[is_drawn])
        values[place] = predicted[is_drawn]
    return values


def _kept(truth: Truth, keep: npt.NDArray[np.bool_]) -> Truth:
    return replace(
        truth,
        row_id=truth.row_id[keep],
        labels={name: values[keep] for name, values in truth.labels.items()},
        weight=None if truth.weight is None else truth.weight[keep],
        unit_of_row=truth.unit_of_row[keep],
    )


def _columns(table: Table, split: str, columns: Sequence[str], share: float, seed: int) -> pa.Table:
    parts = []
    for batch in table.batches(split, [ROW_ID, *columns]):
        keep = is_sampled(batch[ROW_ID].to_numpy(), share, seed=seed)
        parts.append(pa.Table.from_batches([batch.filter(pa.array(keep))]))
    return pa.concat_tables(parts).unify_dictionaries().select(list(columns))
