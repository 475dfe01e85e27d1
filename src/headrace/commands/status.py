"""``headrace status``: the stages and whether they are up to date, the last runs, and disk use."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headrace.commands.pipeline import Dag, changes, read_dag, use_without_git
from headrace.commands.why import Verdict, judge
from headrace.memory import format_bytes
from headrace.project import Project
from headrace.tracking.history import Run, list_runs, read_run, run_path

_STORES = (".dvc/cache", ".headrace", ".prefect", "mlruns", "mlflow.db")


@dataclass(frozen=True)
class StageStatus:
    """One stage: its state, the run that made its outs, and the bytes of its outs."""

    stage: str
    state: str  # fresh, stale, waiting, never run
    made_by: str
    num_bytes: int


@dataclass(frozen=True)
class Status:
    """What ``headrace status`` prints."""

    stages: tuple[StageStatus, ...]
    last_run: Run | None
    stores: tuple[tuple[str, int], ...]  # caches and histories: name, bytes on disk


def status(project: Project) -> Status:
    """Look at the project; nothing is changed."""
    use_without_git(project)
    dag = read_dag(project)
    verdicts = judge(project, dag, changes(project, dag))
    runs = [read_run(run_path(project.journal, run_id)) for run_id in list_runs(project.journal)]
    return Status(
        stages=tuple(_stage(project, dag, verdict, runs) for verdict in verdicts),
        last_run=runs[-1] if runs else None,
        stores=tuple(
            (name, size)
            for name in _STORES
            if (size := disk_bytes(project.root / name)) or (project.root / name).exists()
        ),
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


def _stage(project: Project, dag: Dag, verdict: Verdict, runs: Sequence[Run]) -> StageStatus:
    outs = [project.root / out for out in dag.by_name[verdict.stage].outs]
    made_by = next(
        (
            run.run_id
            for run in reversed(runs)
            if any(s.stage == verdict.stage and s.status == "finished" for s in run.stages)
        ),
        "",
    )
    return StageStatus(verdict.stage, verdict.state, made_by, sum(map(disk_bytes, outs)))


def _last(run: Run | None) -> str:
    if run is None:
        return "no run yet: headrace run"
    moment = datetime.fromtimestamp(run.opened).astimezone().isoformat(" ", timespec="minutes")
    took = f", {run.closed - run.opened:.0f} s" if run.closed else ""
    return f"last run: {run.run_id} ({run.kind}), {moment}, {run.status}{took}"
