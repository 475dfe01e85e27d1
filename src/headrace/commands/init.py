"""Make a project of a folder with one's own files: ``headrace init``.

It reads the files once, guesses what every column is, and writes the guesses with their reasons
into params.yaml for a person to review; from then on nothing is guessed. Files are never copied:
those in the folder are named relative to it, others by their absolute path. A folder that already
has a params.yaml keeps it and gets what is missing around it.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.commands.contract_text import Draft, params_text, recipe_text
from headrace.commands.upgrade import is_source_tree, write_around
from headrace.errors import ConfigError, nearest
from headrace.params import Resources
from headrace.project import CODE_LOCK, LOCK, PARAMS, PIPELINE, Project
from headrace.storage import write_file

if TYPE_CHECKING:
    from headrace.data.scan import Source
    from headrace.schema import Contract
    from headrace.stages.extract import ExtractParams, Survey

MODELS = ("baseline", "catboost", "nn")
RECIPE = "recipe.sql"
_DATA_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq", ".json", ".jsonl", ".ndjson")
_SPLIT_VALUES = {"train", "valid", "test", "gap"}
_BIRTH = re.compile(r"birth|dob|founded|opened|born", re.IGNORECASE)
_TARGET_NAME = re.compile(r"^(target|label|class|y|outcome|result|churn\w*|is_\w+)$", re.IGNORECASE)
_LEAK = 0.999  # association with a target from which a column is suspected to be the target
_MAX_CANDIDATE_VALUES = 20


@dataclass(frozen=True)
class Initialised:
    """What ``init`` wrote and guessed; prints itself for a person to read."""

    folder: Path
    written: tuple[str, ...]
    kept: tuple[str, ...]
    guesses: tuple[tuple[str, ...], ...] = ()  # column, role, dtype, seen, reason
    targets: tuple[str, ...] = ()
    num_rows: int = 0
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = field(default=("headrace run --dry-run", "headrace run"))

    def __str__(self) -> str:
        lines: list[str] = []
        if self.guesses:
            lines += [f"{self.num_rows:,} rows", ""]
            lines += _aligned([("column", "role", "type", "seen", "why"), *self.guesses])
            lines.append("")
        lines += [f"target {target}" for target in self.targets]
        lines += self.notes
        lines += [f"warning: {warning}" for warning in self.warnings]
        if lines and lines[-1]:
            lines.append("")
        if self.written:
            lines.append(f"wrote {', '.join(self.written)}")
        if self.kept:
            lines.append(f"kept {', '.join(self.kept)}")
        if self.guesses:
            lines.append(f"next: review {PARAMS}, then `{'`, `'.join(self.next_steps)}`")
        else:
            lines.append(f"next: `{'`, `'.join(self.next_steps)}`")
        return "\n".join(lines)


def init(
    folder: Path,
    *,
    sources: Sequence[str] = (),
    targets: Sequence[str] = (),
    recipe: Path | None = None,
    key: Sequence[str] = (),
    force: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Initialised:
    """Write the files that make ``folder`` a project.

    Args:
        folder: The folder; made if it is not there.
        sources: Files, patterns, folders or databases (``shop.sqlite::orders``), each optionally
            with the name that the recipe uses (``orders=data/orders.csv``); none: the data files
            that lie in the folder.
        targets: The columns to predict.
        recipe: A file with one SELECT over the sources; none: all columns of the only source.
        key: The columns that identify a row; none: a row's place in its file.
        force: Whether files that are there may be replaced.
        tell: Hears what is being done, for whoever waits.

    Raises:
        ConfigError: no target, no source, several sources without a recipe, or files that are
            there already.
        DataError: what the files hold is refused; nothing is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    project = Project(folder.resolve())
    if project.params.is_file() and not force:
        if sources or targets or recipe or key:
            raise ConfigError(
                f"{project.params} exists already: edit it, or give --force to write it anew; "
                f"without sources and targets `headrace init` keeps it and writes what is missing"
            )
        written, kept = write_around(project, with_git=_can_use_git(project.root), force=False)
        return Initialised(project.root, written, (PARAMS, *kept))
    return _from_sources(project, sources, targets, recipe, key, force=force, tell=tell)


