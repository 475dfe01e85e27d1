"""What must hold before anything is removed, started or looked up: parameters, then code.

Both doors, ``why`` and ``status`` ask here first. A mistake in params.yaml then costs one line, not
a model that was deleted because its name was mistyped.
"""

from headrace.commands.pipeline import Dag
from headrace.commands.settings import read_settings
from headrace.commands.stage import require_locked_code
from headrace.errors import ConfigError
from headrace.project import EMBEDDING_CATBOOST, PARAMS, PIPELINE, Project

_OURS = "headrace stage "  # how dvc.yaml calls a stage of ours


def require_settings(project: Project) -> None:
    """Check all of params.yaml, in a project whose stages are headrace's.

    Raises:
        ConfigError: with the key, the value and the remedy.
    """
    path = project.root / PIPELINE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if _OURS not in text:
        return
    settings = read_settings(project)
    settings.require_all()
    is_stage = f"{_OURS}{EMBEDDING_CATBOOST}" in text
    if is_stage != settings.has_embedding_catboost:
        without, has = (PARAMS, PIPELINE) if is_stage else (PIPELINE, PARAMS)
        raise ConfigError(
            f"{has} has {EMBEDDING_CATBOOST}, {without} has not; run `headrace upgrade`, which "
            f"writes {PIPELINE} as {PARAMS} wants it"
        )


def require_code(project: Project, dag: Dag) -> None:
    """Check that headrace.lock, where there is one, names the installed code for every stage.

    Raises:
        ConfigError: naming the first stage with other code.
    """
    for stage in dag.stages:
        require_locked_code(project, stage.name)
