"""``headrace bench``: rows/s of each step on the project's own data, beside its ceiling."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table as RichTable

from headrace.commands.settings import read_settings
from headrace.commands.views import encoded_views
from headrace.data.encoder import open_encoder
from headrace.data.rates import ROUNDS, Rate, Task, data_tasks, measure
from headrace.data.shards import Shards, open_shards
from headrace.data.table import Table, open_table
from headrace.errors import ConfigError
from headrace.params import Resources
from headrace.project import Project

_MODEL = "nn"


@dataclass(frozen=True)
class Benched:
    """What was measured, and on how much."""

    rates: tuple[Rate, ...]
    num_rows: int  # train rows of the project
    seconds: float
    note: str = ""  # what could not be measured, and why

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "train_rows": self.num_rows,
            "seconds": self.seconds,
            "note": self.note,
            "rates": [rate.to_json() for rate in self.rates],
        }


def bench(project: Project, *, seconds: float, tell: Callable[[str], None]) -> Benched:
    """Measure decoding, encoding, reading and training, each for about ``seconds``.

    ``tell`` hears what is being done.

    Raises:
        ConfigError: if ``seconds`` is not positive, or params.yaml has a fault.
        IntegrityError: if a stage has not run, or its files are damaged or of another table.
    """
    if not seconds > 0:
        raise ConfigError(f"--seconds is {seconds:g}; it must be above 0")
    settings = read_settings(project)
    resources = settings.resources
    reduced, encoded = (project.data(name).relative_to(Path.cwd()) for name in ("reduce", "encode"))
    table = open_table(reduced)
    shards = open_shards(encoded, "train", contract_digest=table.contract.digest)
    encoder = open_encoder(encoded)
    tasks = data_tasks(
        table,
        encoder,
        shards,
        threads=resources.threads,
        budget_bytes=resources.memory_budget,
    )
    note = ""
    if _MODEL in settings.models:
        section = settings.section(f"train@{_MODEL}")
        tasks += _training(project, table, shards, section, resources)
    else:
        note = f"training is not measured: `models` in params.yaml lists no {_MODEL}"
    return Benched(measure(tasks, seconds=seconds, tell=tell), shards.num_rows, seconds, note)


def print_bench(found: Benched, console: Console) -> None:
    """Print the rates as a table."""
    table = RichTable(
        title=f"{found.num_rows:,} train rows, {found.seconds:g} s a rate, medians of {ROUNDS}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("what")
    for name in ("rows/s", "MB/s", "rows/cpu-s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("of its ceiling", justify="right")
    for rate in found.rates:
        shares = [f"{share:.1%} of {name}" for name, share in rate.ceilings]
        table.add_row(
            rate.name,
            f"{rate.rows_per_s:,.0f}",
            f"{rate.bytes_per_s / 1e6:,.0f}",
            f"{rate.rows_per_cpu_s:,.0f}",
            "\n".join(shares),
        )
    console.print(table)
    if found.note:
        console.print(found.note, highlight=False)


def _training(
    project: Project,
    table: Table,
    shards: Shards,
    section: Any,
    resources: Resources,
) -> tuple[Task, ...]:
    from headrace.models.nn import NnParams, open_learner
    from headrace.training.rates import training_tasks

    views = encoded_views(table.folder, shards.folder, project.cache)
    params = cast(NnParams, section)
    # Worker processes would not count in this one's CPU seconds.
    learner = open_learner(views, params, resources=resources.model_copy(update={"workers": 0}))
    return training_tasks(learner, params, row_bytes=shards.schema.rows.row_bytes)
