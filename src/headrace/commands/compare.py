"""``headrace compare RUN RUN…``: the models of several runs beside each other, whenever they ran.

What a run said of the test rows lies in the journal, and with MLflow: ``comparison.json``, and
``resamples.parquet``, from which differences are paired across runs. Nothing is read from the test
rows again, so a comparison is no look at them. Runs of other rows, labels or weights are refused.

A model that says the same in several runs, because its stage was reused, is shown once. Models
whose settings are equal but for the seed are replicates: their spread stands beside the intervals,
and a difference that is no larger is called so.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from headrace.commands.results import interval_text
from headrace.commands.settings import stage_of
from headrace.commands.stage import SETTINGS
from headrace.errors import ConfigError, DataError, nearest
from headrace.evaluation.bootstrap import Interval, IntervalMethod, Resampling, Scored, Units
from headrace.evaluation.pairs import (
    Pair,
    Rank,
    best_of,
    compare_pairs,
    corrected,
    ranks,
    resamples_needed,
    unpaired,
)
from headrace.evaluation.resamples import RESAMPLES, read_resamples
from headrace.evaluation.seed_noise import SeedNoise, is_inside, seed_noise
from headrace.project import Project
from headrace.storage import read_json
from headrace.tracking.history import (
    Run,
    find_run,
    kept_file,
    list_runs,
    read_run,
    run_path,
    stage_in,
)

_COMPARISON = "comparison.json"
_REMEMBERED = 20  # runs that are looked at for other seeds at the end of one
_MLFLOW_ID = re.compile(r"^[0-9a-f]{32}$")
_METRIC_WIDTH, _OTHER_WIDTH = 28, 42  # of the columns of the table of values, in a terminal
# What must agree for resample b to hold the same units in two runs.
_DRAWN = ("unit", "unit_digest", "num_resamples", "seed", "stratify", "block", "resampling")


@dataclass(frozen=True)
class Told:
    """What one run said: comparison.json, its resamples if they are there, settings per model."""

    name: str
    content: Mapping[str, Any]
    scored: Mapping[str, Mapping[str, Scored]] | None
    settings: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Entry:
    """One model of one run, or of several where it says the same, on one target."""

    model: str
    runs: tuple[str, ...]
    values: Mapping[str, Interval]  # metric → estimate
    scored: Scored | None
    drawn: tuple[Any, ...]  # entries with equal ones have the same resamples
    settings: Mapping[str, str]

    @property
    def name(self) -> str:
        """The model and where it is from."""
        return f"{self.model} {'+'.join(self.runs)}"


@dataclass(frozen=True)
class Compared:
    """One target: entries best first, every pair of them, and the spread over seeds."""

    target: str
    metrics: Mapping[str, Mapping[str, Any]]  # name → its entry in comparison.json
    primary: str
    confidence: float
    num_rows: int
    units: str
    entries: tuple[Entry, ...]
    pairs: tuple[Pair, ...]
    ranks: Mapping[str, Rank]  # by name; empty where no entry has a value
    noise: Mapping[str, SeedNoise] = field(default_factory=dict)  # name of an entry → its group's
    warnings: tuple[str, ...] = ()


def compare(
    project: Project, names: Sequence[str], *, target: str | None, metric: str | None
) -> list[Compared]:
    """Compare the models of the runs called ``names``, on one target or on all they share.

    Raises:
        ConfigError: no such run, target or metric.
        DataError: runs of different test rows, labels or weights; a run without an evaluation.
    """
    runs = _tell_apart([_told(project, name) for name in dict.fromkeys(names)])
    shared = [
        name
        for name in runs[0].content["targets"]
        if all(name in run.content["targets"] for run in runs)
    ]
    if target is not None and target not in shared:
        raise ConfigError(
            f"--target {target!r} is not among the targets that all runs have"
            f"{nearest(target, shared)}; they share {', '.join(shared) or 'none'}"
        )
    if not shared:
        raise DataError("the runs have no target in common; compare runs of one project")
    _require_same_rows(runs)
    return [_compare(runs, name, metric) for name in ([target] if target else shared)]


def print_compared(found: Sequence[Compared], console: Console) -> None:
    """Print what was found, target by target."""
    for one in found:
        title = one.metrics[one.primary]["title"]
        console.print(
            f"{one.target}: {one.num_rows:,} test rows{one.units}, "
            f"{100 * one.confidence:.4g} % intervals; best first by {title}",
            style="bold",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        num_metrics = max(1, (console.width - _OTHER_WIDTH) // _METRIC_WIDTH)
        console.print(_values_table(one, num_metrics), highlight=False)
        if one.pairs:
            console.print(_pairs_table(one), highlight=False)
        for line in [*_noise_sentences(title, one.entries, one.noise), *one.warnings]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def seed_sentences(project: Project) -> list[str]:
    """Say how far the models of the newest run moved in earlier ones where only the seed differed.

    Of the last runs of this folder that were evaluated on the same rows and labels.
    """
    told: list[Told] = []
    for run_id in reversed(list_runs(project.journal)[-_REMEMBERED:]):
        with suppress(DataError):  # not evaluated, or on other rows
            one = _of_journal(project, read_run(run_path(project.journal, run_id)))
            _require_same_rows([*told[:1], one])
            told.append(one)
    if len(told) < 2:
        return []
    newest, *_ = told = _tell_apart(told)
    lines = []
    for target, content in newest.content["targets"].items():
        primary = content["primary"]
        runs = [run for run in told if primary in _names(run.content["targets"].get(target, {}))]
        metrics = _metrics(runs, target)
        entries = _entries(runs, target, metrics)
        own = [one for one in entries if newest.name in one.runs]
        noise = _noise(entries, primary)
        lines += [
            f"{target}: {line}" for line in _noise_sentences(metrics[primary]["title"], own, noise)
        ]
    return lines


def _told(project: Project, name: str) -> Told:
    if not _MLFLOW_ID.match(name):
        return _of_journal(project, find_run(project.journal, name))
    return _of_mlflow(project, name)


def _of_journal(project: Project, run: Run) -> Told:
    evaluate = stage_in(project.journal, run, "evaluate")
    kept = {
        event.data["name"]: kept_file(project.journal, event.data["sha256"])
        for event in (evaluate.of_kind("file") if evaluate else ())
    }
    if _COMPARISON not in kept or not kept[_COMPARISON].is_file():
        raise DataError(
            f"run {run.run_id} has no evaluation in the journal; compare runs that finished "
            f"`evaluate` with this version of headrace"
        )
    content = read_json(kept[_COMPARISON])
    models = {model for entry in content["targets"].values() for model in entry["models"]}
    settings = {}
    for model in models:
        if made := stage_in(project.journal, run, stage_of(model)):
            settings[model] = _settings({k: str(v) for k, v in made.params.items()})
    resamples = kept.get(RESAMPLES)
    scored = read_resamples(resamples) if resamples and resamples.is_file() else None
    return Told(run.run_id, content, scored, settings)


def _of_mlflow(project: Project, name: str) -> Told:
    """Read a run from MLflow; from the journal, where it is one of this folder."""
    from mlflow.exceptions import MlflowException

    from headrace.tracking.location import connect, find_store, quiet, told_plainly
    from headrace.tracking.replica import RUN_ID_TAG

    store = find_store(project.root)
    client = connect(store)
    with quiet(), told_plainly(store), TemporaryDirectory() as scratch:
        try:
            run = client.get_run(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise ConfigError(f"MLflow at {store.name} has no run {name}") from error
        run_id = run.data.tags.get(RUN_ID_TAG, "")
        if run_id in list_runs(project.journal):
            return _of_journal(project, read_run(run_path(project.journal, run_id)))
        parent = run.data.tags.get("mlflow.parentRunId", name)
        there = {file.path for file in client.list_artifacts(parent)}
        if _COMPARISON not in there:
            raise DataError(
                f"MLflow run {name} has no {_COMPARISON}; compare runs that finished `evaluate` "
                f"with this version of headrace"
            )
        content = read_json(Path(client.download_artifacts(parent, _COMPARISON, scratch)))
        scored = None
        if RESAMPLES in there:
            scored = read_resamples(Path(client.download_artifacts(parent, RESAMPLES, scratch)))
        params = client.get_run(parent).data.params
    settings: dict[str, Mapping[str, str]] = {}
    for model in {model for entry in content["targets"].values() for model in entry["models"]}:
        start = f"{stage_of(model).replace('@', '/')}."
        own = {k.removeprefix(start): v for k, v in params.items() if k.startswith(start)}
        settings[model] = _settings(own)
    return Told(run_id or name, content, scored, settings)


def _settings(params: Mapping[str, str]) -> dict[str, str]:
    """Return what makes a model what it is: its settings, and the data that it learnt from."""
    data = ("table_digest", "encoded_digest")
    return {k: v for k, v in params.items() if k.startswith(SETTINGS) or k in data}


def _tell_apart(runs: Sequence[Told]) -> list[Told]:
    """Name the runs by their numbers, unless two of them have the same."""
    numbers = [run.name.partition("-")[0] for run in runs]
    if len(set(numbers)) < len(numbers):
        return list(runs)
    return [replace(run, name=number) for run, number in zip(runs, numbers, strict=True)]


def _require_same_rows(runs: Sequence[Told]) -> None:
    first = runs[0]
    for other in runs[1:]:
        one, two = first.content, other.content
        if one["split_digest"] != two["split_digest"]:
            raise DataError(
                f"run {first.name} was evaluated on {one['num_rows']:,} test rows (digest "
                f"{one['split_digest'][:12]}), run {other.name} on {two['num_rows']:,} other ones "
                f"(digest {two['split_digest'][:12]}); scores of different rows cannot be "
                f"compared: name runs of one split"
            )
        for target in set(one["targets"]) & set(two["targets"]):
            digests = [run["targets"][target]["label_digest"] for run in (one, two)]
            if digests[0] != digests[1]:
                raise DataError(
                    f"runs {first.name} and {other.name} have the same test rows, but other "
                    f"labels or weights of {target!r} (digests {digests[0][:12]} and "
                    f"{digests[1][:12]}); name runs of the same data"
                )


def _compare(runs: Sequence[Told], target: str, metric: str | None) -> Compared:
    content = runs[0].content
    entry = content["targets"][target]
    metrics = _metrics(runs, target)
    primary = metric or entry["primary"]
    if primary not in metrics:
        raise ConfigError(
            f"{primary!r} is no metric of {target!r} in all runs{nearest(primary, list(metrics))}; "
            f"they share {', '.join(metrics)}"
        )
    is_up = bool(metrics[primary]["higher_is_better"])
    entries = _sorted(_entries(runs, target, metrics), primary, is_up=is_up)
    confidence = float(content["confidence"])
    pairs = _pairs(entries, primary, entry, content, confidence)
    points = {one.name: one.values[primary].value for one in entries}
    best = best_of(points, higher_is_better=is_up)
    return Compared(
        target=target,
        metrics=metrics,
        primary=primary,
        confidence=confidence,
        num_rows=entry["num_rows"],
        units="" if entry["unit"] == "row" else f" in {entry['num_units']:,} {entry['unit']}s",
        entries=tuple(entries),
        pairs=pairs,
        ranks=ranks(best, points, pairs, 1 - confidence) if best else {},
        noise=_noise(entries, primary),
        warnings=tuple(_warnings(runs, entries, confidence)),
    )


def _metrics(runs: Sequence[Told], target: str) -> dict[str, Mapping[str, Any]]:
    """Return the metrics that all runs have, as the first one describes them."""
    first, *others = (run.content["targets"][target] for run in runs)
    shared = set.intersection(_names(first), *map(_names, others))
    return {one["name"]: one for one in first["metrics"] if one["name"] in shared}


def _names(entry: Mapping[str, Any]) -> set[str]:
    return {one["name"] for one in entry.get("metrics", ())}


def _entries(
    runs: Sequence[Told], target: str, metrics: Mapping[str, Mapping[str, Any]]
) -> list[Entry]:
    found: list[Entry] = []
    for run in runs:
        told = run.content["targets"][target]["models"]
        drawn = tuple(run.content[name] for name in _DRAWN)
        for model, scores in told.items():
            new = Entry(
                model,
                (run.name,),
                {name: _estimate(scores[name]) for name in metrics},
                run.scored[target][model] if run.scored else None,
                drawn,
                run.settings.get(model, {}),
            )
            same = next((i for i, old in enumerate(found) if _says_the_same(old, new)), None)
            if same is None:
                found.append(new)
            else:
                found[same] = replace(found[same], runs=(*found[same].runs, run.name))
    return found


def _estimate(score: Mapping[str, Any]) -> Interval:
    return Interval(
        score["value"],
        score["ci_low"],
        score["ci_high"],
        standard_error=score["standard_error"],
        reason=score["reason"],
    )


def _says_the_same(old: Entry, new: Entry) -> bool:
    if (old.model, old.drawn, old.values) != (new.model, new.drawn, new.values):
        return False
    if old.scored is None or new.scored is None:
        return False
    return all(
        np.array_equal(values, new.scored.resamples[metric], equal_nan=True)
        for metric, values in old.scored.resamples.items()
    )


def _sorted(entries: Sequence[Entry], metric: str, *, is_up: bool) -> list[Entry]:
    def key(one: Entry) -> float:
        value = one.values[metric].value
        return float("inf") if value is None else (-value if is_up else value)

    return sorted(entries, key=key)


def _pairs(
    entries: Sequence[Entry],
    metric: Any,
    told: Mapping[str, Any],
    content: Mapping[str, Any],
    confidence: float,
) -> tuple[Pair, ...]:
    """Return every pair, paired where resamples are there and the same."""
    units = Units(told["unit"], np.empty(0, np.int64), told["num_units"], block=content["block"])
    # What bca needs beside resamples is not kept.
    method: IntervalMethod = "basic" if content["interval"] == "basic" else "percentile"
    resampling = Resampling(content["num_resamples"], confidence, content["seed"], method=method)
    pairs: list[Pair] = []
    for one, other in combinations(entries, 2):
        if _is_paired(one, other):
            scored = {e.name: e.scored for e in (one, other) if e.scored is not None}
            pairs += compare_pairs(metric, scored, units, resampling)
        else:
            values = one.values[metric], other.values[metric]
            pairs.append(unpaired(one.name, other.name, *values, confidence))
    return corrected(pairs)


def _is_paired(one: Entry, other: Entry) -> bool:
    return one.drawn == other.drawn and one.scored is not None and other.scored is not None


def _noise(entries: Sequence[Entry], metric: str) -> dict[str, SeedNoise]:
    """Return the spread over seeds of the entries that have replicates."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for one in entries:
        rest = {k: v for k, v in one.settings.items() if k != f"{SETTINGS}seed"}
        if f"{SETTINGS}seed" in one.settings:
            groups.setdefault((one.model, *sorted(rest.items())), []).append(one)
    found: dict[str, SeedNoise] = {}
    for group in groups.values():
        by_seed = {one.settings[f"{SETTINGS}seed"]: one.values[metric].value for one in group}
        if noise := seed_noise([value for value in by_seed.values() if value is not None]):
            found |= {one.name: noise for one in group}
    return found


