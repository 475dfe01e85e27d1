"""From an output back to what made it: stage keys, the lineage id, and the code a stage runs.

A stage key is the digest of the stage's entry in dvc.lock without its outs: command, dependencies
with their digests, parameters. The lineage id is the digest of the keys of all live stages and of
the environment. Commit, time and host are recorded beside it and never hashed into it, so the same
rows, code, parameters and environment have the same lineage id on every machine.

Code is found by reading import statements, wherever they stand, without running anything.
"""

import ast
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from headrace.errors import IntegrityError
from headrace.storage import canonical_json, digest_bytes, digest_file

PACKAGE = Path(__file__).parent
ABSENT = object()  # the value of a name that is not there
# Layers that call stages; what they contain changes no stage's result.
_CALLERS = {"cli", "commands", "tracking", "access"}


def stage_keys(lock: Path) -> dict[str, str]:
    """Return the key of every stage in dvc.lock by name; empty if there is no dvc.lock yet.

    Raises:
        IntegrityError: if the file is not the YAML that DVC writes.
    """
    if not lock.is_file():
        return {}
    try:
        content = yaml.safe_load(lock.read_text(encoding="utf-8")) or {}
        stages: Mapping[str, Mapping[str, Any]] = content.get("stages") or {}
        return {
            name: digest_bytes(canonical_json({k: entry[k] for k in entry if k != "outs"}).encode())
            for name, entry in stages.items()
        }
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise IntegrityError(
            f"{lock} cannot be read ({error}); restore it from git, or delete it and run again"
        ) from error


def lineage_id(keys: Mapping[str, str], live: Iterable[str], environment: str) -> str:
    """Return the digest that names a pipeline's state: keys of the ``live`` stages, environment."""
    used = {name: keys[name] for name in live if name in keys}
    return digest_bytes(canonical_json({"stages": used, "environment": environment}).encode())


@cache
def environment() -> tuple[str, ...]:
    """Return ``python==…`` and ``name==version`` of all that headrace needs, sorted."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    pending = ["headrace"]
    while pending:
        name = pending.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # an optional or platform-bound requirement that is not installed here
        found[name] = distribution.version
        for text in distribution.requires or ():
            requirement = Requirement(text)
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            key = requirement.name.lower().replace("_", "-").replace(".", "-")
            if needed and key not in found:
                pending.append(key)
    return tuple(f"{name}=={version}" for name, version in sorted(found.items()))


def environment_digest() -> str:
    """Return the digest of ``environment()``."""
    return digest_bytes("\n".join(environment()).encode())


def code_files(*modules: str) -> tuple[Path, ...]:
    """Return the files of headrace that ``modules`` run, themselves included, sorted.

    Imports are followed wherever they stand (functions too). A file beside a module with the same
    stem (a template) belongs to it. The layers that call stages are left out, and so are the
    ``__init__`` files, which hold no logic.
    """
    seen: set[str] = set()
    pending = list(modules)
    files: set[Path] = set()
    while pending:
        module = pending.pop()
        path = _module_file(module)
        if module in seen or path is None:
            continue
        seen.add(module)
        files.update(sibling for sibling in path.parent.glob(f"{path.stem}.*") if sibling.is_file())
        pending += [name for name in _imports(path) if name.split(".")[1] not in _CALLERS]
    return tuple(sorted(files))


def code_digests(*modules: str) -> dict[str, str]:
    """Return the digest of each file that ``modules`` run, by its path within the package."""
    return {p.relative_to(PACKAGE).as_posix(): digest_file(p).digest for p in code_files(*modules)}


def code_digest(*modules: str) -> str:
    """Return the digest of the code that ``modules`` run."""
    return digest_bytes(canonical_json(code_digests(*modules)).encode())


def value_changes(key: str, old: Any, new: Any) -> list[tuple[str, str]]:
    """Return each changed leaf below ``key`` with its old and new value as text.

    >>> value_changes("train.nn", {"lr": 1, "depth": 2}, {"lr": 3, "depth": 2})
    [('train.nn.lr', '1 → 3')]
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        return [
            change
            for name in names
            for change in value_changes(
                f"{key}.{name}" if key else name, old.get(name, ABSENT), new.get(name, ABSENT)
            )
        ]
    return [] if old == new else [(key, f"{_text(old)} → {_text(new)}")]


def stage_modules(stage: str) -> tuple[str, ...]:
    """Return the modules where the code of ``stage`` starts; ``train@MODEL`` has two."""
    name, _, model = stage.partition("@")
    own = (f"headrace.stages.{name}",)
    if model:
        return (*own, f"headrace.models.{model}")
    if name in ("interpret", "publish"):  # models of any kind are read back
        kinds = sorted(path.stem for path in (PACKAGE / "models").glob("[a-z]*.py"))
        return (*own, *(f"headrace.models.{kind}" for kind in kinds))
    return own


def _text(value: Any) -> str:
    return "not set" if value is ABSENT else repr(value)


def _module_file(module: str) -> Path | None:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    source = path.with_suffix(".py")
    return source if module != "headrace" and source.is_file() else None


@cache  # the stages share most of their modules
def _imports(path: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(name for name in names if name.startswith("headrace."))
