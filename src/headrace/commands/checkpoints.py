"""Which checkpoints a training stage goes on from: those of its own stage key, and no others.

Each key has a folder of its own below ``.headrace/checkpoints/STAGE``. Beside the checkpoints lies
``key.json``, the entry whose digest is the key: inputs, parameters and code of the stage. So a run
that finds only checkpoints of another key can say what differs. Of those other folders the newest
stays, for whoever tries a parameter and goes back; the rest is removed when a run starts, and all
of them when the stage has finished. A folder whose name is no key was put there by hand: it is left
alone, and so is the one that ``--resume`` names.

A bag has a folder per fit below that of the key: checkpoints of the fit that runs, ``fitted`` of
those that are finished. A fit that tries settings first has a folder per trial in its own.
"""

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError, HeadraceError
from headrace.lineage import code_digests, stage_modules, value_changes
from headrace.params import Section
from headrace.project import Project
from headrace.record import Recorder
from headrace.storage import (
    canonical_json,
    digest_bytes,
    folder_digest,
    new_file,
    read_json,
    write_json,
)

KEY = "key.json"
_MOST_CHANGES = 4  # that one line names
_MOST_LETTERS = 100  # of one of them
_KEY_LETTERS = 16
_MOST_LEVELS = 2  # of folders below that of the key: a fit's, and a search's within it
_UNKNOWN = f"no {KEY} beside it says with which data, parameters and code it was made"


def stage_entry(
    project: Project, stage: str, section: Section, inputs: list[Path]
) -> Mapping[str, Any]:
    """Return what the result of ``stage`` depends on; its digest is the stage key.

    Made from the files themselves, so it is the same under DVC and without it.
    """
    return {
        "stage": stage,
        "inputs": {
            folder.relative_to(project.root).as_posix(): folder_digest(folder) for folder in inputs
        },
        "parameters": {stage.replace("@", "."): section.model_dump(mode="json")},
        "code": code_digests(*stage_modules(stage)),
    }


def own_folder(project: Project, stage: str, entry: Mapping[str, Any]) -> Path:
    """Return where the checkpoints of ``entry`` lie; nothing is read or written."""
    return project.checkpoints / stage / digest_bytes(canonical_json(entry).encode())[:_KEY_LETTERS]


def checkpoint_folder(
    project: Project,
    stage: str,
    entry: Mapping[str, Any],
    *,
    resume: Path | None,
    recorder: Recorder,
) -> Path:
    """Return the folder of the checkpoints that belong to ``entry``, ready for use.

    Where it is empty and there is a checkpoint of another key, one warning names that checkpoint
    and what differs. ``resume`` is a checkpoint, or a folder of them, to start from.

    Raises:
        ConfigError: if ``resume`` is missing, without a key, or of another key, with what differs.
    """
    folder = own_folder(project, stage, entry)
    given = None if resume is None else _given_file(resume)
    if given is not None:
        _import(given, _require_key(given, entry), folder)  # before anything is removed
    newest = _keep_newest_other(folder, given)
    if given is None and newest is not None and not _files(folder):
        key = _read_key(newest)
        recorder.warn(
            f"checkpoint {newest.relative_to(project.root)} is not used, and training starts "
            f"fresh: {_UNKNOWN if key is None else _differences(key, entry)}"
        )
    write_json(folder / KEY, entry)
    return folder


def remove_checkpoints(folder: Path, *, resume: Path | None) -> None:
    """Remove the checkpoints of a stage that has finished: ``folder`` and those of other keys.

    What lies around ``resume`` stays if it is not ``folder`` itself.
    """
    for other in (folder, *_others(folder)):
        if other == folder or not _is_around(other, resume):
            shutil.rmtree(other, ignore_errors=True)
    with suppress(OSError):  # something that is not ours lies there
        folder.parent.rmdir()


def require_resumable(stage: str, resumable: list[str]) -> None:
    """Refuse ``--resume`` for a stage that takes no checkpoint.

    Raises:
        ConfigError: naming the stages of the project that do.
    """
    if stage not in resumable:
        known = f"those that do: {', '.join(resumable)}" if resumable else "no stage here does"
        raise ConfigError(f"stage {stage} does not take a checkpoint with --resume; {known}")


