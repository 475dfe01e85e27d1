"""What must hold before anything is removed, started or looked up: parameters, then code.

Both doors, ``why`` and ``status`` ask here first. A mistake in params.yaml then costs one line, not
a model that was deleted because its name was mistyped.
"""

from headrace.commands.pipeline import Dag
from headrace.commands.settings import read_settings
from headrace.commands.stage import require_locked_code
from headrace.project import PIPELINE, Project

_OURS = "headrace stage "  # how dvc.yaml calls a stage of ours


def require_settings(project: Project) -> None:
    """Check all of params.yaml, in a project whose stages are headrace's.

    Raises:
        ConfigError: with the key, the value and the remedy.
    """
    path = project.root / PIPELINE
    if path.is_file() and _OURS in path.read_text(encoding="utf-8"):
        read_settings(project).require_all()


def require_code(project: Project, dag: Dag) -> None:
    """Check that headrace.lock, where there is one, names the installed code for every stage.

    Raises:
        ConfigError: naming the first stage with other code.
    """
    for stage in dag.stages:
        require_locked_code(project, stage.name)
