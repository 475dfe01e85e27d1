"""The one layout of predictions: what every model writes and stack and evaluate read.

One Parquet file per target, ``predictions/TARGET.parquet``, sorted by ``row_id``:
``row_id`` int64, ``fold`` int8 (null outside train), ``split``, ``model`` and ``target`` text,
``folds_seen`` list of int8 (folds whose train rows the model, or any model that feeds it, was
fitted on; -1 where it has seen the labels of valid rows), and the prediction: ``prediction``
float64 (the value, or the probability of ``labels[1]``) or ``class_0`` … ``class_K-1`` for a
multiclass target. Joined by ``row_id`` only.

In memory nothing is a Python object per row: text and lists are codes. Reading and writing hold
what ``bytes_held`` says, and one batch.

Values that are no predictions are refused by whoever writes them and again by whoever reads them,
in memory or as a stream: a metric of them would be a number like any other.
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
_SUM_TOLERANCE = 1e-6  # of a row's class probabilities
_NUM_NAMED = 5  # row ids in a message


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
        DataError: if a prediction is NaN or infinite, a probability is outside [0, 1], those of a
            row do not sum to 1, or a row id comes twice: with the count and the first row ids.
    """
    faults = _Faults(predictions.model, target)
    faults.look(predictions.row_id, predictions.values.reshape(len(predictions.row_id), -1))
    faults.refuse_any()
    _refuse_twice(predictions)
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
        DataError: if values are no predictions, as ``write_predictions``.
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
        faults = _Faults(found.model, target)
        start = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
            rows = slice(start, start := start + batch.num_rows)
            found.row_id[rows] = batch[ROW_ID].to_numpy()
            found.fold[rows] = batch[FOLD].fill_null(-1).to_numpy()
            found.split[rows] = _split_codes(batch["split"], path)
            found.seen[rows] = _seen_codes(batch["folds_seen"], codes)
            found.values[rows] = _values(batch, names)
            faults.look(found.row_id[rows], found.values[rows])
    faults.refuse_any()
    values = found.values if target.task == "multiclass" else found.values[:, 0]
    return replace(found, values=values, folds_seen=tuple(codes))


def stream_predictions(
    folder: Path, target: Target, split: str
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """Yield row ids and values of one split, in the order of the ids; memory stays at a batch.

    Raises:
        DataError: if values are no predictions, as ``write_predictions``; none of the batch that
            has the first of them is given out, and the rest of the split is counted.
        IntegrityError: if the file is missing, or its row ids do not rise.
    """
    path = _existing(folder, target)
    names = _value_columns(target)
    faults = _Faults(folder.name, target)
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
            values = _values(batch, names)[is_wanted]
            faults.look(row_id, values)
            if not faults.are_any:
                yield row_id, values if target.task == "multiclass" else values[:, 0]
    faults.refuse_any()


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


def _values(batch: pa.RecordBatch, names: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return the predictions of a batch, (rows, columns); NaN where there is none."""
    return np.column_stack([batch[name].to_numpy(zero_copy_only=False) for name in names])


def _refuse_twice(predictions: Predictions) -> None:
    if len(np.unique(predictions.row_id)) != len(predictions.row_id):
        raise DataError(
            f"model {predictions.model!r}, target {predictions.target!r}: a row id comes twice "
            f"among the predictions"
        )


@dataclass
class _Fault:
    """Rows with one fault: how many, the first few, and the value that is farthest off."""

    num_rows: int = 0
    first: tuple[str, ...] = ()
    worst: float | None = None
    distance: float = 0.0


class _Faults:
    """Counts the rows of one model and target whose values are no predictions."""

    def __init__(self, model: str, target: Target) -> None:
        self._model, self._target = model, target
        self._found: dict[str, _Fault] = {}

    @property
    def are_any(self) -> bool:
        """Whether any row looked at is bad."""
        return bool(self._found)

    def look(self, row_id: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> None:
        """Count what is wrong with ``values`` (rows, columns): of each row one thing."""
        is_finite = np.isfinite(values).all(axis=1)
        if not is_finite.all():
            self._add("predictions are NaN or infinite", row_id[~is_finite])
            row_id, values = row_id[is_finite], values[is_finite]
        if self._target.task == "regression":
            return
        is_inside = ((values >= 0) & (values <= 1)).all(axis=1)
        if not is_inside.all():
            outside = values[~is_inside]
            farthest = np.abs(outside - 0.5).argmax(axis=1)
            worst = outside[np.arange(len(outside)), farthest]
            what = "predictions are no probabilities between 0 and 1"
            self._add(what, row_id[~is_inside], worst, near=0.5)
            row_id, values = row_id[is_inside], values[is_inside]
        if self._target.task == "multiclass":
            total = values.sum(axis=1)
            is_unsummed = np.abs(total - 1) > _SUM_TOLERANCE
            if is_unsummed.any():
                what = "rows have class probabilities that do not sum to 1"
                self._add(what, row_id[is_unsummed], total[is_unsummed], near=1)

    def refuse_any(self) -> None:
        """Raise ``DataError`` if any row is bad, with all that is wrong."""
        if not self._found:
            return
        said = []
        for what, fault in self._found.items():
            worst = "" if fault.worst is None else f", worst {fault.worst:.9g}"
            said.append(f"{fault.num_rows} {what}{worst}, first row ids {list(fault.first)}")
        raise DataError(
            f"model {self._model!r}, target {self._target.name!r}: {'; '.join(said)}; change the "
            f"model's settings or take it out of `models` in params.yaml, then `headrace repro`"
        )

    def _add(
        self,
        what: str,
        row_id: npt.NDArray[np.int64],
        values: npt.NDArray[np.float64] | None = None,
        *,
        near: float = 0.0,
    ) -> None:
        fault = self._found.setdefault(what, _Fault())
        fault.num_rows += len(row_id)
        fault.first = (*fault.first, *map(str, row_id[:_NUM_NAMED].tolist()))[:_NUM_NAMED]
        if values is not None:
            distance = np.abs(values - near)
            if distance.max() > fault.distance:
                fault.distance = float(distance.max())
                fault.worst = float(values[distance.argmax()])
