"""What a run would do and take, told in seconds without doing any of it: ``run --dry-run``.

Rows come from file sizes and footers (``sizes``), columns from the contract in params.yaml or the
last extract, what would run from DVC, time, memory and disk from measured rates (``costs``), or
from this project's own last runs where the journal has them, scaled by the rows. Neither Prefect
nor MLflow is started. Inputs that are new and large are taken as changed without hashing them.
"""

import contextlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from headrace.commands.costs import Cost, Shape, stage_cost
from headrace.commands.pipeline import Dag, changes, locked_entries, read_dag, use_without_git
from headrace.commands.settings import Settings, read_settings
from headrace.commands.sizes import SourceSize, measure_sources
from headrace.commands.upgrade import declared_sources, has_example
from headrace.commands.why import Verdict, judge
from headrace.errors import IntegrityError, ResourceError
from headrace.memory import format_bytes
from headrace.models.protocol import FitParams
from headrace.params import Resources
from headrace.project import LOCK, Project
from headrace.schema import FEATURE_ROLES, read_contract
from headrace.storage import read_json
from headrace.tracking.history import list_runs, read_run, run_path

if TYPE_CHECKING:
    from headrace.data.scan import Source
    from headrace.stages.extract import ExtractParams

RUN_BYTES = 430 << 20  # flow, its server and DVC beside a stage (measured)
_DVC_BYTES = 130 << 20
# By kind of run.
_AROUND_BYTES = {"flow": RUN_BYTES, "repro": _DVC_BYTES, "dvc": _DVC_BYTES, "stage": 0}
_AROUND_BYTES |= {"search": 0, "skill": 0}
_EXAMPLE = {  # bytes and rows of the tables that the stage `raw` makes
    "airlines.csv": (386, 16),
    "airports.csv": (104_302, 1_458),
    "flights.csv": (31_053_850, 336_776),
    "planes.csv": (247_198, 3_322),
    "weather.csv": (2_294_215, 26_115),
}
_MAX_HASHED_BYTES = 1 << 30  # new inputs up to this size are hashed to see whether they changed
_FLOW_START_S, _STAGE_START_S = 12.0, 2.5  # server and flow; DVC and Python for each stage
_MANY_RUNS = 20  # how far back the journal is read
_TIGHT = 0.8  # share of the budget or the disk from which on a warning is given


@dataclass(frozen=True)
class StageForecast:
    """What one stage would take; ``state`` is what ``headrace why`` says of it."""

    stage: str
    state: str
    cost: Cost
    basis: str  # "rates", or the run whose figures were taken


