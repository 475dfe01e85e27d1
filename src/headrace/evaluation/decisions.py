"""What the rules of ``decide`` are worth on test rows: measured here, chosen elsewhere.

Everything is made of sums over rows (confusion by both ways to decide, both log-losses, rows inside
their interval or set), so one set of resamples serves all, and rows may as well be streamed. The
intervals are percentiles, for a rule's gain has no influence values.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.bootstrap import (
    Interval,
    Resampling,
    Units,
    interval,
    resampled_sums,
    sums_per_unit,
)
from headrace.evaluation.comparison import interval_json
from headrace.evaluation.losses import log_losses
from headrace.evaluation.metrics import METRICS, Sample
from headrace.evaluation.page import Cell, Chart, Section, Table
from headrace.evaluation.rules import DEFAULT, Rule, likeliest
from headrace.evaluation.streaming import Part
from headrace.evaluation.thresholds import (
    Objective,
    ThresholdMetric,
    confusion_cells,
)
from headrace.kernels.poisson import Folds
from headrace.schema import Target

Floats: TypeAlias = npt.NDArray[np.float64]
Json: TypeAlias = dict[str, Any]

_METRICS: tuple[ThresholdMetric, ...] = ("f1", "balanced_accuracy", "mcc", "accuracy")
_GUARANTEED = ("random", "stratified")  # splits whose rows are exchangeable
_WHY_NOT = {
    "time": "they are of a later time",
    "grouped": "they are of other groups",
    "given": "they were divided by hand",
    None: "how they were divided is not known",
}


@dataclass(frozen=True)
class Pair:
    """A value by the usual way and by the rule, and the gain of the rule; positive is better."""

    usual: Interval
    ruled: Interval
    gain: Interval


@dataclass(frozen=True)
class Measured:
    """One target's decisions on test rows; what a task does not have is empty or None.

    ``metrics`` are of predicted classes, by their titles. ``size`` is the mean width of intervals,
    or number of classes in a set.
    """

    rule: Rule
    units: Units
    num_rows: int
    metrics: Mapping[str, Pair]
    log_loss: Pair | None
    coverage: Interval | None
    size: Interval | None


def measure_decisions(
    sample: Sample, units: Units, resampling: Resampling, rule: Rule, entry: Mapping[str, Any]
) -> Measured:
    """Measure ``rule`` on the test rows of its model; ``entry`` is of ``decide``."""
    columns_KU = sums_per_unit(_columns(sample, rule), units)
    sums_BK = resampled_sums(columns_KU, units, resampling)
    return _measured(
        columns_KU.sum(axis=1), sums_BK, len(sample.truth), units, resampling, rule, entry
    )


def stream_decisions(
    parts: Iterable[Part],
    units: Units,
    resampling: Resampling,
    rule: Rule,
    entry: Mapping[str, Any],
) -> Measured:
    """Measure ``rule`` as ``measure_decisions`` does, by Poisson resamples of rows in parts."""
    folds: Folds | None = None
    total_K = np.zeros(0)
    num_rows = 0
    with ThreadPoolExecutor(resampling.threads) as pool:
        for part in parts:
            columns_KN = _columns(part.sample, rule)
            if folds is None:
                total_K = np.zeros(len(columns_KN))
                folds = Folds(
                    resampling.num_resamples,
                    first=0,
                    seed=resampling.seed,
                    num_columns=len(columns_KN),
                    num_rankings=0,
                    num_bins=0,
                )
            no_cells = np.empty((0, columns_KN.shape[1]), np.int64)
            folds.add(part.unit_key, columns_KN, no_cells, np.ones(columns_KN.shape[1]), pool)
            total_K += columns_KN.sum(axis=1)
            num_rows += columns_KN.shape[1]
    assert folds is not None  # a target has labelled test rows
    return _measured(total_K, folds.sums_BK, num_rows, units, resampling, rule, entry)


def measured_json(measured: Measured, target: Target) -> Json:
    """Return one target's entry of the decisions.json that ``evaluate`` writes."""
    rule, limit = measured.rule, measured.rule.conformal
    content: Json = {
        "model": rule.model,
        "unit": measured.units.name,
        "num_units": measured.units.count,
        "num_rows": measured.num_rows,
    }
    if target.task == "binary":
        content["threshold"] = {"default": DEFAULT, "used": rule.threshold}
    if measured.metrics:
        content["metrics"] = {
            name: _pair_json(pair, "default", "decided") for name, pair in measured.metrics.items()
        }
    if measured.log_loss is not None:
        content["log_loss"] = _pair_json(measured.log_loss, "raw", "calibrated")
    if limit is not None and measured.coverage is not None and measured.size is not None:
        content["conformal"] = {
            "nominal": limit.coverage,
            "coverage": interval_json(measured.coverage),
            "width" if target.task == "regression" else "classes": interval_json(measured.size),
        }
    return content


