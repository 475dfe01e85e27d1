"""``headrace power``: which difference of two models the test rows could tell, before training.

A difference is told apart with 80 % power if it is (z(1 - alpha/2) + z(0.8)) standard errors of the
*paired* difference. How noisy that is comes from predictions of valid rows, where models have made
some, else from two supposed models; and it shrinks with the root of the number of units. Of the
test rows only the labelled rows and units are counted: no prediction meets a label, so it is no
look at them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from headrace.commands.settings import Settings, read_settings
from headrace.data.alignment import Counted, measure
from headrace.data.predictions import FOLDER, read_predictions
from headrace.data.table import Table as DataTable
from headrace.data.table import open_table
from headrace.data.truth import Truth, line_up, read_truth
from headrace.errors import ConfigError, DataError, IntegrityError, ResourceError, nearest
from headrace.evaluation.bootstrap import FEW_UNITS, Resampling, Scored, Units, bootstrap
from headrace.evaluation.bootstrap import bytes_needed as bootstrap_bytes
from headrace.evaluation.metrics import METRICS, Metric, Sample
from headrace.evaluation.pairs import POWER, compare_pairs
from headrace.evaluation.rules import DEFAULT
from headrace.evaluation.supposed import EXPLAINED, RANKED, supposed_models
from headrace.memory import format_bytes
from headrace.project import Project
from headrace.schema import Target, file_stem
from headrace.stages.evaluate import EvaluateParams
from headrace.stages.stack import StackParams, chosen_metrics

_KEY = "evaluate.unit"


@dataclass(frozen=True)
class Detectable:
    """One metric of one target: the smallest detectable differences of the pairs of models."""

    metric: Metric
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Power:
    """One target: what its test rows can tell, and where that is known from."""

    target: str
    test: Counted
    unit: str
    confidence: float
    basis: str  # a sentence
    primary: Metric
    found: tuple[Detectable, ...]

    def of(self, metric: Metric) -> Detectable | None:
        """Return what was found of one metric; None if its difference had no interval."""
        return next((one for one in self.found if one.metric == metric), None)


def power(project: Project, *, target: str | None, correlation: float) -> list[Power]:
    """Return what the test rows of ``project`` can tell, per target.

    Raises:
        ConfigError: no such target, or a correlation outside [0, 1).
        DataError: no table yet, or no test rows.
        ResourceError: valid rows that do not fit the memory budget.
    """
    if not 0 <= correlation < 1:
        raise ConfigError(f"--correlation is {correlation}; expected 0 or more and less than 1")
    settings = read_settings(project)
    params = cast(EvaluateParams, settings.section("evaluate"))
    table = _table(project)
    names = [one.name for one in table.contract.targets]
    if target is not None and target not in names:
        raise ConfigError(f"--target {target!r} is no target{nearest(target, names)}")
    size = measure(table, "test", unit=params.unit, key=_KEY)
    pilot = "valid" if table.num_rows("valid") else "train"
    _require_memory(table, pilot, settings)
    truth = read_truth(table, pilot, unit=params.unit, key=_KEY)
    metrics = chosen_metrics(table.contract, cast(StackParams, settings.section("stack")))
    members = {name: project.data(stage) for name, stage in settings.members.items()}
    resampling = Resampling(
        params.num_resamples, params.confidence, params.seed, settings.resources.threads
    )
    return [
        _power(one, size.labelled[one.name], truth, members, params, resampling, correlation,
               metrics[one.name])
        for one in table.contract.targets
        if target in (None, one.name)
    ]  # fmt: skip


def print_power(
    found: Sequence[Power], *, metric: str | None, asked: float | None, console: Console
) -> None:
    """Print what was found, and what a difference of ``asked`` would need.

    Raises:
        ConfigError: a metric that a target does not have; a difference that is not above 0.
    """
    if asked is not None and not asked > 0:
        raise ConfigError(f"--difference is {asked}; expected more than 0")
    for one in found:
        units = "" if one.unit == "row" else f" in {one.test.num_units:,} {one.unit}s"
        console.print(
            f"{one.target}: {one.test.num_rows:,} labelled test rows{units}; smallest difference "
            f"found with {POWER:.0%} power at {100 * one.confidence:.4g} % confidence",
            style="bold",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        console.print(_table_of(one), highlight=False)
        lines = [one.basis]
        if one.test.num_units < FEW_UNITS:
            lines.append(
                f"with only {one.test.num_units} {one.unit}s the real ones are larger than these"
            )
        if asked is not None:
            lines.append(_needed(one, _metric(one, metric), asked))
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(project: Project) -> DataTable:
    for stage in ("reduce", "extract"):
        try:
            return open_table(project.data(stage))
        except IntegrityError:  # not there yet, or not whole
            continue
    raise DataError(
        f"there is no table yet: {project.data('extract')} is absent; run `headrace repro reduce` "
        f"and ask again (no model is trained for it)"
    )


def _require_memory(table: DataTable, split: str, settings: Settings) -> None:
    num_rows = table.num_rows(split)
    budget = settings.resources.memory_budget
    needed = max(bootstrap_bytes(num_rows, one.num_outputs) for one in table.contract.targets)
    if needed > budget:
        raise ResourceError(
            f"power needs about {format_bytes(needed)} for {num_rows:,} {split} rows, and may use "
            f"{format_bytes(budget)}; raise `resources.memory_budget`, or look at a "
            f"`headrace run --sample`"
        )


def _power(
    target: Target,
    test: Counted,
    truth: Truth,
    members: Mapping[str, Path],
    params: EvaluateParams,
    resampling: Resampling,
    correlation: float,
    primary: Metric,
) -> Power:
    labels = truth.labels[target.name]
    is_labelled = ~np.isnan(labels)
    if not is_labelled.any():
        raise DataError(
            f"target {target.name!r} has no label in any of the {len(labels)} {truth.split} rows; "
            f"change `extract.split` in params.yaml, or leave the target out"
        )
    weight = None if truth.weight is None else truth.weight[is_labelled]
    samples = _predicted(target, truth, is_labelled, members)
    if len(samples) >= 2:
        basis = (
            f"from predictions of {int(is_labelled.sum()):,} {truth.split} rows by "
            f"{', '.join(samples)}: the median pair of models, and the range over pairs"
        )
    else:
        basis = _assumption(target, truth.split, correlation)
        samples = supposed_models(
            target.task,
            labels[is_labelled],
            num_classes=max(2, len(target.labels)),
            weight=weight,
            correlation=correlation,
            seed=params.seed,
        )
    units = Units(truth.unit, truth.unit_of_row, int(truth.unit_of_row.max()) + 1)
    units = replace(units.of(is_labelled), block=params.block)
    scored = {
        name: bootstrap(sample, units, resampling, threshold=DEFAULT)
        for name, sample in samples.items()
    }
    scale = math.sqrt(units.count / test.num_units)
    return Power(
        target=target.name,
        test=test,
        unit=truth.unit,
        confidence=params.confidence,
        basis=basis,
        primary=primary,
        found=tuple(_detectable(target, scored, units, resampling, scale)),
    )


def _predicted(
    target: Target, truth: Truth, is_needed: npt.NDArray[np.bool_], members: Mapping[str, Path]
) -> dict[str, Sample]:
    """Return the models that have predicted these rows; those of another table are left out."""
    weight = None if truth.weight is None else truth.weight[is_needed]
    found = {}
    for name, folder in members.items():
        if not (folder / FOLDER / f"{file_stem(target.name)}.parquet").is_file():
            continue
        predictions = read_predictions(folder, target).of_split(truth.split)
        try:
            places = line_up(predictions, truth, is_needed)
        except DataError:  # made from other rows: as if it had not been trained yet
            continue
        labels = truth.labels[target.name][is_needed]
        found[name] = Sample(target.task, labels, predictions.values[places], weight)
    return found


def _detectable(
    target: Target,
    scored: Mapping[str, Scored],
    units: Units,
    resampling: Resampling,
    scale: float,
) -> list[Detectable]:
    found = []
    for metric in METRICS[target.task]:
        pairs = compare_pairs(metric.name, scored, units, resampling)
        sizes = [scale * pair.detectable for pair in pairs if pair.detectable is not None]
        if sizes:
            found.append(Detectable(metric, float(np.median(sizes)), min(sizes), max(sizes)))
    return found


def _assumption(target: Target, split: str, correlation: float) -> str:
    skill = {
        "regression": f"R² {EXPLAINED:g}",
        "binary": f"ROC-AUC {RANKED:g}",
        "multiclass": f"ROC-AUC {RANKED:g} between two classes",
    }[target.task]
    return (
        f"no two models have predicted {split} rows yet, so this is an assumption: two models of "
        f"{skill} whose errors have a correlation of {correlation:g} (--correlation), rows "
        f"independent; ask again when models are trained"
    )


def _metric(one: Power, name: str | None) -> Metric:
    if name is None:
        return one.primary
    known = [found.metric for found in one.found]
    for metric in known:
        if metric.name == name:
            return metric
    names = [metric.name for metric in known]
    raise ConfigError(
        f"--metric {name!r} is none of target {one.target!r}{nearest(name, names)}; "
        f"it has {', '.join(names)}"
    )


def _needed(one: Power, metric: Metric, asked: float) -> str:
    found = one.of(metric)
    if found is None:
        return f"{metric.title} has no interval here, so it says nothing of a difference"
    share = (found.median / asked) ** 2
    rows = f"{math.ceil(share * one.test.num_rows):,} test rows"
    units = f"{math.ceil(share * one.test.num_units):,} {one.unit}s"
    needs = rows if one.unit == "row" else f"{units} (about {rows})"
    verdict = "these are enough" if share <= 1 else f"{share:.3g} times as many as there are"
    return f"a difference of {asked:g} in {metric.title} needs {needs}: {verdict}"


def _table_of(one: Power) -> Table:
    table = Table()
    table.add_column("metric")
    table.add_column("smallest detectable", justify="right")
    table.add_column("over pairs", justify="right")
    for found in one.found:
        is_range = found.high > found.low
        table.add_row(
            found.metric.title + (" (primary)" if found.metric == one.primary else ""),
            f"{found.median:.3g}",
            f"{found.low:.3g} to {found.high:.3g}" if is_range else "",
        )
    return table