@dataclass(frozen=True)
class Forecast:
    """What a run would do and take; prints itself as a table."""

    sources: tuple[SourceSize, ...]
    shape: Shape
    stages: tuple[StageForecast, ...]
    budget_bytes: int
    free_bytes: int
    machine_bytes: int

    @property
    def running(self) -> tuple[StageForecast, ...]:
        """The stages that will or may run."""
        return tuple(one for one in self.stages if one.state != "fresh")

    @property
    def seconds(self) -> float:
        """Seconds of all stages that run, one after the other, and of what starts them."""
        if not self.running:
            return 0.0
        stages = sum(one.cost.seconds + _STAGE_START_S for one in self.running)
        return _FLOW_START_S + stages

    @property
    def peak_bytes(self) -> int:
        """The most memory that the run holds at a time."""
        return max((one.cost.peak_bytes for one in self.running), default=0) + RUN_BYTES

    @property
    def disk_bytes(self) -> int:
        """Disk that the run takes at its fullest: new outs, and the largest scratch."""
        kept = sum(one.cost.disk_bytes for one in self.running)
        return kept + max((one.cost.scratch_bytes for one in self.running), default=0)

    @property
    def faults(self) -> tuple[str, ...]:
        """Why the run will not fit, each with its remedy; empty if it will."""
        if not self.running:
            return ()
        found = []
        if self.peak_bytes > self.budget_bytes:
            worst = max(self.running, key=lambda one: one.cost.peak_bytes)
            found.append(
                f"stage {worst.stage} needs about {format_bytes(self.peak_bytes)} with the run "
                f"around it, more than `resources.memory_budget` of "
                f"{format_bytes(self.budget_bytes)}; set at least "
                f"{format_bytes(self.peak_bytes * 1.1)}, or try `--sample 0.1`"
            )
        if self.disk_bytes > self.free_bytes:
            found.append(
                f"the run needs about {format_bytes(self.disk_bytes)} of disk and "
                f"{format_bytes(self.free_bytes)} are free; free some, or try `--sample 0.1`"
            )
        return tuple(found)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is near a limit, or could not be told."""
        found = [
            f"the rows of source {one.name} cannot be told without reading it; the figures leave "
            f"them out"
            for one in self.sources
            if one.num_rows is None
        ]
        if self.budget_bytes > self.machine_bytes:
            found.append(
                f"`resources.memory_budget` is {format_bytes(self.budget_bytes)}, but this "
                f"machine has {format_bytes(self.machine_bytes)} of memory"
            )
        if self.faults or not self.running:
            return tuple(found)
        if self.peak_bytes > _TIGHT * self.budget_bytes:
            found.append("memory is near its budget; the forecast is no closer than that")
        if self.disk_bytes > _TIGHT * self.free_bytes:
            found.append("disk is nearly full after the run")
        return tuple(found)

    def require_fit(self) -> None:
        """Refuse a run that will not fit.

        Raises:
            ResourceError: with the setting and the figure needed.
        """
        if self.faults:
            raise ResourceError("; ".join(self.faults))

    def __str__(self) -> str:
        """Sources, a line per stage, totals against what there is."""
        lines = [
            f"source {one.name}: {one.num_files} file{'s' * (one.num_files != 1)}, "
            f"{format_bytes(one.num_bytes)}, {one.rows_text}"
            for one in self.sources
        ]
        lines.append(
            f"table: ~{self.shape.num_rows:,} rows, {self.shape.num_numbers} numbers, "
            f"{self.shape.num_categories} categories, {self.shape.num_targets} targets"
        )
        lines.append("")
        rows: list[tuple[str, ...]] = [("stage", "", "seconds", "memory", "disk", "told by")]
        rows += [_row(one) for one in self.stages]
        if self.running:
            total = (_seconds(self.seconds), format_bytes(self.peak_bytes))
            rows.append(("all, with the flow", "", *total, format_bytes(self.disk_bytes), ""))
            rows.append(
                (
                    "there is", "", "", format_bytes(self.budget_bytes),
                    format_bytes(self.free_bytes), "",
                )
            )  # fmt: skip
        lines += _aligned(rows)
        lines.append("")
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [f"will not fit: {fault}" for fault in self.faults]
        if not self.running:
            lines.append("nothing would run: all stages are unchanged")
        elif not self.faults:
            lines.append("it fits; expect times within a factor of two")
        return "\n".join(lines)


def forecast(project: Project) -> Forecast:
    """Foretell what ``headrace run`` would do in ``project`` and what it would take.

    Raises:
        ConfigError: params.yaml or dvc.yaml is wrong.
        DataError: a source has no file.
    """
    import psutil

    settings = read_settings(project)
    use_without_git(project)
    dag = read_dag(project)
    sizes = _sizes(project, settings)
    shape = _shape(project, settings, sizes)
    earlier = _earlier(project)
    scale = _growth(project, sizes)
    stages = tuple(
        StageForecast(
            verdict.stage,
            verdict.state,
            *_cost(verdict.stage, shape, settings, settings.resources, earlier, scale),
        )
        for verdict in _verdicts(project, dag)
    )
    return Forecast(
        sources=tuple(sizes),
        shape=shape,
        stages=stages,
        budget_bytes=settings.resources.memory_budget,
        free_bytes=shutil.disk_usage(project.root).free,
        machine_bytes=int(psutil.virtual_memory().total),
    )


# --- the table that will be made -----------------------------------------------------------------


def _sizes(project: Project, settings: Settings) -> list[SourceSize]:
    """Measure the sources; those that the stage ``raw`` has yet to make are known."""
    declared = declared_sources(settings)
    present = _present(project, settings)
    found = measure_sources(project.root, present)
    for name in [name for name in declared if name not in present]:
        file = Path(declared[name].path or "").name
        num_bytes, num_rows = _EXAMPLE.get(file, (0, None))
        found.append(SourceSize(name, 1, num_bytes, num_rows, num_bytes, is_exact=True))
    return found


def _present(project: Project, settings: Settings) -> "dict[str, Source]":
    """Return the sources but those that the stage ``raw`` has yet to make."""
    is_made_later = has_example(settings) and not project.data("raw").is_dir()
    return {
        name: source
        for name, source in declared_sources(settings).items()
        if not (is_made_later and (source.path or "").startswith("data/raw/"))
    }


def _shape(project: Project, settings: Settings, sizes: list[SourceSize]) -> Shape:
    """Put together what is known of the table: rows of the largest source, roles of its columns."""
    params: Any = settings.section("extract")
    num_rows = _rows_of_recipe(project, params, sizes)
    roles = _roles(project, params)
    num_targets = len(params.targets)
    if roles:
        features = [role for role in roles.values() if role in FEATURE_ROLES]
        num_numbers = features.count("numeric")
        num_categories = features.count("category")
    else:
        num_numbers, num_categories = _columns_of(project, settings), 0
    kinds = {source.kind for source in declared_sources(settings).values()}
    return Shape(
        num_rows=round(num_rows * params.sample),
        num_numbers=num_numbers,
        num_categories=num_categories,
        num_texts=len([role for role in roles.values() if role not in (*FEATURE_ROLES, "target")]),
        num_targets=num_targets,
        source_bytes=sum(one.text_bytes for one in sizes),
        is_text=bool(kinds & {"csv", "json"}),
    )


def _roles(project: Project, params: Any) -> dict[str, str]:
    """Return role by column: from the last run, or else from what params.yaml declares."""
    for stage in ("extract", "reduce", "publish"):
        with contextlib.suppress(IntegrityError):
            return {
                column.name: column.role for column in read_contract(project.data(stage)).columns
            }
    return {
        name: own.role or "numeric"
        for name, own in params.columns.items()
        if name not in params.targets
    }


def _columns_of(project: Project, settings: Settings) -> int:
    """Return the columns of the sources by their first file, where nothing else is known."""
    import pyarrow.parquet as pq

    from headrace.data.scan import find_files

    num_columns = 0
    for found in find_files(project.root, _present(project, settings)):
        if not found.files:
            continue
        path = found.files[0].path
        if found.source.kind == "parquet":
            num_columns += len(pq.read_schema(path).names)
        elif found.source.kind == "csv" and path.suffix != ".gz":
            with path.open("rb") as file:
                delimiter = found.source.dialect.delimiter.encode()
                num_columns += file.readline().count(delimiter) + 1
    return num_columns


def _rows_of_recipe(project: Project, params: Any, sizes: list[SourceSize]) -> float:
    """Return the rows that the recipe will make of the sources.

    As many per row of the largest source as the last extract had; without one, all rows of the
    largest source, or of all sources where the recipe puts them under each other.
    """
    rows = [one.num_rows or 0 for one in sizes]
    report = _extract_report(project)
    rows_in = max((one["rows"] for one in report.get("sources", {}).values()), default=0)
    if rows_in:
        made = report["rows"]["recipe"] - report["rows"]["without_target"]
        return float(max(rows, default=0) * made / rows_in)
    recipe = (project.root / params.recipe).read_text(encoding="utf-8") if params.recipe else ""
    without_comments = re.sub(r"--[^\n]*", "", recipe)
    is_union = re.search(r"\bUNION\b", without_comments, re.IGNORECASE) is not None
    return sum(rows) if is_union else max(rows, default=0)


def _growth(project: Project, sizes: list[SourceSize]) -> float | None:
    """Return how many times the rows of the last extract there are now; None if not known."""
    report = _extract_report(project).get("sources", {})
    before = max((one["rows"] for one in report.values()), default=0)
    now = max((one.num_rows or 0 for one in sizes), default=0)
    return now / before if before and now else None


def _extract_report(project: Project) -> Mapping[str, Any]:
    path = project.data("extract") / "extract.json"
    try:
        report = read_json(path)
    except IntegrityError:
        return {}
    return report if isinstance(report, dict) else {}


# --- what would run ------------------------------------------------------------------------------


def _verdicts(project: Project, dag: Dag) -> list[Verdict]:
    locked = locked_entries(project)
    if not locked:
        return [Verdict(name, "never run") for name in dag.by_name]
    suspects = _too_large_to_hash(project, dag)
    if not suspects:
        return judge(project, dag, changes(project, dag))
    changed = {name for name, stage in dag.by_name.items() if suspects & set(stage.deps)}
    below = set(dag.downstream(changed))
    return [
        Verdict(name, "stale" if name in changed else "waiting" if name in below else "fresh")
        for name in dag.by_name
    ]


def _too_large_to_hash(project: Project, dag: Dag) -> set[str]:
    """Return the inputs newer than dvc.lock if hashing them would take seconds."""
    moment = (project.root / LOCK).stat().st_mtime
    found: dict[str, int] = {}
    for stage in dag.stages:
        for dep in stage.deps:
            path = project.root / dep
            if dag.makers(dep) or not path.exists():
                continue
            files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
            new = [p.stat().st_size for p in files if p.stat().st_mtime > moment]
            if new:
                found[dep] = sum(new)
    return set(found) if sum(found.values()) > _MAX_HASHED_BYTES else set()


# --- what it takes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Earlier:
    run: int
    seconds: float
    peak_bytes: int  # of the stage alone


def _cost(
    stage: str,
    shape: Shape,
    settings: Settings,
    resources: Resources,
    earlier: Mapping[str, _Earlier],
    scale: float | None,
) -> tuple[Cost, str]:
    section = settings.section(stage)
    numbers = {
        name: float(value)
        for name, value in section.model_dump().items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if isinstance(section, FitParams) and section.bag != "none":
        extract = cast("ExtractParams", settings.section("extract"))
        numbers["fits"] = float(extract.folds + 1)
    cost = stage_cost(stage, shape, numbers, resources, len(settings.members))
    if stage not in earlier or scale is None:
        return cost, "rates"
    before = earlier[stage]
    peak = before.peak_bytes or cost.peak_bytes
    if scale > 1:  # how memory grows was not measured; it is not less than the rates say
        peak = max(peak, cost.peak_bytes)
    told = replace(cost, seconds=before.seconds * max(scale, 0.1), peak_bytes=peak)
    return told, f"run {before.run}"


def _earlier(project: Project) -> dict[str, _Earlier]:
    """Return what the newest finished execution of each stage took."""
    found: dict[str, _Earlier] = {}
    for run_id in list(reversed(list_runs(project.journal)))[:_MANY_RUNS]:
        run = read_run(run_path(project.journal, run_id))
        around = _AROUND_BYTES[run.kind]
        for stage in run.stages:
            if stage.status == "finished" and stage.stage not in found:
                own = max(stage.peak_bytes - around, 0)
                found[stage.stage] = _Earlier(run.number, stage.seconds, own)
    return found


# --- printing ------------------------------------------------------------------------------------

_STATES = {"fresh": "unchanged", "stale": "will run", "never run": "will run", "waiting": "may run"}


def _row(one: StageForecast) -> tuple[str, ...]:
    if one.state == "fresh":
        return (one.stage, _STATES[one.state], "", "", "", "")
    return (
        one.stage,
        _STATES.get(one.state, one.state),
        _seconds(one.cost.seconds),
        format_bytes(one.cost.peak_bytes),
        format_bytes(one.cost.disk_bytes),
        one.basis,
    )


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if 2 <= i <= 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