def decision_section(
    measured: Measured,
    target: Target,
    entry: Mapping[str, Any],
    *,
    split: str | None,
    confidence: float,
) -> Section:
    """Return what the report says of a target's decisions.

    ``entry`` is the target's in the decisions.json of ``decide``, ``split`` how rows were divided.
    """
    rule = measured.rule
    text = [
        f"Settled for {rule.model} by valid and out-of-fold train rows; measured here on "
        f"{measured.num_rows:,} test rows ({measured.units}), which choose nothing."
    ]
    if "calibration" in entry:
        text.append(f"Calibration: {entry['calibration']['reason']}.")
    if "threshold" in entry:
        text.append(f"Threshold: {entry['threshold']['reason']}.")
    if "costs" in entry:
        text.append(f"Costs: {entry['costs']['reason']}.")
    text.append(f"Conformal: {entry['conformal']['reason']}. {_promise(measured, split)}".strip())
    if "note" in entry:
        text.append(f"Mind: {entry['note']}.")
    percent = f"{100 * confidence:.4g} %"
    tables = [_pair_table(measured, target, percent), _coverage_table(measured, target, percent)]
    charts = [_curve_chart(measured, target, entry), _reliability_chart(target, entry)]
    return Section(
        anchor="decisions",
        title="Decisions",
        text=tuple(text),
        tables=tuple(table for table in tables if table is not None),
        charts=tuple(chart for chart in charts if chart is not None),
    )


def _columns(sample: Sample, rule: Rule) -> Floats:
    """Return what is added up over rows, (K, N): see ``_measured``."""
    num_rows = len(sample.truth)
    columns: list[Floats] = []
    calibrated = sample.prediction
    if sample.task != "regression":
        calibrated = rule.calibrated(sample.prediction)
        num_classes = 2 if calibrated.ndim == 1 else calibrated.shape[1]
        weight = np.ones(num_rows) if sample.weight is None else sample.weight
        columns += [
            *confusion_cells(sample, likeliest(sample.prediction), num_classes),
            *confusion_cells(sample, rule.classes(calibrated), num_classes),
            weight,
            weight * log_losses(sample.truth, sample.prediction),
            weight * log_losses(sample.truth, calibrated),
        ]
    if rule.conformal is not None:
        if sample.task == "regression":
            low, high = rule.conformal.interval(sample.prediction)
            is_inside = (low <= sample.truth) & (sample.truth <= high)
            size = high - low
        else:
            is_in = rule.conformal.classes(calibrated)
            is_inside = is_in[np.arange(num_rows), sample.truth.astype(np.int64)]
            size = is_in.sum(axis=1).astype(np.float64)
        columns += [np.ones(num_rows), is_inside.astype(np.float64), size]
    return np.stack(columns) if columns else np.zeros((1, num_rows))


