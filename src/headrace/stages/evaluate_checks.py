"""The sanity checks of stage ``evaluate``: reads what they look at, and asks them.

All look at a sample of at most ``DRAWN_ROWS`` rows of each split (fewer of a wide table), drawn by
row id; but duplicates are counted in the whole table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.data.drawn import DrawnRows, draw_rows, drawn_predictions
from headrace.data.duplicates import find_duplicates
from headrace.data.leaks import SingleColumn, single_columns
from headrace.data.table import Table
from headrace.data.truth import Truth, UnitChoice
from headrace.errors import ConfigError, nearest
from headrace.evaluation.bootstrap import Resampling, Units
from headrace.evaluation.checks import (
    PAIRS,
    SplitValues,
    check_calibration,
    check_constant,
    check_inversion,
    check_rounding,
    check_target,
)
from headrace.evaluation.checks_section import data_section, target_section
from headrace.evaluation.coded import Coded, coded_columns, is_codable
from headrace.evaluation.data_checks import (
    check_drift,
    check_duplicates,
    check_single_columns,
    check_slices,
)
from headrace.evaluation.drift import Shift, adversarial, shift
from headrace.evaluation.findings import Finding, counted
from headrace.evaluation.interpretation import Interpretation
from headrace.evaluation.metrics import MetricName, Sample, score
from headrace.evaluation.page import Section
from headrace.evaluation.slices import Slices, find_slices, loss_name
from headrace.schema import Contract, Role, Target, arrow_type

Floats: TypeAlias = npt.NDArray[np.float64]
Places: TypeAlias = npt.NDArray[np.int64]

CHECKS = "checks.json"
DRAWN_ROWS = 50_000  # of each split, about
_DRAWN_VALUES = 1_000_000  # of each split: fewer rows of wide tables; 25 MB
_LEAST_PASS_BYTES = 1 << 20  # for the duplicates, however small the budget
_ADVERSARIAL_ROWS = 5_000  # of each split: enough to tell an AUC of 0.55 from 0.5
_SLICED_COLUMNS = 20  # where params.yaml names none
_SPLITS = ("train", "valid", "test")
_UNSLICED: tuple[Role, ...] = ("key", "text", "vector", "target")
_MEASURES: Mapping[str, MetricName] = {
    "regression": "r2",
    "binary": "roc_auc",
    "multiclass": "macro_roc_auc",
}


@dataclass(frozen=True)
class Checks:
    """What the checks found: of the table, and of each target with the chosen model's slices."""

    table: tuple[Finding, ...]
    shifts: Mapping[tuple[str, str], Sequence[Shift]]
    targets: Mapping[str, tuple[Finding, ...]]
    slices: Mapping[str, Slices]
    num_rows: Mapping[str, tuple[int, int]]  # per split: looked at, and there are

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings."""
        return (*self.table, *(one for found in self.targets.values() for one in found))

    @property
    def note(self) -> str:
        """One line that counts the verdicts."""
        return f"sanity checks: {counted(self.findings)}"

    @property
    def warnings(self) -> list[str]:
        """Return what is bad, but for leaks, which ``encode`` has told of or was asked not to."""
        return [
            f"{one.check}, {one.subject}: {one.sentence}"
            for one in self.findings
            if one.verdict == "bad" and one.check != "leaks"
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the content of checks.json."""
        return {
            "format": 1,
            "num_rows": {name: {"drawn": a, "all": b} for name, (a, b) in self.num_rows.items()},
            "table": [one.to_json() for one in self.table],
            "targets": {
                name: [one.to_json() for one in found] for name, found in self.targets.items()
            },
        }

    def data_section(self) -> Section:
        """Return the section about the table."""
        return data_section(self.table, self.shifts, self._rows_text())

    def target_section(self, target: str, chosen: str, confidence: float) -> Section:
        """Return the section about one target."""
        return target_section(
            self.targets[target], self.slices[target], chosen=chosen, confidence=confidence
        )

    def _rows_text(self) -> str:
        rows = ", ".join(f"{a:,} of {b:,} {name}" for name, (a, b) in self.num_rows.items())
        return f"Looked at: {rows} rows; duplicates are counted in all."


