"""``headrace repro``: ``dvc repro`` that works in any shell, says what it does, and exits as told.

DVC runs the stages; what this adds is the PATH of this installation (DVC finds ``headrace`` in a
shell where nothing is activated), one run at a time, progress, and the exit code of the stage that
failed, which DVC replaces by 255.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from headrace.commands.checks import require_code, require_settings
from headrace.commands.display import Display
from headrace.commands.events import LineReader
from headrace.commands.execute import RESUME, deliver, journaled, measured, record_state
from headrace.commands.failure import Failure, clear_failure
from headrace.commands.lock import lock_folder, told_to
from headrace.commands.pipeline import (
    DVC,
    Dag,
    changes,
    environment,
    outcome,
    prepare,
    read_dag,
    use_without_git,
)
from headrace.commands.summary import Cost, print_summary
from headrace.commands.supervise import Finished, Group, stop_on_signals
from headrace.errors import HeadraceError, Stopped
from headrace.project import Project
from headrace.tracking.history import RUN_ID_VARIABLE, read_progress, read_run, run_path
from headrace.tracking.location import find_store
from headrace.tracking.replica import pending

_LOOK_S = 0.2
_RUNNING = re.compile(r"^Running stage '(.+)':")
_UNCHANGED = re.compile(r"^Stage '(.+)' didn't change, skipping")
_RESTORED = re.compile(r"^Stage '(.+)' is cached - skipping run")
_FAILED = re.compile(r"failed to reproduce '(.+?)'")


def repro(project: Project, stages: Sequence[str], *, wait: bool, console: Console) -> None:
    """Bring ``stages`` (default: all) and what they need up to date with DVC alone.

    Raises:
        HeadraceError: what stopped the first stage that failed; ``Stopped`` on Ctrl-C.
        DependencyError: if another run holds the folder, unless ``wait``.
    """
    with (
        stop_on_signals(RESUME),
        lock_folder(project, "headrace repro", wait=wait, on_wait=told_to(console)) as lock,
    ):
        require_settings(project)
        use_without_git(project)
        dag = read_dag(project)
        dag.require(stages)
        require_code(project, dag)
        for note in prepare(project, dag):
            console.print(note, markup=False)
        changed = changes(project, dag)
        if not changed.keys() & dag.needed_for(stages):
            console.print("unchanged, nothing to do")
            _show(project, dag, [], changed, console)
            return
        logs = project.logs
        try:
            with journaled(project, "repro") as journal:
                logs = project.logs / journal.run_id
                with Display(console) as display:
                    watcher = _Watcher(project, journal.run_id, logs / "repro.log", display)
                    finished = _run(project, dag, stages, watcher, lock)
                if failure := _failure(project, dag, finished):
                    raise failure.error()
                stale = changes(project, dag) if stages else {}
                record_state(project, dag, journal, stale=stale)
        except Stopped:
            raise
        except HeadraceError:
            deliver(project, logs)  # MLflow shows what failed, too; the error is the news here
            raise
        is_behind = "publish" in dag.by_name and pending(project.journal, find_store(project.root))
        if is_behind and (problem := deliver(project, logs)):
            console.print(problem, markup=False)
        _show(project, dag, watcher.costs(), stale, console)


def _show(
    project: Project,
    dag: Dag,
    costs: Sequence[Cost],
    stale: Mapping[str, object],
    console: Console,
) -> None:
    """Show the results; but not those of stages that are not up to date."""
    if stale:
        count = "1 stage is" if len(stale) == 1 else f"{len(stale)} stages are"
        console.print(f"{count} not up to date: headrace why", highlight=False)
    else:
        print_summary(project, dag, costs, console)


class _Watcher:
    """Reads DVC's log as it grows, and shows what it says of the stages."""

    def __init__(self, project: Project, run_id: str, log: Path, display: Display) -> None:
        self.run_id = run_id
        self.log = log
        self._project = project
        self._display = display
        self._lines = LineReader(log)
        self._states: dict[str, str] = {}
        self._running: str | None = None

    def look(self) -> None:
        """Show what is new."""
        for line in self._lines.new():
            if found := _RUNNING.match(line):
                self._end_running()
                self._running = found[1]
                self._display.started(found[1])
            elif found := _UNCHANGED.match(line):
                self._end(found[1], "unchanged")
            elif found := _RESTORED.match(line):
                self._end(found[1], "restored")
            elif found := _FAILED.search(line):
                self._running = None
                self._end(found[1], "failed")
        self._display.progress(read_progress(self._project.journal, self.run_id))

    def finish(self) -> None:
        """Show the rest; DVC says nothing when the last stage ends well."""
        self.look()
        self._end_running()

    def costs(self) -> list[Cost]:
        """What each stage took, from the journal."""
        path = run_path(self._project.journal, self.run_id)
        seconds = {stage.stage: stage.seconds for stage in read_run(path).stages}
        peaks = measured(self._project, self.run_id)
        return [
            Cost(name, state, seconds.get(name, 0.0), peaks.get(name, 0))
            for name, state in self._states.items()
        ]

    def _end_running(self) -> None:
        if self._running is not None:
            self._end(self._running, "ran")
            self._running = None

    def _end(self, stage: str, state: str) -> None:
        if state == "unchanged":
            self._end_running()
        self._states[stage] = state
        path = run_path(self._project.journal, self.run_id)
        run = next((s for s in read_run(path).stages if s.stage == stage), None)
        self._display.ended(stage, state, run.seconds if run else 0.0, run.peak_bytes if run else 0)


def _run(
    project: Project, dag: Dag, stages: Sequence[str], watcher: _Watcher, lock: int | None
) -> Finished:
    targets = [member for name in stages for member in dag.members(name)]
    for name in dag.by_name:
        clear_failure(project, name)
    with Group().start(
        [*DVC, "repro", *targets],
        cwd=project.root,
        log=watcher.log,
        env=environment(**{RUN_ID_VARIABLE: watcher.run_id}),
        held=[lock] if lock is not None else [],
    ) as child:
        while (code := child.wait(_LOOK_S)) is None:
            watcher.look()
        watcher.finish()
    return Finished(code, child.seconds, child.tail(), child.log)


def _failure(project: Project, dag: Dag, finished: Finished) -> Failure | None:
    found = _FAILED.findall(finished.tail)
    name = found[-1] if found and found[-1] in dag.by_name else "?"
    return outcome(project, name, finished)
