"""Stage ``train@MODEL``: fit one kind of model on train rows and predict the rows it has not seen.

By default the model is a bag (``headrace.models.bagging``): one fit per fold. Each fit predicts the
train rows of its fold; valid and test rows get the mean of all fits. The labels of valid and test
rows are never read here, but for ``stop_rows: valid``. What cannot be learnt from (no label, a
single class) is refused before anything is fitted.

A finished fit is kept with the checkpoints, so a run that is killed goes on with the next one.
"""

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.data.predictions import VALID_SEEN, Predictions, write_predictions
from headrace.data.table import Table, open_table
from headrace.errors import DataError, IntegrityError
from headrace.models.bagging import BaggedModel, FitPlan, fit_plans
from headrace.models.protocol import (
    KINDS,
    FitParams,
    FittedModel,
    Values,
    kind_module,
    load_model,
    save_model,
)
from headrace.params import Resources, Section
from headrace.record import Recorder, Scalar
from headrace.schema import FOLD, ROW_ID, SPLITS, Target, encode_target
from headrace.storage import folder_digest, new_folder, verify_folder

if TYPE_CHECKING:
    from headrace.data.encoder import EncodedBatch

PREDICTED_SPLITS = ("valid", "test")
_BATCH_ROWS = 65_536
FITTED = "fitted"  # below a fit's checkpoints: the finished model


@dataclass(frozen=True)
class Trained:
    """What ``train`` made; printable."""

    model: str
    targets: tuple[str, ...]
    num_rows: Mapping[str, int]  # predicted, per split
    summary: Mapping[str, Any]

    def __str__(self) -> str:
        rows = ", ".join(f"{split} {count:,}" for split, count in self.num_rows.items() if count)
        return f"{self.model} learnt {', '.join(self.targets)}; predicted rows: {rows}"


@dataclass(frozen=True)
class LabelCounts:
    """Labelled train rows of one target that one fit may use, per class.

    Shape: ``learnt_K`` rows learnt from, (classes,), or (1,) for a regression; ``held_back`` rows
    early stopping looks at, None where a fit needs none; ``low`` and ``high`` are the smallest and
    largest value learnt from, infinite without any.
    """

    target: Target
    fit: str
    learnt_K: npt.NDArray[np.int64]
    held_back: int | None
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
    plans = plan_fits(source, encoded, cache, params)
    record_inputs(recorder, source, encoded)
    fits = fit_all(plans, params, model, source, checkpoints, resources, recorder)
    members = {plan.name: fitted for plan, fitted in fits}
    whole = members[""] if "" in members else BaggedModel(members)
    with new_folder(out) as folder:
        save_model(whole, folder, source.contract)
        num_rows = predict_rows(whole, plans, model, source, encoded, folder, recorder)
    names = tuple(target.name for target in source.contract.targets)
    return Trained(model, names, num_rows, whole.summary)


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
    """Take part in the fits whose first rank runs ``train``, and leave the writing to it."""
    source = open_table(table)
    plans = plan_fits(source, encoded, cache, params)
    fit_all(plans, params, model, source, checkpoints, resources, recorder)


def plan_fits(table: Table, encoded: Path, cache: Path, params: Section) -> tuple[FitPlan, ...]:
    """Return the fits, once it is known that each has something to learn."""
    settings = params if isinstance(params, FitParams) else FitParams()
    plans = fit_plans(
        table.folder,
        encoded,
        cache,
        table.contract,
        _folds(table),
        bag=settings.bag,
        stop_rows=settings.stop_rows,
        needs_stop_rows=settings.needs_stop_rows,
    )
    refuse_unlearnable(count_labels(table, plans))
    return plans


def _folds(table: Table) -> tuple[int, ...]:
    seen: set[int] = set()
    for batch in table.batches("train", [FOLD]):
        seen.update(np.unique(batch.column(FOLD).fill_null(-1).to_numpy()).tolist())
    return tuple(sorted(fold for fold in seen if fold >= 0))


