"""``headrace search MODEL``: try settings of one model, tell which are best and which are tied.

Each trial fits the model as its stage would, in a folder of its own, and is scored by the metric
that ``stack`` chooses by: on out-of-fold predictions of train rows, or, of a model without them, on
valid rows. Test rows are not read. The state is in ``.headrace/search/MODEL/KEY``, where KEY is the
digest of data, settings, space and code: a search that was stopped goes on, another one starts
anew. In the journal a search is one run and each trial a stage of it, so MLflow shows trials as
nested runs. docs/search.md says how to read what it prints.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import yaml
from rich.console import Console
from rich.table import Table

from headrace.commands.budget import Budget
from headrace.commands.checkpoints import stage_entry
from headrace.commands.lock import lock_folder, told_to
from headrace.commands.refit import Hushed, Inputs, project_inputs, refit, told_on, warn_of_stale
from headrace.commands.results import interval_text
from headrace.commands.settings import Settings, read_settings, stage_of
from headrace.commands.space import Point, Space, value_at, with_point
from headrace.commands.stage import Guard, guarded
from headrace.commands.sync import complete_last_run
from headrace.commands.trials import (
    Method,
    Trial,
    propose,
    read_trials,
    trial_name,
    write_point,
    write_trial,
)
from headrace.data.predictions import Predictions
from headrace.data.table import Table as DataTable
from headrace.data.table import open_table
from headrace.data.truth import Truth, line_up, read_truth
from headrace.errors import ConfigError, DataError, Stopped, explain
from headrace.evaluation.bootstrap import Interval, Resampling, Scored, Units, bootstrap, interval
from headrace.evaluation.metrics import Metric, Sample
from headrace.evaluation.tuning import Standings, rank_trials
from headrace.lineage import code_digests, stage_modules
from headrace.models.bagging import WHOLE, FitPlan
from headrace.models.protocol import SECOND_LEVEL, FitParams
from headrace.params import Section, parse_section
from headrace.project import Project
from headrace.record import Scalar
from headrace.schema import Target
from headrace.stages.stack import StackParams, chosen_metrics
from headrace.stages.train import plan_fits
from headrace.storage import canonical_json, digest_bytes, read_json, write_file, write_json
from headrace.tracking.history import list_runs
from headrace.tracking.journal import RunJournal, StageJournal, close_stale, open_run, reopen_run

SUMMARY, FRAGMENT, RUN = "search.json", "best.yaml", "run.json"
_KEY_LETTERS = 16
_SHOWN = 10  # trials of the table
_DEFAULT_TRIALS = 20
_MOST_FAILURES = 10  # at the start, with no trial that ends well
_TITLES = {"train": "out-of-fold train rows", "valid": "valid rows"}


@dataclass(frozen=True)
class Judge:
    """The rows that trials are scored on, their units, and how."""

    truth: Truth
    target: Target
    metric: Metric
    resampling: Resampling

    @property
    def rows(self) -> str:
        """What the rows are, in words."""
        return _TITLES[self.truth.split]

    @property
    def is_labelled(self) -> npt.NDArray[np.bool_]:
        """Which of them have a label."""
        return ~np.isnan(self.truth.labels[self.target.name])

    @property
    def units(self) -> Units:
        """The resampling units of the labelled rows."""
        truth = self.truth
        return Units(truth.unit, truth.unit_of_row, len(truth.unit_of_row)).of(self.is_labelled)

    def score(self, predictions: Predictions) -> tuple[Interval, npt.NDArray[np.float64]]:
        """Return the score with its interval, and its resamples (B,).

        Raises:
            DataError: if rows are missing, or the metric is not defined on them.
        """
        is_labelled = self.is_labelled
        places = line_up(predictions, self.truth, is_labelled)
        weight = self.truth.weight
        sample = Sample(
            self.target.task,
            self.truth.labels[self.target.name][is_labelled],
            predictions.values[places],
            None if weight is None else weight[is_labelled],
        )
        name = self.metric.name
        found = bootstrap(sample, self.units, self.resampling, threshold=0.5, only=name)
        if not np.isfinite(found.points[name]):
            raise DataError(
                f"target {self.target.name!r}: {self.metric.title} is not defined on the "
                f"{self.rows} ({self.metric.undefined or 'a prediction is not finite'})"
            )
        told = interval(found.points[name], found.resamples[name], self.units, self.resampling)
        return told, found.resamples[name]


@dataclass(frozen=True)
class Search:
    """All that one search is about; nothing of it changes while it runs."""

    project: Project
    settings: Settings
    model: str
    space: Space
    section: Section  # as params.yaml has it
    method: Method
    seed: int
    inputs: Inputs
    plans: tuple[FitPlan, ...]
    judge: Judge
    folder: Path

    @property
    def key(self) -> str:
        """Where the model's settings stand in params.yaml."""
        return self.model if self.model in SECOND_LEVEL else f"train.{self.model}"

    def params_of(self, number: int, point: Point) -> Section:
        """Return the settings of one trial; the first is params.yaml as it is.

        Raises:
            ConfigError: if they do not go together.
        """
        if number == 0:
            return self.section
        raw = with_point(self.settings.base(self.model), point)
        return parse_section(type(self.section), raw, key=self.key, path=self.settings.path)