def _measured(
    total_K: Floats,
    sums_BK: Floats,
    num_rows: int,
    units: Units,
    resampling: Resampling,
    rule: Rule,
    entry: Mapping[str, Any],
) -> Measured:
    resampling = replace(resampling, method="percentile")

    def judged(value: Callable[[Floats], Any], sign: int = 1) -> Interval:
        with np.errstate(invalid="ignore", divide="ignore"):
            point, drawn = sign * value(total_K) + 0.0, sign * value(sums_BK) + 0.0  # no −0
        return interval(float(point), drawn, units, resampling)

    def pair(first: Callable[[Floats], Any], second: Callable[[Floats], Any], sign: int) -> Pair:
        gain = judged(lambda sums: second(sums) - first(sums), sign)
        return Pair(judged(first), judged(second), gain)

    metrics: dict[str, Pair] = {}
    log_loss = None
    if entry["task"] != "regression":
        num_classes = int(entry["num_classes"])
        cells = num_classes**2

        def way(objective: Objective, number: int) -> Callable[[Floats], Any]:
            def value(sums: Floats) -> Any:
                part = sums[..., number * cells : (number + 1) * cells]
                shape = (*part.shape[:-1], num_classes, num_classes)
                return objective.of_confusion(part.reshape(shape))

            return value

        for objective in _objectives(entry):
            name = objective.metric or "mean_cost"
            metrics[name] = pair(way(objective, 0), way(objective, 1), objective.sign)
        place = 2 * cells
        log_loss = pair(
            lambda sums: sums[..., place + 1] / sums[..., place],
            lambda sums: sums[..., place + 2] / sums[..., place],
            -1,
        )
    coverage = size = None
    if rule.conformal is not None:
        coverage = judged(lambda sums: sums[..., -2] / sums[..., -3])
        size = judged(lambda sums: sums[..., -1] / sums[..., -3])
    return Measured(rule, units, num_rows, metrics, log_loss, coverage, size)


def _objectives(entry: Mapping[str, Any]) -> list[Objective]:
    """Return by what predicted classes are judged: the metrics of a binary target, and costs."""
    found = [Objective(name, None) for name in _METRICS] if entry["task"] == "binary" else []
    costs = entry.get("objective", {}).get("costs")
    if costs is not None:
        found.append(Objective(None, tuple(tuple(row) for row in costs)))
    return found


def _promise(measured: Measured, split: str | None) -> str:
    if measured.rule.conformal is None:
        return ""
    if split in _GUARANTEED and measured.units.name == "row":
        return (
            "Guaranteed on average over valid sets, as the split is random: a test set shows more "
            "or less by chance."
        )
    why = _WHY_NOT.get(split, f"those of one {measured.units.name} are alike")
    return f"Measured, not guaranteed: test rows are not exchangeable with valid rows, as {why}."


def _pair_table(measured: Measured, target: Target, percent: str) -> Table | None:
    known = {metric.name: metric.title for metric in METRICS[target.task]}
    rows: list[tuple[Cell, ...]] = [
        (known.get(name, "mean cost"), *_pair_cells(pair))
        for name, pair in measured.metrics.items()
    ]
    if measured.log_loss is not None:
        rows.append(("log-loss", *_pair_cells(measured.log_loss)))
    if not rows:
        return None
    usual, ruled = "at 0.5", f"at {measured.rule.threshold:.4g}"
    if target.task == "multiclass":
        usual, ruled = "likeliest class", "as decided"
    if calibration := measured.rule.calibration:
        usual, ruled = f"{usual}, raw", f"{ruled}, calibrated"
    return Table(
        title="The usual way and as decided",
        headings=(
            "metric", usual, "low", "high", ruled, "low", "high",
            f"gain ({percent})", "low", "high",
        ),
        rows=tuple(rows),
        note=f"Gain: positive is better. Calibration map: {calibration or 'none'}.",
    )  # fmt: skip


def _coverage_table(measured: Measured, target: Target, percent: str) -> Table | None:
    limit = measured.rule.conformal
    if limit is None or measured.coverage is None or measured.size is None:
        return None
    what = "mean width" if target.task == "regression" else "mean number of classes"
    return Table(
        title="Coverage of prediction intervals"
        if target.task == "regression"
        else "Coverage of sets of classes",
        headings=("measure", "asked for", "measured", f"low ({percent})", "high"),
        rows=(
            ("coverage", limit.coverage, *_cells(measured.coverage)),
            (what, None, *_cells(measured.size)),
        ),
        note="Each row counts once, whatever its weight.",
    )


