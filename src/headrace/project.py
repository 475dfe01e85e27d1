"""Where things are in a project folder. Pure names: nothing here reads or writes."""

from dataclasses import dataclass
from pathlib import Path

from headrace.errors import ConfigError

PARAMS = "params.yaml"
PIPELINE = "dvc.yaml"
LOCK = "dvc.lock"
EMBEDDING_CATBOOST = "embedding_catboost"  # a stage whose model lies beside those of train@MODEL
CODE_LOCK = "headrace.lock"  # digests of the installed code, in projects without its source


@dataclass(frozen=True)
class Project:
    """A project folder: params.yaml and dvc.yaml at its root, one data folder per stage."""

    root: Path

    @property
    def params(self) -> Path:
        """The parameters file."""
        return self.root / PARAMS

    @property
    def state(self) -> Path:
        """``.headrace/``: git-ignored caches, checkpoints, logs, and the journal (the history)."""
        return self.root / ".headrace"

    @property
    def journal(self) -> Path:
        """Folder of the journal, one file per pipeline run."""
        return self.state / "journal"

    @property
    def scratch(self) -> Path:
        """Folder for spill files and other private files of running stages."""
        return self.state / "tmp"

    @property
    def logs(self) -> Path:
        """Folder of what supervised commands print, one subfolder per run."""
        return self.state / "logs"

    @property
    def cache(self) -> Path:
        """Folder of the pickle cache."""
        return self.state / "cache"

    @property
    def checkpoints(self) -> Path:
        """Folder of training checkpoints, one subfolder per stage key."""
        return self.state / "checkpoints"

    def data(self, stage: str) -> Path:
        """The folder that ``stage`` writes: ``data/STAGE``, or ``data/train/MODEL`` for a model."""
        name = f"train@{stage}" if stage == EMBEDDING_CATBOOST else stage
        return self.root.joinpath("data", *name.split("@"))


def find_project(start: Path) -> Project:
    """Return the project that ``start`` lies in, looking upwards for params.yaml.

    Raises:
        ConfigError: if no folder from ``start`` up holds a params.yaml.
    """
    for folder in [start, *start.parents]:
        if (folder / PARAMS).is_file():
            return Project(folder)
    raise ConfigError(
        f"no {PARAMS} in {start} or above; run this in a project folder, "
        f"or `headrace init` to make one"
    )
