"""The one layout of predictions: what every model writes and stack and evaluate read.

One Parquet file per target, ``predictions/TARGET.parquet``, sorted by ``row_id``:
``row_id`` int64, ``fold`` int8 (null outside train), ``split``, ``model`` and ``target`` text,
``folds_seen`` list of int8 (folds whose train rows the model, or any model that feeds it, was
fitted on; -1 where it has seen the labels of valid rows), and the prediction: ``prediction``
float64 (the value, or the probability of ``labels[1]``) or ``class_0`` … ``class_K-1`` for a
multiclass target. Joined by ``row_id`` only.

In memory nothing is a Python object per row: text and lists are codes. Reading and writing hold
what ``bytes_held`` says, and one batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headrace.errors import DataError, IntegrityError
from headrace.schema import FOLD, ROW_ID, SPLITS, Target, file_stem

FOLDER = "predictions"
VALID_SEEN = -1  # stands among the folds seen for the valid split
_BATCH_ROWS = 1 << 17
_NO_FOLD = -128  # fills lists up to one length


@dataclass(frozen=True)
class Predictions:
    """Predictions of one model for one target, sorted by row id.

    Shapes: ``row_id`` (rows,) int64; ``fold`` (rows,) int8, -1 outside train; ``split`` (rows,)
    int8, positions in ``schema.SPLITS``; ``values`` (rows,) float64, or (rows, classes) for a
    multiclass target; ``seen`` (rows,) int32, positions in ``folds_seen``.
    """

    model: str
    target: str
    row_id: npt.NDArray[np.int64]
    fold: npt.NDArray[np.int8]
    split: npt.NDArray[np.int8]
    values: npt.NDArray[np.float64]
    folds_seen: tuple[tuple[int, ...], ...]  # the different ones
    seen: npt.NDArray[np.int32]

    def of_split(self, split: str) -> "Predictions":
        """Return the rows of one split."""
        return self.where(self.split == SPLITS.index(split))

    def where(self, keep: npt.NDArray[np.bool_]) -> "Predictions":
        """Return the rows to keep."""
        return Predictions(
            self.model,
            self.target,
            self.row_id[keep],
            self.fold[keep],
            self.split[keep],
            self.values[keep],
            self.folds_seen,
            self.seen[keep],
        )


def write_predictions(folder: Path, predictions: Predictions, target: Target) -> None:
    """Write one target's predictions below ``folder``, which the caller publishes when whole.

    Raises:
        DataError: if a prediction is not finite, a probability is outside [0, 1] or a row id
            comes twice: with the count and the first row ids.
    """
    _refuse_bad(predictions, target)
    path = folder / FOLDER / f"{file_stem(predictions.target)}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    order = np.argsort(predictions.row_id, kind="stable")
    tables = _tables(predictions, order, target)
    first = next(tables)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def read_predictions(folder: Path, target: Target) -> Predictions:
    """Read one target's predictions of the model folder ``folder`` (already verified).

    Raises:
        IntegrityError: if the file is missing or lacks a column of the layout.
    """
    path = _existing(folder, target)
    names = _value_columns(target)
    with pq.ParquetFile(path) as file:
        wanted = [ROW_ID, FOLD, "split", "folds_seen", *names]
        present = file.schema_arrow.names
        if missing := [name for name in [*wanted, "model"] if name not in present]:
            raise IntegrityError(f"{path} lacks the columns {missing}; run its stage again")
        num_rows = file.metadata.num_rows
        found = Predictions(
            model=_first_model(file, folder),
            target=target.name,
            row_id=np.empty(num_rows, np.int64),
            fold=np.empty(num_rows, np.int8),
            split=np.empty(num_rows, np.int8),
            values=np.empty((num_rows, len(names))),
            folds_seen=(),
            seen=np.empty(num_rows, np.int32),
        )
        codes: dict[tuple[int, ...], int] = {}
        start = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
            rows = slice(start, start := start + batch.num_rows)
            found.row_id[rows] = batch[ROW_ID].to_numpy()
            found.fold[rows] = batch[FOLD].fill_null(-1).to_numpy()
            found.split[rows] = _split_codes(batch["split"], path)
            found.seen[rows] = _seen_codes(batch["folds_seen"], codes)
            for column, name in enumerate(names):
                found.values[rows, column] = batch[name].to_numpy()
    values = found.values if target.task == "multiclass" else found.values[:, 0]
    return replace(found, values=values, folds_seen=tuple(codes))


def stream_predictions(
    folder: Path, target: Target, split: str
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """Yield row ids and values of one split, in the order of the ids; memory stays at a batch.

    Raises:
        IntegrityError: if the file is missing, or its row ids do not rise.
    """
    path = _existing(folder, target)
    names = _value_columns(target)
    last: int | None = None
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=[ROW_ID, "split", *names]):
            is_wanted = _split_codes(batch["split"], path) == SPLITS.index(split)
            row_id = batch[ROW_ID].to_numpy()[is_wanted]
            if not len(row_id):
                continue
            if (np.diff(row_id) <= 0).any() or (last is not None and row_id[0] <= last):
                raise IntegrityError(f"{path} is not sorted by row id; run its stage again")
            last = int(row_id[-1])
            values = np.column_stack([batch[name].to_numpy()[is_wanted] for name in names])
            yield row_id, values if target.task == "multiclass" else values[:, 0]


def bytes_held(folder: Path, target: Target) -> int:
    """Return how many bytes one target's predictions of a model folder hold when read.

    Raises:
        IntegrityError: if the file is missing.
    """
    num_rows: int = pq.read_metadata(_existing(folder, target)).num_rows
    return num_rows * (8 + 1 + 1 + 4 + 8 * target.num_outputs)


def _tables(
    predictions: Predictions, order: npt.NDArray[np.intp], target: Target
) -> Iterator[pa.Table]:
    """Yield the rows in ``order`` as the file has them, one batch or more."""
    splits = pa.array(SPLITS, pa.string())
    folds_seen = pa.array(predictions.folds_seen, pa.list_(pa.int8()))
    for start in range(0, max(len(order), 1), _BATCH_ROWS):
        rows = order[start : start + _BATCH_ROWS]
        fold = predictions.fold[rows]
        columns: dict[str, pa.Array] = {
            ROW_ID: pa.array(predictions.row_id[rows]),
            FOLD: pa.array(fold, mask=fold < 0),
            "split": splits.take(pa.array(predictions.split[rows])),
            "model": pa.repeat(pa.scalar(predictions.model, pa.string()), len(rows)),
            "target": pa.repeat(pa.scalar(predictions.target, pa.string()), len(rows)),
            "folds_seen": folds_seen.take(pa.array(predictions.seen[rows])),
        }
        values = predictions.values[rows].reshape(len(rows), -1)
        for column, name in enumerate(_value_columns(target)):
            columns[name] = pa.array(values[:, column])
        yield pa.table(columns)


def _existing(folder: Path, target: Target) -> Path:
    path = folder / FOLDER / f"{file_stem(target.name)}.parquet"
    if not path.is_file():
        raise IntegrityError(f"{path} does not exist; run `headrace repro` to make it")
    return path


def _first_model(file: pq.ParquetFile, folder: Path) -> str:
    for batch in file.iter_batches(1, columns=["model"]):
        return str(batch["model"][0])
    return folder.name


def _split_codes(values: pa.Array, path: Path) -> npt.NDArray[np.int8]:
    codes = pc.index_in(values, value_set=pa.array(SPLITS, pa.string()))
    if codes.null_count:
        raise IntegrityError(f"{path} has rows of no split; run its stage again")
    split: npt.NDArray[np.int8] = codes.to_numpy().astype(np.int8)
    return split


def _seen_codes(lists: pa.ListArray, known: dict[tuple[int, ...], int]) -> npt.NDArray[np.int32]:
    """Return the code of each row's list; lists that are not ``known`` yet get the next codes."""
    lengths = lists.value_lengths().to_numpy()
    flat = lists.flatten().to_numpy()
    padded = np.full((len(lists), lengths.max(initial=1)), _NO_FOLD, np.int8)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = flat
    starts = np.flatnonzero(np.r_[True, (padded[1:] != padded[:-1]).any(axis=1)])
    # Neighbours are mostly alike; the runs that are not are told apart by their content.
    runs, run_of = np.unique(padded[starts], axis=0, return_inverse=True)
    codes = np.array(
        [known.setdefault(tuple(run[run != _NO_FOLD].tolist()), len(known)) for run in runs],
        np.int32,
    )
    run_lengths = np.diff(np.r_[starts, len(lists)])
    return np.repeat(codes[run_of.reshape(-1)], run_lengths)


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
