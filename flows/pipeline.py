"""The pipeline as a Prefect flow: order, admission, retries and what the Prefect UI shows.

The stages are those of dvc.yaml, one task each, and DVC decides whether a stage has anything to do;
it is the only cache. Each stage runs in a process group of its own that is gone when this process
is, however it ends: Prefect neither stops the children of a cancelled run nor notices a run that
was killed, so a run notes its process beside its id, and the next run closes the dead.
"""

import os
import queue
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import UUID

from prefect import flow, get_client, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.runtime import flow_run, task_run
from prefect.states import Completed, Crashed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from headrace.commands import results
from headrace.commands.checks import require_code, require_settings
from headrace.commands.events import ENDED, EventLog
from headrace.commands.execute import RESUME, Execution, deliver, journaled, record_state
from headrace.commands.lock import lock_folder
from headrace.commands.pipeline import (
    Capacity,
    admissible,
    changes,
    prepare,
    read_dag,
    use_without_git,
)
from headrace.commands.servers import HOST, MLFLOW_PORT
from headrace.commands.settings import read_resources
from headrace.commands.supervise import die_with_parent
from headrace.errors import DependencyError, HeadraceError, Stopped
from headrace.project import Project
from headrace.storage import write_file
from headrace.tracking.location import find_store
from headrace.tracking.owner import is_alive, process_mark

SKIPPED = "skipped, data unchanged"
_MAX_STAGES_AT_ONCE = 32  # threads that wait; what may run is decided by admission
_RUNNER: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=_MAX_STAGES_AT_ONCE)
_RETRY_DELAYS_S = (2.0, 10.0)


@task(
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=len(_RETRY_DELAYS_S),
    retry_delay_seconds=list(_RETRY_DELAYS_S),
    retry_condition_fn=lambda _task, _run, state: isinstance(
        state.result(raise_on_failure=False), DependencyError
    ),
)
def stage(name: str, execution: Execution) -> State[Any]:
    """Bring one stage up to date; only what may pass by itself (exit code 4) is tried again."""
    done = execution.run_stage(name)
    if done.failure is None:
        named = {"unchanged": "Unchanged", "restored": "Restored", "ran": "Completed"}[done.state]
        return Completed(name=named, message=f"{done.seconds:.1f} s")
    tries_left = len(_RETRY_DELAYS_S) - task_run.run_count + 1
    if done.failure.exit_code == DependencyError.exit_code and tries_left > 0:
        execution.say(f"{done.failure.message}; trying again")
    return Failed(message=done.failure.message, data=done.failure.error())


@task(task_run_name="sync", cache_policy=NO_CACHE, persist_result=False)
def sync(execution: Execution) -> None:
    """Bring the run to MLflow; what cannot be delivered waits in the journal."""
    execution.wait_for("bringing the run to MLflow")
    if problem := deliver(execution.project, execution.logs):
        execution.say(problem)


@flow(
    name="headrace",
    task_runner=_RUNNER,  # type: ignore[arg-type]  # its futures are narrower than declared
    persist_result=False,
    validate_parameters=False,
)
def pipeline(project: str, logs: str = "") -> State[Any]:
    """Bring all stages of ``project`` up to date.

    Args:
        project: the project folder.
        logs: folder for what the stages print; default: one named like the run.
    """
    if "PREFECT__FLOW_RUN_ID" in os.environ:  # started by a server's runner, which may be killed
        die_with_parent()
    home = Project(Path(project).resolve())
    try:
        with lock_folder(home, "a run of `headrace schedule`", wait=True), _known(home):
            return _run(home, Path(logs) if logs else None)
    except HeadraceError as error:
        return Failed(message=str(error), data=error)


def main() -> int:
    """Run the flow for ``headrace run``: ``python -m flows.pipeline PROJECT LOGS``.

    The exit code is that of the stage that failed; how it ended is the last event in ``LOGS``.
    """

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not cut the stop short
            signal.signal(number, lambda *_: None)
        raise Stopped(RESUME)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    events = EventLog(Path(sys.argv[2]))
    try:
        state = pipeline(sys.argv[1], sys.argv[2], return_state=True)
    except (Stopped, TerminationSignal, KeyboardInterrupt):
        events.tell(ENDED, state="Stopped", exit_code=Stopped.exit_code, message=RESUME)
        return Stopped.exit_code
    error = state.result(raise_on_failure=False)
    exit_code = 0 if state.is_completed() else getattr(error, "exit_code", 1)
    events.tell(ENDED, state=state.name, exit_code=exit_code, message=state.message or "")
    return int(exit_code)


