"""``headrace sync``: bring the journal to MLflow and register the published model.

Run at the end of the flow, after ``headrace stage publish`` under plain ``dvc repro``, and by hand.
It is idempotent: what MLflow has is left alone, what was cut off is taken up again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa

from headrace.commands import execute
from headrace.commands.pipeline import changes, read_dag
from headrace.commands.settings import read_settings
from headrace.errors import HeadraceError
from headrace.lineage import PACKAGE
from headrace.models.package import (
    REQUIREMENTS,
    output_schema,
    read_description,
    read_example,
    read_rules,
)
from headrace.project import LOCK, PIPELINE, Project
from headrace.schema import read_contract
from headrace.storage import folder_digest, verify_folder
from headrace.tracking.history import Run, list_runs, read_run, run_path
from headrace.tracking.journal import RunJournal, close_stale
from headrace.tracking.location import Store, connect, find_store
from headrace.tracking.registry import CHALLENGER, Candidate, Registered, register
from headrace.tracking.replica import (
    Replicated,
    find_experiment,
    find_parent,
    replicate,
    replicate_or_defer,
    results_table,
)

_SERVED = Path(__file__).with_name("served_model.py")


@dataclass(frozen=True)
class Synced:
    """What MLflow has now; printable."""

    store: str
    replicated: Replicated
    registered: Registered | None

    def __str__(self) -> str:
        runs = f"MLflow at {self.store}: {self.replicated.sent} runs sent"
        if self.replicated.pending:
            runs += f", {self.replicated.pending} pending: {self.replicated.problem}"
        if self.registered is None:
            return f"{runs}; no model is published yet"
        news = "new" if self.registered.is_new else "was there"
        model = f"{self.registered.name} version {self.registered.version} ({news})"
        return f"{runs}\nmodel {model} is the {CHALLENGER}: {self.registered.uri}"


def sync(project: Project) -> Synced:
    """Close dead runs, send what MLflow lacks, register the package; return what it has now.

    Raises:
        DependencyError: if MLflow cannot be reached; the journal keeps what it was not sent.
        ConfigError: if its database is of another version.
        IntegrityError: if the package is damaged.
    """
    from headrace.stages.publish import PublishParams

    name = cast(PublishParams, read_settings(project).section("publish")).name
    close_stale(project.journal)
    complete_last_run(project)
    store = find_store(project.root)
    replicated = replicate(project.journal, store, experiment=name)
    package = project.data("publish")
    registered = _register(project, store, package, name) if package.is_dir() else None
    return Synced(store.name, replicated, registered)


def sync_or_defer(project: Project) -> str:
    """Like ``sync``, but return what went wrong: no stage fails because a tracker is away."""
    try:
        sync(project)
    except HeadraceError as error:
        return str(error)
    return ""


def send_runs(project: Project) -> str:
    """Send to MLflow what it lacks of the journal; return what went wrong, if anything did."""
    from headrace.stages.publish import PublishParams

    name = cast(PublishParams, read_settings(project).section("publish")).name
    store = find_store(project.root)
    return replicate_or_defer(project.journal, store, experiment=name).problem


def complete_last_run(project: Project) -> None:
    """Give the newest run its lineage, results and reused stages, if it ended without them.

    That is a run of plain ``dvc repro``: only after its last stage does dvc.lock know everything,
    and then nothing of ours runs any more.
    """
    run_ids = list_runs(project.journal)
    has_pipeline = (project.root / LOCK).is_file() and (project.root / PIPELINE).is_file()
    if not run_ids or not has_pipeline:
        return
    run = read_run(run_path(project.journal, run_ids[-1]))
    if run.kind != "dvc" or run.status != "finished" or run.lineage is not None:
        return
    journal = RunJournal(project.journal, run.run_id)
    dag = read_dag(project)
    if changes(project, dag):  # dvc was stopped between two stages
        journal.close("interrupted")
        return
    execute.record_state(project, dag, journal)
    journal.close(run.status)  # again, for it is the last event that closes a run


def _register(project: Project, store: Store, package: Path, name: str) -> Registered:
    verify_folder(package)
    run = _maker(project, folder_digest(package))
    client = connect(store)
    experiment_id = find_experiment(client, store, name)
    parent = find_parent(client, experiment_id, run.run_id) if run else None
    candidate = _candidate(package, run)
    return register(client, store, candidate, experiment_id=experiment_id, run=parent)


def _maker(project: Project, digest: str) -> Run | None:
    """Return the newest run whose ``publish`` made the package, or else the newest run."""
    run_ids = list_runs(project.journal)
    runs = (read_run(run_path(project.journal, run_id)) for run_id in reversed(run_ids))
    newest = None
    for run in runs:
        newest = newest or run
        if any(s.stage == "publish" and s.params.get("package") == digest for s in run.stages):
            return run
    return newest


def _candidate(package: Path, run: Run | None) -> Candidate:
    description = read_description(package)
    outputs = output_schema(read_contract(package).targets, read_rules(package, description))
    tags = {"headrace.run_id": run.run_id, "headrace.lineage": run.lineage or ""} if run else {}
    return Candidate(
        name=description.name,
        digest=folder_digest(package),
        folder=package,
        code_file=_SERVED,
        code_folder=PACKAGE,
        requirements=["mlflow>=3", *(package / REQUIREMENTS).read_text().split()],
        input_columns={column.name: str(column.type) for column in description.inputs},
        output_columns=_kinds(outputs),
        example=read_example(package, description.inputs).to_pandas(),
        tags={key: value for key, value in tags.items() if value},
        description=results_table(run.results) if run and run.results else "",
    )


def _kinds(schema: pa.Schema) -> Mapping[str, str]:
    """Return the columns as MLflow names their types."""
    return {
        field.name: "string" if pa.types.is_string(field.type) else "double" for field in schema
    }
