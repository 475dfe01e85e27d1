"""The command line: each command is one call into ``headrace.commands``; errors become exit codes.

Heavy packages load inside the commands, so that ``headrace --help`` answers at once.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace import __version__
from headrace.errors import explain

if TYPE_CHECKING:
    from rich.console import Console

    from headrace.data.order import Kind
    from headrace.project import Project

app = typer.Typer(
    name="headrace",
    help="An orchestrated ML pipeline with artifact tracking for tables that do not fit in memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_INTERRUPTED = 130  # what typer makes of Ctrl-C


def main() -> None:
    """Run the command line; every error ends in one line on stderr and an exit code."""
    try:
        app()
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            _end(KeyboardInterrupt())
        raise
    except Exception as error:  # noqa: BLE001 - the one place where every error becomes a message
        _end(error)


def _end(error: BaseException) -> None:
    if os.environ.get("HEADRACE_DEBUG") == "1":
        raise error
    message, code = explain(error)
    sys.stderr.write(f"headrace: {message}\n")
    sys.exit(code)


def _version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"headrace {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    folder: Annotated[
        Path | None, typer.Option("--project", "-C", help="Project folder; default: here or above.")
    ] = None,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["HEADRACE_DEBUG"] = "1"  # the stages of a run hear it too
    if folder is not None:
        from headrace.errors import ConfigError

        if not folder.is_dir():
            raise ConfigError(f"--project {folder} is not a folder")
        os.chdir(folder)


@app.command()
def run(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Forecast time, memory and disk; run nothing.")
    ] = False,
    sample: Annotated[
        float | None,
        typer.Option(
            "--sample", help="Quick look at this share of the rows, in a workspace of its own."
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for another run in this folder, not refuse.")
    ] = False,
) -> None:
    """Bring the project up to date with the Prefect flow and show the comparison."""
    project = _project()
    if sample is not None:
        from headrace.commands.sample import sample as make_sample

        sampled = make_sample(project, sample)
        typer.echo(str(sampled))
        project = sampled.project
        os.chdir(project.root)
    if dry_run:
        from headrace.commands.forecast import forecast

        told = forecast(project)
        typer.echo(str(told))
        told.require_fit()
        return
    from headrace.commands.run import run_pipeline

    run_pipeline(project, wait=wait, console=_console())


@app.command()
def repro(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages; default: all.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for another run in this folder, not refuse.")
    ] = False,
) -> None:
    """Bring the project up to date with DVC alone (works without an activated environment)."""
    from headrace.commands.repro import repro as reproduce

    reproduce(_project(), stages or [], wait=wait, console=_console())


@app.command()
def why(
    stages: Annotated[list[str] | None, typer.Argument(help="Stages; default: all.")] = None,
) -> None:
    """Say which input, parameter or code makes each stage run again."""
    from headrace.commands.why import sentences
    from headrace.commands.why import why as find_reasons

    for sentence in sentences(find_reasons(_project(), tuple(stages or ()))):
        typer.echo(sentence)


@app.command()
def status() -> None:
    """Show the stages, their state and disk use, and the last run."""
    from headrace.commands.status import print_status
    from headrace.commands.status import status as look

    print_status(look(_project()), _console())


@app.command()
def init(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Files, patterns or databases; NAME=PATH names one for the recipe."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="Column to predict; repeatable.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="File with one SELECT over the sources.")
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option("--key", help="Column that identifies a row; repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Make this folder a project: look at the data, write params.yaml for review, and the rest."""
    from headrace.commands.init import init as initialise

    made = initialise(
        Path.cwd(),
        sources=sources or (),
        targets=target or (),
        recipe=recipe,
        key=key or (),
        force=force,
        tell=lambda text: typer.echo(text, err=True),
    )
    typer.echo(str(made))


@app.command()
def upgrade() -> None:
    """Accept the installed code: refresh dvc.yaml and headrace.lock."""
    from headrace.commands.upgrade import upgrade as refresh

    typer.echo(str(refresh(_project())))


