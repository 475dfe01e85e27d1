"""Bring the files that follow from the code and from params.yaml up to date: ``headrace upgrade``.

dvc.yaml and headrace.lock say nothing that a person decides. They follow from the sources and
models of params.yaml and from the installed code, so they can be written again at any time; what
a person added to dvc.yaml by hand (``meta``, ``desc``, plots, stages of one's own) is kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from headrace.commands.scaffold import (
    code_lock_text,
    dvc_files,
    gitignore_text,
    locked_digest,
    pipeline_text,
)
from headrace.commands.settings import Settings, read_settings
from headrace.errors import ConfigError
from headrace.lineage import PACKAGE
from headrace.params import read_yaml
from headrace.project import CODE_LOCK, EMBEDDING_CATBOOST, PIPELINE, Project
from headrace.storage import write_file

if TYPE_CHECKING:
    from headrace.data.scan import Source

_OURS = ("cmd", "matrix", "deps", "params", "outs", "metrics", "always_changed")
_GLOB_MARKS = "*?["


@dataclass(frozen=True)
class Upgraded:
    """What ``upgrade`` wrote, and which stages have other code or inputs than before."""

    written: tuple[str, ...]
    stages: tuple[str, ...]

    def __str__(self) -> str:
        if not self.written:
            return "nothing to upgrade: dvc.yaml and headrace.lock are what they must be"
        lines = [f"wrote {' and '.join(self.written)}"]
        if self.stages:
            lines.append(f"changed, so they run again: {', '.join(self.stages)}")
            lines.append("and what depends on them; `headrace why` lists all, `headrace run` runs")
        else:
            lines.append("no stage has other code than before")
        return "\n".join(lines)


def upgrade(project: Project) -> Upgraded:
    """Write dvc.yaml, and headrace.lock outside the source tree, as the installed code wants them.

    Raises:
        ConfigError: params.yaml is wrong, or of a version that this headrace does not know.
    """
    settings = read_settings(project)
    pipeline = project.root / PIPELINE
    before = _stages(pipeline)
    written = []
    text = expected_pipeline(project)
    if not pipeline.is_file() or pipeline.read_text(encoding="utf-8") != text:
        write_file(pipeline, text)
        written.append(PIPELINE)
    changed = {
        name for name, entry in _stages(pipeline).items() if _own(before.get(name)) != _own(entry)
    }
    if not is_source_tree(project):
        lock = project.root / CODE_LOCK
        locked = read_yaml(lock) if lock.is_file() else {}
        new = code_lock_text(stage_names(project))
        stages = [*stage_names(project), *(f"train@{model}" for model in settings.models)]
        found = yaml.safe_load(new)
        changed |= {
            name for name in stages if locked_digest(locked, name) != locked_digest(found, name)
        }
        if not lock.is_file() or lock.read_text(encoding="utf-8") != new:
            write_file(lock, new)
            written.append(CODE_LOCK)
    order = [*stage_names(project), "train", *(f"train@{model}" for model in settings.models)]
    return Upgraded(tuple(written), tuple(name for name in order if name in changed))


def expected_pipeline(project: Project) -> str:
    """Return the text that dvc.yaml of ``project`` must have; keeps what was added by hand."""
    settings = read_settings(project)
    text = pipeline_text(
        inputs=pipeline_inputs(project, settings),
        metric_files=metric_files(settings),
        example=has_example(settings),
        databases=has_databases(settings),
        models=settings.models,
        embedding_catboost=settings.has_embedding_catboost,
        source=is_source_tree(project),
    )
    path = project.root / PIPELINE
    return _with_additions(text, path) if path.is_file() else text


def write_around(
    project: Project, *, with_git: bool, force: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write what is missing beside params.yaml; with ``force`` what differs, too.

    Returns:
        The names of the files that were written, and of those that were there.

    Raises:
        ConfigError: params.yaml is wrong.
    """
    root = project.root
    read_settings(project)  # what follows from params.yaml is written only if it is right
    if force:
        (root / PIPELINE).unlink(missing_ok=True)
    files = {PIPELINE: expected_pipeline(project)}
    if not is_source_tree(project):
        files[CODE_LOCK] = code_lock_text(stage_names(project))
    ignored = root / ".gitignore"
    before = ignored.read_text(encoding="utf-8") if ignored.is_file() else ""
    written, kept = [], []
    if (text := gitignore_text(before)) != before:
        write_file(ignored, text)
        written.append(ignored.name)
    for name, content in files.items():
        if (root / name).exists() and not force:
            kept.append(name)
        else:
            write_file(root / name, content)
            written.append(name)
    for name, content in dvc_files(with_git=with_git).items():
        if not (root / name).exists():
            write_file(root / name, content)
            written.append(name)
    return tuple(written), tuple(kept)


def is_source_tree(project: Project) -> bool:
    """Tell whether the code that runs lies in the project itself, so that DVC can track it."""
    return (project.root / "src" / PACKAGE.name / "lineage.py").is_file()


