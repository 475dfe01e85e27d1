"""The journal: what happened in every pipeline run, written down before anything else hears of it.

One file per run, ``.headrace/journal/RUN_ID.jsonl``: one event per line, numbered, appended under a
lock on the file and synced to disk, so that stages in several processes can write to one run and a
kill loses at most the line being written. Any tracker (MLflow) is a replica that can be rebuilt
from here. Files told to the recorder are copied to ``journal/files/SHA256``, because the outs they
come from are replaced by the next run. Progress is no history: its latest state lies in
``journal/progress/RUN_ID/STAGE.json``, thinned and not synced, and is removed with its stage.

Which run a stage belongs to: the one named by ``HEADRACE_RUN_ID`` (set by whoever runs several
stages), else the open run of the same ``dvc`` process above this one, else a run of its own.
A run is open unless its last event is ``run_close``; its owner is a process, named by pid and
start, and a run whose owner is gone is closed by ``close_stale``.

Cost: one fsync per event (about 1 ms), for points of learning curves at most four a second.
"""

import contextlib
import fcntl
import json
import math
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.errors import HeadraceError, IntegrityError, Stopped
from headrace.record import Scalar
from headrace.storage import digest_bytes, digest_file
from headrace.tracking.history import (
    RUN_ID_VARIABLE,
    Run,
    RunKind,
    RunStatus,
    StageStatus,
    count_looks,
    current_run,
    is_closed,
    kept_file,
    list_runs,
    made_by,
    owner_of,
    progress_path,
    read_progress,
    read_run,
    run_path,
    tail,
)
from headrace.tracking.owner import dvc_above, is_alive, process_mark

__all__ = [
    "RUN_ID_VARIABLE",
    "RunJournal",
    "StageJournal",
    "close_stale",
    "count_looks",
    "current_run",
    "git_state",
    "list_runs",
    "made_by",
    "open_run",
    "open_stage",
    "read_progress",
    "read_run",
    "reopen_run",
    "run_path",
]

_LOCK = ".lock"
_CURVE_SYNC_S = 0.25  # a power cut may cost the last quarter of a second of a learning curve
_PROGRESS_S = 0.2
_RANDOM = secrets.SystemRandom()


class RunJournal:
    """The writer of one run's file; any number of processes may hold one for the same run."""

    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder = folder
        self.run_id = run_id
        self._file = _EventFile(run_path(folder, run_id))

    def stage(
        self, name: str, *, on_warning: Callable[[str], None] | None = None
    ) -> "StageJournal":
        """Open ``name`` as a stage of this run; its recorder is returned.

        ``on_warning`` hears every distinct warning once; by default it goes to standard error.
        """
        return StageJournal(self, name, on_warning=on_warning or _warn_on_stderr(name))

    def state(
        self, *, lineage: str, stage_keys: Mapping[str, str], unchanged: Mapping[str, str | None]
    ) -> None:
        """Record the pipeline's state at the end of the run, so that the run has no holes.

        ``unchanged`` maps each stage whose outs were reused to the run that made them (see
        ``made_by``), or to None where this journal does not know it.
        """
        self._append("lineage", {"id": lineage, "stage_keys": dict(stage_keys)})
        for stage, maker in unchanged.items():
            self._append("stage_reused", {"stage": stage, "made_by": maker})

    def results(
        self, metrics: Mapping[str, Any], *, tied_with_best: Mapping[str, Sequence[str]]
    ) -> None:
        """Record the evaluation.

        ``metrics`` is {target: {model: {metric: {value, ci_low, ci_high}}}}; ``tied_with_best`` are
        the models, the best included, that the test rows cannot tell from the best of a target.
        """
        tied = {target: list(models) for target, models in tied_with_best.items()}
        self._append("results", {"metrics": metrics, "tied_with_best": tied})

    def file(self, path: Path, *, folder: str = "") -> None:
        """Record a finished file as an artifact of the run itself."""
        self._append("file", _keep_file(self.folder, path, folder))

    def note(self, text: str) -> None:
        """Record a sentence in Markdown that a person should read."""
        self._append("note", {"text": text})

    def close(self, status: RunStatus) -> None:
        """Write the end of the run and drop its progress."""
        self._append("run_close", {"status": status})
        _remove_progress(self.folder, self.run_id)

    def _append(
        self, kind: str, data: Mapping[str, Any], *, stage_run: str = "", is_synced: bool = True
    ) -> int:
        return self._file.append(kind, data, stage_run=stage_run, is_synced=is_synced)