def _run(project: Project, logs: Path | None) -> State[Any]:
    require_settings(project)
    use_without_git(project)
    dag = read_dag(project)
    require_code(project, dag)
    resources = read_resources(project)
    notes = prepare(project, dag)
    is_fresh = not changes(project, dag)
    failure = None
    try:
        with journaled(project, "flow") as journal:
            folder = logs or project.logs / journal.run_id
            execution = Execution(project, dag, run_id=journal.run_id, logs=folder)
            for note in notes:
                execution.say(note)
            try:
                if not is_fresh:
                    _run_stages(execution, Capacity(resources.threads, resources.memory_budget))
                record_state(project, dag, journal)
            finally:
                execution.stop()  # nothing runs any more, unless this was stopped
    except Stopped:
        raise
    except HeadraceError as error:
        failure = error  # told to MLflow first
    if "publish" in dag.by_name:
        sync.submit(execution).wait()
    if failure:
        raise failure
    is_fresh = is_fresh or all(
        done.state == "unchanged" or dag.by_name[name].is_always_run
        for name, done in execution.outcomes.items()
    )
    _show(project)
    if is_fresh:
        return Completed(name="Skipped", message=SKIPPED)
    return Completed(message="all stages are up to date")


def _run_stages(execution: Execution, capacity: Capacity) -> None:
    """Run all stages in the DAG's order, as many at a time as ``capacity`` admits.

    Raises:
        HeadraceError: of the first stage that failed, once what ran beside it has ended.
    """
    dag = execution.dag
    waiting = list(dag.by_name)
    futures: dict[str, Any] = {}
    running: set[str] = set()
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    failure = None
    while waiting or running:
        ready = [n for n in waiting if set(dag.by_name[n].upstream) <= set(futures) - running]
        while not failure and (name := admissible(dag, ready, running, capacity)):
            upstream = [futures[above] for above in dag.by_name[name].upstream]
            futures[name] = stage.submit(  # type: ignore[call-overload]  # wait_for is not in the overload
                name, execution, wait_for=upstream
            )
            futures[name].add_done_callback(lambda _, name=name: ended.put(name))
            running.add(name)
            waiting.remove(name)
            ready.remove(name)
        if not running:
            break
        name = ended.get()
        running.discard(name)
        futures[name].wait()
        done = execution.outcomes.get(name)
        if done is None:
            futures[name].result()  # raises what kept the task from running the stage
        elif done.failure and not failure:
            failure = done.failure
    if failure:
        raise failure.error()


@contextmanager
def _known(project: Project) -> Iterator[None]:
    """Note which process runs this flow run; first close those whose process is gone.

    Nobody else may run here at this time (the folder is locked), but a served run may be waiting
    for the lock: it has no note yet.
    """
    folder = project.state / "flow-runs"
    _close_dead(folder)
    note = folder / str(flow_run.id)
    write_file(note, process_mark(os.getpid()))
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def _close_dead(folder: Path) -> None:
    for note in folder.glob("*-*") if folder.is_dir() else ():
        if is_alive(note.read_text()):
            continue
        with get_client(sync_client=True) as client:
            try:
                state = client.read_flow_run(UUID(note.name)).state
                if state is None or not state.is_final():
                    gone: State[Any] = Crashed(
                        message="its process is gone; closed by the next run"
                    )
                    client.set_flow_run_state(UUID(note.name), gone, force=True)
            except ObjectNotFound:
                pass  # the server's database was deleted
        note.unlink(missing_ok=True)


def _show(project: Project) -> None:
    """Leave the results where the Prefect UI shows them."""
    rows = results.results(project)
    if rows:
        create_table_artifact(
            key="results",
            table=[
                {
                    "target": row.target,
                    "metric": row.metric,
                    "model": row.model,
                    "value [95 % interval]": row.interval,
                    "against the chosen": row.verdict,
                    "unit": f"{row.num_units} {row.unit}s",
                }
                for row in rows
            ],
            description="Test rows, primary metric of each target",
        )
    if path := results.report(project):
        create_link_artifact(key="report", link=path.as_uri(), link_text="the report")
    store = find_store(project.root)
    is_remote = store.uri.startswith(("http://", "https://"))
    create_link_artifact(
        key="mlflow",
        link=store.name if is_remote else f"http://{HOST}:{MLFLOW_PORT}",
        link_text="MLflow" if is_remote else "MLflow, while `headrace ui` runs",
    )


if __name__ == "__main__":
    sys.exit(main())
