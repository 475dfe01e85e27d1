"""What the journal holds, read back: runs, their stages, looks at the test rows, progress.

The files are described in ``journal``, which writes them. Reading takes no lock: lines are only
ever appended, and a last line without its newline is not there yet.
"""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from headrace.errors import ConfigError, IntegrityError, nearest
from headrace.record import Scalar
from headrace.storage import read_json

RUN_ID_VARIABLE = "HEADRACE_RUN_ID"
# Who ran the stages: `headrace run`, `headrace repro`, plain dvc, or a person, one stage.
# The stages of `headrace search` are trials, that of `headrace skill` its refits, and none of them
# is the pipeline's.
_TRIALS = ("search", "skill")
RunKind = Literal["flow", "repro", "dvc", "stage", "search", "skill"]
RunStatus = Literal["running", "finished", "failed", "interrupted"]
StageStatus = Literal["running", "finished", "failed", "stopped", "interrupted"]

_RUN_ID = re.compile(r"^\d{4,}-[0-9A-Za-z]+-[0-9a-f]{8}$")
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Event:
    """One line of a journal file; ``stage_run`` is empty for events of the run itself."""

    seq: int
    time: float  # seconds since the epoch, for people; order comes from ``seq``
    kind: str
    stage_run: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class StageRun:
    """One execution of one stage within a run, gathered from its events."""

    stage_run: str
    stage: str
    opened: float
    closed: float | None = None
    status: StageStatus = "running"
    seconds: float = 0.0
    peak_bytes: int = 0
    exit_code: int | None = None
    events: tuple[Event, ...] = ()

    def of_kind(self, kind: str) -> tuple[Event, ...]:
        """Return this stage's events of one kind, in order."""
        return tuple(event for event in self.events if event.kind == kind)

    @property
    def params(self) -> dict[str, Scalar]:
        """All settings the stage recorded; a later value replaces an earlier one."""
        return {k: v for event in self.of_kind("params") for k, v in event.data["values"].items()}

    @property
    def last_metrics(self) -> dict[str, float]:
        """The last value of every metric."""
        return {
            name: float(value)
            for event in self.of_kind("metrics")
            for name, value in event.data["values"].items()
        }


@dataclass(frozen=True)
class Run:
    """One pipeline run, read back from its journal file."""

    run_id: str
    kind: RunKind
    opened: float
    owner: str  # mark of the owning process
    host: str
    commit: str | None = None
    dirty: str | None = None  # digest of the uncommitted diff
    closed: float | None = None
    status: RunStatus = "running"
    lineage: str | None = None
    stage_keys: Mapping[str, str] = field(default_factory=dict)
    reused: Mapping[str, str | None] = field(default_factory=dict)  # stage -> run that made it
    results: Mapping[str, Any] | None = None  # content of metrics.json, see ``RunJournal.results``
    tied_with_best: Mapping[str, list[str]] = field(default_factory=dict)  # target -> models
    stages: tuple[StageRun, ...] = ()
    events: tuple[Event, ...] = ()  # of the run itself, stages excluded
    last_seq: int = 0

    @property
    def number(self) -> int:
        """Position of the run in its journal folder, from 1."""
        return int(self.run_id.partition("-")[0])


@dataclass(frozen=True)
class Progress:
    """How far a running stage is."""

    stage: str
    done: int
    total: int | None
    unit: str
    detail: str
    time: float


def run_path(folder: Path, run_id: str) -> Path:
    """Return the file of a run.

    Raises:
        ConfigError: if ``run_id`` does not have the form of a run id.
    """
    if not _RUN_ID.match(run_id):
        raise ConfigError(
            f"{run_id!r} is not a run id; they look like 0012-20260131T093000Z-1f2e3d4c "
            f"(see {RUN_ID_VARIABLE}, or `headrace status` for those of this project)"
        )
    return folder / f"{run_id}.jsonl"


def list_runs(folder: Path) -> tuple[str, ...]:
    """Return the ids of all runs of a journal folder, oldest first."""
    if not folder.is_dir():
        return ()
    names = [
        path.stem
        for path in folder.glob("*.jsonl")
        if _RUN_ID.match(path.stem) and path.stat().st_size > 0
    ]
    return tuple(sorted(names, key=lambda name: (int(name.partition("-")[0]), name)))


def current_run(folder: Path) -> Run | None:
    """Return the newest run that is still open, or None."""
    for run_id in reversed(list_runs(folder)):
        run = read_run(run_path(folder, run_id))
        if run.status == "running":
            return run
    return None


