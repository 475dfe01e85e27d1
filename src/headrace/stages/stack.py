"""Stage ``stack``: blend the models and choose one per target; no label of a test row is read.

Which rows rank, fit and judge is told in ``headrace.evaluation.selection``; docs/stacking.md has an
example. What is written are predictions of valid and test rows: those of train rows would come from
weights that all train rows, their own included, have set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from headrace.data.predictions import (
    VALID_SEEN,
    Predictions,
    bytes_held,
    read_predictions,
    write_predictions,
)
from headrace.data.table import Table, open_table
from headrace.data.truth import Truth, line_up, read_truth
from headrace.errors import ConfigError, DataError, ResourceError, nearest
from headrace.evaluation.bootstrap import Resampling, Units, bytes_needed
from headrace.evaluation.greedy import greedy_blend
from headrace.evaluation.linear import linear_blend
from headrace.evaluation.metrics import DEFAULT_METRIC, BuiltinMetric, Metric, Sample, metric_of
from headrace.evaluation.selection import (
    NUM_PARTS,
    SELECTION,
    STACK,
    Choice,
    FitBlend,
    LabelledRows,
    choice_json,
    choose,
)
from headrace.memory import format_bytes
from headrace.models.protocol import SECOND_LEVEL
from headrace.params import Resources
from headrace.record import Recorder
from headrace.schema import SPLITS, Contract, Target
from headrace.stages.resampled import ResampledParams
from headrace.storage import new_folder, verify_folder, write_json

Floats: TypeAlias = npt.NDArray[np.float64]


class StackParams(ResampledParams):
    """Section ``stack`` of params.yaml: how members are blended and the best one is chosen."""

    # greedy: a weighted mean that does best by the metric. linear: a ridge regression, or a
    # logistic one on logits; it minimises its own loss, squared or logarithmic.
    method: Literal["greedy", "linear"] = "greedy"
    rounds: Annotated[int, Field(ge=1, le=10_000)] = 50  # greedy: picks with replacement
    # Per target; a target that is not named has RMSE, ROC-AUC or log-loss, by its task.
    metric: Annotated[dict[str, BuiltinMetric], Field(default_factory=dict)]

    @model_validator(mode="after")
    def _rounds_take_effect(self) -> Self:
        if self.method == "linear" and self.rounds != StackParams.model_fields["rounds"].default:
            raise ValueError(
                f"rounds is {self.rounds}, but method is linear, which makes none; leave it out, "
                f"or set method to greedy"
            )
        return self


@dataclass(frozen=True)
class Stacked:
    """What was chosen for each target, and why."""

    choices: Mapping[str, Choice]

    def __str__(self) -> str:
        """One line per target."""
        return "\n".join(f"{name}: {c.chosen} ({c.reason})" for name, c in self.choices.items())


@dataclass(frozen=True)
class Members:
    """What the members predict for one target; the rows, in order, are the same for all.

    ``held_out`` has no values of its own: its rows are those of valid and test. Shapes per model:
    ``values`` of these rows; ``out_of_fold`` of the train rows that have a label, in the order of
    the table, for the models that predict them; ``fold`` (rows,) of these.
    """

    held_out: Predictions
    values: Mapping[str, Floats]
    out_of_fold: Mapping[str, Floats]
    fold: npt.NDArray[np.int64]
    folds_seen: frozenset[int]  # by any member, for any row


def stack(
    table: Path,
    members: Mapping[str, Path],
    out: Path,
    params: StackParams,
    *,
    resources: Resources,
    recorder: Recorder,
) -> Stacked:
    """Blend ``members`` and choose the blend or the best single model, per target.

    Writes selection.json and predictions of the model ``stack`` for valid and test rows.

    Raises:
        ConfigError: a metric that the target's task does not have, or for no target.
        DataError: members that predict different rows, or rows that a member was fitted on.
        ResourceError: rows that do not fit the memory budget, with the figure needed.
    """
    source = open_table(table)
    metrics = chosen_metrics(source.contract, params)
    for folder in members.values():
        verify_folder(folder)
    _require_memory(source, members, resources)
    valid = _truth(source, "valid", params, recorder)
    train = _truth(source, "train", params, recorder)
    choices: dict[str, Choice] = {}
    with new_folder(out) as folder:
        for target in source.contract.targets:
            told = read_members(members, target, train)
            choice = _choose(told, valid, train, target, metrics[target.name], params, resources)
            write_predictions(folder, _blended(told, choice), target)
            choices[target.name] = choice
            recorder.progress(len(choices), len(source.contract.targets), unit="targets")
        targets = {name: choice_json(choice) for name, choice in choices.items()}
        write_json(folder / SELECTION, {"format": 2, "targets": targets})
    _record(choices, recorder)
    return Stacked(choices)


def read_members(members: Mapping[str, Path], target: Target, train: Truth) -> Members:
    """Read every member's predictions of one target, one file at a time.

    Raises:
        DataError: valid or test rows that not all members predict, labelled train rows that a
            member predicts in part, or rows that a member was fitted on: with the count and the
            first row ids. Members whose folds differ: with the count.
    """
    first: Predictions | None = None
    values: dict[str, Floats] = {}
    out_of_fold: dict[str, Floats] = {}
    fold = np.empty(0, np.int64)
    folds_seen: set[int] = set()
    for name, folder in members.items():
        found = read_predictions(folder, target)
        _refuse_seen(name, found)
        folds_seen.update(*found.folds_seen)
        of_train = found.of_split("train")
        if len(of_train.row_id):
            places = line_up(of_train, train, ~np.isnan(train.labels[target.name]))
            own_fold = of_train.fold[places].astype(np.int64)
            if out_of_fold:
                _refuse_other_folds(next(iter(out_of_fold)), name, fold != own_fold, target)
            out_of_fold[name] = of_train.values[places]
            fold = own_fold
        held_out = found.where(found.split != SPLITS.index("train"))
        values[name] = held_out.values
        if first is None:
            first = held_out
        else:
            _refuse_different(first, held_out)
    assert first is not None  # there is a model at least
    return Members(first, values, out_of_fold, fold, frozenset(folds_seen))


def chosen_metrics(contract: Contract, params: StackParams) -> dict[str, Metric]:
    """Return by which metric a model is chosen, per target.

    Raises:
        ConfigError: a metric that the target's task does not have, or for no target.
    """
    names = [target.name for target in contract.targets]
    for name in params.metric:
        if name not in names:
            raise ConfigError(
                f"`stack.metric.{name}`: there is no target {name!r}{nearest(name, names)}"
            )
    chosen = {}
    for target in contract.targets:
        try:
            wanted = params.metric.get(target.name, DEFAULT_METRIC[target.task])
            chosen[target.name] = metric_of(target.task, wanted)
        except ValueError as error:
            raise ConfigError(f"`stack.metric.{target.name}`: {error}") from error
    return chosen


def _truth(source: Table, split: str, params: StackParams, recorder: Recorder) -> Truth:
    truth = read_truth(source, split, unit=params.unit, key="stack.unit")
    recorder.dataset(
        split, path=source.folder, digest=truth.digest, num_rows=len(truth.row_id), context=split
    )
    return truth


def _require_memory(source: Table, members: Mapping[str, Path], resources: Resources) -> None:
    num_rows = {split: source.num_rows(split) for split in ("train", "valid")}
    words = 3 + len(source.contract.targets)  # ids, units, weight and labels
    needed = 8 * words * sum(num_rows.values()) + max(
        _bytes_needed(max(num_rows.values()), members, target) for target in source.contract.targets
    )
    if needed > resources.memory_budget:
        raise ResourceError(
            f"stage stack needs about {format_bytes(needed)} for {num_rows['train']} train rows, "
            f"{num_rows['valid']} valid rows and {len(members)} models, and may use "
            f"{format_bytes(resources.memory_budget)}; raise `resources.memory_budget`, or stack "
            f"fewer `models`"
        )


def _bytes_needed(num_rows: int, members: Mapping[str, Path], target: Target) -> int:
    """Return what one target holds: the values of all members, of all their rows.

    Beside them lies one file with its part of train rows while it is read, the samples of all folds
    but one while a blend is fitted, or one bootstrap of the rows it is judged on.
    """
    read = [bytes_held(folder, target) for folder in members.values()]
    values = 8 * num_rows * target.num_outputs
    fitting = values * (2 * len(members) + 3)
    return sum(read) + max(2 * max(read), fitting, bytes_needed(num_rows, target.num_outputs))


def _refuse_seen(name: str, predictions: Predictions) -> None:
    is_seen = np.zeros(len(predictions.row_id), dtype=bool)
    is_valid = predictions.split == SPLITS.index("valid")
    for code, folds in enumerate(predictions.folds_seen):
        for fold in folds:
            is_of_fold = is_valid if fold == VALID_SEEN else predictions.fold == fold
            is_seen |= (predictions.seen == code) & is_of_fold
    seen = np.flatnonzero(is_seen)
    if len(seen):
        row_ids = [str(predictions.row_id[i]) for i in seen[:5]]
        key = "train.nn" if name in SECOND_LEVEL else f"train.{name}"  # which feeds it
        raise DataError(
            f"model {name!r}, target {predictions.target!r}: {len(seen)} predictions are of rows "
            f"that it was fitted on or stopped on, first row ids {row_ids}; only rows that a model "
            f"has not seen may be blended: set `{key}.stop_rows` to inner if it is valid"
        )


def _refuse_different(first: Predictions, other: Predictions) -> None:
    different = np.setxor1d(first.row_id, other.row_id)
    if len(different):
        raise DataError(
            f"target {first.target!r}: models {first.model!r} and {other.model!r} predict "
            f"different rows: {len(different)} row ids are in one and not in the other, first "
            f"{[str(i) for i in different[:5]]}; train both again on the same table "
            f"(`headrace repro`)"
        )


def _refuse_other_folds(
    first: str, other: str, is_different: npt.NDArray[np.bool_], target: Target
) -> None:
    """A blend is cross-fitted over the folds, which must be the same for all members."""
    if is_different.any():
        raise DataError(
            f"target {target.name!r}: for models {first!r} and {other!r} {is_different.sum()} "
            f"train rows are of different folds; train both again on the same table "
            f"(`headrace repro`)"
        )


def _choose(
    told: Members,
    valid: Truth,
    train: Truth,
    target: Target,
    metric: Metric,
    params: StackParams,
    resources: Resources,
) -> Choice:
    is_labelled = ~np.isnan(valid.labels[target.name])
    if not is_labelled.any():
        raise DataError(
            f"target {target.name!r} has no label in any of the {len(is_labelled)} valid rows, so "
            f"no model can be chosen; change `extract.split` in params.yaml"
        )
    places = _places(told.held_out, valid, is_labelled)
    of_valid = {name: values[places] for name, values in told.values.items()}
    units = _units(valid, is_labelled)
    ranked = LabelledRows(
        "valid", _samples(of_valid, valid, target, is_labelled), units, units.of_row % NUM_PARTS
    )
    out_of_fold = None
    # One model alone is no blend: where the others predict no train row, valid rows do it all.
    first_level = [name for name in told.values if name not in SECOND_LEVEL]
    if len(told.out_of_fold) >= min(2, len(first_level)):
        is_known = ~np.isnan(train.labels[target.name])
        out_of_fold = LabelledRows(
            "out_of_fold",
            _samples(told.out_of_fold, train, target, is_known),
            _units(train, is_known),
            told.fold,
        )
    resampling = Resampling(params.num_resamples, params.confidence, params.seed, resources.threads)
    fit = _fit(params, metric)
    return choose(
        ranked,
        out_of_fold,
        metric,
        fit,
        resampling,
        target=target.name,
        never_blended=tuple(SECOND_LEVEL),
    )


def _fit(params: StackParams, metric: Metric) -> FitBlend:
    if params.method == "linear":
        return linear_blend
    return partial(greedy_blend, metric=metric, rounds=params.rounds)


def _places(
    held_out: Predictions, valid: Truth, is_labelled: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Return where the labelled valid rows stand among the rows held out."""
    of_valid = np.flatnonzero(held_out.split == SPLITS.index("valid"))
    return of_valid[line_up(held_out.of_split("valid"), valid, is_labelled)]


