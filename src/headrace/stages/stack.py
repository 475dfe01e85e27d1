"""Stage ``stack``: blend the models and choose one per target, from valid rows alone.

It reads the members' predictions, the labels of valid rows and no other label. Test rows are
blended, but nothing here looks at how well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from headrace.data.predictions import (
    VALID_SEEN,
    Predictions,
    bytes_held,
    merge_seen,
    read_predictions,
    write_predictions,
)
from headrace.data.table import Table, open_table
from headrace.data.truth import Truth, UnitChoice, line_up, read_truth
from headrace.errors import ConfigError, DataError, ResourceError, nearest
from headrace.evaluation.bootstrap import Resampling, Units, bytes_needed
from headrace.evaluation.metrics import DEFAULT_METRIC, Metric, MetricName, Sample, metric_of
from headrace.evaluation.selection import STACK, Choice, choice_json, choose, mix
from headrace.memory import format_bytes
from headrace.params import Resources, Section
from headrace.record import Recorder
from headrace.schema import SPLITS, Contract, Target
from headrace.storage import new_folder, verify_folder, write_json

SELECTION = "selection.json"


class StackParams(Section):
    """Section ``stack`` of params.yaml: how members are blended and the best one is chosen."""

    rounds: Annotated[int, Field(ge=1, le=10_000)] = 50  # picks with replacement
    # Per target; a target that is not named has RMSE, ROC-AUC or log-loss, by its task.
    metric: Annotated[dict[str, MetricName], Field(default_factory=dict)]
    num_resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 1000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    unit: UnitChoice = "auto"  # what is resampled: by the split days, its groups, or rows
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


@dataclass(frozen=True)
class Stacked:
    """What was chosen for each target, and why."""

    choices: Mapping[str, Choice]

    def __str__(self) -> str:
        """One line per target."""
        return "\n".join(f"{name}: {c.chosen} ({c.reason})" for name, c in self.choices.items())


def stack(
    table: Path,
    members: Mapping[str, Path],
    out: Path,
    params: StackParams,
    *,
    resources: Resources,
    recorder: Recorder,
) -> Stacked:
    """Blend ``members`` with weights chosen on valid rows; fall back to the best single model.

    Writes selection.json and predictions of the model ``stack``, of every row all members predict.

    Raises:
        ConfigError: a metric that the target's task does not have, or for no target.
        DataError: members that predict different rows, or rows that a member was fitted on.
        ResourceError: valid rows that do not fit the memory budget, with the figure needed.
    """
    source = open_table(table)
    metrics = _metrics(source.contract, params)
    for folder in members.values():
        verify_folder(folder)
    _require_memory(source, members, resources)
    truth = read_truth(source, "valid", unit=params.unit, key="stack.unit")
    recorder.dataset(
        "valid", path=table, digest=truth.digest, num_rows=len(truth.row_id), context="valid"
    )
    choices: dict[str, Choice] = {}
    with new_folder(out) as folder:
        for target in source.contract.targets:
            predictions = read_members(members, target)
            choices[target.name] = _choose(
                predictions, truth, target, metrics[target.name], params, resources
            )
            blended = _blended(predictions, choices[target.name].weights)
            write_predictions(folder, blended, target)
            recorder.progress(len(choices), len(source.contract.targets), unit="targets")
        targets = {name: choice_json(choice) for name, choice in choices.items()}
        write_json(folder / SELECTION, {"format": 1, "targets": targets})
    _record(choices, recorder)
    return Stacked(choices)


def read_members(members: Mapping[str, Path], target: Target) -> dict[str, Predictions]:
    """Read every member's predictions of one target; all of the same rows, none seen in training.

    Raises:
        DataError: rows that not all members predict, or that a member was fitted on: with the
            count and the first row ids.
    """
    predictions = {name: read_predictions(folder, target) for name, folder in members.items()}
    first_name, first = next(iter(predictions.items()))
    for name, found in predictions.items():
        _refuse_seen(name, found)
        different = np.setxor1d(first.row_id, found.row_id)
        if len(different):
            raise DataError(
                f"target {target.name!r}: models {first_name!r} and {name!r} predict different "
                f"rows: {len(different)} row ids are in one and not in the other, first "
                f"{[str(i) for i in different[:5]]}; train both again on the same table "
                f"(`headrace repro`)"
            )
    return predictions


def _metrics(contract: Contract, params: StackParams) -> dict[str, Metric]:
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


def _require_memory(source: Table, members: Mapping[str, Path], resources: Resources) -> None:
    num_rows, num_members = source.num_rows("valid"), len(members)
    needed = max(
        _bytes_needed(num_rows, members, target) for target in source.contract.targets
    ) + num_rows * 8 * (3 + len(source.contract.targets))  # ids, units, weight and labels
    if needed > resources.memory_budget:
        raise ResourceError(
            f"stage stack needs about {format_bytes(needed)} for {num_rows} valid rows and "
            f"{num_members} models, and may use {format_bytes(resources.memory_budget)}; raise "
            f"`resources.memory_budget` or give valid a smaller share in `extract.split`"
        )


def _bytes_needed(num_rows: int, members: Mapping[str, Path], target: Target) -> int:
    """Return what one target holds: all members' predictions, of all their rows, are read first.

    On top come either samples of the valid rows and one bootstrap, or the blend while it is made
    and written: its values twice, its order, its codes.
    """
    read = [bytes_held(folder, target) for folder in members.values()]
    choosing = bytes_needed(num_rows, target.num_outputs)
    choosing += 8 * num_rows * target.num_outputs * (len(members) + 3)
    return sum(read) + max(choosing, 3 * max(read))


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
        raise DataError(
            f"model {name!r}, target {predictions.target!r}: {len(seen)} predictions are of rows "
            f"that it was fitted on or stopped on, first row ids {row_ids}; only rows that a model "
            f"has not seen may be blended: set `train.{name}.stop_rows` to inner if it is valid"
        )


def _choose(
    predictions: Mapping[str, Predictions],
    truth: Truth,
    target: Target,
    metric: Metric,
    params: StackParams,
    resources: Resources,
) -> Choice:
    is_labelled = ~np.isnan(truth.labels[target.name])
    if not is_labelled.any():
        raise DataError(
            f"target {target.name!r} has no label in any of the {len(is_labelled)} valid rows, so "
            f"no model can be chosen; change `extract.split` in params.yaml"
        )
    weight = None if truth.weight is None else truth.weight[is_labelled]
    samples = {}
    for name, found in predictions.items():
        of_valid = found.of_split("valid")
        places = line_up(of_valid, truth, is_labelled)
        samples[name] = Sample(
            target.task, truth.labels[target.name][is_labelled], of_valid.values[places], weight
        )
    units = Units(truth.unit, truth.unit_of_row, len(truth.unit_of_row)).of(is_labelled)
    resampling = Resampling(params.num_resamples, params.confidence, params.seed, resources.threads)
    return choose(samples, metric, units, resampling, rounds=params.rounds, target=target.name)


def _blended(predictions: Mapping[str, Predictions], weights: Mapping[str, float]) -> Predictions:
    """Mix the members row by row; what any of them has seen, the blend has seen."""
    used = [found for name, found in predictions.items() if weights[name] > 0]
    first = used[0]  # files are sorted by row id and hold the same rows
    folds_seen, seen = merge_seen(used)
    return Predictions(
        model=STACK,
        target=first.target,
        row_id=first.row_id,
        fold=first.fold,
        split=first.split,
        values=mix({name: found.values for name, found in predictions.items()}, weights),
        folds_seen=folds_seen,
        seen=seen,
    )


def _record(choices: Mapping[str, Choice], recorder: Recorder) -> None:
    for target, choice in choices.items():
        values = {**dict(choice.ranking), STACK: choice.blend_value}
        recorder.metrics(
            {f"{model}/{target}/valid_{choice.metric.name}": v for model, v in values.items()}
        )
        weights = ", ".join(f"{name} {w:.2f}" for name, w in choice.weights.items() if w)
        recorder.params({f"{target}/chosen": choice.chosen, f"{target}/weights": weights})
        recorder.note(f"**{target}**: {choice.chosen} is chosen: {choice.reason}.")