def stage_names(project: Project) -> tuple[str, ...]:
    """Return the stages of ``project`` but ``train``, in running order."""
    settings = read_settings(project)
    first = [*(["raw"] if has_example(settings) else [])]
    first += ["watermark"] if has_databases(settings) else []
    second = [EMBEDDING_CATBOOST] if settings.has_embedding_catboost else []
    last = ("stack", "decide", "interpret", "evaluate", "publish")
    return (*first, "extract", "reduce", "encode", *second, *last)


def has_example(settings: Settings) -> bool:
    """Tell whether the project makes its raw data by the stage ``raw``."""
    return "raw" in settings.content


def has_databases(settings: Settings) -> bool:
    """Tell whether a source is a database, into which DVC cannot look."""
    from headrace.data.scan import DATABASES

    return any(source.kind in DATABASES for source in declared_sources(settings).values())


def declared_sources(settings: Settings) -> "dict[str, Source]":
    """Return ``extract.sources`` of params.yaml."""
    sources: dict[str, Source] = settings.section("extract").sources  # type: ignore[attr-defined]
    return dict(sources)


def pipeline_inputs(project: Project, settings: Settings) -> list[str]:
    """Return the files and folders that ``extract`` reads, as dvc.yaml lists them.

    A pattern becomes the folder it starts in, so that a new file counts as a change; where that
    folder also holds outs of the pipeline, DVC refuses it and the files of today are listed.
    """
    from headrace.data.scan import DATABASES

    recipe: str | None = settings.section("extract").recipe  # type: ignore[attr-defined]
    inputs = [recipe] if recipe else []
    for source in declared_sources(settings).values():
        if source.path is None or source.kind in DATABASES:
            continue
        inputs += _inputs_of(project, source.path, example=has_example(settings))
    return sorted(dict.fromkeys(inputs))


def metric_files(settings: Settings) -> list[str]:
    """Return the files that hold the metrics of ``evaluate.user_metrics``."""
    section: Any = settings.section("evaluate")
    return sorted({one.file for one in section.user_metrics.values()})


def _inputs_of(project: Project, path: str, *, example: bool) -> Iterator[str]:
    parts = Path(path).parts
    if example and parts[:2] == ("data", "raw"):
        yield "data/raw"
    elif not any(mark in path for mark in _GLOB_MARKS):
        yield Path(path).as_posix()
    else:
        fixed = Path(*_before_first_mark(parts))
        is_apart = (fixed.parts and fixed.parts[0] != "data") or fixed.parts[:2] == ("data", "raw")
        if is_apart:
            yield fixed.as_posix()
        else:
            yield from sorted(
                found.relative_to(project.root).as_posix()
                for found in project.root.glob(path)
                if found.is_file()
            )


def _before_first_mark(parts: Sequence[str]) -> list[str]:
    fixed: list[str] = []
    for part in parts:
        if any(mark in part for mark in _GLOB_MARKS):
            break
        fixed.append(part)
    return fixed


def _stages(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))["stages"] or {}
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(_broken(path, error)) from error


def _own(entry: Any) -> dict[str, Any]:
    return {name: entry[name] for name in _OURS if name in entry} if entry else {}


def _with_additions(text: str, path: Path) -> str:
    """Return ``text`` with what the file at ``path`` has besides: fields, stages, comments above.

    The file's own bytes come back where nothing changes, so a commented dvc.yaml stays as it is.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    rules = YAML()
    rules.width = 100
    rules.indent(mapping=2, sequence=2, offset=0)
    try:
        found = rules.load(path.read_text(encoding="utf-8"))
        present = found["stages"]
    except (YAMLError, KeyError, TypeError) as error:
        raise ConfigError(_broken(path, error)) from error
    wanted = rules.load(text)
    before = _plain(found)
    for name in [*present]:
        if name not in wanted["stages"] and _is_written_by_us(present[name]):
            del present[name]
    for name, entry in wanted["stages"].items():
        if name not in present:
            present[name] = entry
            continue
        for field in _OURS:
            if field in entry and _plain(present[name].get(field)) != _plain(entry[field]):
                present[name][field] = entry[field]
            elif field not in entry:
                present[name].pop(field, None)
    plots = found.setdefault("plots", [])
    plots += [plot for plot in wanted.get("plots", []) if _plain(plot) not in _plain(plots)]
    if _plain(found) == before:
        return path.read_text(encoding="utf-8")
    out = StringIO()
    rules.dump(found, out)
    return out.getvalue()


def _broken(path: Path, error: Exception) -> str:
    return (
        f"{path} is not a pipeline ({' '.join(str(error).split())}); restore it, or delete it and "
        f"run `headrace upgrade` to write it anew"
    )


def _is_written_by_us(entry: Mapping[str, Any]) -> bool:
    return str(entry.get("cmd", "")).startswith("headrace stage ")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