@dataclass(frozen=True)
class _Drawn:
    """The drawn rows: of each split, and the columns of all of them, one split after the other."""

    splits: Mapping[str, DrawnRows]
    columns: Mapping[str, Coded]
    unit_of_row: npt.NDArray[np.int64]
    test_units: Units

    @property
    def places(self) -> dict[str, Places]:
        """Where the rows of each split stand in the columns."""
        ends = np.cumsum([len(self.splits[name].row_id) for name in _SPLITS])
        parts = np.split(np.arange(ends[-1]), ends[:-1])
        return dict(zip(_SPLITS, parts, strict=True))


def run_checks(
    source: Table,
    folders: Mapping[str, Path],
    chosen: Mapping[str, str],
    truth: Truth | None,
    units: Units,
    resampling: Resampling,
    *,
    unit: UnitChoice,
    key: str,
    slices: Sequence[str],
    interpreted: Interpretation | None,
    budget_bytes: int,
) -> Checks:
    """Check the table, the targets and the predictions of the models in ``folders``.

    ``chosen`` is the chosen model of each target; ``truth`` and ``units`` are those of the test
    rows, if they are in memory. ``slices`` are the columns to cut by, empty for the most important.

    Raises:
        ConfigError: if a column of ``slices`` is not in the table, or cannot be cut.
    """
    contract = source.contract
    _refuse_unsliced(slices, contract)
    names = list(dict.fromkeys((*contract.features, *contract.named("time"), *slices)))
    names = [name for name in names if is_codable(arrow_type(contract.column(name).dtype))]
    drawn = _draw(source, names, truth, units, resampling.seed, unit, key)
    by_time = contract.split is not None and contract.split.kind == "time"
    features = [drawn.columns[name] for name in contract.features]
    duplicates = _duplicates(source, budget_bytes)
    drift, shifts = _feature_drift(drawn, features, resampling, by_time=by_time)
    singles = _singles(drawn, features, contract)
    of_targets, of_slices = {}, {}
    for target in contract.targets:
        cut_by = _cut_by(slices, target, contract, interpreted)
        found, worst = _check_target(
            target,
            folders,
            chosen[target.name],
            drawn,
            [one for one in singles if one.target == target.name],
            [drawn.columns[name] for name in cut_by],
            resampling,
            by_time=by_time,
        )
        of_targets[target.name], of_slices[target.name] = tuple(found), worst
    sizes = {name: (len(rows.row_id), rows.num_rows) for name, rows in drawn.splits.items()}
    return Checks((*duplicates, *drift), shifts, of_targets, of_slices, sizes)