def _curve_chart(measured: Measured, target: Target, entry: Mapping[str, Any]) -> Chart | None:
    threshold = entry.get("threshold")
    if threshold is None:
        return None
    objective = Objective(entry["objective"]["metric"], entry["objective"]["costs"])
    x, y = zip(*threshold["curve"], strict=True)
    ends = [min(y), max(y)]
    marks = [(DEFAULT, "0.5", "dot")]
    if measured.rule.threshold != DEFAULT:
        marks.append((measured.rule.threshold, f"used: {measured.rule.threshold:.4g}", "dash"))
    lines = [
        {
            "type": "scatter", "mode": "lines", "x": [at, at], "y": ends, "name": name,
            "tone": "ink", "line": {"dash": dash, "width": 1.4}, "hoverinfo": "name",
        }
        for at, name, dash in marks
    ]  # fmt: skip
    best = threshold["tuned"]
    between = (
        ""
        if best["ci_low"] is None
        else f", its interval over resamples {best['ci_low']:.4g} to {best['ci_high']:.4g}"
    )
    curve = {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": objective.title, "tone": 0}
    return Chart(
        name="threshold",
        title=f"{objective.title} by threshold, valid rows",
        alternative=(f"Best at {best['value']:.4g}{between}; used: {measured.rule.threshold:.4g}."),
        traces=(curve, *lines),
        layout={
            "xaxis": {
                "title": {"text": f"threshold on P({target.name} = {target.labels[1]})"},
                "range": [0, 1],
            },
            "yaxis": {"title": {"text": objective.title}},
        },
    )


def _reliability_chart(target: Target, entry: Mapping[str, Any]) -> Chart | None:
    curves = entry.get("calibration", {}).get("reliability")
    if not curves:
        return None
    calibration = entry["calibration"]
    used = "" if calibration["chosen"] == calibration["tried"] else ", not used"
    names = {"before": "raw", "after": f"{calibration['tried']}, cross-fitted{used}"}
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": curve["predicted"],
            "y": curve["observed"],
            "name": names[when],
            "tone": number,
            "hovertemplate": "predicted %{x:.4g}, observed %{y:.4g}<extra>%{fullData.name}</extra>",
        }
        for number, (when, curve) in enumerate((name, curves[name]) for name in names)
    ]
    perfect = {
        "type": "scatter", "mode": "lines", "x": [0, 1], "y": [0, 1], "tone": "soft",
        "line": {"dash": "dot", "width": 1.2}, "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip
    off = {
        names[when]: float(np.abs(np.subtract(curve["predicted"], curve["observed"])).mean())
        for when, curve in ((name, curves[name]) for name in names)
    }
    is_binary = target.task == "binary"
    which = (
        f"P({target.name} = {target.labels[1]})" if is_binary else "probability, likeliest class"
    )
    return Chart(
        name="reliability",
        title="Reliability, out-of-fold rows",
        alternative=(
            "Rows in ten bins of equally many; mean distance of probability and share: "
            + ", ".join(f"{name} {value:.3g}" for name, value in off.items())
            + ". Dotted: perfect."
        ),
        traces=(*traces, perfect),
        layout={
            "xaxis": {"title": {"text": f"mean {which}"}},
            "yaxis": {"title": {"text": "share of hits"}},
        },
    )


def _pair_json(pair: Pair, usual: str, ruled: str) -> Json:
    return {
        usual: interval_json(pair.usual),
        ruled: interval_json(pair.ruled),
        "gain": interval_json(pair.gain),
    }


def _pair_cells(pair: Pair) -> tuple[Cell, ...]:
    return (*_cells(pair.usual), *_cells(pair.ruled), *_cells(pair.gain))


def _cells(found: Interval) -> tuple[Cell, ...]:
    told = interval_json(found)
    return (told["value"], told["ci_low"], told["ci_high"])
