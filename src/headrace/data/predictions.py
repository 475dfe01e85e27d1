"""The one layout of predictions: what every model writes and stack and evaluate read.

One Parquet file per target, ``predictions/TARGET.parquet``, sorted by ``row_id``:
``row_id`` int64, ``fold`` int8 (null outside train), ``split``, ``model`` and ``target`` text,
``folds_seen`` list of int8 (folds whose train rows the model, or any model that feeds it, was
fitted on), and the prediction: ``prediction`` float64 (the value, or the probability of
``labels[1]``) or ``class_0`` … ``class_K-1`` for a multiclass target. Joined by ``row_id`` only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.errors import DataError, IntegrityError
from headrace.schema import FOLD, ROW_ID, Target, file_stem

FOLDER = "predictions"


@dataclass(frozen=True)
class Predictions:
    """Predictions of one model for one target, sorted by row id.

    Shapes: ``row_id`` (rows,) int64; ``fold`` (rows,) int8, -1 outside train; ``split`` (rows,)
    text; ``values`` (rows,) float64, or (rows, classes) for a multiclass target.
    """

    model: str
    target: str
    row_id: npt.NDArray[np.int64]
    fold: npt.NDArray[np.int8]
    split: npt.NDArray[np.str_]
    values: npt.NDArray[np.float64]
    folds_seen: tuple[tuple[int, ...], ...]  # one per row

    def of_split(self, split: str) -> "Predictions":
        """Return the rows of one split."""
        keep = self.split == split
        return Predictions(
            self.model,
            self.target,
            self.row_id[keep],
            self.fold[keep],
            self.split[keep],
            self.values[keep],
            tuple(seen for seen, kept in zip(self.folds_seen, keep, strict=True) if kept),
        )


def write_predictions(folder: Path, predictions: Predictions, target: Target) -> None:
    """Write one target's predictions below ``folder``, which the caller publishes when whole.

    Raises:
        DataError: if a prediction is not finite, a probability is outside [0, 1] or a row id
            comes twice: with the count and the first row ids.
    """
    _refuse_bad(predictions, target)
    order = np.argsort(predictions.row_id, kind="stable")
    columns: dict[str, pa.Array] = {
        ROW_ID: pa.array(predictions.row_id[order]),
        FOLD: pa.array(predictions.fold[order], mask=predictions.fold[order] < 0),
        "split": pa.array(predictions.split[order].tolist(), pa.string()),
        "model": pa.array([predictions.model] * len(order), pa.string()),
        "target": pa.array([predictions.target] * len(order), pa.string()),
        "folds_seen": pa.array([predictions.folds_seen[i] for i in order], pa.list_(pa.int8())),
    }
    values = predictions.values[order]
    if target.task == "multiclass":
        columns |= {f"class_{k}": pa.array(values[:, k]) for k in range(target.num_outputs)}
    else:
        columns["prediction"] = pa.array(values)
    path = folder / FOLDER / f"{file_stem(predictions.target)}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, compression="zstd")


def read_predictions(folder: Path, target: Target) -> Predictions:
    """Read one target's predictions of the model folder ``folder`` (already verified).

    Raises:
        IntegrityError: if the file is missing or lacks a column of the layout.
    """
    path = folder / FOLDER / f"{file_stem(target.name)}.parquet"
    if not path.is_file():
        raise IntegrityError(f"{path} does not exist; run `headrace repro` to make it")
    table = pq.read_table(path)
    names = _value_columns(target)
    missing = [name for name in [ROW_ID, FOLD, "split", *names] if name not in table.column_names]
    if missing:
        raise IntegrityError(f"{path} lacks the columns {missing}; run its stage again")
    values = np.column_stack([table[name].to_numpy() for name in names])
    return Predictions(
        model=table["model"][0].as_py() if table.num_rows else folder.name,
        target=target.name,
        row_id=table[ROW_ID].to_numpy(),
        fold=table[FOLD].fill_null(-1).to_numpy(),
        split=np.asarray(table["split"].to_pylist(), dtype=np.str_),
        values=values if target.task == "multiclass" else values[:, 0],
        folds_seen=tuple(tuple(seen) for seen in table["folds_seen"].to_pylist()),
    )


def _value_columns(target: Target) -> Sequence[str]:
    if target.task == "multiclass":
        return [f"class_{k}" for k in range(target.num_outputs)]
    return ["prediction"]


def _refuse_bad(predictions: Predictions, target: Target) -> None:
    who = f"model {predictions.model!r}, target {target.name!r}"
    values = predictions.values.reshape(len(predictions.row_id), -1)
    not_finite = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(not_finite):
        raise DataError(
            f"{who}: {len(not_finite)} predictions are not finite; "
            f"first row ids: {_ids(predictions, not_finite)}"
        )
    if target.task != "regression":
        is_outside = ((values < 0) | (values > 1)).any(axis=1)
        is_unsummed = np.abs(values.sum(axis=1) - 1) > 1e-6
        wrong = is_outside | is_unsummed if target.task == "multiclass" else is_outside
        if len(positions := np.flatnonzero(wrong)):
            raise DataError(
                f"{who}: {len(positions)} predictions are no probabilities; "
                f"first row ids: {_ids(predictions, positions)}"
            )
    if len(np.unique(predictions.row_id)) != len(predictions.row_id):
        raise DataError(f"{who}: a row id comes twice among the predictions")


def _ids(predictions: Predictions, positions: npt.NDArray[np.intp]) -> list[str]:
    return [str(row_id) for row_id in predictions.row_id[positions[:5]]]
