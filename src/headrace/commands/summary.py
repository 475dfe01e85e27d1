"""The end of a run on the terminal: what it cost, what it found, where to look, what to do next."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from headrace.commands.pipeline import Dag
from headrace.commands.results import Result, looks_sentence, report, results
from headrace.commands.settings import read_resources
from headrace.lineage import environment_digest, lineage_id, stage_keys
from headrace.memory import format_bytes
from headrace.project import LOCK, Project


@dataclass(frozen=True)
class Cost:
    """What one stage took: seconds, and the peak over all processes of the run while it ran."""

    stage: str
    state: str
    seconds: float
    peak_bytes: int


def print_summary(project: Project, dag: Dag, costs: Sequence[Cost], console: Console) -> None:
    """Print the tables and the pointers that end every run."""
    ran = [cost for cost in costs if cost.state != "unchanged"]
    if ran:
        console.print(_cost_table(ran, read_resources(project).memory_budget))
    found = results(project)
    for target in dict.fromkeys(one.target for one in found):
        own = [one for one in found if one.target == target]
        first = own[0]
        console.print(
            f"{target}: {first.metric} on test rows, 95 % interval over "
            f"{first.num_units:,} {first.unit}s",
            style="bold",
            markup=False,
            highlight=False,
        )
        console.print(_result_table(own))
        for line in _tie_sentences(own):
            console.print(line, markup=False, highlight=False)
    for line in [*_seeds(project, found), *_pointers(project, dag, has_results=bool(found))]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cost_table(costs: Sequence[Cost], budget: int) -> Table:
    table = Table(title="Stages", title_justify="left", title_style="bold")
    table.add_column("stage")
    table.add_column("result")
    table.add_column("seconds", justify="right")
    table.add_column(f"peak memory (budget {format_bytes(budget)})", justify="right")
    for cost in costs:
        peak = format_bytes(cost.peak_bytes) if cost.peak_bytes else "not measured"
        table.add_row(cost.stage, cost.state, f"{cost.seconds:.1f}", peak)
    table.add_section()
    peak_bytes = max(cost.peak_bytes for cost in costs)
    seconds = sum(cost.seconds for cost in costs)
    peak = format_bytes(peak_bytes) if peak_bytes else ""
    table.add_row("all", "", f"{seconds:.1f}", peak)
    return table


def _result_table(own: Sequence[Result]) -> Table:
    table = Table()
    table.add_column("model", no_wrap=True)
    table.add_column(r"value \[interval]", justify="right", no_wrap=True)
    table.add_column("against the chosen")
    table.add_column("against the best")
    table.add_column("smallest detectable", justify="right")
    for one in own:
        detectable = "" if one.detectable is None else f"{one.detectable:.3g}"
        table.add_row(one.model, one.interval, one.verdict, one.rank, detectable)
    return table


def _tie_sentences(own: Sequence[Result]) -> list[str]:
    chosen = [one.model for one in own if one.verdict == "chosen"]
    tied = [one.model for one in own if one.verdict == "tied"]
    better = [one.model for one in own if one.verdict == "better"]
    if not chosen:
        return []
    ties = f"tied with it: {', '.join(tied)}" if tied else "no other model is tied with it"
    lines = [f"{chosen[0]} was chosen without test rows; {ties}"]
    if better:
        lines.append(f"better on these rows, which do not choose: {', '.join(better)}")
    return lines


def _seeds(project: Project, found: Sequence[Result]) -> list[str]:
    if not found:
        return []
    from headrace.commands.compare import seed_sentences  # it loads numba: not for a run's start

    return seed_sentences(project)


def _pointers(project: Project, dag: Dag, *, has_results: bool) -> list[str]:
    lines = []
    if has_results:
        lines.append(looks_sentence(project))
    keys = stage_keys(project.root / LOCK)
    lines.append(f"lineage id: {lineage_id(keys, dag.by_name, environment_digest())}")
    if path := report(project):
        lines.append(f"report: {path}")
    lines.append("MLflow and Prefect UIs: headrace ui")
    step = (
        "change a value in params.yaml, see `headrace why`, then `headrace run`"
        if has_results
        else "headrace status"
    )
    lines.append(f"next: {step}")
    return lines
