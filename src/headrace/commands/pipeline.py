"""The stages of a project as dvc.yaml has them, and the commands that bring them up to date.

dvc.yaml is the only list of stages: names, order, files and declared needs are read from DVC's own
graph, never repeated. DVC is run as ``dvc --wait-for-lock …`` in a process of its own: the global
flag matters (without it DVC polls its lock for 3 s and may lose a stage that has already finished),
and a process can be stopped with all that it started.

A stage may declare what it needs in its ``meta`` in dvc.yaml: ``threads``, ``bytes`` (a size) and
``timeout_s``. One that does not is taken to need all of ``resources``, so it runs alone.
"""

import json
import os
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from headrace.commands.failure import Failure, read_failure
from headrace.commands.supervise import Finished, run
from headrace.errors import ConfigError, DataError, DependencyError, IntegrityError, nearest
from headrace.params import parse_bytes
from headrace.project import LOCK, PARAMS, PIPELINE, Project
from headrace.storage import sweep

DVC = (sys.executable, "-P", "-m", "dvc", "--wait-for-lock")  # -P: not a dvc.py of the project
UNCHANGED = "didn't change, skipping"
_CACHED = "is cached - skipping run"
_EXITED = re.compile(r"exited with (-?\d+)")
_STATUS_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class StageNode:
    """One stage: what it needs from others, its files relative to the project, its declared needs.

    ``threads`` and ``num_bytes`` are None where dvc.yaml declares nothing.
    """

    name: str
    command: str
    upstream: tuple[str, ...]
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    threads: int | None = None
    num_bytes: int | None = None
    timeout_s: float | None = None
    is_always_run: bool = False


@dataclass(frozen=True)
class Dag:
    """The stages in an order in which they can run."""

    stages: tuple[StageNode, ...]

    @cached_property
    def by_name(self) -> Mapping[str, StageNode]:
        """Stages by name, in running order."""
        return {stage.name: stage for stage in self.stages}

    def require(self, names: Iterable[str]) -> None:
        """Check that all ``names`` are stages; a matrix may be named as a whole (``train``).

        Raises:
            ConfigError: with the nearest name.
        """
        for name in names:
            if not self.members(name):
                known = self.by_name
                hint = nearest(name, known) or f"; known: {', '.join(known)}"
                raise ConfigError(f"{name!r} is not a stage of {PIPELINE}{hint}")

    def members(self, name: str) -> tuple[str, ...]:
        """The stages that ``name`` stands for: itself, or all of its matrix."""
        return tuple(stage for stage in self.by_name if name in (stage, stage.partition("@")[0]))

    def makers(self, path: str) -> tuple[str, ...]:
        """The stages whose outs are ``path``, lie in it, or hold it."""
        wanted = Path(path)
        return tuple(
            stage.name
            for stage in self.stages
            if any(
                out == wanted or out in wanted.parents or wanted in out.parents
                for out in map(Path, stage.outs)
            )
        )

    def needed_for(self, names: Collection[str]) -> set[str]:
        """Stages that ``names`` (or matrices) stand for and all they need; all without names."""
        reached = {member for name in names for member in self.members(name)} or set(self.by_name)
        for stage in reversed(self.stages):
            if stage.name in reached:
                reached.update(stage.upstream)
        return reached

    def downstream(self, names: Collection[str]) -> tuple[str, ...]:
        """Stages that need, directly or not, one of ``names``; without ``names`` themselves."""
        reached = set(names)
        for stage in self.stages:
            if reached.intersection(stage.upstream):
                reached.add(stage.name)
        return tuple(name for name in self.by_name if name in reached and name not in names)


@dataclass(frozen=True)
class Capacity:
    """What a run may use at a time, or what stages use of it."""

    threads: int
    num_bytes: int


def read_dag(project: Project) -> Dag:
    """Read the stages of ``project`` from DVC.

    Raises:
        ConfigError: no dvc.yaml, no DVC project, or one that DVC refuses.
    """
    if not (project.root / PIPELINE).is_file():
        raise ConfigError(
            f"{project.root} has no {PIPELINE}; run this in a project folder, "
            f"or `headrace init` to make one"
        )
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with warnings.catch_warnings(), Repo(str(project.root)) as repo:
            warnings.simplefilter("ignore", DeprecationWarning)  # pygtrie's, inside DVC
            graph = repo.index.graph
            found = {_name(project, stage): stage for stage in repo.index.stages}
            upstream = {
                name: tuple(above for above in found if found[above] in graph[stage])
                for name, stage in found.items()
            }
    except DvcException as error:
        raise ConfigError(f"{project.root / PIPELINE}: {_told_by(error)}") from error
    return Dag(
        tuple(_node(project, name, found[name], upstream[name]) for name in _sorted(upstream))
    )