@app.command()
def predict(
    source: Annotated[Path, typer.Argument(help="New rows: .csv, .tsv or .parquet.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Predictions: .csv or .parquet.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="Package; default: data/publish of the project.")
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option("--delimiter", help="Of a CSV; default: comma, tab in .tsv.")
    ] = None,
) -> None:
    """Score new rows with the published package; row order and count are kept."""
    from headrace.commands.predict import predict_file

    source, out = source.resolve(), out.resolve()
    package = model.resolve() if model else _project().data("publish")
    typer.echo(str(predict_file(source, out, model=package, delimiter=delimiter)))


@app.command()
def sync() -> None:
    """Bring MLflow up to date with the journal and register the published package."""
    from headrace.commands.sync import sync as bring

    typer.echo(str(bring(_project())))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Runs: id, its beginning, its number, last, or an MLflow run id."),
    ],
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Only this target; default: all.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="To sort and test by; default: the primary one.")
    ] = None,
) -> None:
    """Compare the models of several runs on the same test rows: intervals, pairs, ties, seeds."""
    from headrace.commands.compare import compare as look
    from headrace.commands.compare import print_compared

    print_compared(look(_project(), runs, target=target, metric=metric), _console())


@app.command()
def power(
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Only this target; default: all.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="Of --difference; default: the primary one.")
    ] = None,
    difference: Annotated[
        float | None,
        typer.Option("--difference", help="Say how many rows or units this one would need."),
    ] = None,
    correlation: Annotated[
        float, typer.Option("--correlation", help="Of models' errors, where none has predicted.")
    ] = 0.9,
) -> None:
    """Say which difference between two models the test rows could tell, before training."""
    from headrace.commands.power import power as look
    from headrace.commands.power import print_power

    found = look(_project(), target=target, correlation=correlation)
    print_power(found, metric=metric, asked=difference, console=_console())


@app.command()
def batch(
    split: Annotated[str, typer.Option("--split", help="train, valid or test.")] = "train",
    rows: Annotated[int, typer.Option("--rows", help="First rows to show.")] = 8,
    number: Annotated[int, typer.Option("--batch", help="Which batch, from 0.")] = 0,
    epoch: Annotated[int, typer.Option("--epoch", help="Of which epoch, from 0.")] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Rows of a batch; default: 4096, at most all."),
    ] = None,
    order: Annotated[
        str, typer.Option("--order", help="exact, window, block or sequential.")
    ] = "exact",
    seed: Annotated[int, typer.Option("--seed", help="Of the order.")] = 0,
    file: Annotated[
        Path | None, typer.Option("--json", help="Write the look to this file too.")
    ] = None,
) -> None:
    """Show one encoded batch, decoded: labels, numbers in their own units, what is missing."""
    from typing import cast

    from headrace.commands.outputs import json_target

    file = json_target(file)  # before the folder changes to the project's
    from headrace.commands.batch import show_batch

    shown = show_batch(
        _project(),
        split=split,
        order=cast("Kind", order),
        seed=seed,
        epoch=epoch,
        batch=number,
        batch_size=batch_size,
        num_rows=rows,
    )
    typer.echo(shown.text(width=_console().width), nl=False)
    if file:
        from headrace.storage import write_json

        write_json(file, shown.to_json())


@app.command()
def bench(
    seconds: Annotated[float, typer.Option("--seconds", help="For each rate, about.")] = 3.0,
    file: Annotated[
        Path | None, typer.Option("--json", help="Write the rates to this file too.")
    ] = None,
) -> None:
    """Measure how fast this project's rows are decoded, encoded, read and learnt from."""
    from headrace.commands.outputs import json_target

    file = json_target(file)  # before the folder changes to the project's
    from headrace.commands.bench import bench as run_bench
    from headrace.commands.bench import print_bench

    console = _console()
    with console.status("opening") as waiting:
        found = run_bench(_project(), seconds=seconds, tell=waiting.update)
    print_bench(found, console)
    if file:
        from headrace.storage import write_json

        write_json(file, found.to_json())


@app.command()
def schedule(
    cron: Annotated[str, typer.Option("--cron", help='When, such as "0 3 * * *".')],
    timezone: Annotated[
        str | None, typer.Option("--timezone", help="Of the cron times; default: this machine's.")
    ] = None,
    port: Annotated[int, typer.Option("--port", help="Of the Prefect server.")] = 4200,
) -> None:
    """Serve the flow on a schedule until stopped; unchanged data ends as skipped."""
    from headrace.commands.schedule import schedule as serve

    serve(_project(), cron=cron, timezone=timezone, port=port, console=_console())


@app.command()
def ui(
    prefect_port: Annotated[int, typer.Option("--prefect-port", help="Of Prefect's UI.")] = 4200,
    mlflow_port: Annotated[int, typer.Option("--mlflow-port", help="Of MLflow's UI.")] = 5000,
) -> None:
    """Serve the Prefect and MLflow UIs on this machine until stopped."""
    from headrace.commands.ui import ui as serve

    serve(_project(), prefect_port=prefect_port, mlflow_port=mlflow_port, console=_console())


