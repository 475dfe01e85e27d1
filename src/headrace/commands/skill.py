"""``headrace skill MODEL``: how well a recipe does on rows it has not seen, and how it varies.

The whole recipe is repeated on bootstrap samples of the train rows: a table of its own is drawn
(``data/resample``), encoded and fitted anew, and judged on the rows that are not in it. So nothing
that was learnt, by the encoder or by the model, has met a row that judges it. What is done before,
in the SQL recipe, is not repeated: what it computes over rows lies outside the loop.

Refits run side by side in processes of their own, as far as threads and memory allow. Each one's
result is a file below ``.headrace/skill/MODEL/KEY``, so a call that was stopped goes on; KEY is the
digest of rows, settings and code. docs/skill.md says how to read what it prints.
"""

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.status import Status
from rich.table import Table

from headrace.commands.budget import Budget
from headrace.commands.checkpoints import stage_entry
from headrace.commands.execute import journaled
from headrace.commands.lock import lock_folder, told_to
from headrace.commands.refit import Hushed, Inputs, refit, say_nothing, told_on, warn_of_stale
from headrace.commands.settings import read_settings, stage_of
from headrace.commands.stage import Guard, guarded
from headrace.commands.supervise import die_with_parent
from headrace.commands.sync import complete_last_run
from headrace.data.resample import draw_units, write_resample
from headrace.data.table import open_table
from headrace.data.truth import Truth, UnitChoice, line_up, read_truth
from headrace.errors import ConfigError, DataError, ResourceError, Stopped, explain
from headrace.evaluation.metrics import METRICS, Sample
from headrace.evaluation.skill import FEW_REFITS, Skill, metrics_of, skill_of
from headrace.lineage import code_digests, stage_modules
from headrace.models.bagging import FitPlan
from headrace.models.protocol import SECOND_LEVEL, FitParams
from headrace.params import Resources, Section
from headrace.project import Project
from headrace.schema import Target
from headrace.stages.encode import EncodeParams, encode
from headrace.stages.stack import StackParams
from headrace.stages.train import plan_fits, train
from headrace.storage import canonical_json, digest_bytes, read_json, write_json
from headrace.training.params import TrainingParams

SUMMARY = "skill.json"
_FORMAT = 1
_KEY_LETTERS = 16
_WORKER_BYTES = 700 << 20  # that one process with torch and a small table holds at least
_GPU_DRIVER = Path("/proc/driver/nvidia/version")

Metrics = dict[str, dict[str, float | None]]  # per target and metric


@dataclass(frozen=True)
class Job:
    """All that one refit needs to know, in a form that another process can be told."""

    table: Path
    folder: Path
    model: str
    section: Section
    network: Section | None  # of train.nn, for a model that it feeds
    encoding: EncodeParams
    unit: UnitChoice
    seed: int
    resources: Resources


@dataclass(frozen=True)
class Refit:
    """One refit that has ended: what it was judged by, or what stopped it."""

    number: int
    state: Literal["finished", "failed"]
    seconds: float
    num_learnt: int = 0  # different train rows of the sample
    num_judged: int = 0  # rows out of bag
    metrics: Metrics | None = None
    error: str = ""


def skill(
    project: Project,
    model: str,
    *,
    refits: int,
    budget_s: float | None,
    seed: int,
    wait: bool,
    console: Console,
) -> None:
    """Refit ``model`` until there are ``refits``, or the time is up; print and keep the estimate.

    Raises:
        ConfigError: an option that is wrong.
        DataError: a target that cannot be learnt; fewer than two units; all refits failed.
        Stopped: on a signal; the next call goes on.
    """
    if refits < 2:
        raise ConfigError(f"--refits is {refits}; a spread needs at least 2")
    with lock_folder(project, f"headrace skill {model}", wait=wait, on_wait=told_to(console)):
        settings = read_settings(project)
        with guarded(project, f"skill of {model}", settings.resources) as guard:
            job, truth = open_job(project, model, seed=seed, resources=guard.resources)
            warn_of_stale(project, ["reduce"], console)
            complete_last_run(project)
            with journaled(project, "skill") as journal:
                told = journal.stage(f"skill@{model}")
                try:
                    ended = run_refits(
                        job, guard, limit=refits, budget=Budget(budget_s), console=console
                    )
                    params = cast(StackParams, settings.section("stack"))
                    summary = _conclude(job, truth, ended, refits, params.confidence, console)
                except BaseException as error:
                    is_stop = isinstance(error, Stopped)
                    told.close("stopped" if is_stop else "failed", exit_code=explain(error)[1])
                    raise
                write_json(job.folder / SUMMARY, summary)
                told.metrics(_flat(summary))
                told.params({"refits": summary["num_refits"], "seed": seed})
                told.file(job.folder / SUMMARY)
                told.note("\n".join(f"- {sentence}" for sentence in summary["sentences"]))
                told.peak_bytes = guard.watch.peak_bytes
                told.close("finished", exit_code=0)
        console.print((job.folder / SUMMARY).relative_to(project.root), highlight=False)