def changes(project: Project, dag: Dag) -> dict[str, list[Any]]:
    """Return what ``dvc status`` finds changed, by stage in running order; empty if all is fresh.

    Raises:
        DependencyError: if DVC cannot tell.
    """
    log = project.logs / f"status-{os.getpid()}.log"
    try:
        finished = run(
            [*DVC, "status", "--json"],
            cwd=project.root,
            log=log,
            env=environment(),
            timeout_s=_STATUS_TIMEOUT_S,
        )
        text = log.read_text(encoding="utf-8", errors="replace")
    finally:
        log.unlink(missing_ok=True)
    start = text.rfind("\n{") + 1 if not text.startswith("{") else 0  # after DVC's warnings
    try:
        content = json.loads(text[start:])
    except json.JSONDecodeError as error:
        if " is busy, it is being blocked by" in text:
            raise DependencyError(
                f"a stage is running in {project.root}; ask again when the run has ended "
                f"(`headrace status` shows how far it is)"
            ) from error
        raise DependencyError(
            f"`dvc status` failed with {finished.exit_code}: {last_line(finished.tail)}"
        ) from error
    return {name: content[name] for name in dag.by_name if name in content}


def environment(**extra: str) -> dict[str, str]:
    """The environment of a supervised command: ours, with this installation's programs first."""
    scripts = sysconfig.get_path("scripts")
    path = os.environ.get("PATH", os.defpath)
    env = {**os.environ, "PATH": f"{scripts}{os.pathsep}{path}", **extra}
    env.pop("PYTHONWARNINGS", None)
    for name in ("NO_PROXY", "no_proxy"):  # our servers are on this machine
        env[name] = ",".join(filter(None, [env.get(name, ""), "127.0.0.1", "localhost"]))
    env.setdefault("HEADRACE_RUN_PID", str(os.getpid()))
    return env


def stage_command(stage: str) -> list[str]:
    """The command that brings one stage up to date, its upstream being so already."""
    return [*DVC, "repro", "--single-item", stage]


def admissible(
    dag: Dag, waiting: Sequence[str], running: Collection[str], capacity: Capacity
) -> str | None:
    """Return the first of ``waiting`` that fits beside ``running``, or None.

    A stage that declares no needs takes the whole capacity; one that declares more than there is
    counts as all of it, so it runs alone.
    """
    used = [_needs(dag.by_name[name], capacity) for name in running]
    threads = capacity.threads - sum(need.threads for need in used)
    num_bytes = capacity.num_bytes - sum(need.num_bytes for need in used)
    for name in waiting:
        need = _needs(dag.by_name[name], capacity)
        if need.threads <= threads and need.num_bytes <= num_bytes:
            return name
    return None


def prepare(project: Project, dag: Dag) -> list[str]:
    """Make the folder ready for DVC; return what was done, as sentences for the terminal.

    Outs of stages that are no longer in the pipeline are removed (DVC leaves them, and a dependency
    on their folder would go on reading them), and so are the leftovers of killed writers.

    Raises:
        DataError: if input files that no stage makes are missing.
    """
    for folder in {(project.root / out).parent for stage in dag.stages for out in stage.outs}:
        sweep(folder)
    removed = _remove_abandoned(project, dag)
    _require_inputs(project, dag)
    return [f"removed {path}: no stage makes it any more" for path in removed]


def use_without_git(project: Project) -> bool:
    """Let DVC work in a folder outside git, by its ignored local settings; True if it had to.

    Raises:
        ConfigError: if the folder is no DVC project at all.
    """
    folder = project.root / ".dvc"
    if not folder.is_dir():
        raise ConfigError(
            f"{project.root} is no DVC project; run `headrace init`, or "
            f"`dvc init` (`dvc init --no-scm` outside git)"
        )
    if any((above / ".git").exists() for above in (project.root, *project.root.parents)):
        return False  # also in a folder of a repository; `init` has seen to one that git ignores
    import configparser

    for name in ("config.local", "config"):
        settings = configparser.ConfigParser()
        settings.read(folder / name)
        if settings.getboolean("core", "no_scm", fallback=False):
            return False
    from dvc.config import Config

    with Config(str(folder)).edit("local") as local:
        local.setdefault("core", {})["no_scm"] = True
    return True


def outcome(project: Project, stage: str, finished: Finished) -> Failure | None:
    """Return why ``stage`` failed, or None if it did not.

    DVC exits with 255 whatever the stage said, so the stage's own word comes first, then the code
    that DVC names, then DVC's last error.
    """
    if finished.exit_code == 0:
        return None
    if told := read_failure(project, stage):
        return told
    found = _EXITED.findall(finished.tail)
    if not found:
        return _dvc_failure(stage, finished)
    code = int(found[-1])
    code = 128 - code if code < 0 else code
    if code == 137:
        return Failure(
            stage,
            6,
            f"stage {stage} was killed by the system, most likely for lack of memory; "
            f"lower `resources.memory_budget` in {PARAMS} or free memory, then run again",
        )
    return Failure(
        stage, code, f"stage {stage} ended with exit code {code}; its output is in {finished.log}"
    )


def is_unchanged(finished: Finished) -> bool:
    """Whether DVC found nothing to do."""
    return UNCHANGED in finished.tail