def search(
    project: Project,
    model: str,
    *,
    method: Method,
    trials: int | None,
    budget_s: float | None,
    target: str | None,
    seed: int,
    wait: bool,
    console: Console,
) -> None:
    """Try settings of ``model`` until the budget is spent; print and keep what came of it.

    Raises:
        ConfigError: a section ``search.MODEL`` or an option that is wrong.
        DataError: a target that cannot be learnt; all trials failed.
        Stopped: on a signal; the next call goes on.
    """
    if trials is not None and trials < 1:
        raise ConfigError(f"--trials is {trials}; at least 1 is needed")
    command = f"headrace search {model}"
    with lock_folder(project, command, wait=wait, on_wait=told_to(console)):
        found = open_search(project, model, method=method, target=target, seed=seed)
        with guarded(project, f"search of {model}", found.settings.resources) as guard:
            network = ["train@nn"] if model in SECOND_LEVEL else []
            warn_of_stale(project, ["reduce", "encode", *network], console)
            close_stale(project.journal)
            complete_last_run(project)
            limit = trials if trials is not None or budget_s is not None else _DEFAULT_TRIALS
            with _journaled(found) as journal:
                ended = run_trials(
                    found, journal, guard, limit=limit, budget=Budget(budget_s), console=console
                )
                _conclude(found, ended, journal, console)


def open_search(
    project: Project, model: str, *, method: Method, target: str | None, seed: int
) -> Search:
    """Read and check all that a search depends on, before anything is fitted."""
    settings = read_settings(project)
    section = settings.section(stage_of(model))
    space = settings.space(model)
    if method == "grid":
        space.require_grid()
    inputs = project_inputs(project, model)
    table = open_table(inputs.table)
    params = cast(StackParams, settings.section("stack"))
    wanted = table.contract.target(target) if target else table.contract.targets[0]
    plans = _plans(table, inputs, model, section)
    split = "train" if plans and plans[0].name else "valid"
    _refuse_seen(model, section, split)
    truth = read_truth(table, split, unit=params.unit, key="stack.unit")
    resampling = Resampling(
        params.num_resamples, params.confidence, params.seed, settings.resources.threads
    )
    metric = chosen_metrics(table.contract, params)[wanted.name]
    entry = {
        **stage_entry(project, stage_of(model), section, inputs.folders),
        "code": code_digests(*stage_modules(stage_of(model)), "headrace.evaluation.tuning"),
        "space": space.to_json(),
        "method": method,
        "seed": seed,
        "score": {
            "target": wanted.name,
            "metric": metric.name,
            "unit": truth.unit,
            "num_resamples": params.num_resamples,
            "confidence": params.confidence,
            "seed": params.seed,
        },
    }
    digest = digest_bytes(canonical_json(entry).encode())[:_KEY_LETTERS]
    return Search(
        project=project,
        settings=settings,
        model=model,
        space=space,
        section=section,
        method=method,
        seed=seed,
        inputs=inputs,
        plans=plans,
        judge=Judge(truth, wanted, metric, resampling),
        folder=project.state / "search" / model / digest,
    )


