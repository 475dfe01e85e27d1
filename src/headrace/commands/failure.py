"""Why a stage failed: the exit code and message that DVC, which runs the stage, does not pass on.

The stage runner writes one small file per stage before it exits; whoever started DVC reads it. The
file is also what a machine reads after a failed run.
"""

from dataclasses import dataclass
from pathlib import Path

from headrace.errors import (
    ConfigError,
    DataError,
    DependencyError,
    HeadraceError,
    IntegrityError,
    ResourceError,
    SecurityError,
    Stopped,
)
from headrace.project import Project
from headrace.storage import read_json, write_json

_KINDS: tuple[type[HeadraceError], ...] = (
    ConfigError,
    DataError,
    DependencyError,
    IntegrityError,
    ResourceError,
    SecurityError,
    Stopped,
)


@dataclass(frozen=True)
class Failure:
    """One failed stage: its name, its exit code and its one-line message."""

    stage: str
    exit_code: int
    message: str

    def error(self) -> HeadraceError:
        """Return the error to raise: of the class that carries ``exit_code``."""
        for kind in _KINDS:
            if kind.exit_code == self.exit_code:
                return kind(self.message)
        error = HeadraceError(self.message)
        error.exit_code = self.exit_code
        return error


def write_failure(project: Project, stage: str, exit_code: int, message: str) -> None:
    """Leave word of why ``stage`` failed, for the process that started DVC."""
    write_json(
        _path(project, stage),
        {"stage": stage, "exit_code": exit_code, "message": " ".join(message.split())},
    )


def read_failure(project: Project, stage: str) -> Failure | None:
    """Return why ``stage`` failed last, or None if it left no word.

    Raises:
        IntegrityError: if the file is there but not whole.
    """
    path = _path(project, stage)
    if not path.is_file():
        return None
    content = read_json(path)
    return Failure(str(content["stage"]), int(content["exit_code"]), str(content["message"]))


def clear_failure(project: Project, stage: str) -> None:
    """Forget an earlier failure of ``stage``; called before it starts."""
    _path(project, stage).unlink(missing_ok=True)


def _path(project: Project, stage: str) -> Path:
    return project.state / "failures" / f"{stage}.json"
