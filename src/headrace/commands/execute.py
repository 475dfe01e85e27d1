"""One run of the pipeline, stage by stage: what the flow's tasks call.

Each stage is brought up to date by DVC in a supervised process group; what came of it is told in
the run's events. The run itself is opened and closed in the journal here, for every door alike.
"""

import contextlib
import shutil
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from headrace.commands.events import (
    MESSAGE,
    RUN_OPENED,
    STAGE_ENDED,
    STAGE_STARTED,
    WAITING,
    EventLog,
)
from headrace.commands.failure import Failure, clear_failure
from headrace.commands.pipeline import (
    Dag,
    environment,
    is_restored,
    is_unchanged,
    last_line,
    outcome,
    stage_command,
)
from headrace.commands.results import looks, report
from headrace.commands.supervise import Group, run
from headrace.errors import ResourceError, Stopped, explain
from headrace.evaluation.identity import identified
from headrace.lineage import environment_digest, lineage_id, stage_keys
from headrace.project import LOCK, Project
from headrace.storage import read_json, write_file, write_json
from headrace.tracking.history import RUN_ID_VARIABLE, RunKind, made_by, read_run, run_path
from headrace.tracking.journal import RunJournal, close_stale, open_run

StageState = Literal["ran", "restored", "unchanged", "failed"]
RESUME = "stopped; what is finished is kept, run again to resume"
_KEPT_LOGS = 20  # runs
_SYNC_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Outcome:
    """What became of one stage in this run."""

    stage: str
    state: StageState
    seconds: float
    peak_bytes: int = 0
    failure: Failure | None = None


class Execution:
    """The stages of one run; its methods may be called from several threads."""

    def __init__(self, project: Project, dag: Dag, *, run_id: str, logs: Path) -> None:
        self.project = project
        self.dag = dag
        self.run_id = run_id
        self.logs = logs
        self.outcomes: dict[str, Outcome] = {}
        self._events = EventLog(logs)
        self._group = Group()
        self._events.tell(RUN_OPENED, run_id=run_id)

    def run_stage(self, name: str) -> Outcome:
        """Bring ``name`` up to date; a failure is an outcome, not an exception.

        Raises:
            Stopped: if the run was stopped meanwhile.
        """
        self._events.tell(STAGE_STARTED, stage=name)
        clear_failure(self.project, name)
        started = time.monotonic()
        try:
            finished = run(
                stage_command(name),
                cwd=self.project.root,
                log=self.logs / f"{name.replace('/', '_')}.log",
                env=environment(**{RUN_ID_VARIABLE: self.run_id}),
                timeout_s=self.dag.by_name[name].timeout_s,
                group=self._group,
            )
        except ResourceError as error:  # the timeout
            failure = Failure(name, error.exit_code, f"stage {name}: {error}")
            return self._ended(Outcome(name, "failed", time.monotonic() - started, 0, failure))
        state: StageState = "ran"
        if failed := outcome(self.project, name, finished):
            state = "failed"
        elif is_unchanged(finished):
            state = "unchanged"
        elif is_restored(finished):
            state = "restored"
        peak_bytes = measured(self.project, self.run_id).get(name, 0)
        return self._ended(Outcome(name, state, finished.seconds, peak_bytes, failed))

    def stop(self) -> None:
        """Stop all that runs; later calls of ``run_stage`` raise ``Stopped``."""
        self._group.stop()

    def say(self, text: str) -> None:
        """Tell a sentence to whoever shows this run."""
        self._events.tell(MESSAGE, text=text)

    def wait_for(self, text: str) -> None:
        """Tell what the run does now that is no stage."""
        self._events.tell(WAITING, text=text)

    def _ended(self, result: Outcome) -> Outcome:
        self._events.tell(
            STAGE_ENDED,
            stage=result.stage,
            state=result.state,
            seconds=round(result.seconds, 3),
            peak_bytes=result.peak_bytes,
        )
        self.outcomes[result.stage] = result
        return result


