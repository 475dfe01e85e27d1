"""Stage ``evaluate``: every model on the test rows, with intervals, comparisons and a report.

This is the one place where labels of test rows are read. It reports and chooses nothing: which
model leads each table was settled by ``stack``, without them. One run is one look at the test set,
told to the recorder once, by the digest of the test rows' ids.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from headrace.data.alignment import Aligned, Counted, measure, read_share, stream_aligned
from headrace.data.lookup import rows_by_id
from headrace.data.predictions import bytes_held, read_predictions
from headrace.data.table import Table, open_table
from headrace.data.truth import Truth, UnitChoice, label_bytes, line_up, read_truth, unit_bytes
from headrace.errors import ConfigError, DataError, ResourceError, nearest
from headrace.evaluation.blend import rounded
from headrace.evaluation.bootstrap import (
    FEW_UNITS,
    IntervalMethod,
    Resampling,
    Scored,
    Units,
    bootstrap,
    bytes_needed,
    require_resamples,
)
from headrace.evaluation.classes import (
    ClassScores,
    classes_json,
    classes_section,
    score_classes,
)
from headrace.evaluation.comparison import (
    Comparison,
    all_pairs,
    comparison_json,
    judge,
    metrics_json,
)
from headrace.evaluation.decisions import (
    Measured,
    decision_section,
    measure_decisions,
    measured_json,
    stream_decisions,
)
from headrace.evaluation.figures import Points, draw, interval_charts
from headrace.evaluation.interpretation import (
    Interpretation,
    attention_section,
    errors_section,
    interpretation_sections,
    read_interpretation,
)
from headrace.evaluation.learning import learning_section, read_summary
from headrace.evaluation.metrics import METRICS, Metric, MetricName, Sample
from headrace.evaluation.page import Chart
from headrace.evaluation.page import Section as PageSection
from headrace.evaluation.pair_section import PAIRS, pair_section, pairs_csv
from headrace.evaluation.pairs import Rank, resamples_needed
from headrace.evaluation.plots import pictures
from headrace.evaluation.report import ReportInputs, TargetSection, interval_text, render_report
from headrace.evaluation.resamples import RESAMPLES, resamples_bytes
from headrace.evaluation.rules import DECISIONS, DEFAULT, Decisions, read_decisions
from headrace.evaluation.selection import STACK, read_selection
from headrace.evaluation.streaming import Part, stream_bootstrap
from headrace.evaluation.user_metrics import (
    UserMetric,
    UserMetricParams,
    load_user_metrics,
    refuse_names,
    score_user_metrics,
    without_rows,
)
from headrace.evaluation.worst import SHOWN_COLUMNS, WorstRows, worst_json, worst_of, worst_rows
from headrace.memory import format_bytes
from headrace.params import Resources, Section
from headrace.record import Recorder
from headrace.schema import Contract, Target, file_stem
from headrace.stages.evaluate_checks import CHECKS, Checks, run_checks
from headrace.storage import (
    digest_bytes,
    new_folder,
    read_json,
    verify_file,
    verify_folder,
    write_file,
    write_json,
)

_STATED = (
    "num_resamples",
    "seed",
    "confidence",
    "interval",
    "stratify",
    "block",
    "resampling",
)
_UNIT_KEY = "evaluate.unit"
_RANKS = {"best": "  best", "tied": "  tied with best"}
_NO_ROWS = np.empty(0, np.int64)
_UserMetricName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
_DRAWN_ROWS = 50_000  # of a stream, about; charts show no more


class EvaluateParams(Section):
    """Section ``evaluate`` of params.yaml: how intervals are made, and of what."""

    num_resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 1000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    unit: UnitChoice = "auto"  # what is resampled: by the split days, its groups, or rows
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the pinball loss; 0.5: half the MAE
    interval: IntervalMethod = "percentile"
    # none; class: resamples keep the number of units of each class; or a column: of each value
    stratify: str = "none"
    block: Annotated[int, Field(ge=1)] = 1  # units of time that follow each other, drawn together
    # multinomial: as many units as there are, all rows in memory. poisson: about as many, rows
    # stream. auto: poisson if the test rows do not fit `resources.memory_budget`.
    resampling: Literal["auto", "multinomial", "poisson"] = "auto"
    # Columns whose values, fifths or blocks of time are judged apart; if none is named, the most
    # important ones and the time.
    slices: Annotated[tuple[str, ...], Field(strict=False)] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    # metrics of one's own, by name; functions of (truth, prediction, weights)
    user_metrics: Annotated[dict[_UserMetricName, UserMetricParams], Field(default_factory=dict)]

    @model_validator(mode="after")
    def _metrics_are_new(self) -> Self:
        refuse_names(self.user_metrics)
        return self

    @model_validator(mode="after")
    def _resamples_suffice(self) -> Self:
        require_resamples(self.num_resamples, self.confidence)
        return self

    @model_validator(mode="after")
    def _draws_go_together(self) -> Self:
        asked = {
            "interval bca": self.interval == "bca",
            f"stratify {self.stratify}": self.stratify != "none",
            f"block {self.block}": self.block > 1,
            "resampling poisson": self.resampling == "poisson",
        }
        together = [name for name, is_asked in asked.items() if is_asked]
        if len(together) > 1:
            raise ValueError(f"{' and '.join(together)} do not go together; keep one of them")
        return self


@dataclass(frozen=True)
class EvaluatedRow:
    """One line of the table shown at the end of a run; None where there is no value or interval."""

    target: str
    model: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    is_tied: bool
    is_chosen: bool
    is_primary: bool
    rank: Rank  # by the primary metric, every pair of models tested


@dataclass(frozen=True)
class Evaluated:
    """What the test rows said, and where the report is."""

    rows: tuple[EvaluatedRow, ...]
    unit: str
    num_units: int
    num_rows: int
    report: Path

    def __str__(self) -> str:
        """The primary metric of every model, one line each."""
        lines = [
            f"{row.target}  {row.model}  {row.metric} {_number(row.value)} "
            f"[{_number(row.low)}, {_number(row.high)}]"
            f"{'  chosen' if row.is_chosen else '  tied' if row.is_tied else ''}"
            f"{_RANKS.get(row.rank, '')}"
            for row in self.rows
            if row.is_primary
        ]
        units = "" if self.unit == "row" else f", {self.num_units} {self.unit}s"
        return "\n".join([*lines, f"{self.num_rows} test rows{units}"])


def evaluate(
    table: Path,
    members: Mapping[str, Path],
    stack: Path,
    out: Path,
    params: EvaluateParams,
    *,
    resources: Resources,
    recorder: Recorder,
    root: Path = Path(),
    profile: Path | None = None,
    interpretation: Path | None = None,
    decisions: Path | None = None,
) -> Evaluated:
    """Judge ``members`` and their blend on the test rows of ``table``.

    Writes metrics.json, comparison.json, checks.json, decisions.json, pairs.csv,
    resamples.parquet, errors.json, report.html, figures and plot files.
    ``root`` is the project, which holds the files of ``evaluate.user_metrics``.
    ``profile`` is the data profile that ``extract`` wrote, ``interpretation`` the folder of
    ``interpret``, ``decisions`` that of ``decide``, which are measured in decisions.json; the
    report shows them. Test rows that do not fit the memory budget are streamed;
    then charts of predictions show a share of them.

    Raises:
        ConfigError: strata or blocks that the test rows do not have; a user metric that is not
            there, fails, or has no finite value.
        DataError: no test rows, a target without a test label, rows without a prediction.
        IntegrityError: damaged inputs, or a selection made from other models or targets.
        ResourceError: test rows that do not fit the memory budget, where ``params`` ask for what a
            stream does not give; with the figure needed.
    """
    source = open_table(table)
    user_metrics = load_user_metrics(root, params.user_metrics, source.contract.targets)
    folders = {**members, STACK: stack}
    for folder in folders.values():
        verify_folder(folder)
    selection = read_selection(stack, source.contract, members)
    learnt = learning_section({name: read_summary(folder) for name, folder in members.items()})
    described = read_json(verify_file(profile.parent, profile.name)) if profile else None
    interpreted = read_interpretation(interpretation) if interpretation else None
    chosen_models = {name: entry["chosen"] for name, entry in selection.items()}
    decided = read_decisions(decisions, chosen_models) if decisions else None
    is_streamed = _is_streamed(source, folders, params, resources)
    test = _measure(source, params) if is_streamed else _read(source, params)
    recorder.dataset("test", path=table, digest=test.digest, num_rows=test.num_rows, context="test")
    units = test.units
    if units.num_independent < FEW_UNITS:
        recorder.warn(
            f"the test rows have only {units}; intervals from fewer than "
            f"{FEW_UNITS} units are narrower than they should be"
        )
    needed = resamples_needed(len(folders), params.confidence)
    if params.num_resamples < needed:
        recorder.warn(
            f"{params.num_resamples} resamples cannot tell any pair of {len(folders)} models apart "
            f"once corrected for all pairs; set `evaluate.num_resamples` to {needed} or more"
        )
    resampling = Resampling(
        params.num_resamples, params.confidence, params.seed, resources.threads, params.interval
    )
    judged: list[_Judgement] = []
    with new_folder(out) as folder:
        for target in source.contract.targets:
            stem = file_stem(target.name)
            recorder.progress(len(judged), len(source.contract.targets), unit="targets")
            chosen, own = selection[target.name], user_metrics[target.name]
            if test.truth is None:
                one = _judge_stream(
                    target,
                    folders,
                    source,
                    test,
                    resampling,
                    params,
                    chosen,
                    own,
                    decided,
                    resources,
                )
            else:
                one = _judge_target(
                    target, folders, test.truth, units, resampling, params, chosen, own, decided
                )
            judged.append(one)
            (folder / "plots").mkdir(exist_ok=True)  # DVC waits for it, of a stream too
            _write_plot_files(folder / "plots", stem, one.points)
        errors = _errors(judged, source, interpreted)
        write_json(folder / "errors.json", {"format": 1, "split": "test", "targets": errors})
        checks = run_checks(
            source,
            folders,
            {one.comparison.target: one.comparison.chosen for one in judged},
            test.truth,
            units,
            resampling,
            unit=params.unit,
            key=_UNIT_KEY,
            slices=params.slices,
            interpreted=interpreted,
            budget_bytes=resources.memory_budget // 4,  # the test rows are still held
        )
        of_run = [
            checks.data_section(),
            learnt,
            attention_section(interpreted) if interpreted else None,
        ]
        sections = [section for section in of_run if section is not None]
        _write(
            folder,
            judged,
            selection,
            source,
            test,
            params,
            described,
            interpreted,
            errors,
            sections,
            checks,
            decided,
        )
    _tell(checks, recorder)
    _record(judged, out, recorder)
    if is_streamed:
        recorder.note(_streamed_note(judged))
    return Evaluated(
        rows=tuple(row for one in judged for row in _rows(one.comparison)),
        unit=units.name,
        num_units=units.count,
        num_rows=test.num_rows,
        report=out / "report.html",
    )


@dataclass(frozen=True)
class _TestRows:
    """What is known of the test rows: ``truth`` if they are in memory, else ``labelled`` counts."""

    digest: str
    num_rows: int
    units: Units
    truth: Truth | None
    labelled: Mapping[str, Counted]
    label_digest: Mapping[str, str]  # per target
    unit_digest: str


@dataclass(frozen=True)
class _Judgement:
    """All that is known of one target; ``points`` are the lines of its plot files.

    Of a stream, charts and points are of a share of the rows, and bounds say how far its bins of
    scores can have moved each model's metrics.
    """

    worst: WorstRows  # of the chosen model
    comparison: Comparison
    scored: Mapping[str, Scored]
    charts: Sequence[Chart]
    points: Points
    classes: Sequence[ClassScores]  # of every model
    measured: Measured | None
    error_bound: Mapping[str, Mapping[MetricName, float]] = field(default_factory=dict)


def _read(source: Table, params: EvaluateParams) -> _TestRows:
    strata = _strata_column(source.contract, params)
    truth = read_truth(source, "test", unit=params.unit, key=_UNIT_KEY, strata=strata)
    digests = {name: digest_bytes(label_bytes(truth, name)) for name in truth.labels}
    return _TestRows(
        digest=truth.digest,
        num_rows=len(truth.row_id),
        units=_units(truth, params),
        truth=truth,
        labelled={},
        label_digest=digests,
        unit_digest=digest_bytes(unit_bytes(truth)),
    )


def _measure(source: Table, params: EvaluateParams) -> _TestRows:
    size = measure(source, "test", unit=params.unit, key=_UNIT_KEY)
    units = Units(size.unit, _NO_ROWS, size.rows.num_units)
    return _TestRows(
        digest=size.digest,
        num_rows=size.rows.num_rows,
        units=units,
        truth=None,
        labelled=size.labelled,
        label_digest=size.label_digest,
        unit_digest=size.unit_digest,
    )


def _judge_target(
    target: Target,
    folders: Mapping[str, Path],
    truth: Truth,
    units: Units,
    resampling: Resampling,
    params: EvaluateParams,
    selection: Mapping[str, Any],
    user_metrics: Sequence[UserMetric],
    decisions: Decisions | None,
) -> _Judgement:
    labels = truth.labels[target.name]
    is_labelled = ~np.isnan(labels)
    _require_labels(target, int(is_labelled.sum()), len(labels))
    labelled_units = units.of(is_labelled)
    if params.stratify == "class" and target.task != "regression":
        labelled_units = _stratified(labelled_units, labels[is_labelled].astype(np.int64), params)
    weight = None if truth.weight is None else truth.weight[is_labelled]
    samples: dict[str, Sample] = {}
    scored: dict[str, Scored] = {}
    for model, folder in folders.items():
        predictions = read_predictions(folder, target).of_split("test")
        values = predictions.values[line_up(predictions, truth, is_labelled)]
        samples[model] = Sample(target.task, labels[is_labelled], values, weight, params.quantile)
        scored[model] = score_user_metrics(
            user_metrics,
            bootstrap(samples[model], labelled_units, resampling, threshold=DEFAULT),
            samples[model],
            labelled_units,
            resampling,
            who=f"model {model!r}, target {target.name!r}",
        )
    comparison = Comparison(
        target=target.name,
        task=target.task,
        primary=selection["metric"],
        chosen=selection["chosen"],
        unit=units.name,
        num_units=labelled_units.count,
        num_rows=int(is_labelled.sum()),
        num_unlabelled=int((~is_labelled).sum()),
        confidence=params.confidence,
        judged=judge(
            scored, selection["chosen"], _metrics(target, user_metrics), labelled_units, resampling
        ),
        pairs=all_pairs(scored, labelled_units, resampling),
    )
    charts, points = draw(
        target,
        comparison.chosen,
        samples,
        labelled_units,
        confidence=params.confidence,
        threshold=DEFAULT,
    )
    charts = interval_charts(comparison, scored, confidence=params.confidence) + charts
    worst = worst_rows(samples[comparison.chosen], truth.row_id[is_labelled])
    classes = score_classes(scored, target, labelled_units, resampling)
    measured = None
    if decisions:
        rule, entry = decisions.rules[target.name], decisions.entry(target.name)
        measured = measure_decisions(samples[rule.model], labelled_units, resampling, rule, entry)
    return _Judgement(worst, comparison, scored, charts, points, classes, measured)


def _judge_stream(
    target: Target,
    folders: Mapping[str, Path],
    source: Table,
    test: _TestRows,
    resampling: Resampling,
    params: EvaluateParams,
    selection: Mapping[str, Any],
    user_metrics: Sequence[UserMetric],
    decisions: Decisions | None,
    resources: Resources,
) -> _Judgement:
    """Judge by Poisson resamples of rows that are read a batch at a time, once for each model."""
    labelled = test.labelled[target.name]
    _require_labels(target, labelled.num_rows, test.num_rows)
    units = replace(test.units, count=labelled.num_units)

    def read(folder: Path) -> Iterator[Aligned]:
        return stream_aligned(source, folder, target, "test", unit=params.unit, key=_UNIT_KEY)

    def parts(folder: Path) -> Iterator[Part]:
        return (Part(_sample(target, rows, params), rows.unit_key) for rows in read(folder))

    streamed = {
        model: stream_bootstrap(
            partial(parts, folder),
            target.task,
            resampling,
            threshold=DEFAULT,
            budget_bytes=resources.memory_budget // 2,  # the other half is for the batches
        )
        for model, folder in folders.items()
    }
    scored = {model: without_rows(user_metrics, found.scored) for model, found in streamed.items()}
    comparison = Comparison(
        target=target.name,
        task=target.task,
        primary=selection["metric"],
        chosen=selection["chosen"],
        unit=units.name,
        num_units=units.count,
        num_rows=labelled.num_rows,
        num_unlabelled=test.num_rows - labelled.num_rows,
        confidence=params.confidence,
        judged=judge(
            scored, selection["chosen"], _metrics(target, user_metrics), units, resampling
        ),
        pairs=all_pairs(scored, units, resampling),
    )
    share = min(1.0, _DRAWN_ROWS / labelled.num_rows)
    drawn = {
        model: read_share(
            source, folder, target, "test", share, unit=params.unit, key=_UNIT_KEY, seed=params.seed
        )
        for model, folder in folders.items()
    }
    present, of_row = np.unique(next(iter(drawn.values())).unit_key, return_inverse=True)
    charts, points = draw(
        target,
        comparison.chosen,
        {model: _sample(target, rows, params) for model, rows in drawn.items()},
        Units(units.name, of_row.astype(np.int64), len(present)),
        confidence=params.confidence,
        threshold=DEFAULT,
    )
    bounds = {model: found.error_bound for model, found in streamed.items()}
    charts = interval_charts(comparison, scored, confidence=params.confidence) + charts
    chosen = read(folders[comparison.chosen])
    worst = worst_of((_sample(target, rows, params), rows.row_id) for rows in chosen)
    classes = score_classes(scored, target, units, resampling)
    measured = None
    if decisions:
        rule, entry = decisions.rules[target.name], decisions.entry(target.name)
        measured = stream_decisions(parts(folders[rule.model]), units, resampling, rule, entry)
    return _Judgement(worst, comparison, scored, charts, points, classes, measured, bounds)


def _metrics(target: Target, user_metrics: Sequence[UserMetric]) -> list[Metric]:
    return [*METRICS[target.task], *(one.metric for one in user_metrics)]


def _sample(target: Target, rows: Aligned, params: EvaluateParams) -> Sample:
    return Sample(target.task, rows.label, rows.values, rows.weight, params.quantile)


def _require_labels(target: Target, num_labelled: int, num_rows: int) -> None:
    if not num_labelled:
        raise DataError(
            f"target {target.name!r} has no label in any of the {num_rows} test rows; "
            f"change `extract.split` in params.yaml, or leave the target out"
        )


def _write(
    folder: Path,
    judged: Sequence[_Judgement],
    selection: Mapping[str, Mapping[str, Any]],
    source: Table,
    test: _TestRows,
    params: EvaluateParams,
    described: Any,
    interpreted: Interpretation | None,
    errors: Mapping[str, Any],
    sections: Sequence[PageSection],
    checks: Checks,
    decided: Decisions | None,
) -> None:
    comparisons = [one.comparison for one in judged]
    resampled = "poisson" if test.truth is None else "multinomial"
    settings = params.model_dump(mode="json") | {"resampling": resampled, "threshold": DEFAULT}
    digests = {
        "digest of the test rows' ids": test.digest,
        "digest of the table": source.digest,
        "digest of the data contract": source.contract.digest,
    }
    write_json(folder / "metrics.json", metrics_json(comparisons))
    write_json(
        folder / "comparison.json",
        {
            "format": 1,
            "split_digest": test.digest,
            "unit_digest": test.unit_digest,
            "unit": test.units.name,
            "num_units": test.units.count,
            "num_rows": test.num_rows,
            **{name: settings[name] for name in _STATED},
            "threshold": DEFAULT,
            "targets": {
                one.comparison.target: comparison_json(one.comparison)
                | {"label_digest": test.label_digest[one.comparison.target]}
                | ({"classes": classes_json(one.classes)} if one.classes else {})
                | _bounds_json(one)
                for one in judged
            },
        },
    )
    write_json(folder / CHECKS, checks.to_json())
    write_json(folder / DECISIONS, _decisions_json(judged, source.contract))
    write_file(folder / PAIRS, pairs_csv(comparisons))
    write_file(
        folder / RESAMPLES,
        resamples_bytes({one.comparison.target: one.scored for one in judged}),
    )
    for one in judged:
        stem = file_stem(one.comparison.target)
        for figure in pictures(one.comparison, confidence=params.confidence):
            write_file(folder / "figures" / f"{stem}_{figure.name}.svg", figure.file_text())
    targets = [
        TargetSection(
            one.comparison,
            selection[one.comparison.target],
            one.charts,
            _target_sections(one, source.contract, interpreted, errors, checks, decided),
        )
        for one in judged
    ]
    page = render_report(ReportInputs(targets, settings, digests, described, sections))
    write_file(folder / "report.html", page)


def _errors(
    judged: Sequence[_Judgement], source: Table, interpreted: Interpretation | None
) -> dict[str, Any]:
    """Return per target the rows that the chosen model is most wrong about.

    Beside each row stand its key and the columns that matter most to the best single model; the
    first columns, where nobody has asked.
    """
    contract = source.contract
    errors = {}
    for one in judged:
        name = one.comparison.target
        most = interpreted.most(name, SHOWN_COLUMNS) if interpreted else contract.features
        columns = list(dict.fromkeys((*contract.named("key"), *most[:SHOWN_COLUMNS])))
        rows = rows_by_id(source, "test", one.worst.row_id, columns)
        values = {
            column: [_cell(value) for value in rows[column].to_pylist()] for column in columns
        }
        errors[name] = worst_json(one.worst, contract.target(name), one.comparison.chosen, values)
    return errors


def _decisions_json(judged: Sequence[_Judgement], contract: Contract) -> dict[str, Any]:
    targets = {
        one.comparison.target: measured_json(one.measured, contract.target(one.comparison.target))
        for one in judged
        if one.measured
    }
    return {"format": 1, "split": "test", "targets": targets}


def _target_sections(
    one: _Judgement,
    contract: Contract,
    interpreted: Interpretation | None,
    errors: Mapping[str, Any],
    checks: Checks,
    decided: Decisions | None,
) -> list[PageSection]:
    """Return what the report says of one target below its charts."""
    comparison = one.comparison
    target = contract.target(comparison.target)
    of_classes = classes_section(comparison, one.classes)
    sections = [
        pair_section(comparison),
        *([of_classes] if of_classes else []),
        checks.target_section(target.name, comparison.chosen, comparison.confidence),
    ]
    if decided and one.measured:
        sections.append(
            decision_section(
                one.measured,
                target,
                decided.entry(target.name),
                split=contract.split.kind if contract.split else None,
                confidence=comparison.confidence,
            )
        )
    if interpreted:
        sections += interpretation_sections(interpreted, target, contract, comparison.models)
    sections.append(errors_section(errors[target.name], target, comparison.num_rows))
    return sections


def _bounds_json(one: _Judgement) -> dict[str, Any]:
    """Return the entry ``error_bound`` of a target whose rows were streamed."""
    if not one.error_bound:
        return {}
    return {
        "error_bound": {
            model: {name: rounded(value) for name, value in bounds.items()}
            for model, bounds in one.error_bound.items()
        }
    }


def _streamed_note(judged: Sequence[_Judgement]) -> str:
    bounds = [bound for one in judged for of in one.error_bound.values() for bound in of.values()]
    return (
        f"The test rows were streamed: intervals are from Poisson resamples, rankings from bins of "
        f"scores (a value is within {max(bounds):.2g} of the exact one). Charts show about "
        f"{_DRAWN_ROWS:,} rows at most; with a larger `resources.memory_budget` they show all."
    )


def _cell(value: Any) -> float | str | None:
    """Return a value of the table as JSON has it: a finite number, or a text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None if value is None else str(value)
    return value if math.isfinite(value) else None