def _samples(
    predictions: Mapping[str, Floats],
    truth: Truth,
    target: Target,
    is_labelled: npt.NDArray[np.bool_],
) -> dict[str, Sample]:
    labels = truth.labels[target.name][is_labelled]
    weight = None if truth.weight is None else truth.weight[is_labelled]
    return {
        name: Sample(target.task, labels, values, weight) for name, values in predictions.items()
    }


def _units(truth: Truth, is_labelled: npt.NDArray[np.bool_]) -> Units:
    return Units(truth.unit, truth.unit_of_row, len(truth.unit_of_row)).of(is_labelled)


def _blended(told: Members, choice: Choice) -> Predictions:
    """Return the blend of valid and test rows.

    It has seen all that any member has, and the labels of the rows that it was fitted on.
    """
    fitted_on = () if choice.fitted_on == "out_of_fold" else (VALID_SEEN,)
    return replace(
        told.held_out,
        model=STACK,
        values=choice.blend.of(told.values),
        folds_seen=(tuple(sorted({*told.folds_seen, *fitted_on})),),
        seen=np.zeros_like(told.held_out.seen),
    )


def _record(choices: Mapping[str, Choice], recorder: Recorder) -> None:
    for target, choice in choices.items():
        for rows, values in (
            ("valid", {**dict(choice.ranking), STACK: choice.blend_value}),
            ("out_of_fold", choice.out_of_fold),
        ):
            recorder.metrics(
                {f"{m}/{target}/{rows}_{choice.metric.name}": v for m, v in values.items()}
            )
        recorder.params({f"{target}/chosen": choice.chosen, f"{target}/blend": str(choice.blend)})
        recorder.note(f"**{target}**: {choice.chosen} is chosen: {choice.reason}.{_apart(choice)}")


def _apart(choice: Choice) -> str:
    """Return which models are not in the blend, why, and what would change it."""
    told = ""
    if choice.uninformed:
        told += f" Not blended, no better than a constant: {', '.join(choice.uninformed)}."
    if choice.compared_only:
        told += (
            f" Compared but not blended, without out-of-fold predictions of train rows: "
            f"{', '.join(choice.compared_only)}; a first-level model has them unless its `bag` "
            f"is none."
        )
    return told
