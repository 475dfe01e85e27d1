"""MLflow as a replica of the journal: one run per pipeline run, a child per stage or model.

Everything sent is a pure function of the journal and is keyed by it: a run is found by the tag
``headrace.run_id``, a child by ``headrace.stage_run``; metrics carry the journal's time and step,
so sending one again changes nothing; params, tags, data sets and files are set, not added. How far
a run has been sent is the tag ``headrace.seq`` on its parent, moved last. So a crash at any point
neither loses nor doubles, and a deleted store is built again from the journal.

Run ids are always explicit: there is no active run, and no global state of MLflow is touched.
A run deleted in MLflow stays deleted.
"""

import contextlib
import fcntl
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.errors import ConfigError, HeadraceError, IntegrityError
from headrace.storage import read_json, write_json
from headrace.tracking.history import (
    Event,
    Run,
    StageRun,
    count_looks,
    kept_file,
    last_seq,
    list_runs,
    read_run,
    run_path,
)
from headrace.tracking.location import Store, connect, quiet, told_plainly

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as MlflowRun

RUN_ID_TAG = "headrace.run_id"
KIND_TAG = "headrace.kind"
STAGE_TAG = "headrace.stage"
STAGE_RUN_TAG = "headrace.stage_run"
SEQ_TAG = "headrace.seq"
LINEAGE_TAG = "headrace.lineage"
TIED_TAG = "tied_with_best"  # on the child of a model: yes, no, or the targets where it is
LOOKS_TAG = "headrace.test_looks"  # one number for each digest of ``headrace.split_digest``

_POSITIONS = "replicated.json"
_METRICS_PER_BATCH = 1000  # MLflow's limits
_ENTITIES_PER_BATCH = 100
_DIGEST_LENGTH = 36
_STATUS = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
    "stopped": "KILLED",
}
_SLOW = "MLflow is slow, the rest is sent later"
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9_\-. :/]")


@dataclass(frozen=True)
class Replicated:
    """What one call sent, and what it left: ``problem`` says why anything is pending."""

    sent: int = 0  # runs brought up to date
    pending: int = 0  # runs the store does not have in full
    problem: str = ""
    experiment_id: str = ""


def replicate(
    folder: Path, store: Store, *, experiment: str, budget_s: float | None = None
) -> Replicated:
    """Bring ``store`` up to date with the journal in ``folder``; running runs included.

    With ``budget_s`` it stops between two calls after about that time, and the rest is pending.

    Raises:
        DependencyError: if the store cannot be reached or refuses; what was sent stays sent.
        ConfigError: if the store belongs to another version of MLflow.
    """
    run_ids = list_runs(folder)
    if not run_ids:
        return Replicated()
    with _lock(folder) as is_ours:
        if not is_ours:
            return Replicated(0, pending(folder, store), "another process is sending them")
        client = connect(store)
        with quiet(), told_plainly(store):
            sender = _Sender(client, folder, find_experiment(client, store, experiment), budget_s)
            return sender.send(run_ids, store)


def replicate_or_defer(
    folder: Path, store: Store, *, experiment: str, budget_s: float | None = None
) -> Replicated:
    """Like ``replicate``, but a store that cannot be used is told in the result, not raised.

    For the end of a pipeline run: what was computed is whole, whatever the tracker does.
    """
    if not pending(folder, store):
        return Replicated()
    try:
        return replicate(folder, store, experiment=experiment, budget_s=budget_s)
    except HeadraceError as error:
        return Replicated(0, pending(folder, store), str(error))


def pending(folder: Path, store: Store) -> int:
    """Return how many runs ``store`` does not have in full, as far as this folder remembers.

    Asks nobody and does not import MLflow.
    """
    if store.database is not None and not store.database.is_file():
        return len(list_runs(folder))
    positions = _positions(folder).get(store.digest, {})
    return sum(
        last_seq(run_path(folder, run_id)) > positions.get(run_id, 0)
        for run_id in list_runs(folder)
    )