def fit_all(
    plans: Sequence[FitPlan],
    params: Section,
    model: str,
    table: Table,
    checkpoints: Path,
    resources: Resources,
    recorder: Recorder,
) -> list[tuple[FitPlan, FittedModel]]:
    """Fit every plan, or take what an earlier run finished of it."""
    fits: list[tuple[FitPlan, FittedModel]] = []
    for place, plan in enumerate(plans):
        views = plan.views
        if views.stop.kind == "none":
            tuned = BaggedModel({one.name: fitted for one, fitted in fits}).tuned
            views = replace(views, tuned=tuned)
        own = checkpoints / plan.name if plan.name else checkpoints
        told = _FitRecorder(recorder, plan.name, place, len(plans)) if plan.name else recorder
        finished = own / FITTED
        if _is_finished(finished, model, recorder):
            fitted = load_model(finished)
            recorder.note(f"{plan.name or model} was finished by an earlier run and is kept.")
        else:
            fitted = kind_module(model).fit(
                views, params, checkpoints=own, resources=resources, recorder=told
            )
            if plan.name and _is_first_rank(model):
                with new_folder(finished) as folder:
                    save_model(fitted, folder, table.contract)
                _remove_others(own, finished)
        fits.append((plan, fitted))
    return fits


def _remove_others(folder: Path, kept: Path) -> None:
    """Remove the checkpoints of a fit whose model is kept."""
    for path in folder.iterdir():
        if path.is_dir() and path != kept:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _is_finished(folder: Path, model: str, recorder: Recorder) -> bool:
    """Whether ``folder`` holds a whole model; of several ranks the first one looks.

    A damaged one is removed, so that it is fitted again.
    """

    def look() -> bool:
        if not folder.is_dir():
            return False
        try:
            verify_folder(folder)
        except IntegrityError as error:
            recorder.warn(f"a finished fit is damaged and is made again: {error}")
            shutil.rmtree(folder)
            return False
        return True

    if not KINDS[model].can_share:
        return look()
    from headrace.training.distributed import current_ranks

    return bool(current_ranks().from_first(look))


def _is_first_rank(model: str) -> bool:
    if not KINDS[model].can_share:
        return True
    from headrace.training.distributed import current_ranks

    return current_ranks().is_first


