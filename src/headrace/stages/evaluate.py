"""Stage ``evaluate``: every model on the test rows, with intervals, comparisons and a report.

This is the one place where labels of test rows are read. It reports and chooses nothing: which
model leads each table was settled by ``stack``, without them. One run is one look at the test set,
told to the recorder once, by the digest of the test rows' ids.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from headrace.data.alignment import Aligned, measure, read_share, stream_aligned
from headrace.data.predictions import bytes_held, read_predictions
from headrace.data.table import Table, open_table
from headrace.data.truth import Truth, label_bytes, line_up, read_truth, unit_bytes
from headrace.errors import ConfigError, DataError, ResourceError, nearest
from headrace.evaluation.bootstrap import (
    FEW_UNITS,
    IntervalMethod,
    Resampling,
    Scored,
    Units,
    bootstrap,
    bytes_needed,
)
from headrace.evaluation.classes import (
    score_classes,
)
from headrace.evaluation.comparison import (
    Comparison,
    all_pairs,
    judge,
)
from headrace.evaluation.decisions import (
    measure_decisions,
    stream_decisions,
)
from headrace.evaluation.figures import draw, interval_charts
from headrace.evaluation.interpretation import (
    attention_section,
    read_interpretation,
)
from headrace.evaluation.learning import learning_section, read_summary
from headrace.evaluation.metrics import METRICS, Sample
from headrace.evaluation.pairs import Rank, resamples_needed
from headrace.evaluation.rules import DEFAULT, Decisions, read_decisions
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
from headrace.evaluation.worst import worst_of, worst_rows
from headrace.memory import format_bytes
from headrace.params import Resources
from headrace.record import Recorder
from headrace.schema import Contract, Target, file_stem
from headrace.stages.evaluate_checks import Checks, run_checks
from headrace.stages.evaluate_files import (
    Judgement,
    TestRows,
    record_results,
    worst_errors,
    write_files,
    write_plot_files,
)
from headrace.stages.resampled import ResampledParams
from headrace.storage import (
    digest_bytes,
    new_folder,
    read_json,
    verify_file,
    verify_folder,
    write_json,
)

_UNIT_KEY = "evaluate.unit"
_RANKS = {"best": "  best", "tied": "  tied with best"}
_NO_ROWS = np.empty(0, np.int64)
_UserMetricName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
_DRAWN_ROWS = 50_000  # of a stream, about; charts show no more


class EvaluateParams(ResampledParams):
    """Section ``evaluate`` of params.yaml: how intervals are made, and of what."""

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
    # metrics of one's own, by name; functions of (truth, prediction, weights)
    user_metrics: Annotated[dict[_UserMetricName, UserMetricParams], Field(default_factory=dict)]

    @model_validator(mode="after")
    def _metrics_are_new(self) -> Self:
        refuse_names(self.user_metrics)
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
    judged: list[Judgement] = []
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
            write_plot_files(folder / "plots", stem, one.points)
        errors = worst_errors(judged, source, interpreted)
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
        write_files(
            folder,
            judged,
            selection,
            source,
            test,
            params.model_dump(mode="json"),
            described,
            interpreted,
            errors,
            sections,
            checks,
            decided,
        )
    _tell(checks, recorder)
    record_results(judged, out, recorder)
    if is_streamed:
        recorder.note(_streamed_note(judged))
    return Evaluated(
        rows=tuple(row for one in judged for row in _rows(one.comparison)),
        unit=units.name,
        num_units=units.count,
        num_rows=test.num_rows,
        report=out / "report.html",
    )


def _read(source: Table, params: EvaluateParams) -> TestRows:
    strata = _strata_column(source.contract, params)
    truth = read_truth(source, "test", unit=params.unit, key=_UNIT_KEY, strata=strata)
    digests = {name: digest_bytes(label_bytes(truth, name)) for name in truth.labels}
    return TestRows(
        digest=truth.digest,
        num_rows=len(truth.row_id),
        units=_units(truth, params),
        truth=truth,
        labelled={},
        label_digest=digests,
        unit_digest=digest_bytes(unit_bytes(truth)),
    )


def _measure(source: Table, params: EvaluateParams) -> TestRows:
    size = measure(source, "test", unit=params.unit, key=_UNIT_KEY)
    units = Units(size.unit, _NO_ROWS, size.rows.num_units)
    return TestRows(
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
) -> Judgement:
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
    num_rows = int(is_labelled.sum())
    comparison = _comparison(
        target, scored, selection, user_metrics, labelled_units, resampling,
        num_rows=num_rows, num_unlabelled=len(labels) - num_rows,
    )  # fmt: skip
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
    return Judgement(worst, comparison, scored, charts, points, classes, measured)


def _judge_stream(
    target: Target,
    folders: Mapping[str, Path],
    source: Table,
    test: TestRows,
    resampling: Resampling,
    params: EvaluateParams,
    selection: Mapping[str, Any],
    user_metrics: Sequence[UserMetric],
    decisions: Decisions | None,
    resources: Resources,
) -> Judgement:
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
    comparison = _comparison(
        target, scored, selection, user_metrics, units, resampling,
        num_rows=labelled.num_rows, num_unlabelled=test.num_rows - labelled.num_rows,
    )  # fmt: skip
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
    return Judgement(worst, comparison, scored, charts, points, classes, measured, bounds)


def _comparison(
    target: Target,
    scored: Mapping[str, Scored],
    selection: Mapping[str, Any],
    user_metrics: Sequence[UserMetric],
    units: Units,
    resampling: Resampling,
    *,
    num_rows: int,
    num_unlabelled: int,
) -> Comparison:
    metrics = [*METRICS[target.task], *(one.metric for one in user_metrics)]
    return Comparison(
        target=target.name,
        task=target.task,
        primary=selection["metric"],
        chosen=selection["chosen"],
        unit=units.name,
        num_units=units.count,
        num_rows=num_rows,
        num_unlabelled=num_unlabelled,
        confidence=resampling.confidence,
        judged=judge(scored, selection["chosen"], metrics, units, resampling),
        pairs=all_pairs(scored, units, resampling),
    )


def _sample(target: Target, rows: Aligned, params: EvaluateParams) -> Sample:
    return Sample(target.task, rows.label, rows.values, rows.weight, params.quantile)


def _require_labels(target: Target, num_labelled: int, num_rows: int) -> None:
    if not num_labelled:
        raise DataError(
            f"target {target.name!r} has no label in any of the {num_rows} test rows; "
            f"change `extract.split` in params.yaml, or leave the target out"
        )


def _streamed_note(judged: Sequence[Judgement]) -> str:
    bounds = [bound for one in judged for of in one.error_bound.values() for bound in of.values()]
    return (
        f"The test rows were streamed: intervals are from Poisson resamples, rankings from bins of "
        f"scores (a value is within {max(bounds):.2g} of the exact one). Charts show about "
        f"{_DRAWN_ROWS:,} rows at most; with a larger `resources.memory_budget` they show all."
    )


def _tell(checks: Checks, recorder: Recorder) -> None:
    recorder.note(checks.note)
    for text in checks.warnings:
        recorder.warn(text)


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
