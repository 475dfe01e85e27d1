"""Stage ``decide``: how predictions become decisions; no label of a test row is read.

Per target, for the model that ``stack`` chose, in this order:
- a calibration map of its probabilities, fitted and judged on out-of-fold train rows;
- the threshold of a binary target, or whether costs move the class of several, on valid rows;
- the limit of prediction intervals and sets of classes, on valid rows.
Each is used only where it helps beyond doubt; else what is usual is kept, and decisions.json says
why. ``evaluate`` measures the decisions on test rows, ``publish`` packs them; docs/decide.md has an
example.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from headrace.data.predictions import bytes_held, read_predictions
from headrace.data.table import Table, open_table
from headrace.data.truth import Truth, line_up, read_truth
from headrace.errors import ConfigError, DataError, ResourceError, nearest
from headrace.evaluation.blend import blend_of, rounded
from headrace.evaluation.bootstrap import (
    Interval,
    Resampling,
    Units,
    bytes_needed,
)
from headrace.evaluation.calibration import Calibrated, calibrate, reliability
from headrace.evaluation.comparison import interval_json
from headrace.evaluation.conformal import conform, fewest_rows
from headrace.evaluation.metrics import Sample
from headrace.evaluation.rules import DECISIONS, Conformal, Costs, Rule, least_cost, likeliest
from headrace.evaluation.selection import STACK, read_selection
from headrace.evaluation.thresholds import (
    Objective,
    ThresholdMetric,
    Tuned,
    compare,
    tune,
    verdict,
)
from headrace.memory import format_bytes
from headrace.params import Resources
from headrace.record import Recorder
from headrace.schema import Contract, Target
from headrace.stages.resampled import ResampledParams
from headrace.storage import new_folder, verify_folder, write_json

Floats: TypeAlias = npt.NDArray[np.float64]
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=False)]
_BINARY_COSTS = ("false_positive", "false_negative")
_UNIT_KEY = "decide.unit"


class DecideParams(ResampledParams):
    """Section ``decide`` of params.yaml: what thresholds are tuned for, how sure intervals are."""

    # What a binary target's threshold is tuned for; f1 for a target that is not named.
    metric: Annotated[dict[str, ThresholdMetric], Field(default_factory=dict)]
    # Instead of a metric. Binary: {false_positive: 1, false_negative: 5}. Several classes: the cost
    # of every mistake, {TRUE_CLASS: {PREDICTED_CLASS: cost}}; one that is left out costs nothing.
    costs: Annotated[dict[str, dict[str, Cost | dict[str, Cost]]], Field(default_factory=dict)]
    coverage: Annotated[float, Field(gt=0, lt=1)] = 0.9  # share of rows inside interval or set

    @model_validator(mode="after")
    def _one_objective(self) -> Self:
        if both := sorted(set(self.metric) & set(self.costs)):
            raise ValueError(f"{both} stand in metric and in costs; keep one of them for a target")
        return self


@dataclass(frozen=True)
class Decided:
    """What was settled for each target, in words."""

    told: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        """One line per decision."""
        return "\n".join(f"{name}: {line}" for name, lines in self.told.items() for line in lines)


@dataclass(frozen=True)
class _Rows:
    """Labelled rows of one split, as the chosen model predicts them."""

    sample: Sample
    units: Units
    fold: npt.NDArray[np.int64]  # -1 outside train


@dataclass(frozen=True)
class _Class:
    """Whether costs move the predicted class of several, and what was compared."""

    costs: Costs | None
    value: Interval
    at_default: Interval
    gain: Interval
    reason: str


def decide(
    table: Path,
    members: Mapping[str, Path],
    stack: Path,
    out: Path,
    params: DecideParams,
    *,
    resources: Resources,
    recorder: Recorder,
) -> Decided:
    """Settle calibration, thresholds and conformal limits of the models that ``stack`` chose.

    Writes decisions.json.

    Raises:
        ConfigError: a metric or costs for no target, or for one of another task or other classes.
        DataError: no labelled valid rows, or all of one class.
        IntegrityError: damaged inputs, or a selection made from other models or targets.
        ResourceError: rows that do not fit the memory budget, with the figure needed.
    """
    source = open_table(table)
    objectives = _objectives(source.contract, params)
    folders = {**members, STACK: stack}
    for folder in folders.values():
        verify_folder(folder)
    selection = read_selection(stack, source.contract, members)
    _require_memory(source, folders, resources)
    truths = {}
    for split in ("valid", "train"):
        truths[split] = read_truth(source, split, unit=params.unit, key=_UNIT_KEY)
        recorder.dataset(
            split,
            path=source.folder,
            digest=truths[split].digest,
            num_rows=len(truths[split].row_id),
            context=split,
        )
    resampling = Resampling(params.num_resamples, params.confidence, params.seed, resources.threads)
    entries: dict[str, Any] = {}
    told: dict[str, tuple[str, ...]] = {}
    for target in source.contract.targets:
        entry = selection[target.name]
        valid = _rows(folders[entry["chosen"]], truths["valid"], target)
        out_of_fold = _out_of_fold(folders, entry, truths["train"], target)
        objective = objectives[target.name]
        entries[target.name], lines, limit = _settle(
            target, entry, valid, out_of_fold, objective, resampling, params
        )
        told[target.name] = lines
        if limit is None:
            recorder.warn(f"target {target.name!r}: {lines[-1]}")
        recorder.progress(len(entries), len(source.contract.targets), unit="targets")
    split_kind = source.contract.split.kind if source.contract.split else None
    with new_folder(out) as folder:
        content = {
            "format": 1,
            "rows": "valid",
            "split": split_kind,
            "confidence": params.confidence,
            "num_resamples": params.num_resamples,
            "coverage": params.coverage,
            "targets": entries,
        }
        write_json(folder / DECISIONS, content)
    for name, lines in told.items():
        recorder.note(f"**{name}**: " + "; ".join(lines) + ".")
    recorder.file(out / DECISIONS)
    return Decided(told)


def _settle(
    target: Target,
    selection: Mapping[str, Any],
    valid: _Rows,
    out_of_fold: _Rows | None,
    objective: Objective | None,
    resampling: Resampling,
    params: DecideParams,
) -> tuple[dict[str, Any], tuple[str, ...], Conformal | None]:
    """Return one target's entry of decisions.json, what to say of it, and its conformal limit."""
    rule = Rule(model=selection["chosen"])
    sample, units = valid.sample, valid.units
    entry: dict[str, Any] = {
        "model": rule.model,
        "task": target.task,
        "num_classes": len(target.labels),
        "unit": units.name,
        "num_units": units.count,
        "num_rows": len(sample.truth),
    }
    lines = []
    if target.task != "regression":
        if len(np.unique(sample.truth)) < 2:
            raise DataError(
                f"target {target.name!r}: all {len(sample.truth)} labelled valid rows are of the "
                f"class {target.labels[int(sample.truth[0])]!r}, so nothing can be decided by "
                f"them; change `extract.split` in params.yaml"
            )
        calibrated = _calibrated(out_of_fold, sample, resampling)
        rule = rule.model_copy(update={"calibration": calibrated.map})
        sample = replace(sample, prediction=rule.calibrated(sample.prediction))
        entry["calibration"] = _calibration_json(calibrated, out_of_fold)
        lines.append(f"calibration {calibrated.reason}")
    if objective is not None:
        entry["objective"] = {"metric": objective.metric, "costs": objective.costs}
        if target.task == "binary":
            tuned = tune(sample, units, resampling, objective)
            rule = rule.model_copy(update={"threshold": tuned.threshold})
            entry["threshold"] = _threshold_json(tuned)
            lines.append(f"threshold {tuned.reason}")
        else:
            decided = _by_costs(sample, units, resampling, objective)
            rule = rule.model_copy(update={"costs": decided.costs})
            entry["costs"] = _compared_json(decided)
            lines.append(decided.reason)
    limit = conform(sample, params.coverage)
    rule = rule.model_copy(update={"conformal": limit})
    entry["conformal"] = {
        "limit": limit and limit.limit,
        "reason": _limit_text(limit, valid, params),
    }
    lines.append(entry["conformal"]["reason"])
    if rule.model == STACK and selection["rows"] == "valid":
        entry["note"] = "the blend was fitted on these valid rows too"
    return {**entry, "rule": rule.model_dump(mode="json")}, tuple(lines), limit


