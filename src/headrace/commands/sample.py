"""A quick look at a share of the rows, in a workspace of its own: ``headrace run --sample``.

The workspace is a whole project below ``.headrace/samples/``: params.yaml with ``extract.sample``,
its own pipeline, lock, journal and lineage, so ``data/`` and dvc.lock of the project stay as they
are. Source files are hard links, or symbolic ones where a link cannot cross file systems: nothing
is copied but the recipe and the files of user metrics. Which rows are in is a hash of their id, so
a larger sample holds a smaller one, and the same rows come each time. A second look runs only what
changed.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from headrace.commands.settings import Settings, read_settings
from headrace.commands.upgrade import declared_sources, has_example, metric_files, write_around
from headrace.errors import ConfigError
from headrace.project import Project
from headrace.storage import canonical_json, digest_bytes, write_file

SAMPLES = "samples"


@dataclass(frozen=True)
class Sampled:
    """The workspace of a sample."""

    project: Project
    fraction: float
    num_files: int  # source files that it links to

    def __str__(self) -> str:
        return (
            f"sample of {self.fraction:.4g} of the rows in {os.path.relpath(self.project.root)}: "
            f"a project of its own, with its own lineage; delete the folder when done"
        )


def sample(project: Project, fraction: float) -> Sampled:
    """Make, or bring up to date, the workspace for ``fraction`` of the rows of ``project``.

    Raises:
        ConfigError: a fraction outside (0, 1), a params.yaml that is wrong, or a file that it
            names and that is not there.
        DataError: a source has no file.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"--sample is {fraction:g}; give a share of the rows such as 0.05")
    settings = read_settings(project)
    workspace = Project(_folder(project, settings, fraction))
    workspace.root.mkdir(parents=True, exist_ok=True)
    write_file(workspace.params, _sampled_params(project, settings, fraction))
    recipe = _extract(settings).recipe
    for name in [*([recipe] if recipe else []), *metric_files(settings)]:
        _copy_if_other(project.root / name, workspace.root / name)
    num_files = _link_sources(project, settings, workspace)
    write_around(workspace, with_git=False, force=True)
    return Sampled(workspace, fraction, num_files)


def _folder(project: Project, settings: Settings, fraction: float) -> Path:
    """One folder per fraction and per what decides the rows."""
    params = _extract(settings)
    recipe = (project.root / params.recipe).read_bytes() if params.recipe else b""
    parts = {"extract": params.model_dump(mode="json"), "recipe": digest_bytes(recipe)}
    digest = digest_bytes(canonical_json(parts).encode())[:8]
    return project.state / SAMPLES / f"{fraction:g}-{digest}"


def _extract(settings: Settings) -> Any:
    return settings.section("extract")


def _sampled_params(project: Project, settings: Settings, fraction: float) -> str:
    """Return params.yaml with ``extract.sample`` set, its comments kept."""
    from ruamel.yaml import YAML

    rules = YAML()
    rules.width = 1000
    rules.preserve_quotes = True
    content = rules.load(project.params.read_text(encoding="utf-8"))
    content["extract"]["sample"] = fraction * _extract(settings).sample
    out = StringIO()
    rules.dump(content, out)
    return out.getvalue()


def _copy_if_other(source: Path, target: Path) -> None:
    if not source.is_file():
        raise ConfigError(f"{source} does not exist, but params.yaml names it; put it there")
    content = source.read_bytes()
    if not target.is_file() or target.read_bytes() != content:
        write_file(target, content)


def _link_sources(project: Project, settings: Settings, workspace: Project) -> int:
    """Link the source files of the project into the workspace; remove links that are no source."""
    wanted = dict(_source_files(project, settings))
    for name, path in wanted.items():
        link = workspace.root / name
        if link.is_file() and link.samefile(path):
            continue
        link.unlink(missing_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), link)
        except OSError:  # another file system, or one without hard links
            link.symlink_to(path.resolve())
    for name, path in _source_files(workspace, settings, is_strict=False):
        if name not in wanted:
            path.unlink()
    return len(wanted)


def _source_files(
    project: Project, settings: Settings, *, is_strict: bool = True
) -> Iterator[tuple[str, Path]]:
    """Yield the source files that lie in ``project``, by relative path.

    Those that the stage ``raw`` makes are left out, for the workspace has that stage too; those
    that are declared by an absolute path are read where they are.
    """
    from headrace.data.scan import find_files

    sources = {
        name: source
        for name, source in declared_sources(settings).items()
        if source.path is not None
        and not Path(source.path).is_absolute()
        and not (has_example(settings) and source.path.startswith("data/raw/"))
    }
    if is_strict:
        find_files(project.root, sources)  # refuses a source without files
    for source in sources.values():
        pattern = str(source.path)
        for path in sorted(project.root.glob(pattern)):
            name = path.relative_to(project.root).as_posix()
            if path.is_file() and not name.startswith(".headrace/"):
                yield name, path
