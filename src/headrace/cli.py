"""The command line: each command is one call into ``headrace.commands``; errors become exit codes.

Heavy packages load inside the commands, so that ``headrace --help`` answers at once.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace import __version__
from headrace.errors import explain

if TYPE_CHECKING:
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
def stage(name: Annotated[str, typer.Argument(help="Stage, such as extract or train@nn.")]) -> None:
    """Run one stage in this process, whether or not it is up to date (what DVC calls)."""
    from headrace.commands.stage import run_stage

    typer.echo(str(run_stage(_project(), name)))


def _project() -> "Project":
    """The project around the current folder, which becomes the current folder."""
    from headrace.project import find_project

    project = find_project(Path.cwd())
    os.chdir(project.root)
    return project