def _from_sources(
    project: Project,
    sources: Sequence[str],
    targets: Sequence[str],
    recipe: Path | None,
    key: Sequence[str],
    *,
    force: bool,
    tell: Callable[[str], None],
) -> Initialised:
    root = project.root
    _refuse_present(project, recipe, force=force)
    declared = _declared(root, sources or _lying_around(root))
    recipe_name = _recipe_name(root, recipe, declared)
    tell(f"reading {', '.join(str(settings.get('path')) for settings in declared.values())}")
    resources = Resources(memory_budget=_memory_budget(), threads=_threads())
    if not targets:
        raise ConfigError(_ask_for_target(root, declared, recipe_name, key, resources, project))
    raw: dict[str, Any] = {"sources": declared, "targets": list(targets), "key": list(key)}
    raw |= {"recipe": recipe_name} if recipe else {}
    params = _checked(raw)
    survey = _survey(root, params, project, resources)
    split, split_reason, warnings = _choose_split(survey, targets)
    contract, reasons = _with_split(survey, split)
    warnings += _suspicions(contract, survey.profile)
    warnings += [
        f"{path} lies outside the project, so the project cannot be moved or shared without it"
        for path in (str(settings.get("path", "")) for settings in declared.values())
        if Path(path).is_absolute()
    ]
    draft = Draft(
        name=_project_name(root),
        sources=declared,
        recipe=recipe_name,
        key=key,
        contract=contract,
        reasons=reasons,
        split=split,
        split_reason=split_reason,
        memory_budget=f"{resources.memory_budget >> 30}GiB",
        threads=resources.threads,
        models=MODELS,
    )
    files = {PARAMS: params_text(draft)}
    if recipe is None:
        files[RECIPE] = _default_recipe(declared, survey, key)
    for name, text in files.items():
        write_file(root / name, text)
    written, kept = write_around(project, with_git=_can_use_git(root), force=force)
    return Initialised(
        folder=root,
        written=(*files, *written),
        kept=kept,
        guesses=_guesses(contract, reasons, survey.profile),
        targets=tuple(_target_line(survey, name) for name in targets),
        num_rows=survey.num_rows,
        warnings=tuple(warnings),
        notes=(split_reason,),
    )


# --- sources and recipe --------------------------------------------------------------------------


def _lying_around(root: Path) -> list[str]:
    """Return the data files in the folder itself, or else in its data/raw."""
    for base in (root, root / "data" / "raw"):
        found = sorted(
            path.relative_to(root).as_posix()
            for path in (base.iterdir() if base.is_dir() else ())
            if path.is_file() and _is_data(path)
        )
        if found:
            return found
    raise ConfigError(
        f"{root} holds no data file ({', '.join(_DATA_SUFFIXES)}); name them: "
        f"`headrace init my.parquet --target y`"
    )


