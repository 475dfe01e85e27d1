"""Why a stage would run: what changed since it last ran, and which stage upstream brings it on.

DVC tells which dependency differs; what a parameter was before stands in dvc.lock. Stages below a
changed one may or may not change: that depends on whether the new result has other bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.commands.checks import require_settings
from headrace.commands.pipeline import Dag, changes, locked_entries, read_dag, use_without_git
from headrace.lineage import ABSENT, value_changes
from headrace.params import read_yaml
from headrace.project import Project


@dataclass(frozen=True)
class Reason:
    """One thing that changed: its kind, its name, and what there is to say about it."""

    kind: str  # parameter, code, input, upstream, command, out, first run, always
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.kind, self.name, self.detail) if part)


@dataclass(frozen=True)
class Verdict:
    """Whether one stage would run.

    ``state`` is ``fresh``, ``stale``, ``never run``, or ``waiting``: itself unchanged, but below a
    stage that will run (named in ``causes``).
    """

    stage: str
    state: str
    reasons: tuple[Reason, ...] = ()
    causes: tuple[str, ...] = ()


def why(project: Project, stages: tuple[str, ...] = ()) -> list[Verdict]:
    """Return a verdict for each of ``stages`` (default: all), in running order.

    Raises:
        ConfigError: if one of ``stages`` is not in dvc.yaml.
    """
    require_settings(project)
    use_without_git(project)
    dag = read_dag(project)
    dag.require(stages)
    verdicts = judge(project, dag, changes(project, dag))
    wanted = {member for name in stages for member in dag.members(name)} or set(dag.by_name)
    return [verdict for verdict in verdicts if verdict.stage in wanted]


def judge(project: Project, dag: Dag, changed: Mapping[str, list[Any]]) -> list[Verdict]:
    """Turn what ``dvc status`` says into a verdict for every stage."""
    locked = locked_entries(project)
    verdicts: dict[str, Verdict] = {}
    for stage in dag.stages:
        above = tuple(u for u in stage.upstream if verdicts[u].state != "fresh")
        reasons = tuple(
            reason
            for change in changed.get(stage.name, [])
            for reason in _reasons(project, change, locked.get(stage.name) or {}, dag)
        )
        if stage.name not in locked:
            state, reasons = "never run", (Reason("first run", ""), *_upstream(reasons))
        elif reasons:
            state = "stale"
        else:
            state = "waiting" if above else "fresh"
        verdicts[stage.name] = Verdict(stage.name, state, reasons, above)
    return list(verdicts.values())


def sentences(verdicts: list[Verdict]) -> list[str]:
    """Return the lines that ``headrace why`` prints."""
    if all(verdict.state == "fresh" for verdict in verdicts):
        names = "all stages" if len(verdicts) != 1 else verdicts[0].stage
        return [f"{names}: unchanged, nothing to do"]
    return [_sentence(verdict) for verdict in verdicts]


def _sentence(verdict: Verdict) -> str:
    """One line for a stage, or one per reason where there are several."""
    causes = ", ".join(verdict.causes)
    is_one = len(verdict.causes) == 1
    if verdict.state == "fresh":
        return f"{verdict.stage}: unchanged"
    if verdict.state == "waiting":
        give = "gives" if is_one else "give"
        return f"{verdict.stage}: unchanged itself; runs if {causes} {give} another result"
    reasons = [str(reason) for reason in verdict.reasons]
    if causes:
        reasons.append(f"{causes} {'runs' if is_one else 'run'} first")
    return f"{verdict.stage}: will run: " + "\n    ".join(reasons)


def _reasons(project: Project, change: Any, entry: Mapping[str, Any], dag: Dag) -> list[Reason]:
    if change == "changed command":
        return [Reason("command", "", "is another one now")]
    if change == "always changed":
        return [Reason("always", "", "runs every time: it looks into a database")]
    if not isinstance(change, Mapping):
        return [Reason(str(change), "")]
    found = []
    for path, what in (change.get("changed deps") or {}).items():
        if path in (entry.get("params") or {}) or isinstance(what, Mapping):
            found += _parameters(project, path, what, entry)
        elif who := dag.makers(path):
            found.append(Reason("upstream", path, f"{what} (made by {', '.join(who)})"))
        else:
            kind = "code" if path.endswith(".py") else "input"
            found.append(Reason(kind, path, what))
    for path, what in (change.get("changed outs") or {}).items():
        told = "is missing" if what in ("deleted", "not in cache") else "was changed by hand"
        found.append(Reason("out", path, told))
    return found


def _parameters(project: Project, path: str, what: Any, entry: Mapping[str, Any]) -> list[Reason]:
    old_values = (entry.get("params") or {}).get(path) or {}
    if not isinstance(what, Mapping):
        return [Reason("parameter", path, str(what))]
    content = read_yaml(project.root / path)
    kind = "code" if Path(path).suffix == ".lock" else "parameter"
    found = []
    for key in what:
        changes_below = value_changes(key, old_values.get(key, ABSENT), _lookup(content, str(key)))
        if kind == "code":
            found.append(Reason(kind, path, f"has another digest for {key}"))
        else:
            found += [Reason(kind, name, told) for name, told in changes_below]
    return found


def _lookup(content: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return ABSENT
        content = content[part]
    return content


def _upstream(reasons: tuple[Reason, ...]) -> tuple[Reason, ...]:
    """Of a stage that never ran, everything is new; only missing inputs are worth a word."""
    return tuple(
        reason for reason in reasons if reason.kind == "input" and "deleted" in reason.detail
    )
