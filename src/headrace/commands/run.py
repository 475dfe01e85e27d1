"""``headrace run``: the pipeline as a Prefect flow, with embedded servers and one quiet terminal.

The flow runs in a process of its own whose output goes to a log, so nothing that Prefect, DVC or a
stage prints gets between the person and the progress. This process only shows, and stops what must
be stopped: first the flow, which stops its stages and tells Prefect, then the server.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from headrace.commands.checks import require_code, require_settings
from headrace.commands.display import Display
from headrace.commands.events import (
    ENDED,
    MESSAGE,
    RUN_OPENED,
    STAGE_ENDED,
    STAGE_STARTED,
    WAITING,
    EventReader,
)
from headrace.commands.execute import RESUME, deliver, prune_logs
from headrace.commands.failure import Failure
from headrace.commands.lock import lock_folder, told_to
from headrace.commands.pipeline import (
    Dag,
    changes,
    environment,
    last_line,
    prepare,
    read_dag,
    use_without_git,
)
from headrace.commands.servers import prefect_api, prefect_environment
from headrace.commands.summary import Cost, print_summary
from headrace.commands.supervise import Child, Group, stop_on_signals
from headrace.errors import DependencyError
from headrace.project import Project
from headrace.tracking.history import read_progress, read_run, run_path
from headrace.tracking.journal import close_stale
from headrace.tracking.location import find_store
from headrace.tracking.replica import pending

_LOOK_S = 0.2
_FLOW_GRACE_S = 40.0  # its stages have 15 s, then it tells Prefect


def run_pipeline(project: Project, *, wait: bool, console: Console) -> None:
    """Bring ``project`` up to date and show what came of it.

    Raises:
        HeadraceError: what stopped the first stage that failed; ``Stopped`` on Ctrl-C.
        DependencyError: if another run holds the folder (unless ``wait``), or no server starts.
    """
    with (
        stop_on_signals(RESUME),
        lock_folder(project, "headrace run", wait=wait, on_wait=told_to(console)) as lock,
    ):
        require_settings(project)
        use_without_git(project)
        dag = read_dag(project)
        require_code(project, dag)
        for note in prepare(project, dag):
            console.print(note, markup=False)
        if changes(project, dag):
            costs = _run_flow(project, lock, console)
        else:
            console.print("skipped, data unchanged: nothing to do")
            costs = []
            if _is_behind(project, dag) and (problem := deliver(project, project.logs)):
                console.print(problem, markup=False)
        print_summary(project, dag, costs, console)


def _run_flow(project: Project, lock: int | None, console: Console) -> list[Cost]:
    prune_logs(project)
    logs = project.logs / f"flow-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    group = Group()
    with Display(console) as display:
        display.wait_for("starting the flow engine (about 10 s)")
        with prefect_api(project, group, log=logs / "prefect.log") as (url, held):
            command = flow_command(project, logs)
            env = environment(**prefect_environment(project), PREFECT_API_URL=url)
            with group.start(
                command,
                cwd=project.root,
                log=logs / "flow.log",
                env=env,
                grace_s=_FLOW_GRACE_S,
                held=[fd for fd in (lock, held) if fd is not None],
            ) as child:
                follower = Follower(project, logs, display)
                while child.wait(_LOOK_S) is None:
                    follower.look()
                follower.look()
    _raise_failure(child, follower.ended)
    return follower.costs


class Follower:
    """Follows a run in another process and shows it."""

    def __init__(self, project: Project, logs: Path, display: Display) -> None:
        self.ended: dict[str, Any] | None = None
        self.costs: list[Cost] = []
        self._project = project
        self._display = display
        self._events = EventReader(logs)
        self._run_id = ""
        self._warned: set[str] = set()

    def look(self) -> None:
        """Take in and show what is new."""
        for event in self._events.new():
            self._take(event)
        if self._run_id:
            self._display.progress(read_progress(self._project.journal, self._run_id))

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == RUN_OPENED:
            self._run_id = event["run_id"]
        elif kind == STAGE_STARTED:
            self._display.started(event["stage"])
        elif kind == STAGE_ENDED:
            self._tell_warnings()
            cost = Cost(event["stage"], event["state"], event["seconds"], event["peak_bytes"])
            self.costs = [c for c in self.costs if c.stage != cost.stage] + [cost]
            self._display.ended(cost.stage, cost.state, cost.seconds, cost.peak_bytes)
        elif kind == MESSAGE:
            self._display.say(event["text"])
        elif kind == WAITING:
            self._display.wait_for(event["text"])
        elif kind == ENDED:
            self.ended = event

    def _tell_warnings(self) -> None:
        path = run_path(self._project.journal, self._run_id)
        if not path.is_file():
            return
        for stage in read_run(path).stages:
            for warning in stage.of_kind("warn"):
                text = f"{stage.stage}: {warning.data['text']}"
                if text not in self._warned:
                    self._warned.add(text)
                    self._display.say(text)


def flow_command(project: Project, logs: Path) -> list[str]:
    """The command that runs the flow in a process of its own; ``-P``: not the folder's modules."""
    return [sys.executable, "-P", "-m", "flows.pipeline", str(project.root), str(logs)]


def _is_behind(project: Project, dag: Dag) -> bool:
    """Whether MLflow lacks runs that were made by another door, such as `dvc repro`."""
    close_stale(project.journal)
    return "publish" in dag.by_name and pending(project.journal, find_store(project.root)) > 0


def _raise_failure(child: Child, ended: dict[str, Any] | None) -> None:
    code = child.wait(0)
    if code == 0:
        return
    if ended:
        raise Failure("", int(ended["exit_code"]), str(ended["message"])).error()
    raise DependencyError(
        f"the flow engine ended with exit code {code}: {last_line(child.tail())}; "
        f"see {child.log}, or run `headrace doctor`"
    )