class _FitRecorder:
    """Passes on what one fit of a bag tells, under the fit's name."""

    def __init__(self, recorder: Recorder, name: str, place: int, num_fits: int) -> None:
        self._recorder = recorder
        self._name = name
        self._place = place
        self._num_fits = num_fits

    def params(self, values: Mapping[str, Scalar]) -> None:
        self._recorder.params({f"{self._name}/{key}": value for key, value in values.items()})

    def metrics(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        named = {f"{self._name}/{key}": value for key, value in values.items()}
        self._recorder.metrics(named, step=step)

    def file(self, path: Path, *, folder: str = "") -> None:
        self._recorder.file(path, folder=f"{folder}/{self._name}" if folder else self._name)

    def dataset(self, name: str, *, path: Path, digest: str, num_rows: int, context: str) -> None:
        self._recorder.dataset(name, path=path, digest=digest, num_rows=num_rows, context=context)

    def note(self, text: str) -> None:
        self._recorder.note(f"{self._name}: {text}")

    def warn(self, text: str) -> None:
        self._recorder.warn(f"{self._name}: {text}")

    def progress(self, done: int, total: int | None, *, unit: str, detail: str = "") -> None:
        where = f"fit {self._place + 1}/{self._num_fits}"
        self._recorder.progress(done, total, unit=unit, detail=f"{where}, {detail}")


def count_labels(table: Table, plans: Sequence[FitPlan]) -> tuple[LabelCounts, ...]:
    """Return what labels each fit may use of each target; one pass, batch by batch."""
    targets = table.contract.targets
    learnt = np.zeros((len(plans), len(targets), max(map(_num_classes, targets))), np.int64)
    held_back = np.zeros((len(plans), len(targets)), np.int64)
    low = np.full((len(plans), len(targets)), np.inf)
    high = -low
    names = [target.name for target in targets]
    for split in ("train", "valid"):
        for batch in table.batches(split, [ROW_ID, FOLD, *names]):
            fold = batch.column(FOLD).fill_null(-1).to_numpy()
            row_id = batch.column(ROW_ID).to_numpy()
            labels = [encode_target(batch.column(t.name), t) for t in targets]
            for i, plan in enumerate(plans):
                is_learnt = plan.views.is_learnt(fold, row_id)
                is_stop = plan.views.is_stop(fold, row_id)
                if plan.views.stop.kind == "valid" and split == "valid":
                    is_stop = np.ones(len(fold), bool)
                for j, (target, y) in enumerate(zip(targets, labels, strict=True)):
                    is_known = ~np.isnan(y)
                    held_back[i, j] += (is_stop & is_known).sum()
                    y = y[is_learnt & is_known]
                    if not len(y):
                        continue
                    code = np.zeros(len(y), np.int64)
                    if target.task != "regression":
                        code = y.astype(np.int64)
                    learnt[i, j] += np.bincount(code, minlength=learnt.shape[2])
                    low[i, j] = min(low[i, j], y.min())
                    high[i, j] = max(high[i, j], y.max())
    return tuple(
        LabelCounts(
            target,
            plan.name,
            learnt[i, j, : _num_classes(target)],
            None if plan.views.stop.kind == "none" else int(held_back[i, j]),
            float(low[i, j]),
            float(high[i, j]),
        )
        for i, plan in enumerate(plans)
        for j, target in enumerate(targets)
    )


def refuse_unlearnable(counts: Iterable[LabelCounts]) -> None:
    """Refuse targets that no model can learn, all of them in one message.

    Raises:
        DataError: a target without labels, constant, or without a class in the rows learnt from.
    """
    faults: dict[str, str] = {}
    for found in counts:
        if (fault := _fault(found)) and found.target.name not in faults:
            faults[found.target.name] = fault
    if faults:
        raise DataError("; ".join(faults.values()))


def _fault(counts: LabelCounts) -> str:
    target = counts.target
    where = f"target {target.name!r}"
    of_fit = f" of the fit {counts.fit}" if counts.fit else ""
    if counts.learnt_K.sum() < 2 or counts.held_back == 0:
        return (
            f"{where} has {counts.learnt_K.sum()} labelled rows to learn from and "
            f"{counts.held_back or 0} to stop on{of_fit}; at least 2 and 1 are needed: check the "
            f"column, give train more rows in `extract.split`, or set `bag` to none"
        )
    if target.task == "regression":
        if counts.low == counts.high:
            return f"{where} has the one value {counts.low:g} in all rows learnt from; drop it"
        return ""
    absent = [
        label for label, rows in zip(target.labels, counts.learnt_K, strict=True) if rows == 0
    ]
    if absent:
        return (
            f"{where}: no row to learn from{of_fit} has the class "
            f"{', '.join(map(repr, absent))}; merge rare classes in the recipe, lower "
            f"`extract.folds` below the number of rows of the rarest class, or choose another "
            f"`extract.split`"
        )
    return ""


def _num_classes(target: Target) -> int:
    return max(1, len(target.labels))


def record_inputs(recorder: Recorder, table: Table, encoded: Path) -> None:
    """Tell which rows are learnt from and predicted."""
    for split, context in (("train", "train"), *((name, name) for name in PREDICTED_SPLITS)):
        recorder.dataset(
            f"table-{split}",
            path=table.folder,
            digest=table.digest,
            num_rows=table.num_rows(split),
            context=context,
        )
    recorder.params({"table_digest": table.digest, "encoded_digest": folder_digest(encoded)})


@dataclass
class _Told:
    """Predictions of consecutive rows, part by part, before they are one file per target."""

    row_ids: list[npt.NDArray[np.int64]]
    folds: list[npt.NDArray[np.int8]]
    values: list[Values]


def predict_rows(
    whole: FittedModel,
    plans: Sequence[FitPlan],
    model: str,
    table: Table,
    encoded: Path,
    folder: Path,
    recorder: Recorder,
    *,
    seen_before: Collection[int] = (),
) -> dict[str, int]:
    """Predict into ``folder`` all rows of the predicted splits and, of a bag, the train rows.

    ``seen_before`` are folds that the models feeding this one have seen; it has seen them, too.
    """
    splits = (*PREDICTED_SPLITS, *(("train",) if isinstance(whole, BaggedModel) else ()))
    if not sum(table.num_rows(split) for split in PREDICTED_SPLITS):
        raise DataError("there are no valid and no test rows to predict; change `extract.split`")
    for target, found in zip(
        table.contract.targets,
        predictions_of(
            whole, plans, model, table, encoded, splits, recorder, seen_before=seen_before
        ),
        strict=True,
    ):
        write_predictions(folder, found, target)
    return {name: int((found.split == SPLITS.index(name)).sum()) for name in splits}


def predictions_of(
    whole: FittedModel,
    plans: Sequence[FitPlan],
    model: str,
    table: Table,
    encoded: Path,
    splits: Sequence[str],
    recorder: Recorder,
    *,
    seen_before: Collection[int] = (),
) -> Iterator[Predictions]:
    """Predict all rows of ``splits``, target by target; a bag predicts train rows out of fold."""
    total = sum(table.num_rows(split) for split in splits)
    told = _Told([], [], [])
    num_rows = dict.fromkeys(splits, 0)
    for split in splits:
        for row_id, fold, rows in _rows(whole.inputs, split, table, encoded):
            if split == "train":
                assert isinstance(whole, BaggedModel)
                values = _out_of_fold(whole, plans, fold, rows)
            else:
                values = whole.predict(rows)
            told.row_ids.append(row_id)
            told.folds.append(fold)
            told.values.append(values)
            num_rows[split] += len(row_id)
            recorder.progress(sum(num_rows.values()), total, unit="rows", detail=f"predict {split}")
    row_id, fold = np.concatenate(told.row_ids), np.concatenate(told.folds)
    folds_seen, seen = _seen(plans, fold, seen_before)
    codes = np.array([SPLITS.index(split) for split in splits], np.int8)
    for target in table.contract.targets:
        yield Predictions(
            model=model,
            target=target.name,
            row_id=row_id,
            fold=fold,
            split=np.repeat(codes, list(num_rows.values())),
            values=np.concatenate([part[target.name] for part in told.values]),
            folds_seen=folds_seen,
            seen=seen,
        )


def _out_of_fold(
    bag: BaggedModel,
    plans: Sequence[FitPlan],
    fold: npt.NDArray[np.int8],
    rows: "EncodedBatch | pa.Table",
) -> Values:
    """Return each train row's prediction by the member that has not seen its fold."""
    values: Values = {}
    for plan in plans:
        if plan.scored is None:
            continue
        places = np.flatnonzero(fold == plan.scored)
        if not len(places):
            continue
        part = rows.take(pa.array(places)) if isinstance(rows, pa.Table) else rows.where(places)
        for target, found in bag.members[plan.name].predict(part).items():
            if target not in values:
                values[target] = np.full((len(fold), *found.shape[1:]), np.nan)
            values[target][places] = found
    return values


def _seen(
    plans: Sequence[FitPlan], fold: npt.NDArray[np.int8], seen_before: Collection[int]
) -> tuple[tuple[tuple[int, ...], ...], npt.NDArray[np.int32]]:
    """Return ``folds_seen`` and each row's place in it: its own fit's folds, else those of all."""
    folds = [sorted({*plan.views.folds, *seen_before, *_valid_seen(plan)}) for plan in plans]
    everything = tuple(sorted({one for seen in folds for one in seen}))
    seen = np.zeros(len(fold), np.int32)
    for place, plan in enumerate(plans, start=1):
        if plan.scored is not None:
            seen[fold == plan.scored] = place
    return (everything, *map(tuple, folds)), seen


def _valid_seen(plan: FitPlan) -> tuple[int, ...]:
    return (VALID_SEEN,) if plan.views.stop.kind == "valid" else ()


def _rows(
    inputs: str, split: str, table: Table, encoded: Path
) -> "Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int8], EncodedBatch | pa.Table]]":
    """Yield row ids, folds (-1 outside train) and inputs of ``split``, in parts."""
    if inputs == "table":
        for batch in table.batches(
            split, [ROW_ID, FOLD, *table.contract.features], batch_rows=_BATCH_ROWS
        ):
            fold = batch.column(FOLD).fill_null(-1).to_numpy()
            yield batch.column(ROW_ID).to_numpy(), fold, pa.Table.from_batches([batch])
        return
    from headrace.data.shards import open_shards

    shards = open_shards(encoded, split, contract_digest=table.contract.digest)
    for start in range(0, shards.num_rows, _BATCH_ROWS):
        rows = shards.slice(start, min(shards.num_rows, start + _BATCH_ROWS))
        yield rows.row_id, rows.fold, rows