def _draw(
    source: Table,
    names: Sequence[str],
    truth: Truth | None,
    units: Units,
    seed: int,
    unit: UnitChoice,
    key: str,
) -> _Drawn:
    # Not by the memory budget: what is found must not hang on it.
    count = min(DRAWN_ROWS, _DRAWN_VALUES // max(1, len(names)))
    splits = {
        split: draw_rows(source, split, names, count=count, seed=seed, unit=unit, key=key)
        for split in _SPLITS
    }
    rows = pa.concat_tables([splits[split].columns for split in _SPLITS]).unify_dictionaries()
    categories = source.contract.named("category")
    coded = {one.name: one for one in coded_columns(rows, names, categories=categories)}
    keys = np.concatenate([splits[split].unit_key for split in _SPLITS])
    unit_of_row = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    test = splits["test"]
    if truth is not None:
        test_units = units.of(np.isin(truth.row_id, test.row_id, assume_unique=True))
    else:
        present, of_row = np.unique(test.unit_key, return_inverse=True)
        test_units = Units(test.unit, of_row.astype(np.int64), len(present))
    return _Drawn(splits, coded, unit_of_row, test_units)


def _duplicates(source: Table, budget_bytes: int) -> list[Finding]:
    features = source.contract.features
    if not features:
        reason = "The table has no feature to compare rows by."
        return [Finding("duplicate rows", "all", "unknown", reason)]
    found = find_duplicates(source, features, budget_bytes=max(budget_bytes, _LEAST_PASS_BYTES))
    return [
        check_duplicates(
            pair, copies.num_rows, copies.share, copies.first_ids, found.repeated_in_train
        )
        for pair, copies in found.copies.items()
    ]


def _feature_drift(
    drawn: _Drawn, features: Sequence[Coded], resampling: Resampling, *, by_time: bool
) -> tuple[list[Finding], dict[tuple[str, str], list[Shift]]]:
    if not features:
        return [Finding("feature drift", "all", "unknown", "There are no features to compare.")], {}
    unit = drawn.test_units.name
    return _drift(features, drawn.places, drawn.unit_of_row, unit, resampling, by_time=by_time)


def _drift(
    columns: Sequence[Coded],
    places: Mapping[str, Places],
    unit_of_row: npt.NDArray[np.int64],
    unit: str,
    resampling: Resampling,
    *,
    by_time: bool,
    model: str = "",
) -> tuple[list[Finding], dict[tuple[str, str], list[Shift]]]:
    """Ask of each pair of splits whether ``columns`` tell them apart.

    ``places`` are where the rows of a split stand in the columns; a split without rows is left out.
    """
    findings, shifts = [], {}
    for pair in PAIRS:
        first, second = (places[name] for name in pair)
        if not len(first) or not len(second):
            continue
        rows = np.concatenate([first, second])
        is_second = np.arange(len(rows)) >= len(first)
        shifts[pair] = sorted(
            (shift(column.where(rows), is_second, unit_of_row[rows]) for column in columns),
            key=lambda one: (-one.index, one.column),
        )
        few = _few(is_second, resampling.seed)
        present, of_row = np.unique(unit_of_row[rows[few]], return_inverse=True)
        units = Units(unit, of_row.astype(np.int64), len(present))
        own = [column.where(rows[few]) for column in columns]
        area = adversarial(own, is_second[few], units, resampling)
        findings.append(
            check_drift(pair, area, shifts[pair], units, len(few), by_time=by_time, model=model)
        )
    return findings, shifts


def _few(is_second: npt.NDArray[np.bool_], seed: int) -> npt.NDArray[np.int64]:
    """Return the places of some rows of each side, in their order."""
    rng = np.random.default_rng(seed)
    chosen = [
        rng.permutation(np.flatnonzero(side))[:_ADVERSARIAL_ROWS]
        for side in (~is_second, is_second)
    ]
    return np.sort(np.concatenate(chosen))


def _singles(drawn: _Drawn, features: Sequence[Coded], contract: Contract) -> list[SingleColumn]:
    train = drawn.places["train"]
    inputs = {
        one.name: one.codes()[train] if one.kind == "category" else one.values[train]
        for one in features
    }
    return list(single_columns(inputs, drawn.splits["train"].labels, contract.targets))


def _check_target(
    target: Target,
    folders: Mapping[str, Path],
    chosen: str,
    drawn: _Drawn,
    singles: Sequence[SingleColumn],
    cut_by: Sequence[Coded],
    resampling: Resampling,
    *,
    by_time: bool,
) -> tuple[list[Finding], Slices]:
    test = drawn.splits["test"]
    labels = {name: rows.labels[target.name] for name, rows in drawn.splits.items()}
    known = {name: ~np.isnan(values) for name, values in labels.items()}
    findings = [_target_finding(target, labels, known, drawn, by_time=by_time)]
    if not known["test"].any():
        reason = "None of the test rows that were drawn has a label."
        unchecked = Slices(loss_name(target.task), "0 rows", (), 0, 0, 0, {})
        return [*findings, Finding("predictions", target.name, "unknown", reason)], unchecked
    predicted = {
        model: drawn_predictions(folder, target, test)[known["test"]]
        for model, folder in folders.items()
    }
    weight = None if test.weight is None else test.weight[known["test"]]
    truth = labels["test"][known["test"]]
    units = drawn.test_units.of(known["test"])
    samples = {
        model: Sample(target.task, truth, values, weight) for model, values in predicted.items()
    }
    for model, sample in samples.items():
        findings += [
            check_calibration(target, model, sample, units, resampling),
            check_inversion(target, model, sample, units, resampling),
            check_rounding(target, model, sample.prediction),
            check_constant(model, sample.prediction, truth, is_chosen=model == chosen),
        ]
    findings += _prediction_drift(
        target, chosen, folders[chosen], drawn, resampling, by_time=by_time
    )
    findings.append(_leak_finding(target, chosen, singles, samples[chosen]))
    judged = drawn.places["test"][known["test"]]
    rows = [one.where(judged) for one in cut_by]
    found = find_slices(samples[chosen], units, rows, resampling)
    findings.append(check_slices(chosen, found, len(truth), units))
    return findings, found


def _target_finding(
    target: Target,
    labels: Mapping[str, Floats],
    known: Mapping[str, npt.NDArray[np.bool_]],
    drawn: _Drawn,
    *,
    by_time: bool,
) -> Finding:
    bare = [name for name in _SPLITS if not known[name].any()]
    if bare:
        reason = f"The target has no label in {', '.join(bare)}."
        return Finding("target distribution", target.name, "unknown", reason)
    values = {
        name: SplitValues(
            labels[name][known[name]], drawn.unit_of_row[drawn.places[name]][known[name]]
        )
        for name in _SPLITS
    }
    return check_target(target, values, by_time=by_time)


def _prediction_drift(
    target: Target,
    model: str,
    folder: Path,
    drawn: _Drawn,
    resampling: Resampling,
    *,
    by_time: bool,
) -> list[Finding]:
    """Compare the model's predictions between the splits that have them."""
    parts = [
        drawn_predictions(folder, target, drawn.splits[name]).reshape(-1, target.num_outputs)
        for name in _SPLITS
    ]
    values_NO = np.concatenate(parts)
    is_there = ~np.isnan(values_NO[:, 0])
    names = target.labels if target.task == "multiclass" else ("prediction",)
    columns = [
        Coded(name, "number", values) for name, values in zip(names, values_NO.T, strict=True)
    ]
    places = {name: here[is_there[here]] for name, here in drawn.places.items()}
    unit = drawn.test_units.name
    findings, _ = _drift(
        columns, places, drawn.unit_of_row, unit, resampling, by_time=by_time, model=model
    )
    return findings


def _leak_finding(
    target: Target, chosen: str, singles: Sequence[SingleColumn], sample: Sample
) -> Finding:
    value = score(_MEASURES[target.task], sample)
    return check_single_columns(
        target.name,
        "R²" if target.task == "regression" else "ROC-AUC",
        {one.column: one.value for one in singles},
        [one.column for one in singles if one.is_suspicious],
        chosen,
        value if np.isfinite(value) else None,
    )


def _cut_by(
    slices: Sequence[str], target: Target, contract: Contract, interpreted: Interpretation | None
) -> list[str]:
    """Return the columns to cut by: those asked for, or the most important ones, and the time."""
    if slices:
        return list(slices)
    most = interpreted.most(target.name, _SLICED_COLUMNS) if interpreted else []
    columns = [*most, *(name for name in contract.features if name not in most)]
    return [*columns[:_SLICED_COLUMNS], *contract.named("time")]


def _refuse_unsliced(slices: Sequence[str], contract: Contract) -> None:
    names = [column.name for column in contract.columns]
    for name in slices:
        if name not in names:
            raise ConfigError(
                f"`evaluate.slices` names {name!r}, which is no column of the table"
                f"{nearest(name, names)}"
            )
        column = contract.column(name)
        if column.role in _UNSLICED or not is_codable(arrow_type(column.dtype)):
            raise ConfigError(
                f"`evaluate.slices` names {name!r}, which is a {column.role} of type "
                f"{column.dtype}; slices need a number, a category or a time"
            )
