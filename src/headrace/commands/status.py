"""``headrace status``: the stages and whether they are up to date, the last runs, and disk use."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headrace.commands.checks import require_settings
from headrace.commands.lock import Holder, current_holder
from headrace.commands.pipeline import Dag, changes, read_dag, use_without_git
from headrace.commands.why import judge
from headrace.memory import format_bytes
from headrace.project import Project
from headrace.tracking.history import (
    Run,
    current_run,
    list_runs,
    read_progress,
    read_run,
    run_path,
)

_STORES = (".dvc/cache", ".headrace", ".prefect", "mlruns", "mlflow.db")


@dataclass(frozen=True)
class StageStatus:
    """One stage: its state, the run that made its outs, and the bytes of its outs."""

    stage: str
    state: str  # fresh, stale, waiting, never run; in a run: how far it is
    made_by: str
    num_bytes: int


@dataclass(frozen=True)
class Status:
    """What ``headrace status`` prints."""

    stages: tuple[StageStatus, ...]
    last_run: Run | None
    stores: tuple[tuple[str, int], ...]  # caches and histories: name, bytes on disk
    holder: Holder | None = None  # the run that goes on


def status(project: Project) -> Status:
    """Look at the project; nothing is changed. While a run goes on, it is the run that is shown."""
    require_settings(project)
    use_without_git(project)
    dag = read_dag(project)
    holder = current_holder(project)
    states = _states_in_a_run(project, dag) if holder else _states_at_rest(project, dag)
    runs = [read_run(run_path(project.journal, run_id)) for run_id in list_runs(project.journal)]
    return Status(
        stages=tuple(
            StageStatus(
                name,
                states[name],
                made_by=_maker(name, runs),
                num_bytes=sum(disk_bytes(project.root / out) for out in stage.outs),
            )
            for name, stage in dag.by_name.items()
        ),
        last_run=runs[-1] if runs else None,
        stores=tuple(
            (name, disk_bytes(project.root / name))
            for name in _STORES
            if (project.root / name).exists()
        ),
        holder=holder,
    )


def print_status(found: Status, console: Console) -> None:
    """Print ``found`` as tables."""
    table = Table(title="Stages", title_justify="left", title_style="bold")
    for name in ("stage", "state", "made by run"):
        table.add_column(name)
    table.add_column("disk", justify="right")
    for stage in found.stages:
        table.add_row(stage.stage, stage.state, stage.made_by, format_bytes(stage.num_bytes))
    console.print(table)
    for name, size in found.stores:
        console.print(f"{name:<12} {format_bytes(size)}", highlight=False)
    console.print(_last(found.last_run), highlight=False, soft_wrap=True)
    if found.holder:
        told = f"running: `{found.holder.command}` (pid {found.holder.pid})"
        console.print(told, markup=False, highlight=False)
        return
    stale = [stage.stage for stage in found.stages if stage.state != "fresh"]
    count = "1 stage is" if len(stale) == 1 else f"{len(stale)} stages are"
    told = f"{count} not up to date: headrace why" if stale else "all stages are up to date"
    console.print(told, highlight=False)


def disk_bytes(path: Path) -> int:
    """Return the bytes that ``path`` takes on disk; a file with several names counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    paths = [path] if path.is_file() else [Path(r) / n for r, _, ns in os.walk(path) for n in ns]
    for file in paths:
        try:
            stat = file.lstat()
        except FileNotFoundError:
            continue
        if (stat.st_dev, stat.st_ino) not in seen:
            seen.add((stat.st_dev, stat.st_ino))
            total += stat.st_blocks * 512
    return total


def _states_at_rest(project: Project, dag: Dag) -> dict[str, str]:
    verdicts = judge(project, dag, changes(project, dag))
    return {verdict.stage: verdict.state for verdict in verdicts}


def _states_in_a_run(project: Project, dag: Dag) -> dict[str, str]:
    """DVC does not compare while it works; what the journal knows of the run is told instead."""
    run = current_run(project.journal)
    if run is None:
        return dict.fromkeys(dag.by_name, "not known yet")
    found = {stage.stage: str(stage.status) for stage in run.stages}
    for name, far in read_progress(project.journal, run.run_id).items():
        total = f"/{far.total:,}" if far.total else ""
        found[name] = f"running {far.done:,}{total} {far.unit}"
    return {name: found.get(name, "not known yet") for name in dag.by_name}


def _maker(stage: str, runs: Sequence[Run]) -> str:
    """The newest run in which ``stage`` finished, if the journal knows one."""
    return next(
        (
            run.run_id
            for run in reversed(runs)
            if any(s.stage == stage and s.status == "finished" for s in run.stages)
        ),
        "",
    )


def _last(run: Run | None) -> str:
    if run is None:
        return "no run yet: headrace run"
    moment = datetime.fromtimestamp(run.opened).astimezone().isoformat(" ", timespec="minutes")
    took = f", {run.closed - run.opened:.0f} s" if run.closed else ""
    return f"last run: {run.run_id} ({run.kind}), {moment}, {run.status}{took}"
