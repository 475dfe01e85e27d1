"""Every error a user can meet, and the exit code that goes with it.

One error is one message: what was expected, what came, where, and what to do. The CLI prints it
as one line and exits with ``exit_code``; the traceback appears only with ``--debug``.
"""

import difflib
import errno
from collections.abc import Iterable


class HeadraceError(Exception):
    """Base of all errors that headrace raises on purpose; carries the process exit code."""

    exit_code = 1


class ConfigError(HeadraceError):
    """A parameter, a flag or a project file is wrong or missing."""

    exit_code = 2


class DataError(HeadraceError):
    """The data cannot be used as it is: refused before anything was computed from it."""

    exit_code = 3


class SchemaError(DataError):
    """A table does not match the data contract or what params.yaml asks of it."""


class DependencyError(HeadraceError):
    """Something outside this process is not available: a server, a port, an optional package."""

    exit_code = 4


class IntegrityError(HeadraceError):
    """Bytes on disk are not the bytes that were written: a digest, a length or a format differs."""

    exit_code = 5


class ResourceError(HeadraceError):
    """Memory, disk or time did not suffice; the message names the setting and the figure needed."""

    exit_code = 6


class SecurityError(HeadraceError):
    """A request was refused because it reaches outside what the project allows."""

    exit_code = 7


class Stopped(HeadraceError):
    """Stopped on request; what was finished is kept and the next run continues from it."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; nearest name: X"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; nearest name: {close[0]}" if close else ""


def explain(error: BaseException) -> tuple[str, int]:
    """Return the one-line message and the exit code for any error that ends a command."""
    if isinstance(error, HeadraceError):
        return " ".join(str(error).split()), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "stopped; run again to go on from here", Stopped.exit_code
    if isinstance(error, MemoryError):
        return (
            "memory ran out; lower `resources.memory_budget` below what this machine has free",
            ResourceError.exit_code,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = error.filename or "the disk"
        return (
            f"no space left while writing {where}; free some and run again: finished work stays",
            ResourceError.exit_code,
        )
    return (
        f"unexpected {type(error).__name__}: {' '.join(str(error).split())}; "
        f"`headrace --debug …` shows the traceback",
        HeadraceError.exit_code,
    )