def run_trials(
    search: Search,
    journal: RunJournal,
    guard: Guard,
    *,
    limit: int | None,
    budget: Budget,
    console: Console,
) -> list[Trial]:
    """Run trials until there are ``limit``, the time is up or every point was tried; return all."""
    ended, begun = read_trials(search.folder, search.space)
    if ended or begun:
        told = f"going on with {len(ended)} trials" + (
            f", {len(begun)} unfinished" if begun else ""
        )
        console.print(told, highlight=False)
    while limit is None or len(ended) < limit:
        _refuse_hopeless(search, ended)
        if not budget.has_time([trial.seconds for trial in ended if trial.state == "finished"]):
            console.print("the time is up", highlight=False)
            break
        number, point = _next(search, ended, begun)
        if point is None:
            console.print("every point of the space has been tried", highlight=False)
            break
        with console.status(f"trial {number}") as status:
            tell = told_on(status, f"trial {number}")
            trial = _run_trial(search, number, point, journal, guard, on_progress=tell)
        ended.append(trial)
        console.print(_line(search, trial), markup=False, highlight=False, soft_wrap=True)
    return ended


def _refuse_hopeless(search: Search, ended: Sequence[Trial]) -> None:
    """Give up where nothing but failures comes."""
    if len(ended) >= _MOST_FAILURES and all(trial.state == "failed" for trial in ended):
        raise DataError(_all_failed(search, ended))


def _all_failed(search: Search, ended: Sequence[Trial]) -> str:
    folder = search.folder.relative_to(search.project.root)
    return (
        f"search of {search.model}: all {len(ended)} trials failed; the first: {ended[0].error}; "
        f"mend that, or delete {folder} to try them again"
    )


def _next(
    search: Search, ended: Sequence[Trial], begun: dict[int, Point]
) -> tuple[int, Point | None]:
    """Return what to try now: first what was interrupted, then params.yaml as it is."""
    if begun:
        number = min(begun)
        return number, begun.pop(number)
    number = max((trial.number for trial in ended), default=-1) + 1
    if number == 0:
        told = search.section.model_dump(mode="json")
        return 0, {name: value_at(told, name) for name in search.space.params}
    higher = search.judge.metric.higher_is_better
    point = propose(
        search.space, search.method, number, ended, seed=search.seed, is_higher_better=higher
    )
    return number, point


def _run_trial(
    search: Search,
    number: int,
    point: Point,
    journal: RunJournal,
    guard: Guard,
    *,
    on_progress: Callable[[str], None],
) -> Trial:
    folder = search.folder / trial_name(number)
    write_point(folder, point)
    scratch = folder / "scratch"
    started = time.monotonic()
    with _told(journal, search, number, point) as told:
        try:
            params = search.params_of(number, point)
            found = refit(
                search.inputs,
                search.model,
                params,
                search.plans,
                scratch,
                split=search.judge.truth.split,
                resources=guard.resources,
                recorder=Hushed(on_warning=told.warn, on_progress=on_progress),
            )
            score, resamples = search.judge.score(found[search.judge.target.name])
        except Exception as error:  # anything that its library raises
            if isinstance(error, Stopped):
                raise
            seconds = round(time.monotonic() - started, 3)
            message, code = explain(error)
            trial = Trial(number, point, "failed", seconds, error=message)
            if guard.is_stopping:  # it took too much memory: the next call does not try it again
                write_trial(folder, trial)
                raise
            told.warn(message)
            told.close("failed", exit_code=code)
        else:
            seconds = round(time.monotonic() - started, 3)
            trial = Trial(
                number,
                point,
                "finished",
                seconds,
                score.value,
                score.low,
                score.high,
                tuple(float(one) if np.isfinite(one) else None for one in resamples),
            )
            told.metrics(_metrics(search, trial))
            told.peak_bytes = guard.watch.peak_bytes
            told.close("finished", exit_code=0)
    write_trial(folder, trial)
    shutil.rmtree(scratch, ignore_errors=True)
    return trial


@contextlib.contextmanager
def _told(journal: RunJournal, search: Search, number: int, point: Point) -> Iterator[StageJournal]:
    """Yield the recorder of one trial; what ends the whole search closes it as stopped."""
    told = journal.stage(trial_name(number), on_warning=lambda _: None)
    told.params({name: _scalar(value) for name, value in point.items()})
    truth = search.judge.truth
    told.dataset(
        f"table-{truth.split}",
        path=search.inputs.table,
        digest=truth.digest,
        num_rows=len(truth.row_id),
        context=truth.split,
    )
    try:
        yield told
    except BaseException as error:
        told.close("stopped", exit_code=explain(error)[1])
        raise