@contextlib.contextmanager
def journaled(project: Project, kind: RunKind) -> Iterator[RunJournal]:
    """Open a run in the journal and close it with what ended the body; first sweep dead runs."""
    close_stale(project.journal)
    prune_logs(project)
    journal = open_run(project.journal, kind=kind)
    try:
        yield journal
    except BaseException as error:
        is_stop = isinstance(error, Stopped) or not isinstance(error, Exception)
        journal.note(explain(error)[0])
        journal.close("interrupted" if is_stop else "failed")
        raise
    journal.close("finished")


def record_state(
    project: Project, dag: Dag, journal: RunJournal, *, stale: Collection[str] = ()
) -> str:
    """Write the lineage of what lies in the folder now, and who made the reused parts; return it.

    Stages in ``stale`` are not up to date: nothing is said of them, nor of results they lead to.

    Also to ``.headrace/lineage.json``, beside time, host and commit, which are not part of it.
    """
    keys = stage_keys(project.root / LOCK)
    lineage = lineage_id(keys, dag.by_name, environment_digest())
    entry = read_run(run_path(project.journal, journal.run_id))
    ran = {stage.stage for stage in entry.stages if stage.status == "finished"}
    unchanged = {
        name: made_by(project.journal, name, key=keys[name])
        for name in dag.by_name
        if name in keys and name not in ran and name not in stale
    }
    journal.state(lineage=lineage, stage_keys=keys, unchanged=unchanged)
    evaluated = project.data("evaluate")
    if (evaluated / "metrics.json").is_file() and "evaluate" not in stale:
        targets = read_json(evaluated / "comparison.json")["targets"]
        tied = {target: entry["tied_with_best"] for target, entry in targets.items()}
        journal.results(read_json(evaluated / "metrics.json"), tied_with_best=tied)
        _keep_report(project, journal, lineage=lineage, commit=entry.commit, dirty=entry.dirty)
    write_json(
        project.state / "lineage.json",
        {
            "lineage": lineage,
            "stage_keys": {name: keys[name] for name in dag.by_name if name in keys},
            "run": journal.run_id,
            "commit": entry.commit,
            "uncommitted": entry.dirty,
            "host": socket.gethostname(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    return lineage


def _keep_report(
    project: Project, journal: RunJournal, *, lineage: str, commit: str | None, dirty: str | None
) -> None:
    """Keep a copy of the report that says which run it belongs to; the stage's own does not."""
    page = report(project)
    if page is None:
        return
    count = looks(project)
    facts = {
        "lineage id": lineage,
        "run": journal.run_id,
        "commit": (commit or "none") + (", with uncommitted changes" if dirty else ""),
        "looks at these test rows": "unknown" if count is None else str(count),
    }
    copy = project.state / page.name
    write_file(copy, identified(page.read_text(encoding="utf-8"), facts))
    journal.file(copy)
    copy.unlink()


def measured(project: Project, run_id: str) -> Mapping[str, int]:
    """Peak bytes of each stage that ran, summed over the run's processes, from the journal."""
    path = run_path(project.journal, run_id)
    if not path.is_file():
        return {}
    return {stage.stage: stage.peak_bytes for stage in read_run(path).stages}


def prune_logs(project: Project) -> None:
    """Keep the logs of the last runs only."""
    if project.logs.is_dir():
        runs = [path for path in project.logs.iterdir() if path.is_dir()]
        runs.sort(key=lambda path: path.stat().st_mtime)
        for folder in runs[:-_KEPT_LOGS]:
            shutil.rmtree(folder, ignore_errors=True)


def deliver(project: Project, logs: Path) -> str:
    """Bring the journal to MLflow and register the published model; return what went wrong.

    Tracking is a replica: what cannot be delivered stays in the journal and never fails a run.
    """
    finished = run(
        ["headrace", "sync"],
        cwd=project.root,
        log=logs / "sync.log",
        env=environment(),
        timeout_s=_SYNC_TIMEOUT_S,
    )
    if finished.exit_code == 0:
        return ""
    return (
        f"MLflow is not up to date ({last_line(finished.tail)}); nothing is lost: "
        f"`headrace sync` delivers it later"
    )