def _calibrated(out_of_fold: _Rows | None, valid: Sample, resampling: Resampling) -> Calibrated:
    if out_of_fold is None:
        return Calibrated(None, "none: the model has no out-of-fold predictions of train rows", {})
    return calibrate(
        out_of_fold.sample, out_of_fold.fold, out_of_fold.units, resampling, valid=valid
    )


def _by_costs(sample: Sample, units: Units, resampling: Resampling, objective: Objective) -> _Class:
    assert objective.costs is not None
    cheapest = least_cost(sample.prediction, objective.costs)
    value, at_default, gain = compare(
        sample, cheapest, likeliest(sample.prediction), units, resampling, objective
    )
    is_used, told = verdict(gain, objective, units, resampling)
    reason = (
        f"class of least expected cost: {told}"
        if is_used
        else f"the likeliest class is kept; of the class of least expected cost {told}"
    )
    return _Class(objective.costs if is_used else None, value, at_default, gain, reason)


def _limit_text(limit: Conformal | None, valid: _Rows, params: DecideParams) -> str:
    num_rows = len(valid.sample.truth)
    if limit is None:
        return (
            f"no intervals or sets: {num_rows} labelled valid rows, and a coverage of "
            f"{params.coverage:g} needs at least {fewest_rows(params.coverage)}; lower "
            f"`decide.coverage`, or give valid a larger share in `extract.split`"
        )
    what = "residual" if valid.sample.task == "regression" else "1 − probability of the class"
    return (
        f"coverage {params.coverage:g}: {what} up to {limit.limit:.4g}, from {num_rows} valid rows"
    )