def _write_plot_files(folder: Path, stem: str, points: Points) -> None:
    """Write one file of x and y per kind and model, as ``dvc plots`` reads a folder of them."""
    for kind, lines in points.items():
        for name, line in lines.items():
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["x", "y"])
            writer.writerows([rounded(x), rounded(y)] for x, y in line.tolist())
            write_file(folder / f"{stem}.{kind}.{file_stem(name)}.csv", text.getvalue())


def _record(judged: Sequence[_Judgement], out: Path, recorder: Recorder) -> None:
    for one in judged:
        comparison = one.comparison
        for found in comparison.judged:
            key = f"{found.model}/{comparison.target}/{found.metric.name}"
            values = {
                key: found.estimate.value,
                f"{key}_ci_low": found.estimate.low,
                f"{key}_ci_high": found.estimate.high,
            }
            recorder.metrics({name: value for name, value in values.items() if value is not None})
        recorder.note(_note(comparison))
    for picture in sorted((out / "figures").iterdir()):
        recorder.file(picture, folder="figures")
    for name in ("comparison.json", DECISIONS, PAIRS, RESAMPLES):
        recorder.file(out / name)


def _tell(checks: Checks, recorder: Recorder) -> None:
    recorder.note(checks.note)
    for text in checks.warnings:
        recorder.warn(text)