def is_restored(finished: Finished) -> bool:
    """Whether DVC took the result from its cache instead of running the stage."""
    return _CACHED in finished.tail


def _name(project: Project, stage: Any) -> str:
    """The stage's name as DVC gives it in the project's folder; its own depends on ours."""
    path, name = _relative(project, stage.path), getattr(stage, "name", None)
    if not name:
        return path  # data that `dvc add` tracks
    return str(name) if path == PIPELINE else f"{path}:{name}"


def _node(project: Project, name: str, stage: Any, upstream: tuple[str, ...]) -> StageNode:
    meta = stage.meta if isinstance(stage.meta, dict) else {}
    try:
        threads = int(meta["threads"]) if "threads" in meta else None
        num_bytes = parse_bytes(meta["bytes"]) if "bytes" in meta else None
        timeout_s = float(meta["timeout_s"]) if "timeout_s" in meta else None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{PIPELINE}: `meta` of stage {name}: {error}") from error
    return StageNode(
        name=name,
        command=str(stage.cmd or ""),
        upstream=upstream,
        deps=tuple(
            _relative(project, dep.fs_path) for dep in stage.deps if dep.protocol == "local"
        ),
        outs=tuple(_relative(project, out.fs_path) for out in stage.outs),
        threads=threads,
        num_bytes=num_bytes,
        timeout_s=timeout_s,
        is_always_run=bool(stage.always_changed),
    )


def _relative(project: Project, path: str) -> str:
    return Path(os.path.relpath(path, project.root)).as_posix()


def _sorted(upstream: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Order names so that each comes after its upstream; ties stay as dvc.yaml has them."""
    order: list[str] = []
    while len(order) < len(upstream):
        order.append(
            next(n for n in upstream if n not in order and set(upstream[n]).issubset(order))
        )
    return order


def _needs(stage: StageNode, capacity: Capacity) -> Capacity:
    threads = capacity.threads if stage.threads is None else stage.threads
    num_bytes = capacity.num_bytes if stage.num_bytes is None else stage.num_bytes
    return Capacity(min(threads, capacity.threads), min(num_bytes, capacity.num_bytes))


def _remove_abandoned(project: Project, dag: Dag) -> list[str]:
    live = {out for stage in dag.stages for out in stage.outs}
    live |= {dep for stage in dag.stages for dep in stage.deps}
    removed = []
    for name, entry in locked_entries(project).items():
        if name in dag.by_name:
            continue
        for out in entry.get("outs") or []:
            path = str(out["path"])
            whole = project.root / path
            is_ours = path.startswith("data/") and ".." not in Path(path).parts
            if is_ours and path not in live and whole.exists():
                shutil.rmtree(whole) if whole.is_dir() else whole.unlink()
                removed.append(path)
    return removed


def locked_entries(project: Project) -> Mapping[str, Any]:
    """The entries of dvc.lock by stage; those of stages that are gone are still there."""
    path = project.root / LOCK
    if not path.is_file():
        return {}
    try:
        return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages") or {}
    except (yaml.YAMLError, AttributeError) as error:
        raise IntegrityError(
            f"{path} cannot be read; restore it from git, or delete it and run again"
        ) from error


def _require_inputs(project: Project, dag: Dag) -> None:
    missing: dict[str, list[str]] = {}
    for stage in dag.stages:
        for dep in stage.deps:
            if not (project.root / dep).exists() and not dag.makers(dep):
                missing.setdefault(dep, []).append(stage.name)
    if missing:
        listed = ", ".join(f"{path} (needed by {', '.join(who)})" for path, who in missing.items())
        raise DataError(
            f"missing in {project.root}: {listed}; put it there, or `dvc pull` it if it is in a "
            f"remote; no stage makes it"
        )


def _dvc_failure(stage: str, finished: Finished) -> Failure:
    told = last_line(finished.tail)
    if "No space left on device" in finished.tail:
        return Failure(stage, 6, f"stage {stage}: no space left on the disk of the project; {told}")
    if "nable to acquire lock" in finished.tail:
        return Failure(stage, 4, f"stage {stage}: another DVC holds the project: {told}")
    if "missing data" in told or "does not exist" in told:
        return Failure(stage, 3, f"stage {stage}: {told}")
    if "are missing from" in told:  # parameters of dvc.yaml that params.yaml does not have
        return Failure(stage, 2, f"stage {stage}: {told}; `headrace upgrade` may mend it")
    return Failure(stage, 4, f"stage {stage}: DVC failed: {told}; see {finished.log}")


def last_line(tail: str) -> str:
    """The last error in ``tail``, or else its last line."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return errors[-1] if errors else (lines[-1] if lines else "it said nothing")


def _told_by(error: BaseException) -> str:
    """One line of what DVC said, its cause included."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < 3:
        parts.append(" ".join(str(current).split()))
        current = current.__cause__
    return ": ".join(dict.fromkeys(part for part in parts if part))