def _rows(folder: Path, truth: Truth, target: Target) -> _Rows:
    """Return the labelled valid rows, as the model in ``folder`` predicts them."""
    is_labelled = ~np.isnan(truth.labels[target.name])
    if not is_labelled.any():
        raise DataError(
            f"target {target.name!r} has no label in any of the {len(is_labelled)} valid rows, so "
            f"nothing can be decided; change `extract.split` in params.yaml"
        )
    predictions = read_predictions(folder, target).of_split(truth.split)
    values = predictions.values[line_up(predictions, truth, is_labelled)]
    return _labelled(values, truth, target, is_labelled, np.full(len(values), -1))


def _out_of_fold(
    folders: Mapping[str, Path], selection: Mapping[str, Any], truth: Truth, target: Target
) -> _Rows | None:
    """Return the labelled train rows as the chosen model, or its blend, predicts them out of fold.

    None if a model has no such predictions, or a blend was not fitted on them. The weights of a
    blend have seen all of these rows: a few numbers, against as many rows.
    """
    is_stack = selection["chosen"] == STACK
    if target.task == "regression" or (is_stack and selection["rows"] != "out_of_fold"):
        return None
    blend = blend_of(selection["blend"])
    names = blend.members if is_stack else (selection["chosen"],)
    is_labelled = ~np.isnan(truth.labels[target.name])
    values: dict[str, Floats] = {}
    fold = np.empty(0, np.int64)
    for name in names:
        predictions = read_predictions(folders[name], target).of_split("train")
        if not len(predictions.row_id):
            return None
        places = line_up(predictions, truth, is_labelled)
        values[name] = predictions.values[places]
        fold = predictions.fold[places].astype(np.int64)
    told = blend.of(values) if is_stack else values[selection["chosen"]]
    return _labelled(told, truth, target, is_labelled, fold)


def _labelled(
    values: Floats,
    truth: Truth,
    target: Target,
    is_labelled: npt.NDArray[np.bool_],
    fold: npt.NDArray[np.int64],
) -> _Rows:
    weight = None if truth.weight is None else truth.weight[is_labelled]
    sample = Sample(target.task, truth.labels[target.name][is_labelled], values, weight)
    units = Units(truth.unit, truth.unit_of_row, len(truth.unit_of_row)).of(is_labelled)
    return _Rows(sample, units, fold)


def _objectives(contract: Contract, params: DecideParams) -> dict[str, Objective | None]:
    """Return per target what its decisions are judged by; None where there is nothing to tune."""
    targets = {target.name: target for target in contract.targets}
    for key, named in (("metric", params.metric), ("costs", params.costs)):
        for name in named:
            if name not in targets:
                raise ConfigError(
                    f"`decide.{key}.{name}`: there is no target {name!r}{nearest(name, targets)}"
                )
            task = targets[name].task
            if task == "regression" or (key == "metric" and task != "binary"):
                wanted = "binary" if key == "metric" else "binary or multiclass"
                raise ConfigError(
                    f"`decide.{key}.{name}`: {name!r} is a {task} target, expected a {wanted} one; "
                    f"leave it out"
                )
    found: dict[str, Objective | None] = {}
    for name, target in targets.items():
        if name in params.costs:
            costs = params.costs[name]
            matrix = _of_binary if target.task == "binary" else _of_classes
            found[name] = Objective(None, matrix(target, costs))
        elif target.task == "binary":
            found[name] = Objective(params.metric.get(name, "f1"), None)
        else:
            found[name] = None
    return found