def _warnings(runs: Sequence[Told], entries: Sequence[Entry], confidence: float) -> list[str]:
    told = [
        f"run {run.name}: its resamples are gone, so its models are compared unpaired, which is "
        f"far less sharp; run `headrace repro evaluate` on it to have them again"
        for run in runs
        if run.scored is None
    ]
    first = runs[0]
    for run in runs[1:]:
        for name in _DRAWN:
            values = [one.content[name] for one in (first, run)]
            if values[0] != values[1]:
                told.append(
                    f"runs {first.name} and {run.name} have other resamples ({name}: {values[0]} "
                    f"and {values[1]}), so their models are compared unpaired, which is far less "
                    f"sharp"
                )
                break
    needed = resamples_needed(len(entries), confidence)
    if first.content["num_resamples"] < needed:
        told.append(
            f"{first.content['num_resamples']} resamples cannot tell any pair of {len(entries)} "
            f"models apart once corrected for all pairs; set `evaluate.num_resamples` to {needed} "
            f"or more, or name fewer runs"
        )
    return told


def _values_table(found: Compared, num_metrics: int) -> Table:
    """Return the values of as many metrics as asked for, the primary one first."""
    table = Table()
    table.add_column("model and run", no_wrap=True)
    ordered = sorted(found.metrics, key=lambda name: name != found.primary)[:num_metrics]
    for name in ordered:
        table.add_column(found.metrics[name]["title"], justify="right")
    table.add_column("against the best")
    for one in found.entries:
        cells = [
            interval_text(one.values[n].value, one.values[n].low, one.values[n].high)
            for n in ordered
        ]
        table.add_row(one.name, *cells, found.ranks.get(one.name, "untested"))
    return table