def open_job(project: Project, model: str, *, seed: int, resources: Resources) -> tuple[Job, Truth]:
    """Read and check all that the refits depend on, before anything is fitted.

    Raises:
        ConfigError: if there is no such model.
        DataError: if there are too few units to draw from.
    """
    settings = read_settings(project)
    stage = stage_of(model)
    section = settings.section(stage)
    network = settings.section("train@nn") if model in SECOND_LEVEL else None
    encoding = cast(EncodeParams, settings.section("encode"))
    params = cast(StackParams, settings.section("stack"))
    table = project.data("reduce")
    truth = read_truth(open_table(table), "train", unit=params.unit, key="stack.unit")
    if (num_units := _num_units(truth)) < 2:
        raise DataError(
            f"the train rows have {num_units} {truth.unit}; at least 2 are needed to leave one out "
            f"of a sample: set `stack.unit` to a smaller unit"
        )
    stages = ["encode", stage, *(["train@nn"] if network else [])]
    modules = [module for name in stages for module in stage_modules(name)]
    modules += ["headrace.data.resample", "headrace.evaluation.skill"]
    entry = {
        **stage_entry(project, stage, section, [table]),
        "code": code_digests(*modules),
        "encode": encoding.model_dump(mode="json"),
        "network": None if network is None else network.model_dump(mode="json"),
        "unit": truth.unit,
        "seed": seed,
    }
    digest = digest_bytes(canonical_json(entry).encode())[:_KEY_LETTERS]
    job = Job(
        table=table,
        folder=project.state / "skill" / model / digest,
        model=model,
        section=section,
        network=network,
        # A sample that gives a target away is no news: the stage has said it of all rows.
        encoding=encoding.model_copy(update={"leaks": "allow"}),
        unit=params.unit,
        seed=seed,
        resources=resources,
    )
    return job, truth


def run_refits(
    job: Job, guard: Guard, *, limit: int, budget: Budget, console: Console
) -> list[Refit]:
    """Run refits until there are ``limit`` or the time is up; return all, earlier ones included.

    Refit ``number`` is the same whatever else runs: it has its own sample.
    """
    ended = {one.number: one for one in read_refits(job.folder)}
    if ended:
        console.print(f"going on with {len(ended)} refits", highlight=False)
    pending = [number for number in range(limit) if number not in ended]
    workers = min(count_workers(job), max(1, len(pending)))

    def has_time() -> bool:
        return budget.has_time([one.seconds for one in ended.values()])

    with console.status("refits") as status:
        made = (
            _one_after_another(_shared(job, 1), pending, has_time, guard, status)
            if workers == 1
            else _side_by_side(_shared(job, workers), pending, has_time, workers)
        )
        for one in made:
            ended[one.number] = one
            content = {"format": _FORMAT, **asdict(one)}
            write_json(job.folder / f"refit-{one.number:04d}.json", content)
            shutil.rmtree(_scratch(job, one.number), ignore_errors=True)
            console.print(_line(one), markup=False, highlight=False, soft_wrap=True)
    if pending:
        console.print(f"the time is up, with {len(ended)} of {limit} refits", highlight=False)
    return [ended[number] for number in sorted(ended)][:limit]


def run_refit(
    job: Job,
    number: int,
    *,
    guard: Guard | None = None,
    on_progress: Callable[[str], None] = say_nothing,
) -> Refit:
    """Draw a sample, encode it, fit the model on it, and judge it on the rows out of bag.

    A refit that fails is told in the result; only what ends the command is raised.
    """
    started = time.monotonic()
    try:
        source = open_table(job.table)
        truth = read_truth(source, "train", unit=job.unit, key="stack.unit")
        drawn = draw_units(_num_units(truth), seed=job.seed, number=number)
        counts = drawn[truth.unit_of_row]
        if counts.all():
            raise DataError(f"sample {number} holds every {truth.unit}; none is left to judge on")
        metrics = _judged(job, number, counts, truth, on_progress)
    except Exception as error:  # anything that a model's library raises
        if isinstance(error, Stopped) or (guard is not None and guard.is_stopping):
            raise
        seconds = round(time.monotonic() - started, 3)
        return Refit(number, "failed", seconds, error=explain(error)[0])
    seconds = round(time.monotonic() - started, 3)
    num_learnt = int((counts > 0).sum())
    return Refit(number, "finished", seconds, num_learnt, len(counts) - num_learnt, metrics)


def read_refits(folder: Path) -> list[Refit]:
    """Return the refits that have ended."""
    found = []
    for path in sorted(folder.glob("refit-*.json")):
        content = read_json(path)
        del content["format"]
        found.append(Refit(**content))
    return found