def _note(comparison: Comparison) -> str:
    """The target's primary metric as a Markdown table."""
    title, ranks = comparison.primary_metric.title, comparison.ranks
    units = "" if comparison.unit == "row" else f", {comparison.num_units:,} {comparison.unit}s"
    lines = [
        f"**{comparison.target}** on {comparison.num_rows:,} test rows{units}",
        "",
        f"| model | {title} | against the chosen | against the best |",
        "|---|---|---|---|",
    ]
    for model in comparison.models:
        found = comparison.of(model, comparison.primary)
        value = " ".join(interval_text(found.estimate))
        lines.append(f"| {model} | {value} | {found.verdict} | {ranks[model]} |")
    return "\n".join(lines)


def _rows(comparison: Comparison) -> Iterator[EvaluatedRow]:
    ranks = comparison.ranks
    for found in comparison.judged:
        yield EvaluatedRow(
            target=comparison.target,
            model=found.model,
            metric=found.metric.name,
            value=found.estimate.value,
            low=found.estimate.low,
            high=found.estimate.high,
            is_tied=found.is_tied,
            is_chosen=found.model == comparison.chosen,
            is_primary=found.metric.name == comparison.primary,
            rank=ranks[found.model],
        )


def _strata_column(contract: Contract, params: EvaluateParams) -> str | None:
    """Return the column that gives the strata, None if there is none or the class does."""
    if params.stratify == "none":
        return None
    if params.stratify == "class":
        if all(target.task == "regression" for target in contract.targets):
            raise ConfigError(
                "`evaluate.stratify` is class, but no target has classes; set it to none, or to a "
                "column"
            )
        return None
    names = [column.name for column in contract.columns]
    if params.stratify not in names:
        raise ConfigError(
            f"`evaluate.stratify` is {params.stratify!r}, which is no column of the table"
            f"{nearest(params.stratify, names)}; set it to none, class or a column"
        )
    return params.stratify