class StageJournal:
    """The recorder of one stage: all it hears goes to the journal; see ``record.Recorder``."""

    def __init__(self, run: RunJournal, stage: str, *, on_warning: Callable[[str], None]) -> None:
        self.run = run
        self.stage = stage
        self.peak_bytes = 0  # set by whoever measures, before the stage is closed
        self._on_warning = on_warning
        self._warned: set[str] = set()
        self._started = time.monotonic()
        self._curve_synced = 0.0
        self._progress_told = 0.0
        opened = run._append("stage_open", {"stage": stage})
        self.stage_run = f"{stage}.{opened}"

    def params(self, values: Mapping[str, Scalar]) -> None:
        """Record settings that were decided inside the stage."""
        self._append("params", {"values": {name: _plain(value) for name, value in values.items()}})

    def metrics(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        """Record numbers; points of a curve (``step``) are synced at most four times a second."""
        now = time.monotonic()
        is_synced = step is None or now - self._curve_synced >= _CURVE_SYNC_S
        if is_synced:
            self._curve_synced = now
        numbers = {name: _number(value) for name, value in values.items()}
        self._append("metrics", {"values": numbers, "step": step}, is_synced=is_synced)

    def file(self, path: Path, *, folder: str = "") -> None:
        """Record a finished file; its bytes are kept, whatever happens to ``path`` later."""
        self._append("file", _keep_file(self.run.folder, path, folder))

    def dataset(self, name: str, *, path: Path, digest: str, num_rows: int, context: str) -> None:
        """Record that a data set was read."""
        self._append(
            "dataset",
            {
                "name": name,
                "path": _in_project(self.run.folder, path),
                "digest": digest,
                "rows": int(num_rows),
                "context": context,
            },
        )

    def note(self, text: str) -> None:
        """Record a sentence in Markdown."""
        self._append("note", {"text": text})

    def warn(self, text: str) -> None:
        """Record a warning and tell it once."""
        if text not in self._warned:
            self._warned.add(text)
            self._append("warn", {"text": text})
            self._on_warning(text)

    def progress(self, done: int, total: int | None, *, unit: str, detail: str = "") -> None:
        """Leave the latest state where ``read_progress`` finds it, at most five times a second."""
        now = time.monotonic()
        if now - self._progress_told < _PROGRESS_S and done != total:
            return
        self._progress_told = now
        state = {"done": int(done), "total": total, "unit": unit, "detail": detail}
        path = progress_path(self.run.folder, self.run.run_id, self.stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        private = path.with_name(f".{path.name}.{os.getpid()}")
        private.write_text(json.dumps({**state, "stage": self.stage, "time": time.time()}))
        private.replace(path)

    def close(self, status: StageStatus, *, exit_code: int) -> None:
        """Write the end of the stage."""
        data = {
            "status": status,
            "seconds": round(time.monotonic() - self._started, 3),
            "peak_bytes": int(self.peak_bytes),
            "exit_code": exit_code,
        }
        self._append("stage_close", data)
        progress_path(self.run.folder, self.run.run_id, self.stage).unlink(missing_ok=True)

    def _append(self, kind: str, data: Mapping[str, Any], *, is_synced: bool = True) -> None:
        self.run._append(kind, data, stage_run=self.stage_run, is_synced=is_synced)


def open_run(folder: Path, *, kind: RunKind, owner_pid: int | None = None) -> RunJournal:
    """Start a run owned by process ``owner_pid`` (this one by default) and return its writer.

    Whoever opens a run and starts stages in other processes passes ``RunJournal.run_id`` to them
    in the variable ``HEADRACE_RUN_ID``, and closes the run.
    """
    with _folder_lock(folder):
        return _open_run(folder, kind=kind, owner_pid=owner_pid or os.getpid())


def reopen_run(folder: Path, run_id: str) -> RunJournal:
    """Go on with a run that has ended: this process owns it, and closes it again."""
    with _folder_lock(folder):
        kind = read_run(run_path(folder, run_id)).kind
        return _open_run(folder, kind=kind, owner_pid=os.getpid(), run_id=run_id)


@contextlib.contextmanager
def open_stage(folder: Path, stage: str) -> Iterator[StageJournal]:
    """Yield the recorder of ``stage`` in the run this process belongs to; close both as due.

    The stage is closed with what ended the body: finished, failed or stopped, and its exit code.
    A run of its own ends with it; a run shared under ``dvc repro`` ends with ``publish``.
    """
    run, kind = _run_of_this_process(folder)
    recorder = run.stage(stage)
    try:
        yield recorder
    except BaseException as error:
        is_stop = isinstance(error, Stopped | KeyboardInterrupt)
        recorder.close("stopped" if is_stop else "failed", exit_code=_exit_code(error))
        if kind == "stage":
            run.close("interrupted" if is_stop else "failed")
        raise
    recorder.close("finished", exit_code=0)
    if kind == "stage" or (kind == "dvc" and stage == "publish"):
        run.close("finished")


def close_stale(folder: Path) -> tuple[str, ...]:
    """Close the runs whose owner is gone, and the stages they left open; return their ids.

    A run under ``dvc repro`` whose stages all finished is finished: dvc had nothing more to run.
    """
    closed = []
    if not folder.is_dir():
        return ()
    with _folder_lock(folder):
        _drop_unborn(folder)
        for run_id in list_runs(folder):
            path = run_path(folder, run_id)
            if is_closed(path):
                continue
            run = read_run(path)
            if is_alive(run.owner):
                continue
            _close_orphan(folder, run)
            closed.append(run_id)
    return tuple(closed)


def git_state(root: Path) -> tuple[str | None, str | None]:
    """Return the commit of ``root`` and the digest of what is not committed; None where absent."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    diff = _git(root, "diff", "HEAD", "--binary")
    return commit.decode().strip(), digest_bytes(diff) if diff else None


class _EventFile:
    """Appends numbered lines to one file, under a lock that all its writers take."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = (-1, 0)  # length of the file when last seen, and the number of its last event

    def append(self, kind: str, data: Mapping[str, Any], *, stage_run: str, is_synced: bool) -> int:
        with self._path.open("r+b" if self._path.exists() else "w+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            length = file.seek(0, os.SEEK_END)
            if length != self._known[0]:
                whole, seq = tail(file)
                if whole < length:
                    file.truncate(whole)  # the line a killed writer left
                self._known = (whole, seq)
            length, seq = self._known
            event = {"seq": seq + 1, "time": round(time.time(), 3), "event": kind}
            if stage_run:
                event["stage_run"] = stage_run
            line = json.dumps({**event, **data}, ensure_ascii=False, allow_nan=False) + "\n"
            file.seek(length)
            file.write(line.encode())
            if is_synced:
                os.fsync(file.fileno())
            self._known = (length + len(line.encode()), seq + 1)
            return seq + 1


def _open_run(folder: Path, *, kind: RunKind, owner_pid: int, run_id: str = "") -> RunJournal:
    known = list_runs(folder)
    number = int(known[-1].partition("-")[0]) + 1 if known else 1
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    run = RunJournal(folder, run_id or f"{number:04d}-{moment}-{_RANDOM.getrandbits(32):08x}")
    commit, dirty = git_state(folder.parent.parent)
    run._append(
        "run_open",
        {
            "run_kind": kind,
            "owner": process_mark(owner_pid),
            "host": socket.gethostname(),
            "commit": commit,
            "dirty": dirty,
        },
    )
    return run


def _drop_unborn(folder: Path) -> None:
    for path in folder.glob("*.jsonl"):
        if path.stat().st_size == 0:  # killed between creating the file and its first line
            path.unlink()


def _run_of_this_process(folder: Path) -> tuple[RunJournal, RunKind]:
    named = os.environ.get(RUN_ID_VARIABLE)
    with _folder_lock(folder):
        if named:
            if run_path(folder, named).is_file():
                return RunJournal(folder, named), "flow"
            parent = os.getppid()
            return _open_run(folder, kind="flow", owner_pid=parent, run_id=named), "flow"
        dvc = dvc_above(os.getpid())
        if dvc is None:
            return _open_run(folder, kind="stage", owner_pid=os.getpid()), "stage"
        mark = process_mark(dvc)
        for run_id in reversed(list_runs(folder)):
            if owner_of(run_path(folder, run_id)) == mark:
                return RunJournal(folder, run_id), "dvc"
        return _open_run(folder, kind="dvc", owner_pid=dvc), "dvc"


def _close_orphan(folder: Path, run: Run) -> None:
    journal = RunJournal(folder, run.run_id)
    open_stages = [stage for stage in run.stages if stage.status == "running"]
    for stage in open_stages:
        data = {"status": "interrupted", "seconds": 0.0, "peak_bytes": 0, "exit_code": None}
        journal._append("stage_close", data, stage_run=stage.stage_run)
    if any(stage.status == "failed" for stage in run.stages):
        journal.close("failed")
    elif run.kind in ("flow", "repro", "search") or any(
        stage.status != "finished" for stage in run.stages
    ):
        journal.close("interrupted")
    else:
        journal.close("finished")


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _keep_file(folder: Path, path: Path, artifact_folder: str) -> dict[str, Any]:
    if not path.is_file():
        raise IntegrityError(f"{path} was recorded as a finished file but is not there")
    entry = digest_file(path)
    kept = kept_file(folder, entry.digest)
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        private = kept.with_name(f".{kept.name}.{os.getpid()}")
        with path.open("rb") as source, private.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
        private.replace(kept)
    return {
        "name": path.name,
        "folder": artifact_folder,
        "sha256": entry.digest,
        "bytes": entry.num_bytes,
    }


def _in_project(folder: Path, path: Path) -> str:
    """Return ``path`` as seen from the project's root, which may move; elsewhere as it is."""
    root = folder.parent.parent.resolve()
    whole = path.resolve()
    return (whole.relative_to(root) if whole.is_relative_to(root) else path).as_posix()


def _remove_progress(folder: Path, run_id: str) -> None:
    own = folder / "progress" / run_id
    for path in own.glob("*.json"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # absent, or another stage writes at this moment
        own.rmdir()


def _number(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)  # JSON has no NaN; float() reads it


def _plain(value: Any) -> Scalar:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or type(value) in (str, int, float, bool):
        return value  # type: ignore[no-any-return]
    return _plain(value.item()) if hasattr(value, "item") else str(value)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, HeadraceError):
        return error.exit_code
    return Stopped.exit_code if isinstance(error, KeyboardInterrupt) else 1


def _warn_on_stderr(stage: str) -> Callable[[str], None]:
    def tell(text: str) -> None:
        sys.stderr.write(f"{stage}: warning: {text}\n")
        sys.stderr.flush()

    return tell


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            timeout=10,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
