"""The command line: each command is one call into ``headrace.commands``; errors become exit codes.

Heavy packages load inside the commands, so that ``headrace --help`` answers at once.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from headrace import __version__
from headrace.errors import HeadraceError, ResourceError

app = typer.Typer(
    name="headrace",
    help="An orchestrated ML pipeline with artifact tracking for tables that do not fit in memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_is_debug = False


def main() -> None:
    """Run the command line; every error ends in one line on stderr and an exit code."""
    try:
        app()
    except (HeadraceError, OSError, KeyboardInterrupt) as error:
        if _is_debug:
            raise
        message, code = _explain(error)
        typer.echo(f"headrace: {message}", err=True)
        sys.exit(code)
    except Exception as error:
        if _is_debug:
            raise
        typer.echo(
            f"headrace: unexpected {type(error).__name__}: {error}; "
            f"run again with `headrace --debug …` for the traceback",
            err=True,
        )
        sys.exit(1)


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, HeadraceError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "stopped; run again to resume", 75
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = error.filename or "the disk"
        return f"no space left while writing {where}; free space and run again", (
            ResourceError.exit_code
        )
    return f"{error}", 1


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
    global _is_debug
    _is_debug = debug or os.environ.get("HEADRACE_DEBUG") == "1"
    if folder is not None:
        os.chdir(folder)


@app.command()
def stage(name: Annotated[str, typer.Argument(help="Stage, such as extract or train@nn.")]) -> None:
    """Run one stage in this process, whether or not it is up to date (what DVC calls)."""
    from headrace.commands.stage import run_stage

    typer.echo(str(run_stage(_project(), name)))


def _project():  # type: ignore[no-untyped-def]
    from headrace.project import find_project

    project = find_project(Path.cwd())
    os.chdir(project.root)
    return project