def _given_file(resume: Path) -> Path:
    from headrace.training.checkpoint import BEFORE, NEWEST

    paths = [resume]
    if resume.is_dir():
        paths = [path for name in (NEWEST, BEFORE) for path in _by_age(resume, name)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        lacks = f"holds neither {NEWEST} nor {BEFORE}" if resume.is_dir() else "is not there"
        raise ConfigError(f"--resume {resume} {lacks}; give a checkpoint or the folder of one")
    return path


def _by_age(folder: Path, name: str) -> list[Path]:
    """Return the files called ``name`` below ``folder``: its own first, then the newest."""

    def place(path: Path) -> tuple[bool, float]:
        return path.parent != folder, -path.stat().st_mtime

    return sorted(folder.rglob(name), key=place)


def _require_key(given: Path, entry: Mapping[str, Any]) -> Path:
    """Return the folder of the key that the checkpoint belongs to, which must be that of ``entry``.

    It is the checkpoint's own folder, or one above it: of a bag, of a search within a fit.
    """
    above = given.parents[: _MOST_LEVELS + 1]
    folder = next((one for one in above if (one / KEY).exists()), given.parent)
    found = _read_key(folder)
    if found is None:
        raise ConfigError(
            f"--resume {given} is refused: {_UNKNOWN}; give a checkpoint together with the {KEY} "
            f"of the folder it was written to, or run without --resume to start fresh"
        )
    if found["stage"] != entry["stage"]:
        raise ConfigError(
            f"--resume {given} is refused: it is of stage {found['stage']}, not {entry['stage']}"
        )
    if differs := _differences(found, entry):
        raise ConfigError(
            f"--resume {given} is refused, for it belongs to another stage key: {differs}. Undo "
            f"that, or run without --resume to start fresh"
        )
    return folder


def _import(given: Path, source: Path, folder: Path) -> None:
    """Copy the checkpoint, and the fits of its bag that are finished, from ``source``."""
    from headrace.stages.train import FITTED
    from headrace.training.checkpoint import GIVEN

    target = folder / given.parent.relative_to(source) / GIVEN
    with given.open("rb") as read, new_file(target) as write:
        shutil.copyfileobj(read, write)
    for fitted in source.glob(f"*/{FITTED}"):
        own = folder / fitted.relative_to(source)
        if not own.exists():
            half = own.with_name(f".new-{FITTED}")
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(fitted, half)
            half.rename(own)


def _read_key(folder: Path) -> Mapping[str, Any] | None:
    """Return the entry that the checkpoints in ``folder`` belong to; None if nothing says it."""
    try:
        found = read_json(folder / KEY)
    except HeadraceError:
        return None
    parts = ("inputs", "parameters", "code")
    if not isinstance(found, Mapping) or not isinstance(found.get("stage"), str):
        return None
    return found if all(isinstance(found.get(part), Mapping) for part in parts) else None


def _differences(found: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    """Return what differs between two entries of one stage; empty if nothing."""
    told = []
    for name, change in value_changes("", found["parameters"], entry["parameters"]):
        told.append(f"parameter {name} {change}")
    for kind in ("inputs", "code"):
        names = [name for name, _ in value_changes("", found[kind], entry[kind])]
        told += [f"{kind.removesuffix('s')} {name} changed" for name in names]
    told = [text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}…" for text in told]
    beyond = len(told) - _MOST_CHANGES
    return "; ".join(told[:_MOST_CHANGES]) + (f"; and {beyond} more" if beyond > 0 else "")


def _keep_newest_other(folder: Path, given: Path | None) -> Path | None:
    """Of the other keys' folders, keep and return the one with the newest checkpoint.

    The one around ``given`` stays too.
    """
    others = _others(folder)
    ages = {
        other: max(path.stat().st_mtime for path in files)
        for other in others
        if (files := _files(other))
    }
    newest = max(ages, key=lambda other: ages[other], default=None)
    for other in others:
        if other != newest and not _is_around(other, given):
            shutil.rmtree(other, ignore_errors=True)
    return newest


def _others(folder: Path) -> list[Path]:
    """Return the folders of other keys beside ``folder``."""
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    name = re.compile(f"[0-9a-f]{{{_KEY_LETTERS}}}")
    return [other for other in beside if other != folder and name.fullmatch(other.name)]


def _is_around(folder: Path, path: Path | None) -> bool:
    return path is not None and path.resolve().is_relative_to(folder.resolve())


def _files(folder: Path) -> list[Path]:
    """Return the checkpoints and snapshots in ``folder``, not what a kill left half-written."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != KEY and not path.name.startswith(".new-")
    ]