def find_run(folder: Path, name: str) -> Run:
    """Return the run called ``name``: its id or the beginning of it, its number, or ``last``.

    The last one is the last of stages: a search or an estimate of skill evaluates nothing.

    Raises:
        ConfigError: if there is no such run, with the nearest id, or several begin like this.
    """
    known = list_runs(folder)
    wanted = [
        run_id
        for run_id in known
        if (
            int(name) == int(run_id.partition("-")[0])
            if name.isdigit()
            else run_id.startswith(name)
        )
    ]
    if len(wanted) > 1 and not name.isdigit():
        raise ConfigError(f"{len(wanted)} runs begin with {name!r}: {', '.join(wanted)}; name one")
    if name == "last":
        of_stages = (
            i for i in reversed(known) if read_run(run_path(folder, i)).kind not in _TRIALS
        )
        wanted = list(itertools.islice(of_stages, 1))
    if not wanted:
        raise ConfigError(
            f"{folder} has no run {name!r}{nearest(name, known)}; "
            f"it holds {len(known)} runs" + (f", the last is {known[-1]}" if known else "")
        )
    return read_run(run_path(folder, wanted[-1]))


def read_run(path: Path) -> Run:
    """Read one run's file; a last line torn by a kill is left out.

    Raises:
        IntegrityError: if the file is missing, or another line than the last cannot be read.
    """
    events = _read_events(path)
    if not events or events[0].kind != "run_open":
        raise IntegrityError(f"{path} does not start with `run_open`; move it away to go on")
    own = tuple(event for event in events if not event.stage_run and event.kind != "stage_open")
    opening = _last(own, "run_open")
    assert opening is not None
    lineage = _last(own, "lineage")
    results = _last(own, "results")
    closing = _closing(events)
    return Run(
        run_id=path.stem,
        kind=opening.data["run_kind"],
        opened=events[0].time,  # it may have been opened again since
        owner=opening.data["owner"],
        host=opening.data["host"],
        commit=opening.data["commit"],
        dirty=opening.data["dirty"],
        closed=closing.time if closing else None,
        # The last close knows best how the run ended, the first one when.
        status=events[-1].data["status"] if closing else "running",
        lineage=lineage.data["id"] if lineage else None,
        stage_keys=lineage.data["stage_keys"] if lineage else {},
        reused={e.data["stage"]: e.data["made_by"] for e in own if e.kind == "stage_reused"},
        results=results.data["metrics"] if results else None,
        # An event that an earlier version wrote says nothing of ties.
        tied_with_best=results.data.get("tied_with_best", {}) if results else {},
        stages=_gather_stages(events),
        events=own,
        last_seq=events[-1].seq,
    )


def last_seq(path: Path) -> int:
    """Return the number of the last whole event of a run's file, reading only its end."""
    with path.open("rb") as file:
        return tail(file)[1]


def read_progress(folder: Path, run_id: str) -> dict[str, Progress]:
    """Return how far the running stages of a run are, by stage."""
    found: dict[str, Progress] = {}
    for path in sorted((folder / "progress" / run_id).glob("*.json")):
        with contextlib.suppress(IntegrityError):  # removed or replaced at this moment
            state = read_json(path)
            found[state["stage"]] = Progress(**state)
    return found


def made_by(folder: Path, stage: str, *, key: str | None = None) -> str | None:
    """Return the newest run in which ``stage`` finished, with stage key ``key`` if one is given.

    None if this journal does not know: the outs came from a remote or from another folder.
    """
    for run_id in reversed(list_runs(folder)):
        run = read_run(run_path(folder, run_id))
        has_made = any(s.stage == stage and s.status == "finished" for s in run.stages)
        if has_made and (key is None or run.stage_keys.get(stage, key) == key):
            return run_id
    return None


def stage_in(folder: Path, run: Run, stage: str) -> StageRun | None:
    """Return the execution of ``stage`` that made its outs in ``run``: its own or a reused one.

    None if it did not finish, or this journal does not know who made what was reused.
    """
    own = [one for one in run.stages if one.stage == stage and one.status == "finished"]
    if own:
        return own[-1]
    maker = run.reused.get(stage)
    path = run_path(folder, maker) if maker else None
    if path is None or not path.is_file():
        return None
    made = read_run(path).stages
    return next((s for s in reversed(made) if (s.stage, s.status) == (stage, "finished")), None)


