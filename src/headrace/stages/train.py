"""Stage ``train@MODEL``: fit one kind of model on train rows, predict the valid and test rows.

The labels of valid and test rows are never read here: early stopping uses the last fold of train,
and predictions are made from inputs alone. What cannot be learnt from (no label, a single class)
is refused before anything is fitted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.data.predictions import Predictions, write_predictions
from headrace.data.table import Table, open_table
from headrace.errors import DataError
from headrace.models.protocol import (
    FittedModel,
    TrainViews,
    Values,
    choose_stop_fold,
    kind_module,
    save_model,
)
from headrace.params import Resources, Section
from headrace.record import Recorder
from headrace.schema import FOLD, ROW_ID, SPLITS, Target, encode_target
from headrace.storage import folder_digest, new_folder

if TYPE_CHECKING:
    from headrace.data.encoder import EncodedBatch

PREDICTED_SPLITS = ("valid", "test")
_BATCH_ROWS = 65_536


@dataclass(frozen=True)
class Trained:
    """What ``train`` made; printable."""

    model: str
    targets: tuple[str, ...]
    num_rows: Mapping[str, int]  # predicted, per split
    summary: Mapping[str, Any]

    def __str__(self) -> str:
        rows = ", ".join(f"{split} {count:,}" for split, count in self.num_rows.items())
        return f"{self.model} learnt {', '.join(self.targets)}; predicted rows: {rows}"


@dataclass(frozen=True)
class LabelCounts:
    """Labelled train rows of one target, per fold and, for classes, per class.

    Shape: ``rows_FK`` (folds, classes), or (folds, 1) for a regression; ``low`` and ``high`` are
    the smallest and largest value, NaN without any.
    """

    target: Target
    folds: tuple[int, ...]
    rows_FK: npt.NDArray[np.int64]
    low: float
    high: float


def train(
    table: Path,
    encoded: Path,
    out: Path,
    params: Section,
    *,
    model: str,
    cache: Path,
    checkpoints: Path,
    resources: Resources,
    recorder: Recorder,
) -> Trained:
    """Fit ``model`` on ``table`` and ``encoded``; write it and its predictions to ``out``.

    Raises:
        ConfigError: if there is no such kind of model, with the nearest name.
        DataError: if a target cannot be learnt from the train rows, or a prediction is not finite.
        IntegrityError: if an input is damaged.
    """
    source = open_table(table)
    contract = source.contract
    views = _views(source, encoded, cache)
    _record_inputs(recorder, source, encoded)
    fitted = kind_module(model).fit(
        views, params, checkpoints=checkpoints, resources=resources, recorder=recorder
    )
    with new_folder(out) as folder:
        save_model(fitted, folder, contract)
        num_rows = _predict(fitted, model, source, encoded, views.folds, folder, recorder)
    names = tuple(target.name for target in contract.targets)
    return Trained(model, names, num_rows, fitted.summary)


def assist(
    table: Path,
    encoded: Path,
    params: Section,
    *,
    model: str,
    cache: Path,
    checkpoints: Path,
    resources: Resources,
    recorder: Recorder,
) -> None:
    """Take part in a fit whose first rank runs ``train``, and leave the writing to it."""
    views = _views(open_table(table), encoded, cache)
    kind_module(model).fit(
        views, params, checkpoints=checkpoints, resources=resources, recorder=recorder
    )


def _views(table: Table, encoded: Path, cache: Path) -> TrainViews:
    """Return what a fit may look at, once it is known that there is something to learn."""
    folds, counts = count_labels(table)
    stop_fold = choose_stop_fold(folds)
    refuse_unlearnable(counts, stop_fold)
    return TrainViews(table.folder, encoded, cache, table.contract, folds, stop_fold)


def count_labels(table: Table) -> tuple[tuple[int, ...], tuple[LabelCounts, ...]]:
    """Return the folds of the train rows and what labels they hold; one pass, batch by batch."""
    targets = table.contract.targets
    counts: list[dict[int, npt.NDArray[np.int64]]] = [{} for _ in targets]
    lows, highs = [np.inf] * len(targets), [-np.inf] * len(targets)
    seen: set[int] = set()
    for batch in table.batches("train", [FOLD, *(target.name for target in targets)]):
        fold = batch.column(FOLD).fill_null(-1).to_numpy()
        seen.update(np.unique(fold).tolist())
        for j, target in enumerate(targets):
            y = encode_target(batch.column(target.name), target)
            is_known = ~np.isnan(y)
            code = np.zeros(len(y), np.int64)
            if target.task != "regression":
                code[is_known] = y[is_known].astype(np.int64)
            for one in np.unique(fold[is_known]).tolist():
                found = np.bincount(code[is_known & (fold == one)], minlength=_num_classes(target))
                counts[j][one] = counts[j].get(one, 0) + found
            if is_known.any():
                lows[j], highs[j] = (
                    min(lows[j], y[is_known].min()),
                    max(highs[j], y[is_known].max()),
                )
    folds = tuple(sorted(fold for fold in seen if fold >= 0))
    return folds, tuple(
        LabelCounts(
            target,
            folds,
            np.array(
                [counts[j].get(fold, np.zeros(_num_classes(target), np.int64)) for fold in folds]
            ).reshape(len(folds), _num_classes(target)),
            float(lows[j]),
            float(highs[j]),
        )
        for j, target in enumerate(targets)
    )


def refuse_unlearnable(counts: tuple[LabelCounts, ...], stop_fold: int) -> None:
    """Refuse targets that no model can learn, all of them in one message.

    Raises:
        DataError: a target without labels, constant, or without a class in the rows learnt from.
    """
    faults = [fault for found in counts if (fault := _fault(found, stop_fold))]
    if faults:
        raise DataError("; ".join(faults))


def _fault(counts: LabelCounts, stop_fold: int) -> str:
    target = counts.target
    is_stop = np.array([fold == stop_fold for fold in counts.folds])
    learnt_K, held_back = counts.rows_FK[~is_stop].sum(axis=0), counts.rows_FK[is_stop].sum()
    where = f"target {target.name!r}"
    if learnt_K.sum() < 2 or held_back < 1:
        return (
            f"{where} has {learnt_K.sum()} labelled train rows to learn from and {held_back} to "
            f"stop on (fold {stop_fold}); at least 2 and 1 are needed: check the column, or "
            f"choose other train rows in `extract.split`"
        )
    if target.task == "regression":
        if counts.low == counts.high:
            return f"{where} has the one value {counts.low:g} in all train rows; drop it"
        return ""
    absent = [label for label, rows in zip(target.labels, learnt_K, strict=True) if rows == 0]
    if absent:
        return (
            f"{where}: no train row to learn from (folds other than {stop_fold}) has the class "
            f"{', '.join(map(repr, absent))}; merge rare classes in the recipe, or choose another "
            f"`extract.split`"
        )
    return ""


def _num_classes(target: Target) -> int:
    return max(1, len(target.labels))


def _record_inputs(recorder: Recorder, table: Table, encoded: Path) -> None:
    for split, context in (("train", "train"), *((name, name) for name in PREDICTED_SPLITS)):
        recorder.dataset(
            f"table-{split}",
            path=table.folder,
            digest=table.digest,
            num_rows=table.num_rows(split),
            context=context,
        )
    recorder.params({"table_digest": table.digest, "encoded_digest": folder_digest(encoded)})


def _predict(
    fitted: FittedModel,
    model: str,
    table: Table,
    encoded: Path,
    folds: tuple[int, ...],
    folder: Path,
    recorder: Recorder,
) -> dict[str, int]:
    """Predict all rows of the predicted splits into ``folder``; return how many per split."""
    total = sum(table.num_rows(split) for split in PREDICTED_SPLITS)
    num_rows = dict.fromkeys(PREDICTED_SPLITS, 0)
    row_ids: list[npt.NDArray[np.int64]] = []
    parts: list[Values] = []
    for split in PREDICTED_SPLITS:
        for row_id, rows in _rows(fitted.inputs, split, table, encoded):
            row_ids.append(row_id)
            parts.append(fitted.predict(rows))
            num_rows[split] += len(row_id)
            recorder.progress(sum(num_rows.values()), total, unit="rows", detail=f"predict {split}")
    if not sum(num_rows.values()):
        raise DataError("there are no valid and no test rows to predict; change `extract.split`")
    row_id = np.concatenate(row_ids)
    codes = np.array([SPLITS.index(split) for split in num_rows], np.int8)
    split_of_row = np.repeat(codes, list(num_rows.values()))
    for target in table.contract.targets:
        write_predictions(
            folder,
            Predictions(
                model=model,
                target=target.name,
                row_id=row_id,
                fold=np.full(len(row_id), -1, np.int8),
                split=split_of_row,
                values=np.concatenate([part[target.name] for part in parts]),
                folds_seen=(folds,),
                seen=np.zeros(len(row_id), np.int32),
            ),
            target,
        )
    return num_rows


def _rows(
    inputs: str, split: str, table: Table, encoded: Path
) -> "Iterator[tuple[npt.NDArray[np.int64], EncodedBatch | pa.Table]]":
    if inputs == "table":
        for batch in table.batches(
            split, [ROW_ID, *table.contract.features], batch_rows=_BATCH_ROWS
        ):
            yield batch.column(ROW_ID).to_numpy(), pa.Table.from_batches([batch])
        return
    from headrace.data.shards import open_shards

    shards = open_shards(encoded, split, contract_digest=table.contract.digest)
    for start in range(0, shards.num_rows, _BATCH_ROWS):
        rows = shards.slice(start, min(shards.num_rows, start + _BATCH_ROWS))
        yield rows.row_id, rows