def _units(truth: Truth, params: EvaluateParams) -> Units:
    units = Units(truth.unit, truth.unit_of_row, len(np.unique(truth.unit_of_row)))
    if truth.stratum is not None:
        return _stratified(units, truth.stratum, params)
    if params.block > 1 and not truth.is_unit_of_time:
        raise ConfigError(
            f"`evaluate.block` is {params.block}, but the resampling unit is {truth.unit}, which "
            f"has no order in time; set `evaluate.unit` to day, or leave out the block"
        )
    return replace(units, block=params.block)


def _stratified(units: Units, stratum: npt.NDArray[np.int64], params: EvaluateParams) -> Units:
    try:
        return units.stratified(stratum)
    except ValueError as error:
        raise ConfigError(
            f"`evaluate.stratify` is {params.stratify}, but {error}; set it to none, or "
            f"`evaluate.unit` to row"
        ) from error


def _is_streamed(
    source: Table, folders: Mapping[str, Path], params: EvaluateParams, resources: Resources
) -> bool:
    """Whether test rows are read a batch at a time.

    Raises:
        ResourceError: if they do not fit the memory budget, and the params ask for what a stream
            does not give.
    """
    if params.resampling == "poisson":
        return True
    needed = _bytes_needed(source, folders, params)
    if needed <= resources.memory_budget:
        return False
    asked = {
        "resampling": params.resampling == "multinomial",
        "interval": params.interval == "bca",
        "stratify": params.stratify != "none",
        "block": params.block > 1,
    }
    names = [f"`evaluate.{name}`" for name, is_asked in asked.items() if is_asked]
    if names:
        raise ResourceError(
            f"stage evaluate needs about {format_bytes(needed)} for {source.num_rows('test')} test "
            f"rows and {len(folders)} models, and may use {format_bytes(resources.memory_budget)}; "
            f"raise `resources.memory_budget`, give test a smaller share in `extract.split`, or "
            f"leave out {', '.join(names)}, so that the rows can be streamed"
        )
    return True


def _bytes_needed(source: Table, folders: Mapping[str, Path], params: EvaluateParams) -> int:
    num_rows, num_models = source.num_rows("test"), len(folders)
    needed = num_rows * 8 * (3 + len(source.contract.targets))  # ids, units, weight and labels
    return needed + max(
        # One model's file at a time, its test rows beside it; then one bootstrap.
        max(
            2 * max(bytes_held(folder, target) for folder in folders.values()),
            bytes_needed(num_rows, target.num_outputs, method=params.interval),
        )
        + 8 * num_rows * (target.num_outputs * num_models + 2)
        for target in source.contract.targets
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