def _is_data(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz")
    return name.endswith(_DATA_SUFFIXES) and not name.startswith(".")


def _declared(root: Path, sources: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return each source's settings by name: its path, and how its files are written."""
    declared: dict[str, dict[str, Any]] = {}
    for text in sources:
        name, settings = _parse_source(root, text)
        if name in declared:
            raise ConfigError(
                f"two sources would be called {name!r}; name them: `{name}={text}`, `other={text}`"
            )
        declared[name] = settings
    return declared


def _parse_source(root: Path, text: str) -> tuple[str, dict[str, Any]]:
    from headrace.data.scan import Source

    given, has_name, location = text.partition("=")
    if not has_name or "/" in given or "." in given:
        given, location = "", text
    location, _, table = location.partition("::")
    if location.startswith(("postgresql://", "postgres://")):
        settings: dict[str, Any] = {"format": "postgresql", "url": location, "table": table}
        return given or _name_of(table), settings
    path = _path_from(root, location)
    settings = {"path": path} | ({"table": table} if table else {})
    try:
        source = Source.model_validate(settings)
    except ValueError as error:
        reason = str(error).split("Value error, ")[-1].split(" [type=")[0]
        hint = "; name a table: `shop.sqlite::orders`" if "`table`" in reason else ""
        raise ConfigError(f"source {text}: {reason}{hint}") from error
    if source.kind == "csv":
        settings |= _dialect_settings(root, path, source)
    return given or _name_of(table or Path(location).name), settings


def _path_from(root: Path, location: str) -> str:
    """Return a path as params.yaml has it: relative to the project where it lies inside."""
    here = Path(location)
    base = root if (root / here).exists() or _has_mark(location) else Path.cwd()
    path = Path(os.path.abspath(base / here))  # noqa: PTH100 - resolve() would follow links
    if not _has_mark(location) and not path.exists():
        folders = {(root / here).parent, path.parent}
        others = [file.name for folder in folders if folder.is_dir() for file in folder.iterdir()]
        raise ConfigError(f"source {location} does not exist{nearest(path.name, others)}")
    if path.is_dir():
        kinds = sorted({file.suffix for file in path.iterdir() if _is_data(file)})
        if len(kinds) != 1:
            raise ConfigError(
                f"source {location} is a folder with files of the kinds {kinds}; give a pattern "
                f"such as {location.rstrip('/')}/*.parquet"
            )
        path = path / f"*{kinds[0]}"
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _has_mark(text: str) -> bool:
    return any(mark in text for mark in "*?[")


def _name_of(text: str) -> str:
    stem = text.rpartition(".")[2] if "." not in text else text.partition(".")[0]
    name = re.sub(r"\W+", "_", stem).strip("_").lower()
    if not name:
        return "rows"
    return name if not name[0].isdigit() else f"t_{name}"


def _dialect_settings(root: Path, path: str, source: "Source") -> dict[str, Any]:
    """Return what of a CSV file's dialect is not the default."""
    from headrace.data.dialect import Dialect
    from headrace.data.propose import propose_dialect
    from headrace.data.scan import find_files

    (found,) = find_files(root, {"source": source})
    proposed = propose_dialect(found.files[0].path)
    default = Dialect() if ".tsv" not in path else Dialect(delimiter="\t")
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in proposed.model_dump().items()
        if value != getattr(default, name)
    }


def _recipe_name(root: Path, recipe: Path | None, declared: Mapping[str, Any]) -> str:
    if recipe is None:
        if len(declared) > 1:
            first, second, *_ = declared
            raise ConfigError(
                f"there are {len(declared)} sources ({', '.join(declared)}) and no recipe that "
                f"joins them; write one SELECT into a file and name it: --recipe {RECIPE}, for "
                f"example SELECT a.*, b.price FROM {first} a LEFT JOIN {second} b USING (id); or "
                f"name the one file you mean"
            )
        return RECIPE
    path = (root / recipe) if not recipe.is_absolute() else recipe
    if not path.is_file() and recipe.is_file():
        path = recipe.absolute()
    if not path.is_file():
        raise ConfigError(f"--recipe {recipe} does not exist; write one SELECT into it")
    if not path.resolve().is_relative_to(root):
        raise ConfigError(
            f"--recipe {recipe} lies outside {root}; copy it into the project, where DVC and git "
            f"follow its changes"
        )
    return path.resolve().relative_to(root).as_posix()


def _default_recipe(declared: Mapping[str, Any], survey: "Survey", key: Sequence[str]) -> str:
    (source,) = declared
    columns = survey.types[source]
    dates = {name for name, kind in columns.items() if kind.startswith(("DATE", "TIMESTAMP"))}
    return recipe_text(source, columns, has_row_id=not key, dates=dates)


# --- looking at the rows -------------------------------------------------------------------------


def _checked(raw: dict[str, Any]) -> "ExtractParams":
    from headrace.params import parse_section
    from headrace.stages.extract import ExtractParams

    return parse_section(ExtractParams, raw, key="extract", path=Path("headrace init"))


def _survey(
    root: Path, params: "ExtractParams", project: Project, resources: Resources
) -> "Survey":
    from headrace.stages.extract import survey

    had_state = project.state.is_dir()
    try:
        return survey(root, params, scratch=project.scratch, resources=resources)
    finally:
        if not had_state:
            shutil.rmtree(project.state, ignore_errors=True)


def _ask_for_target(
    root: Path,
    declared: Mapping[str, Any],
    recipe: str,
    key: Sequence[str],
    resources: Resources,
    project: Project,
) -> str:
    """Return the error that asks for a target, with the likeliest columns first."""
    from headrace.data.engine import identifier, open_engine
    from headrace.data.recipe import read_recipe
    from headrace.data.scan import DATABASES, attached_files, find_files, readable_files, scan_files

    wanted = "no target is given: name the column to predict with --target"
    params = _checked({"sources": dict(declared), "targets": ["?"], "key": list(key)})
    found = find_files(root, params.sources)
    if any(one.source.kind in DATABASES for one in found):
        return f"{wanted} (a column that the recipe returns)"
    had_state = project.state.is_dir()
    try:
        with open_engine(
            project.scratch,
            memory_budget=resources.memory_budget,
            threads=resources.threads,
            max_spill=params.max_spill,
            readable=readable_files(found),
            attached=attached_files(found),
        ) as engine:
            for one in found:
                scan_files(engine, one, with_row_id=not key)
            own = recipe if (root / recipe).is_file() else None
            query = read_recipe(root, own, list(declared))
            names = [name for name, _ in engine.describe(query.text, place=query)]
            counts = ", ".join(f"approx_count_distinct({identifier(name)})" for name in names)
            distinct = engine.row(f"SELECT {counts} FROM ({query.text})")
    finally:
        if not had_state:
            shutil.rmtree(project.state, ignore_errors=True)
    few = [
        name
        for name, count in zip(names, distinct, strict=True)
        if 2 <= count <= _MAX_CANDIDATE_VALUES
    ]
    ranked = sorted(few, key=lambda name: (not _TARGET_NAME.match(name), -names.index(name)))
    likely = f"likely, for they have few values: {', '.join(ranked[:5])}; " if ranked else ""
    return f"{wanted}; {likely}all columns: {', '.join(name for name in names if name != 'row_id')}"


def _choose_split(
    survey: "Survey", targets: Sequence[str]
) -> tuple[dict[str, Any], str, list[str]]:
    """Return the split to propose, the sentence that says why, and warnings."""
    contract, profile = survey.contract, survey.profile
    given = [
        column.name
        for column in contract.columns
        if column.dtype == "string" and column.name not in targets
        if {"train", "test"} <= _values(profile[column.name]) <= _SPLIT_VALUES
    ]
    if given:
        return (
            {"kind": "given", "column": given[0]},
            f"Split: given by the column {given[0]}, which holds train and test.",
            [],
        )
    dates = [c.name for c in contract.columns if c.dtype.startswith(("date", "timestamp"))]
    times = [
        name
        for name in dates
        if not _BIRTH.search(name) and not profile[name]["nulls"] and _cuts(profile[name])
    ]
    if len(times) == 1:
        valid_from, test_from = _cuts(profile[times[0]]) or ("", "")
        return (
            {"kind": "time", "column": times[0], "valid_from": valid_from, "test_from": test_from},
            f"Split: by time, on {times[0]}, the only time column: train before {valid_from}, "
            f"valid before {test_from}, test after; set `kind: random` if rows have no order.",
            [],
        )
    warnings = []
    if dates:
        warnings.append(
            f"the table has dates ({', '.join(dates)}), and which one orders the rows is not "
            f"clear: if rows are predicted forward in time, set `extract.split` to kind: time "
            f"with that column, which must have no missing value; a random split is too optimistic"
        )
    groups = [
        column.name
        for column in contract.columns
        if column.role == "category" and "identifier" in survey.reasons.get(column.name, "")
    ]
    if groups:
        warnings.append(
            f"rows share identifiers ({', '.join(groups)}): if a prediction is for one that is not "
            f"in train, set `extract.split` to kind: grouped with that column"
        )
    with_classes = [t.name for t in contract.targets if t.task != "regression"]
    if with_classes:
        return (
            {"kind": "stratified", "column": with_classes[0], "valid": 0.15, "test": 0.15},
            f"Split: by a hash of each row, with equal shares of the classes of {with_classes[0]}.",
            warnings,
        )
    return (
        {"kind": "random", "valid": 0.15, "test": 0.15},
        "Split: by a hash of each row's values.",
        warnings,
    )


def _values(entry: Mapping[str, Any]) -> set[str]:
    return {str(part["value"]) for part in entry.get("top", ())}


def _cuts(entry: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the days after which 70 % and 85 % of the rows come, if they are three times apart."""
    edges, counts = entry["histogram"]["edges"], entry["histogram"]["counts"]
    total, so_far = sum(counts), 0
    days: list[datetime] = []
    for share in (0.7, 0.85):
        so_far = 0
        for edge, count in zip(edges[1:], counts, strict=True):
            so_far += count
            if so_far >= share * total:
                moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=edge)
                days.append(moment.replace(hour=0, minute=0, second=0, microsecond=0))
                break
    first, last = (
        datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=edges[i]) for i in (0, -1)
    )
    if len(days) < 2 or not first < days[0] < days[1] <= last:
        return None
    return days[0].date().isoformat(), days[1].date().isoformat()


def _with_split(survey: "Survey", split: Mapping[str, Any]) -> tuple["Contract", dict[str, str]]:
    """Return contract and reasons as they are under the proposed split."""
    contract, reasons = survey.contract, dict(survey.reasons)
    if split["kind"] == "given":
        columns = tuple(c for c in contract.columns if c.name != split["column"])
        return contract.model_copy(update={"columns": columns}), reasons
    if split["kind"] == "time":
        columns = tuple(
            c.model_copy(update={"role": "time", "note": ""}) if c.name == split["column"] else c
            for c in contract.columns
        )
        reasons[split["column"]] = "rows are split by it; no feature: derive some in the recipe"
        return contract.model_copy(update={"columns": columns}), reasons
    return contract, reasons


def _suspicions(contract: "Contract", profile: Mapping[str, Any]) -> list[str]:
    """Name columns that all but are the target, and columns put aside."""
    found = []
    for name in contract.features:
        for target, entry in profile[name].get("association", {}).items():
            if entry["value"] is not None and abs(entry["value"]) > _LEAK:
                found.append(
                    f"{name} tells {target} almost exactly ({entry['measure']} "
                    f"{entry['value']:.4f}): is it known when a prediction is made? If not, leave "
                    f"it out of the recipe"
                )
    put_aside = [c.name for c in contract.columns if c.role == "ignore"]
    if put_aside:
        found.append(
            f"no model sees {', '.join(put_aside)} (the reasons are above); set another role, or "
            f"derive features in the recipe"
        )
    return found


# --- what is shown -------------------------------------------------------------------------------


def _guesses(
    contract: "Contract", reasons: Mapping[str, str], profile: Mapping[str, Any]
) -> tuple[tuple[str, ...], ...]:
    targets = {target.name for target in contract.targets}
    return tuple(
        (
            column.name,
            column.role,
            column.dtype,
            _seen(profile[column.name]),
            reasons.get(column.name, ""),
        )
        for column in contract.columns
        if column.name not in targets
    )


def _seen(entry: Mapping[str, Any]) -> str:
    """One cell of the profile: range and mean, or the commonest values; then what is missing."""
    if entry["nulls"] == entry["rows"]:
        return "all missing"
    parts = []
    if "mean" in entry:
        parts.append(
            f"{_short(entry['min'])} … {_short(entry['max'])}, mean {_short(entry['mean'])}"
        )
    elif "min" in entry:
        parts.append(f"{entry['min'][:16]} … {entry['max'][:16]}")
    elif entry.get("top"):
        shown = ", ".join(str(part["value"])[:14] for part in entry["top"][:3])
        parts.append(f"{entry['distinct']} values: {shown}")
    if entry["nulls"]:
        parts.append(f"{entry['nulls'] / entry['rows']:.1%} missing")
    return ", ".join(parts)


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e6 or isinstance(value, float) else str(value)


def _target_line(survey: "Survey", name: str) -> str:
    target, entry = survey.contract.target(name), survey.profile[name]
    shown = f"{target.task}, {survey.reasons[name]}"
    if target.labels:
        shown += f"; classes {', '.join(target.labels[:10])}"
    if target.task == "binary":
        shown += f"; positive is {target.labels[1]}"
    if "mean" in entry:
        shown += f"; mean {_short(entry['mean'])}"
    if entry["nulls"]:
        shown += f"; missing in {entry['nulls'] / entry['rows']:.1%} of the rows, which are masked"
    return f"{name}: {shown}"


def _aligned(rows: Sequence[Sequence[str]], *, max_width: int = 48) -> list[str]:
    widths = [min(max_width, max(len(row[i]) for row in rows)) for i in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return lines


# --- writing -------------------------------------------------------------------------------------


def _refuse_present(project: Project, recipe: Path | None, *, force: bool) -> None:
    names = [PARAMS, PIPELINE, CODE_LOCK, *([RECIPE] if recipe is None else [])]
    present = [name for name in names if (project.root / name).exists()]
    if present and not force:
        raise ConfigError(
            f"{project.root} holds {', '.join(present)} already; give --force to replace them"
            + (f", or --recipe {RECIPE} to use that one" if RECIPE in present else "")
        )
    if is_source_tree(project):
        raise ConfigError(
            f"{project.root} is headrace's own source tree, which has its pipeline; "
            f"make a project in a folder of its own"
        )


def _can_use_git(root: Path) -> bool:
    """Tell whether git can hold dvc.yaml and dvc.lock; DVC refuses to work where it cannot."""
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        return False
    if shutil.which("git") is None:
        return False
    done = subprocess.run(
        ["git", "-C", str(root), "check-ignore", PIPELINE, LOCK],
        capture_output=True,
        check=False,
    )
    return done.returncode == 1  # 0: ignored; 128: git itself refuses the folder


def _project_name(root: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_. -]+", "-", root.name).strip("-. _")
    return name[:100] or "headrace"


def _memory_budget() -> int:
    """Half of the machine's memory, in whole GiB, at least one."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return max(1, (total // 2) >> 30) << 30


def _threads() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