def _of_binary(target: Target, costs: Mapping[str, Any]) -> Costs:
    is_number = all(isinstance(cost, int | float) for cost in costs.values())
    if sorted(costs) != sorted(_BINARY_COSTS) or not is_number:
        raise ConfigError(
            f"`decide.costs.{target.name}` is {dict(costs)}; a binary target has one number for "
            f"each of {list(_BINARY_COSTS)}, where {target.labels[1]!r} is positive"
        )
    matrix = ((0.0, costs["false_positive"]), (costs["false_negative"], 0.0))
    return _some(matrix, target)


def _of_classes(target: Target, costs: Mapping[str, Any]) -> Costs:
    key = f"decide.costs.{target.name}"
    flat = [name for name, row in costs.items() if not isinstance(row, dict)]
    if flat:
        raise ConfigError(
            f"`{key}`: {flat} have a number, expected {{PREDICTED_CLASS: cost}} for each true "
            f"class of a multiclass target"
        )
    named = [*costs, *(name for row in costs.values() for name in row)]
    unknown = sorted(set(named) - set(target.labels))
    if unknown:
        raise ConfigError(
            f"`{key}` names the classes {unknown}, which the target does not have"
            f"{nearest(unknown[0], target.labels)}; its classes: {', '.join(target.labels)}"
        )
    right = [name for name, row in costs.items() if row.get(name, 0)]
    if right:
        raise ConfigError(f"`{key}`: a right prediction costs nothing, but {right} have a cost")
    matrix = tuple(
        tuple(costs.get(true, {}).get(told, 0.0) for told in target.labels)
        for true in target.labels
    )
    return _some(matrix, target)


def _some(costs: Costs, target: Target) -> Costs:
    if not any(cost > 0 for row in costs for cost in row):
        raise ConfigError(f"`decide.costs.{target.name}`: all costs are 0; expected one above it")
    return costs


def _require_memory(
    source: Table,
    folders: Mapping[str, Path],
    resources: Resources,
) -> None:
    """Raise ``ResourceError`` if the rows of one target and its bootstrap do not fit the budget."""
    num_rows = max(source.num_rows(split) for split in ("train", "valid"))
    words = 3 + len(source.contract.targets)  # ids, units, weight and labels
    needed = 8 * words * (source.num_rows("train") + source.num_rows("valid"))
    needed += max(
        2 * max(bytes_held(folder, target) for folder in folders.values())
        + 8 * num_rows * target.num_outputs * len(folders)
        + bytes_needed(num_rows, target.num_outputs)
        + 16 * num_rows * max(2, len(target.labels)) ** 2
        for target in source.contract.targets
    )
    if needed > resources.memory_budget:
        raise ResourceError(
            f"stage decide needs about {format_bytes(needed)} for {source.num_rows('train')} train "
            f"and {source.num_rows('valid')} valid rows, and may use "
            f"{format_bytes(resources.memory_budget)}; raise `resources.memory_budget`"
        )


def _calibration_json(found: Calibrated, out_of_fold: _Rows | None) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    if out_of_fold is not None and found.cross_fitted is not None:
        curves = {
            "before": reliability(out_of_fold.sample),
            "after": reliability(found.cross_fitted),
        }
    return {
        "chosen": found.map.kind if found.map else "none",
        "tried": found.tried,
        "reason": found.reason,
        "rows": "out_of_fold",
        "num_rows": 0 if out_of_fold is None else len(out_of_fold.sample.truth),
        "num_units": 0 if out_of_fold is None else out_of_fold.units.count,
        "log_loss": rounded(found.raw_log_loss),
        "gains": {name: interval_json(gain) for name, gain in found.gains.items()},
        "gain_on_valid": rounded(found.on_valid),
        "reliability": curves,
    }


def _threshold_json(tuned: Tuned) -> dict[str, Any]:
    return {
        "used": tuned.threshold,
        "tuned": interval_json(tuned.best),
        **_compared_json(tuned),
        "curve": [[rounded(x), rounded(y)] for x, y in tuned.curve],
    }


def _compared_json(found: Tuned | _Class) -> dict[str, Any]:
    return {
        "reason": found.reason,
        "value": interval_json(found.value),
        "at_default": interval_json(found.at_default),
        "gain": interval_json(found.gain),
    }