def results_table(results: Mapping[str, Any]) -> str:
    """Return an evaluation as Markdown: a table per target, values with 95 % intervals.

    ``results`` is {target: {model: {metric: {value, ci_low, ci_high}}}}.
    """
    blocks = []
    for target, models in results.items():
        metrics = list(dict.fromkeys(name for scores in models.values() for name in scores))
        lines = [
            f"**{target}** (test rows, 95 % intervals)",
            "",
            "| model | " + " | ".join(metrics) + " |",
            "|---|" + "---|" * len(metrics),
        ]
        for model, scores in models.items():
            cells = [_cell(scores[name]) if name in scores else "" for name in metrics]
            lines.append(f"| {model} | " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


class _OutOfTimeError(Exception):
    """The time for one call of ``replicate`` is used up."""


class _Sender:
    """Sends runs to one experiment through one client, and stops when its time is used up."""

    def __init__(
        self, client: "MlflowClient", folder: Path, experiment_id: str, budget_s: float | None
    ) -> None:
        self._client = client
        self._folder = folder
        self._experiment_id = experiment_id
        self._deadline = None if budget_s is None else time.monotonic() + budget_s

    def send(self, run_ids: Sequence[str], store: Store) -> Replicated:
        try:
            sent = self._sent()
        except _OutOfTimeError:
            return Replicated(0, pending(self._folder, store), _SLOW, self._experiment_id)
        behind = [i for i in run_ids if sent.get(i, 0) < last_seq(run_path(self._folder, i))]
        done = 0
        try:
            for run_id in behind:
                run = read_run(run_path(self._folder, run_id))
                self._send_run(run, since=sent.get(run_id, 0))
                sent[run_id] = run.last_seq
                done += 1
        except _OutOfTimeError:
            return Replicated(done, len(behind) - done, _SLOW, self._experiment_id)
        finally:
            positions = _positions(self._folder) | {store.digest: sent}
            write_json(self._folder / _POSITIONS, positions)
        return Replicated(done, 0, experiment_id=self._experiment_id)

    def _sent(self) -> dict[str, int]:
        """Return the position of every run the store knows; a deleted one counts as sent."""
        found: dict[str, int] = {}
        for run in self._search(f"tags.`{KIND_TAG}` = 'run'"):
            run_id = run.data.tags.get(RUN_ID_TAG, "")
            is_deleted = run.info.lifecycle_stage == "deleted"
            seq = 1 << 62 if is_deleted else int(run.data.tags.get(SEQ_TAG, 0))
            if run_id not in found or not is_deleted:
                found[run_id] = seq
        return found

    def _send_run(self, run: Run, *, since: int) -> None:
        parent = self._find_or_create(
            name=run.run_id,
            started=run.opened,
            tags={RUN_ID_TAG: run.run_id, KIND_TAG: "run"},
        )
        self._set_tags(parent, _run_tags(run) | self._looks_tag(run))
        children = {
            stage.stage_run: self._send_stage(run, stage, parent=parent, since=since)
            for stage in run.stages
        }
        made = {stage.stage: stage for stage in run.stages if stage.status == "finished"}
        child_of = {stage.stage: children[stage.stage_run] for stage in run.stages}
        for stage, maker in run.reused.items():
            child_of[stage], reused = self._send_reused(run, stage, maker, parent=parent)
            if reused:
                made[stage] = reused
        self._send_events(parent, run.events, since=since)
        if run.kind != "search":  # whose trials have the same settings, with other values
            params = {f"{name}.{k}": v for name, s in made.items() for k, v in s.params.items()}
            self._set_params(parent, params)
        self._send_inputs(parent, [event for stage in made.values() for event in stage.events])
        if run.results:
            self._send_results(run, parent, child_of)
            if "evaluate" in made:
                told = made["evaluate"].of_kind("file")
                self._send_files(parent, [event for event in told if _is_for_parent(event)])
        self._finish(parent, status=run.status, ended=run.closed)
        self._set_tags(parent, {SEQ_TAG: str(run.last_seq)})

    def _looks_tag(self, run: Run) -> dict[str, str]:
        """How often the test rows of this run had been looked at, this run included."""
        looks = [
            count_looks(self._folder, digest, until=run.run_id) for digest in _test_digests(run)
        ]
        return {LOOKS_TAG: " ".join(map(str, looks))} if looks else {}

    def _send_stage(self, run: Run, stage: StageRun, *, parent: str, since: int) -> str:
        child = self._find_or_create(
            name=stage.stage,
            started=stage.opened,
            tags={
                RUN_ID_TAG: run.run_id,
                KIND_TAG: "stage",
                STAGE_RUN_TAG: stage.stage_run,
                STAGE_TAG: stage.stage,
                "mlflow.parentRunId": parent,
            },
        )
        key = run.stage_keys.get(stage.stage)
        self._set_tags(child, _common_tags(run) | ({"headrace.stage_key": key} if key else {}))
        if not any(event.seq > since for event in stage.events):
            return child
        self._send_events(child, stage.events, since=since)
        self._send_inputs(child, stage.events)
        self._set_tags(child, _stage_tags(stage))
        if stage.closed is not None:
            self._set_params(child, stage.params)
            measured = {"stage/seconds": stage.seconds, "stage/peak_bytes": stage.peak_bytes}
            self._send_metrics(child, _metrics(measured, moment=stage.closed, step=0))
            self._finish(child, status=stage.status, ended=stage.closed)
        return child

    def _send_reused(
        self, run: Run, stage: str, maker: str | None, *, parent: str
    ) -> tuple[str, StageRun | None]:
        """Give ``stage`` a child that repeats what its maker told and links to it."""
        made, origin = self._made(stage, maker)
        child = self._find_or_create(
            name=f"{stage} (reused)",
            started=run.closed or run.opened,
            tags={
                RUN_ID_TAG: run.run_id,
                KIND_TAG: "reused",
                STAGE_RUN_TAG: f"{stage}.reused",
                STAGE_TAG: stage,
                "mlflow.parentRunId": parent,
            },
        )
        text = f"Nothing it depends on had changed: reused from run {maker}."
        if maker is None:
            text = "Its outs were there already; this journal does not know the run that made them."
        elif origin:
            link = f"#/experiments/{self._experiment_id}/runs/{origin}"
            text = f"Nothing it depends on had changed: reused from run [{maker}]({link})."
        tags = {
            **_common_tags(run),
            "headrace.reused_from": maker or "unknown",
            "headrace.reused_mlflow_run": origin,
            "headrace.stage_key": run.stage_keys.get(stage, ""),
            "mlflow.note.content": text,
        }
        self._set_tags(child, {name: value for name, value in tags.items() if value})
        if made:
            self._set_params(child, made.params)
            moment = run.closed or run.opened
            self._send_metrics(child, _metrics(made.last_metrics, moment=moment, step=0))
            self._send_inputs(child, made.events)
        self._finish(child, status="finished", ended=run.closed or run.opened)
        return child, made

    def _made(self, stage: str, maker: str | None) -> tuple[StageRun | None, str]:
        """Return what the maker of a reused stage told, and its MLflow run."""
        if maker is None:
            return None, ""
        origin = self._search(
            f"tags.`{RUN_ID_TAG}` = '{maker}' and tags.`{KIND_TAG}` = 'stage'"
            f" and tags.`{STAGE_TAG}` = '{stage}'"
        )
        told = None
        with contextlib.suppress(IntegrityError):  # its file was removed
            stages = read_run(run_path(self._folder, maker)).stages
            told = next((s for s in reversed(stages) if s.stage == stage), None)
        return told, origin[-1].info.run_id if origin else ""

    def _send_events(self, run: str, events: Iterable[Event], *, since: int) -> None:
        new = [event for event in events if event.seq > since]
        points: list[Metric] = []
        for event in new:
            if event.kind == "metrics":
                step = event.data["step"] or 0
                points += _metrics(event.data["values"], moment=event.time, step=step)
        self._send_metrics(run, points)
        self._send_files(run, [event for event in new if event.kind == "file"])

    def _send_metrics(self, run: str, points: "list[Metric]") -> None:
        for start in range(0, len(points), _METRICS_PER_BATCH):
            self._check_time()
            self._client.log_batch(run, metrics=points[start : start + _METRICS_PER_BATCH])

    def _send_files(self, run: str, events: Sequence[Event]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            for event in events:
                self._check_time()
                kept = kept_file(self._folder, event.data["sha256"])
                if not kept.is_file():
                    missing = f"{event.data['name']} is gone from the journal"
                    self._set_tags(run, {"headrace.missing_file": missing})
                    continue
                named = Path(scratch) / event.data["name"]
                shutil.copyfile(kept, named)
                self._client.log_artifact(run, str(named), event.data["folder"] or None)
                named.unlink()

    def _send_inputs(self, run: str, events: Iterable[Event]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow keeps one context per data set and run, so several uses of one are told together.
        uses: dict[tuple[str, str], list[Event]] = {}
        for event in events:
            if event.kind == "dataset":
                uses.setdefault((event.data["name"], event.data["digest"]), []).append(event)
        inputs = []
        for (name, digest), told in uses.items():
            rows = {event.data["context"]: event.data["rows"] for event in told}
            data = Dataset(
                name=name,
                digest=digest[:_DIGEST_LENGTH],
                source_type="local",
                source=json.dumps({"uri": told[0].data["path"]}),
                profile=json.dumps({"num_rows": rows, "digest": digest}),
            )
            context = InputTag("mlflow.data.context", ", ".join(rows))
            inputs.append(DatasetInput(data, [context]))
        if inputs:
            self._check_time()
            self._client.log_inputs(run, datasets=inputs)

    def _send_results(self, run: Run, parent: str, child_of: Mapping[str, str]) -> None:
        """Put the evaluation on the parent, and each model's part on the child of that model."""
        moment = run.closed or run.opened
        results = run.results or {}
        for target, models in results.items():
            for model, scores in models.items():
                # In the table of runs a child stands for its model: plain names, to sort by.
                prefix = f"{target}/" if len(results) > 1 else ""
                own = _flat(scores, prefix=prefix, suffix="")
                both = _flat(scores, prefix=f"test/{target}/", suffix=f"/{model}")
                self._send_metrics(parent, _metrics(both, moment=moment, step=0))
                if child := child_of.get(f"train@{model}", child_of.get(model, "")):
                    self._send_metrics(child, _metrics(own, moment=moment, step=0))
                    if run.tied_with_best:
                        self._set_tags(child, {TIED_TAG: _tied(run.tied_with_best, model)})

    def _set_params(self, run: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        # A param cannot change: what an interrupted call already set is left out.
        known = self._client.get_run(run).data.params
        named = {_key(name): str(value) for name, value in values.items()}
        params = [Param(name, text) for name, text in named.items() if name not in known]
        for start in range(0, len(params), _ENTITIES_PER_BATCH):
            self._check_time()
            self._client.log_batch(run, params=params[start : start + _ENTITIES_PER_BATCH])

    def _set_tags(self, run: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._check_time()
        self._client.log_batch(run, tags=[RunTag(name, text) for name, text in values.items()])

    def _finish(self, run: str, *, status: str, ended: float | None) -> None:
        if ended is not None and status in _STATUS:
            self._check_time()
            self._client.set_terminated(run, _STATUS[status], end_time=_milliseconds(ended))

    def _find_or_create(self, *, name: str, started: float, tags: Mapping[str, str]) -> str:
        identity = [RUN_ID_TAG, KIND_TAG, *([STAGE_RUN_TAG] if STAGE_RUN_TAG in tags else [])]
        found = self._search(" and ".join(f"tags.`{k}` = '{tags[k]}'" for k in identity))
        # More than one: a server made a run but its answer was lost, and the call was repeated.
        for double in found[1:]:
            if double.info.lifecycle_stage == "active":
                self._client.delete_run(double.info.run_id)
        if found:
            return str(found[0].info.run_id)
        self._check_time()
        created = self._client.create_run(
            self._experiment_id,
            start_time=_milliseconds(started),
            run_name=name,
            tags={**tags, "mlflow.source.name": "headrace", "mlflow.source.type": "LOCAL"},
        )
        return str(created.info.run_id)

    def _search(self, filter_string: str) -> "list[MlflowRun]":
        """Return the runs that match, active ones first, then oldest first."""
        from mlflow.entities import ViewType

        found: list[MlflowRun] = []
        token = None
        while True:
            self._check_time()
            page = self._client.search_runs(
                [self._experiment_id],
                filter_string,
                run_view_type=ViewType.ALL,
                order_by=["attributes.start_time ASC"],
                max_results=1000,
                page_token=token,
            )
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda run: run.info.lifecycle_stage != "active")

    def _check_time(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise _OutOfTimeError


def find_parent(client: "MlflowClient", experiment_id: str, run_id: str) -> str | None:
    """Return the MLflow run that replicates pipeline run ``run_id``."""
    wanted = f"tags.`{KIND_TAG}` = 'run' and tags.`{RUN_ID_TAG}` = '{run_id}'"
    found = client.search_runs([experiment_id], wanted, max_results=1)
    return str(found[0].info.run_id) if found else None


def find_experiment(client: "MlflowClient", store: Store, name: str) -> str:
    """Return the id of the experiment called ``name``, made if there is none.

    Raises:
        ConfigError: if it was deleted in MLflow, where its name stays taken.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            location = store.artifact_location(name)
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another clone was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            f"the MLflow experiment {name!r} at {store.name} was deleted; restore it there, "
            f"or set another `publish.name` in params.yaml"
        )
    return str(found.experiment_id)


def _run_tags(run: Run) -> dict[str, str]:
    tags = _common_tags(run) | {"headrace.door": run.kind, "headrace.host": run.host}
    if digests := _test_digests(run):
        tags["headrace.split_digest"] = " ".join(digests)
    parts = [results_table(run.results)] if run.results else []
    parts += [event.data["text"] for event in run.events if event.kind == "note"]
    if run.lineage:
        parts.append(f"lineage `{run.lineage}`" + (f", commit `{run.commit}`" * bool(run.commit)))
    if parts:
        tags["mlflow.note.content"] = "\n\n".join(parts)
    return tags


def _test_digests(run: Run) -> list[str]:
    digests = {
        event.data["digest"]
        for stage in run.stages
        for event in stage.of_kind("dataset")
        if stage.stage == "evaluate" and event.data["context"] == "test"
    }
    return sorted(digests)


def _common_tags(run: Run) -> dict[str, str]:
    tags = {
        LINEAGE_TAG: run.lineage,
        "headrace.commit": run.commit,
        "mlflow.source.git.commit": run.commit,
        "headrace.uncommitted": run.dirty,
    }
    return {name: value for name, value in tags.items() if value}


def _stage_tags(stage: StageRun) -> dict[str, str]:
    parts = [event.data["text"] for event in stage.of_kind("note")]
    parts += [f"- warning: {event.data['text']}" for event in stage.of_kind("warn")]
    tags = {"mlflow.note.content": "\n\n".join(parts)} if parts else {}
    if stage.exit_code is not None:
        tags["headrace.exit_code"] = str(stage.exit_code)
    for event in stage.of_kind("dataset"):
        if event.data["context"] == "test":
            tags["headrace.split_digest"] = event.data["digest"]
    return tags


def _is_for_parent(event: Event) -> bool:
    """Tell whether a file of ``evaluate`` answers what a person opens a run for.

    The report is not among them: the run has a copy of its own, which says what run it is.
    """
    name = event.data["name"]
    whole = ("comparison.json", "pairs.csv", "resamples.parquet")
    return name in whole or "forest" in name


def _metrics(values: Mapping[str, Any], *, moment: float, step: int) -> "list[Metric]":
    from mlflow.entities import Metric

    stamp = _milliseconds(moment)
    return [Metric(_key(name), float(value), stamp, step) for name, value in values.items()]


def _flat(scores: Mapping[str, Any], *, prefix: str, suffix: str) -> dict[str, float]:
    """Name a model's scores as MLflow shows them: the value, and beside it its interval."""
    ends = {"value": "", "ci_low": "_ci_low", "ci_high": "_ci_high"}
    return {
        f"{prefix}{metric}{suffix}{ends[part]}": float(number)
        for metric, score in scores.items()
        for part, number in score.items()
        if part in ends and number is not None
    }


def _tied(tied_with_best: Mapping[str, Sequence[str]], model: str) -> str:
    """Say whether ``model`` is tied with the best; of several targets, with the best of which."""
    tied = [target for target, models in tied_with_best.items() if model in models]
    if len(tied) in (0, len(tied_with_best)):
        return "yes" if tied else "no"
    return ", ".join(tied)


def _cell(score: Mapping[str, Any]) -> str:
    if score.get("value") is None:
        return "undefined"
    text = f"{score['value']:.4g}"
    if score.get("ci_low") is None or score.get("ci_high") is None:
        return text
    return f"{text} [{score['ci_low']:.4g}, {score['ci_high']:.4g}]"


def _key(name: str) -> str:
    return _NOT_ALLOWED.sub("_", name.replace("@", "/"))[:250]


def _milliseconds(moment: float) -> int:
    return round(moment * 1000)


def _positions(folder: Path) -> dict[str, dict[str, int]]:
    try:
        content = read_json(folder / _POSITIONS)
    except IntegrityError:  # absent or damaged: everything is compared with the store again
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Yield whether this process may send; a second one need not wait for the first."""
    with (folder / ".replica.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
