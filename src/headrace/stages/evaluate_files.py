"""What the stage ``evaluate`` writes and records, once every target is judged."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.data.alignment import Counted
from headrace.data.lookup import rows_by_id
from headrace.data.table import Table
from headrace.data.truth import Truth
from headrace.evaluation.blend import rounded
from headrace.evaluation.bootstrap import Scored, Units
from headrace.evaluation.classes import ClassScores, classes_json, classes_section
from headrace.evaluation.comparison import Comparison, comparison_json, metrics_json
from headrace.evaluation.decisions import Measured, decision_section, measured_json
from headrace.evaluation.figures import Points
from headrace.evaluation.interpretation import (
    Interpretation,
    errors_section,
    interpretation_sections,
)
from headrace.evaluation.metrics import MetricName
from headrace.evaluation.page import Chart
from headrace.evaluation.page import Section as PageSection
from headrace.evaluation.pair_section import PAIRS, pair_section, pairs_csv
from headrace.evaluation.plots import pictures
from headrace.evaluation.report import ReportInputs, TargetSection, interval_text, render_report
from headrace.evaluation.resamples import RESAMPLES, resamples_bytes
from headrace.evaluation.rules import DECISIONS, DEFAULT, Decisions
from headrace.evaluation.worst import SHOWN_COLUMNS, WorstRows, worst_json
from headrace.record import Recorder
from headrace.schema import Contract, file_stem
from headrace.stages.evaluate_checks import CHECKS, Checks
from headrace.storage import write_file, write_json

_STATED = (
    "num_resamples",
    "seed",
    "confidence",
    "interval",
    "stratify",
    "block",
    "resampling",
)


@dataclass(frozen=True)
class TestRows:
    """What is known of the test rows: ``truth`` if they are in memory, else ``labelled`` counts."""

    digest: str
    num_rows: int
    units: Units
    truth: Truth | None
    labelled: Mapping[str, Counted]
    label_digest: Mapping[str, str]  # per target
    unit_digest: str


@dataclass(frozen=True)
class Judgement:
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


def write_files(
    folder: Path,
    judged: Sequence[Judgement],
    selection: Mapping[str, Mapping[str, Any]],
    source: Table,
    test: TestRows,
    settings: Mapping[str, Any],
    described: Any,
    interpreted: Interpretation | None,
    errors: Mapping[str, Any],
    sections: Sequence[PageSection],
    checks: Checks,
    decided: Decisions | None,
) -> None:
    """Write every file but errors.json and those of plots; ``settings`` is the stage's section."""
    comparisons = [one.comparison for one in judged]
    resampled = "poisson" if test.truth is None else "multinomial"
    settings = {**settings, "resampling": resampled, "threshold": DEFAULT}
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
        for figure in pictures(one.comparison, confidence=one.comparison.confidence):
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


def worst_errors(
    judged: Sequence[Judgement], source: Table, interpreted: Interpretation | None
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


def _decisions_json(judged: Sequence[Judgement], contract: Contract) -> dict[str, Any]:
    targets = {
        one.comparison.target: measured_json(one.measured, contract.target(one.comparison.target))
        for one in judged
        if one.measured
    }
    return {"format": 1, "split": "test", "targets": targets}


def _target_sections(
    one: Judgement,
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


def _bounds_json(one: Judgement) -> dict[str, Any]:
    """Return the entry ``error_bound`` of a target whose rows were streamed."""
    if not one.error_bound:
        return {}
    return {
        "error_bound": {
            model: {name: rounded(value) for name, value in bounds.items()}
            for model, bounds in one.error_bound.items()
        }
    }


def write_plot_files(folder: Path, stem: str, points: Points) -> None:
    """Write one file of x and y per kind and model, as ``dvc plots`` reads a folder of them."""
    for kind, lines in points.items():
        for name, line in lines.items():
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["x", "y"])
            writer.writerows([rounded(x), rounded(y)] for x, y in line.tolist())
            write_file(folder / f"{stem}.{kind}.{file_stem(name)}.csv", text.getvalue())


def record_results(judged: Sequence[Judgement], out: Path, recorder: Recorder) -> None:
    """Record metrics with intervals, a table per target, figures and files for comparisons."""
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


def _cell(value: Any) -> float | str | None:
    """Return a value of the table as JSON has it: a finite number, or a text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None if value is None else str(value)
    return value if math.isfinite(value) else None