@app.command()
def doctor() -> None:
    """Check versions, memory, disk, GPU, servers and telemetry; say what to do about problems."""
    from headrace.commands.doctor import doctor as examine
    from headrace.errors import ConfigError

    try:
        project = _project()
    except ConfigError:
        project = None  # what it examines is the machine; a project only says which disk
    examine(project, console=_console())


@app.command()
def diagnose(
    model: Annotated[str, typer.Argument(help="Model that trains from encoded shards.")] = "nn",
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Run the best proposal for a few seconds.")
    ] = True,
    steps: Annotated[
        bool,
        typer.Option("--steps", help="Compare other ways to run a step; on CUDA, more of them."),
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")
    ] = None,
) -> None:
    """Say what binds a training step (data, launch, arithmetic, memory), and what to change."""
    from headrace.commands.outputs import json_target

    json = json_target(json)  # before the folder changes to the project's
    from headrace.commands.diagnose import diagnose as measure

    measure(_project(), model, check=check, steps=steps, json=json, console=_console())


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="Model whose section `search.MODEL` is looked at.")],
    trials: Annotated[
        int | None,
        typer.Option("--trials", help="In all, earlier calls included; default: 20, or the time."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time of this call, such as 90s, 30m or 1h30m.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="tpe, random or grid.")] = "tpe",
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Target to score by; default: the first.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what is tried.")] = 0,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for another run in this folder, not refuse.")
    ] = False,
) -> None:
    """Try settings of one model, score them on held-out rows, and write the best ones to a file."""
    from headrace.commands.budget import parse_duration
    from headrace.commands.search import search as look
    from headrace.commands.trials import method_of

    project = _project()
    look(
        project,
        model,
        method=method_of(method),
        trials=trials,
        budget_s=parse_duration(budget) if budget else None,
        target=target,
        seed=seed,
        wait=wait,
        console=_console(),
    )
    _send_runs(project)


@app.command()
def skill(
    model: Annotated[str, typer.Argument(help="Model that is refitted, as params.yaml has it.")],
    refits: Annotated[
        int, typer.Option("--refits", help="In all, those of earlier calls included.")
    ] = 20,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time of this call, such as 90s, 30m or 1h30m.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap samples.")] = 0,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for another run in this folder, not refuse.")
    ] = False,
) -> None:
    """Refit one model on bootstrap samples, preparation included; score it on rows left out."""
    from headrace.commands.budget import parse_duration
    from headrace.commands.skill import skill as estimate

    project = _project()
    estimate(
        project,
        model,
        refits=refits,
        budget_s=parse_duration(budget) if budget else None,
        seed=seed,
        wait=wait,
        console=_console(),
    )
    _send_runs(project)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="Stage, such as extract or train@nn.")],
    resume: Annotated[
        Path | None,
        typer.Option("--resume", help="Checkpoint, or the folder of one, to train on from."),
    ] = None,
) -> None:
    """Run one stage in this process, whether or not it is up to date (what DVC calls)."""
    from headrace.commands.stage import run_stage

    given = resume.resolve() if resume else None  # before the folder changes to the project's
    project = _project()
    result = run_stage(project, name, resume=given)
    if result is None:  # this process helped another one, which tells
        return
    typer.echo(str(result))
    if name == "evaluate":
        from headrace.commands.results import looks_sentence

        typer.echo(looks_sentence(project))
    if name == "publish" and "HEADRACE_RUN_ID" not in os.environ:
        # Under plain `dvc repro` nobody comes after publish who would bring MLflow up to date.
        from headrace.commands.sync import sync_or_defer

        if problem := sync_or_defer(project):
            typer.echo(f"headrace: MLflow is not up to date ({problem})", err=True)


def _send_runs(project: "Project") -> None:
    from headrace.commands.sync import send_runs

    if problem := send_runs(project):
        typer.echo(f"headrace: MLflow is not up to date ({problem})", err=True)


def _console() -> "Console":
    from rich.console import Console

    return Console()


def _project() -> "Project":
    """The project around the current folder, which becomes the current folder."""
    from headrace.errors import HeadraceError
    from headrace.project import find_project
    from headrace.tracking.location import repair_location

    project = find_project(Path.cwd())
    os.chdir(project.root)
    if os.environ.get("RANK", "0") == "0":  # of several processes of torchrun the first does it
        with suppress(HeadraceError):  # a locked store says so where it is needed
            repair_location(project.root)  # after the folder was moved
    return project