@contextlib.contextmanager
def _journaled(search: Search) -> Iterator[RunJournal]:
    """Open the run of the search, or go on with that of an earlier call; close it as due."""
    path = search.folder / RUN
    known = read_json(path)["run"] if path.is_file() else None
    if known in list_runs(search.project.journal):
        journal = reopen_run(search.project.journal, known)
    else:
        journal = open_run(search.project.journal, kind="search")
        write_json(path, {"run": journal.run_id})
    try:
        yield journal
    except BaseException as error:
        is_stop = isinstance(error, Stopped) or not isinstance(error, Exception)
        journal.close("interrupted" if is_stop else "failed")
        raise
    journal.close("finished")


def _conclude(
    search: Search, ended: Sequence[Trial], journal: RunJournal, console: Console
) -> None:
    finished = {trial.number: trial for trial in ended if trial.state == "finished"}
    if not finished:
        raise DataError(_all_failed(search, ended))
    judge = search.judge
    standings = rank_trials(
        {number: _scored(judge.metric, trial) for number, trial in finished.items()},
        judge.metric,
        judge.units,
        judge.resampling,
    )
    summary = _summary(search, ended, standings)
    write_json(search.folder / SUMMARY, summary)
    best = finished[standings.best.number]
    fragment = _fragment(search, best, standings, len(ended))
    write_file(search.folder / FRAGMENT, fragment)
    journal.file(search.folder / SUMMARY)
    journal.file(search.folder / FRAGMENT)
    console.print(_table(search, finished, standings), highlight=False)
    for sentence in summary["sentences"]:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    shown = (search.folder / FRAGMENT).relative_to(search.project.root)
    console.print(f"\n{shown}; nothing in params.yaml was changed:", highlight=False)
    console.print(fragment, markup=False, highlight=False, soft_wrap=True, end="")
    journal.note("\n".join(f"- {sentence}" for sentence in summary["sentences"]))


def _summary(search: Search, ended: Sequence[Trial], standings: Standings) -> dict[str, Any]:
    judge = search.judge
    by_number = {one.number: one for one in standings.of}
    return {
        "format": 1,
        "model": search.model,
        "target": judge.target.name,
        "metric": judge.metric.name,
        "higher_is_better": judge.metric.higher_is_better,
        "rows": judge.rows,
        "num_rows": int(judge.is_labelled.sum()),
        "unit": judge.units.name,
        "num_units": judge.units.count,
        "confidence": judge.resampling.confidence,
        "method": search.method,
        "num_trials": len(ended),
        "num_failed": sum(trial.state == "failed" for trial in ended),
        "best": standings.best.number,
        "optimism": standings.optimism,
        "sentences": _sentences(search, ended, standings),
        "trials": [
            {
                "number": trial.number,
                "state": trial.state,
                "params": trial.point,
                "seconds": trial.seconds,
                "error": trial.error,
                "value": trial.value,
                "ci_low": trial.low,
                "ci_high": trial.high,
                "difference": _difference(by_number[trial.number].difference)
                if trial.number in by_number
                else None,
                "tied": trial.number in by_number and by_number[trial.number].is_tied,
            }
            for trial in ended
        ],
    }


def _sentences(search: Search, ended: Sequence[Trial], standings: Standings) -> list[str]:
    judge = search.judge
    units = judge.units
    failed = sum(trial.state == "failed" for trial in ended)
    share = f"{judge.resampling.confidence:.0%}"
    told = [
        f"{judge.metric.title} of {judge.target.name} on {judge.is_labelled.sum():,} {judge.rows}; "
        f"{share} intervals over {units.count:,} {units.name}s; test rows were not read"
    ]
    best, others = standings.best, [one for one in standings.of[1:] if one.is_tied]
    if others:
        numbers = ", ".join(str(one.number) for one in others)
        told.append(f"tied with the best, trial {best.number}: {numbers}")
    now = next((one for one in standings.of if one.number == 0), None)
    if now is not None and best.number == 0:
        told.append("no trial beats the settings of params.yaml")
    elif now is not None and now.is_tied:
        told.append("the settings of params.yaml are tied with the best: the gain may be noise")
    told.append(
        f"the best score of {len(standings.of)} trials is optimistic, by about "
        f"{standings.optimism:.2g} here (bootstrap estimate), for it was chosen as the best: judge "
        f"it on rows that chose nothing"
    )
    if failed:
        first = next(trial for trial in ended if trial.state == "failed")
        told.append(f"{failed} of {len(ended)} trials failed, first {first.name}: {first.error}")
    return told