def count_looks(folder: Path, split_digest: str, *, until: str | None = None) -> int:
    """Return how many executions of ``evaluate`` have read the test rows of this split.

    With ``until`` runs after that one are left out: what a run has to say of itself.
    """
    looks = 0
    known = list_runs(folder)
    for run_id in known[: known.index(until) + 1] if until else known:
        path = run_path(folder, run_id)
        if split_digest.encode() not in path.read_bytes():
            continue
        looks += sum(
            any(
                event.data["context"] == "test" and event.data["digest"] == split_digest
                for event in stage.of_kind("dataset")
            )
            for stage in read_run(path).stages
            if stage.stage == "evaluate"
        )
    return looks


def kept_file(folder: Path, digest: str) -> Path:
    """Return where the journal keeps the bytes of a recorded file."""
    return folder / "files" / digest[:2] / digest


def is_closed(path: Path) -> bool:
    """Tell whether a run's last event is its end, reading only the end of its file."""
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 4096))
        return b'"event": "run_close"' in file.read().rstrip(b"\n").rpartition(b"\n")[2]


def owner_of(path: Path) -> str:
    """Return the mark of the process that owns a run, reading only the first line."""
    with path.open("rb") as file:
        first = file.readline()
    return str(json.loads(first)["owner"]) if first.endswith(b"\n") else ""


def progress_path(folder: Path, run_id: str, stage: str) -> Path:
    """Return where a running stage leaves how far it is."""
    return folder / "progress" / run_id / f"{stage}.json"


def tail(file: BinaryIO) -> tuple[int, int]:
    """Return the length of the whole lines of ``file`` and the number of the last event."""
    length = file.seek(0, os.SEEK_END)
    take = min(_TAIL_BYTES, length)
    while True:
        file.seek(length - take)
        end = file.read(take)
        cut = end.rfind(b"\n")
        start = end.rfind(b"\n", 0, cut) if cut > 0 else -1
        if start >= 0 or take == length:
            break
        take = min(take * 4, length)
    if cut < 0:
        return 0, 0
    return length - take + cut + 1, int(json.loads(end[start + 1 : cut])["seq"])


def _read_events(path: Path) -> list[Event]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} does not exist; the run it describes is lost") from error
    lines.pop()  # empty after a whole last line, else the torn one
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            seq, moment, kind = content.pop("seq"), content.pop("time"), content.pop("event")
        except (ValueError, KeyError, AttributeError) as error:
            raise IntegrityError(
                f"{path}:{number}: not a journal event ({error}); move the file away to go on "
                f"without this run"
            ) from error
        events.append(Event(seq, moment, kind, content.pop("stage_run", ""), content))
    return events


def _gather_stages(events: list[Event]) -> tuple[StageRun, ...]:
    by_stage_run: dict[str, list[Event]] = {}
    for event in events:
        if event.kind == "stage_open":
            by_stage_run[f"{event.data['stage']}.{event.seq}"] = [event]
        elif event.stage_run in by_stage_run:
            by_stage_run[event.stage_run].append(event)
    return tuple(_stage_run(name, own) for name, own in by_stage_run.items())


def _stage_run(name: str, events: list[Event]) -> StageRun:
    opening = events[0]
    closing = _last(tuple(events), "stage_close")
    if closing is None:
        return StageRun(name, opening.data["stage"], opening.time, events=tuple(events))
    seconds = closing.data["seconds"] or round(closing.time - opening.time, 3)
    return StageRun(
        stage_run=name,
        stage=opening.data["stage"],
        opened=opening.time,
        closed=closing.time,
        status=closing.data["status"],
        seconds=max(seconds, 0.0),
        peak_bytes=closing.data["peak_bytes"],
        exit_code=closing.data["exit_code"],
        events=tuple(events),
    )


def _closing(events: list[Event]) -> Event | None:
    """Return the event that ended the run, if it has ended and no stage has joined since.

    What is told about a run later (its lineage, under plain ``dvc repro``) is followed by another
    ``run_close``; the first one says when the run ended.
    """
    if events[-1].kind != "run_close":
        return None
    opened = max((event.seq for event in events if event.kind == "stage_open"), default=0)
    return next(e for e in events if e.kind == "run_close" and e.seq > opened)


def _last(events: tuple[Event, ...], kind: str) -> Event | None:
    return next((event for event in reversed(events) if event.kind == kind), None)