def count_workers(job: Job) -> int:
    """Return how many refits run side by side: as threads and memory allow; one on a GPU."""
    own = job.section.threads if isinstance(job.section, TrainingParams) else 1
    if getattr(job.section, "device", "cpu") != "cpu" and _GPU_DRIVER.is_file():
        return 1
    by_memory = job.resources.memory_budget // _WORKER_BYTES
    return max(1, min(job.resources.threads // own, by_memory))


def _one_after_another(
    job: Job, pending: list[int], has_time: Callable[[], bool], guard: Guard, status: Status
) -> Iterator[Refit]:
    while pending and has_time():
        number = pending.pop(0)
        tell = told_on(status, f"refit {number}")
        yield run_refit(job, number, guard=guard, on_progress=tell)


def _side_by_side(
    job: Job, pending: list[int], has_time: Callable[[], bool], workers: int
) -> Iterator[Refit]:
    with _workers(workers) as pool:
        running: set[Future[Refit]] = set()
        while True:
            while pending and len(running) < workers and has_time():
                running.add(pool.submit(run_refit, job, pending.pop(0)))
            if not running:
                return
            done, running = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            yield from map(_result, done)


def _judged(
    job: Job,
    number: int,
    counts: npt.NDArray[np.int64],
    truth: Truth,
    on_progress: Callable[[str], None],
) -> Metrics:
    scratch = _scratch(job, number)
    table, encoded = scratch / "table", scratch / "encoded"
    if not table.is_dir():
        write_resample(open_table(job.table), counts, table, with_valid=_needs_valid(job))
    resources = job.resources
    recorder = Hushed(on_warning=say_nothing, on_progress=on_progress)
    if not encoded.is_dir():
        encode(table, encoded, job.encoding, resources=resources, recorder=recorder)
    cache = scratch / "cache"
    network = None
    plans: tuple[FitPlan, ...] = ()
    if job.network is not None:
        network = scratch / "network"
        if not network.is_dir():
            train(
                table,
                encoded,
                network,
                job.network,
                model="nn",
                cache=cache,
                checkpoints=scratch / "network-fits",
                resources=resources,
                recorder=recorder,
            )
    else:
        plans = plan_fits(open_table(table), encoded, cache, job.section)
    inputs = Inputs(table, encoded, cache, network)
    found = refit(
        inputs,
        job.model,
        job.section,
        plans,
        scratch,
        split="test",
        resources=resources,
        recorder=recorder,
    )
    out_of_bag = _out_of_bag(truth, counts == 0)
    metrics: Metrics = {}
    for target in open_table(job.table).contract.targets:
        is_labelled = ~np.isnan(out_of_bag.labels[target.name])
        places = line_up(found[target.name], out_of_bag, is_labelled)
        weight = out_of_bag.weight
        metrics[target.name] = metrics_of(
            Sample(
                target.task,
                out_of_bag.labels[target.name][is_labelled],
                found[target.name].values[places],
                None if weight is None else weight[is_labelled],
            )
        )
    return metrics


def _out_of_bag(truth: Truth, is_out: npt.NDArray[np.bool_]) -> Truth:
    return replace(
        truth,
        split="out-of-bag",
        row_id=truth.row_id[is_out],
        labels={name: labels[is_out] for name, labels in truth.labels.items()},
        weight=None if truth.weight is None else truth.weight[is_out],
        unit_of_row=truth.unit_of_row[is_out],
    )


def _needs_valid(job: Job) -> bool:
    """Whether the recipe looks at valid rows: to stop on, or to bring networks' spaces together."""
    sections = [one for one in (job.section, job.network) if one is not None]
    is_stop = any(isinstance(one, FitParams) and one.stop_rows == "valid" for one in sections)
    return is_stop or job.network is not None


def _shared(job: Job, workers: int) -> Job:
    """Return the job of one of several workers: a part of memory and threads.

    A network keeps its own threads, for its weights depend on them.
    """
    threads = max(1, job.resources.threads // workers)
    section = job.section
    if "threads" in type(section).model_fields and not isinstance(section, TrainingParams):
        section = section.model_copy(update={"threads": threads})
    part = {"threads": threads, "memory_budget": job.resources.memory_budget // workers}
    resources = job.resources.model_copy(update=part)
    return replace(job, section=section, resources=resources)


@contextlib.contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose processes end with this one, and at once if the block is left early."""
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin_worker)
    try:
        yield pool
    except BaseException:
        for process in active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; who started this one ends it


def _result(future: "Future[Refit]") -> Refit:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a process that refits was killed, as the system does where memory runs out; lower "
            "`resources.threads` for fewer of them, and run again to go on"
        ) from error


def _scratch(job: Job, number: int) -> Path:
    return job.folder / f"refit-{number:04d}"


def _num_units(truth: Truth) -> int:
    return int(truth.unit_of_row.max()) + 1


def _conclude(
    job: Job,
    truth: Truth,
    ended: Sequence[Refit],
    limit: int,
    confidence: float,
    console: Console,
) -> dict[str, Any]:
    finished = [one for one in ended if one.metrics is not None]
    if not finished:
        first = f"; the first: {ended[0].error}" if ended else ""
        raise DataError(f"skill of {job.model}: all {len(ended)} refits failed{first}")
    targets = open_table(job.table).contract.targets
    found = {target.name: _skills(target, finished, confidence) for target in targets}
    sentences = _sentences(job, truth, ended, limit, confidence)
    for target, skills in found.items():
        console.print(_table(target, skills, confidence), highlight=False)
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    return {
        "format": _FORMAT,
        "model": job.model,
        "unit": truth.unit,
        "num_units": _num_units(truth),
        "num_rows": len(truth.row_id),
        "num_refits": len(finished),
        "num_asked": limit,
        "num_failed": len(ended) - len(finished),
        "confidence": confidence,
        "seed": job.seed,
        "sentences": sentences,
        "targets": {
            target: {
                one.metric.name: {
                    "mean": one.mean,
                    "deviation": one.deviation,
                    "ci_low": one.low,
                    "ci_high": one.high,
                    "num_refits": one.num_refits,
                    "num_undefined": one.num_undefined,
                }
                for one in skills
            }
            for target, skills in found.items()
        },
        "refits": [asdict(one) for one in ended],
    }


def _skills(target: Target, finished: Sequence[Refit], confidence: float) -> list[Skill]:
    return [
        skill_of(
            metric,
            [one.metrics[target.name].get(metric.name) for one in finished if one.metrics],
            confidence=confidence,
        )
        for metric in METRICS[target.task]
    ]


def _sentences(
    job: Job, truth: Truth, ended: Sequence[Refit], limit: int, confidence: float
) -> list[str]:
    finished = [one for one in ended if one.state == "finished"]
    failed = [one for one in ended if one.state == "failed"]
    share = np.mean([one.num_learnt / len(truth.row_id) for one in finished])
    units = f"{len(truth.row_id):,} train rows"
    if truth.unit != "row":
        units = f"{_num_units(truth):,} {truth.unit}s with {units}"
    told = [
        f"{len(finished)} of {limit} refits of {job.model} on bootstrap samples of {units}, each "
        f"encoded, fitted and judged anew; valid and test rows did not judge",
        f"what the recipe reaches on rows it has not seen; a little pessimistic, for a refit has "
        f"seen {share:.0%} of the rows",
        f"{confidence:.0%} interval: where another refit would fall, by the luck of the rows it "
        f"learns from and of those it is judged on",
    ]
    if len(finished) < FEW_REFITS:
        told.append(
            f"with {len(finished)} refits the interval is little more than their range; "
            f"{FEW_REFITS} and more say where its ends are"
        )
    if truth.is_unit_of_time:
        told.append(
            f"{truth.unit}s out of bag lie between those learnt from: of the time after them only "
            f"the test rows tell"
        )
    if failed:
        told.append(f"{len(failed)} refits failed, first {failed[0].number}: {failed[0].error}")
    return told


def _table(target: str, skills: Sequence[Skill], confidence: float) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column(target, no_wrap=True)
    for name in ("mean", "deviation"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"{confidence:.0%} of refits", no_wrap=True)
    table.add_column("")
    for one in skills:
        ends = "" if one.low is None else f"[{one.low:.4g}, {one.high:.4g}]"
        undefined = f"undefined in {one.num_undefined} refits" if one.num_undefined else ""
        table.add_row(one.metric.title, _number(one.mean), _number(one.deviation), ends, undefined)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _line(one: Refit) -> str:
    if one.metrics is None:
        return f"refit {one.number} failed: {one.error}"
    first = {target: next(iter(metrics.items())) for target, metrics in one.metrics.items()}
    values = ", ".join(f"{target} {name} {_number(v)}" for target, (name, v) in first.items())
    return f"refit {one.number}: {values} on {one.num_judged:,} rows, {one.seconds:.1f} s"


def _flat(summary: Mapping[str, Any]) -> dict[str, float]:
    """Name the estimates as MLflow shows scores: the value, and beside it its interval."""
    ends = {"mean": "", "ci_low": "_ci_low", "ci_high": "_ci_high", "deviation": "_deviation"}
    return {
        f"{target}/out_of_bag_{metric}{ends[part]}": float(value)
        for target, metrics in summary["targets"].items()
        for metric, parts in metrics.items()
        for part, value in parts.items()
        if part in ends and value is not None
    }