def _table(search: Search, finished: Mapping[int, Trial], standings: Standings) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("trial", justify="right")
    table.add_column(search.judge.metric.title, no_wrap=True)
    table.add_column("trial − best", no_wrap=True)
    table.add_column("")
    table.add_column("settings", overflow="fold")
    for one in standings.of[:_SHOWN]:
        trial, change = finished[one.number], one.difference
        verdict = "best" if one is standings.best else "tied" if one.is_tied else ""
        apart = "" if one is standings.best else _change_text(change)
        score = interval_text(trial.value, trial.low, trial.high)
        table.add_row(str(trial.number), score, apart, verdict, _settings(trial.point))
    return table


def _change_text(change: Interval) -> str:
    if change.low is None or change.high is None:
        return f"{change.value:+.2g}"
    return f"{change.value:+.2g} [{change.low:+.2g}, {change.high:+.2g}]"


def _fragment(search: Search, best: Trial, standings: Standings, num_trials: int) -> str:
    judge = search.judge
    score = interval_text(best.value, best.low, best.high)
    # What params.yaml leaves to the model stays left to it.
    said = {name: value for name, value in best.point.items() if best.number or value is not None}
    body: dict[str, Any] = with_point({}, said)
    for name in reversed(search.key.split(".")):
        body = {name: body}
    text: str = yaml.safe_dump(body, sort_keys=False)
    return (
        f"# Trial {best.number}, the best of {num_trials}: {judge.metric.title} of "
        f"{judge.target.name} {score} on {judge.rows},\n"
        f"# about {standings.optimism:.2g} too good for having been chosen as the best. Put into "
        f"params.yaml what is to hold.\n{text}"
    )


def _line(search: Search, trial: Trial) -> str:
    values = _settings(trial.point)
    if trial.state == "failed":
        return f"trial {trial.number} failed: {trial.error} ({values})"
    title = search.judge.metric.title
    score = interval_text(trial.value, trial.low, trial.high)
    now = ", as params.yaml has it" if trial.number == 0 else ""
    return f"trial {trial.number}: {title} {score}, {trial.seconds:.1f} s ({values}{now})"


def _settings(point: Point) -> str:
    return ", ".join(f"{name} {_scalar(value)}" for name, value in point.items())


def _metrics(search: Search, trial: Trial) -> dict[str, float]:
    rows = "out_of_fold" if search.judge.truth.split == "train" else "valid"
    name = f"{search.judge.target.name}/{rows}_{search.judge.metric.name}"
    told = {name: trial.value, f"{name}_ci_low": trial.low, f"{name}_ci_high": trial.high}
    return {name: value for name, value in told.items() if value is not None}


def _scored(metric: Metric, trial: Trial) -> Scored:
    resamples = np.array([np.nan if one is None else one for one in trial.resamples])
    assert trial.value is not None
    return Scored({metric.name: trial.value}, {metric.name: resamples})


def _difference(found: Interval) -> dict[str, float | None]:
    return {"value": found.value, "ci_low": found.low, "ci_high": found.high}


def _scalar(value: Any) -> Scalar:
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _plans(table: DataTable, inputs: Inputs, model: str, section: Section) -> tuple[FitPlan, ...]:
    """Return the fits that a score needs: of a bag all but the last, which predicts no train row.

    A second-level model plans for itself.
    """
    if model in SECOND_LEVEL:
        return ()
    plans = plan_fits(table, inputs.encoded, inputs.cache, section)
    return tuple(plan for plan in plans if plan.name != WHOLE)


def _refuse_seen(model: str, section: Section, split: str) -> None:
    """Refuse to score on valid rows a model that has looked at their labels."""
    is_seen = isinstance(section, FitParams) and section.stop_rows == "valid"
    if split == "valid" and is_seen:
        key = model if model in SECOND_LEVEL else f"train.{model}"
        raise ConfigError(
            f"`{key}.stop_rows` is valid, so that trials would be scored on rows whose labels they "
            f"have seen; set it to inner, or `{key}.bag` to folds"
        )