def _pairs_table(found: Compared) -> Table:
    title = found.metrics[found.primary]["title"]
    table = Table(title=f"pairs by {title}", title_justify="left")
    table.add_column("pair")
    for name in ("difference", "p", "p, Holm", "smallest detectable"):
        table.add_column(name, justify="right")
    table.add_column("told apart")
    by_name = {one.name: one for one in found.entries}
    for pair in found.pairs:
        change = pair.difference
        table.add_row(
            f"{pair.first} − {pair.second}",
            interval_text(change.value, change.low, change.high),
            *(
                "–" if x is None else f"{x:.3g}"
                for x in (pair.p_value, pair.p_holm, pair.detectable)
            ),
            ", ".join(_remarks(pair, found, by_name)),
        )
    return table


def _remarks(pair: Pair, found: Compared, by_name: Mapping[str, Entry]) -> list[str]:
    if pair.p_holm is None:
        return ["no test"]
    said = ["yes" if pair.p_holm <= 1 - found.confidence else "no"]
    first, second = found.noise.get(pair.first), found.noise.get(pair.second)
    if pair.difference.value is not None and is_inside(pair.difference.value, first, second):
        said.append("inside seed noise")
    if not _is_paired(by_name[pair.first], by_name[pair.second]):
        said.append("unpaired")
    return said


def _noise_sentences(
    title: str, entries: Sequence[Entry], noise: Mapping[str, SeedNoise]
) -> list[str]:
    """Say the spread over seeds of each model that has replicates."""
    spreads = dict.fromkeys((one.model, noise[one.name]) for one in entries if one.name in noise)
    return [
        f"{model}: {title} over {spread.num_seeds} seeds has a standard deviation of "
        f"{spread.deviation:.3g} (from {spread.low:.4g} to {spread.high:.4g}), which its interval "
        f"does not hold; a gain of less than {spread.reach:.3g} is inside seed noise"
        for model, spread in spreads
    ]
