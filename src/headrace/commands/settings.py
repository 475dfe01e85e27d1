"""The whole of params.yaml as one checked object, composed of the sections of the stages.

Each stage gets only its own section. A section's class is imported when it is asked for, so that
``headrace stage extract`` does not load the models.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.errors import ConfigError, nearest
from headrace.params import Resources, Section, parse_section, read_yaml
from headrace.project import EMBEDDING_CATBOOST, Project

if TYPE_CHECKING:
    from headrace.commands.space import Space

VERSION = 1
# Stage sections: name in params.yaml -> class; the class lives in headrace.stages.NAME.
_SECTIONS = {
    "raw": "RawParams",
    "watermark": "WatermarkParams",
    "extract": "ExtractParams",
    "reduce": "ReduceParams",
    "encode": "EncodeParams",
    EMBEDDING_CATBOOST: "EmbeddingCatboostParams",
    "stack": "StackParams",
    "decide": "DecideParams",
    "interpret": "InterpretParams",
    "evaluate": "EvaluateParams",
    "publish": "PublishParams",
}
# Of the example, of databases, and of a model that is off by default.
_OPTIONAL = ("raw", "watermark", EMBEDDING_CATBOOST)
_KNOWN = ("version", "resources", "models", "train", "search", *_SECTIONS)


@dataclass(frozen=True)
class Settings:
    """The content of params.yaml; sections are validated when they are taken out."""

    path: Path
    content: Mapping[str, Any]

    @property
    def resources(self) -> Resources:
        """Section ``resources``."""
        return parse_section(
            Resources, self.content.get("resources"), key="resources", path=self.path
        )

    @property
    def models(self) -> tuple[str, ...]:
        """The models to train, in the order of params.yaml.

        Raises:
            ConfigError: if the list is missing, empty, has a repeated or an unknown name.
        """
        from headrace.models.protocol import model_section

        models = self.content.get("models")
        if not isinstance(models, list) or not models:
            raise ConfigError(f"{self.path}: `models` must list at least one model, not {models!r}")
        for position, name in enumerate(models):
            model_section(str(name))  # refuses unknown kinds
            if name in models[:position]:
                raise ConfigError(f"{self.path}: `models` names {name!r} twice; keep one")
        return tuple(models)

    @property
    def has_embedding_catboost(self) -> bool:
        """Whether the project has the stage ``embedding_catboost``."""
        return EMBEDDING_CATBOOST in self.content

    @property
    def members(self) -> dict[str, str]:
        """All models that are compared, and the stage that makes each."""
        found = {model: f"train@{model}" for model in self.models}
        return found | (
            {EMBEDDING_CATBOOST: EMBEDDING_CATBOOST} if self.has_embedding_catboost else {}
        )

    def section(self, stage: str) -> Section:
        """Return the validated section of ``stage`` (``train@MODEL`` has ``train.MODEL``)."""
        name, _, model = stage.partition("@")
        if name == "train":
            from headrace.models.protocol import model_section

            trained = self.content.get("train") or {}
            if not isinstance(trained, Mapping):
                raise ConfigError(f"{self.path}: `train` must have a section per model")
            return parse_section(
                model_section(model), trained.get(model), key=f"train.{model}", path=self.path
            )
        kind = getattr(import_module(f"headrace.stages.{name}"), _SECTIONS[name])
        section: Section = parse_section(kind, self.content.get(name), key=name, path=self.path)
        return section

    def base(self, model: str) -> Mapping[str, Any]:
        """Return what params.yaml says of ``model``, as it is written."""
        trained = self.content.get("train") or {}
        found = self.content.get(model) if model == EMBEDDING_CATBOOST else trained.get(model)
        return found or {}

    def space(self, model: str) -> "Space":
        """Return the checked section ``search.MODEL``."""
        from headrace.commands.space import read_space

        kind = type(self.section(stage_of(model)))
        spaces = self.content.get("search") or {}
        if not isinstance(spaces, Mapping):
            raise ConfigError(f"{self.path}: `search` must have a section per model")
        return read_space(spaces.get(model), model, kind, self.base(model), self.path)

    def check(self) -> None:
        """Validate every section that params.yaml has.

        Raises:
            ConfigError: with every fault of the first section that has one.
        """
        unknown = [name for name in self.content if name not in _KNOWN]
        if unknown:
            hint = nearest(str(unknown[0]), _KNOWN) or f"; known: {', '.join(_KNOWN)}"
            raise ConfigError(f"{self.path}: unknown sections {unknown}{hint}")
        if self.content.get("version") != VERSION:
            raise ConfigError(
                f"{self.path}: `version` is {self.content.get('version')!r}; this headrace reads "
                f"version {VERSION}: run `headrace upgrade`"
            )
        if "extract" not in self.content:
            raise ConfigError(
                f"{self.path}: section `extract` is missing; it names the sources and the targets"
            )
        _ = self.resources
        if self.has_embedding_catboost and "nn" not in self.models:
            raise ConfigError(
                f"{self.path}: section `{EMBEDDING_CATBOOST}` needs what the model nn says, and "
                f"`models` lists {', '.join(self.models)}; add nn there, or remove the section"
            )
        trained = self.content.get("train") or {}
        for model in {*self.models, *(trained if isinstance(trained, Mapping) else ())}:
            self.section(f"train@{model}")
        for name in _SECTIONS:
            if name in self.content:
                self.section(name)
        for model in self.content.get("search") or ():
            self.space(str(model))

    def require_all(self) -> None:
        """Check that every section is written: DVC cannot depend on what is not there.

        Raises:
            ConfigError: naming the section, and what to write for its defaults.
        """
        trained = self.content.get("train") or {}
        missing = [f"train.{model}" for model in self.models if model not in trained]
        missing += [name for name in _SECTIONS if name not in (*self.content, *_OPTIONAL)]
        if missing:
            name = missing[0].rpartition(".")[2]
            raise ConfigError(
                f"{self.path}: section `{missing[0]}` is missing; for its defaults write "
                f"`{name}: {{}}`{' under `train`' if '.' in missing[0] else ''}"
            )


def stage_of(model: str) -> str:
    """Return the stage that makes ``model``."""
    return model if model == EMBEDDING_CATBOOST else f"train@{model}"


def read_resources(project: Project) -> Resources:
    """Read section ``resources`` alone, whatever the rest of params.yaml is.

    Raises:
        ConfigError: see ``params.read_yaml`` and ``params.parse_section``.
    """
    path = Path(os.path.relpath(project.params))
    return Settings(path, read_yaml(path)).resources


def read_settings(project: Project) -> Settings:
    """Read params.yaml of ``project`` and check all of it.

    Raises:
        ConfigError: see ``params.read_yaml`` and ``Settings.check``.
    """
    path = Path(os.path.relpath(project.params))
    settings = Settings(path, read_yaml(path))
    settings.check()
    return settings
