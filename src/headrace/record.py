"""What a stage may tell the world while it runs, without knowing who listens.

The CLI hands a stage a recorder that writes the journal; a test or a notebook hands it a
``MemoryRecorder``. Nothing told here reaches a stage's outs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

Scalar: TypeAlias = str | int | float | bool | None


class Recorder(Protocol):
    """The listener of one stage (or of one model within it)."""

    def params(self, values: Mapping[str, Scalar]) -> None:
        """Record settings that were decided inside the stage (chosen device, batch size, …)."""

    def metrics(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        """Record finite numbers; ``step`` is the epoch or iteration of a learning curve."""

    def file(self, path: Path, *, folder: str = "") -> None:
        """Record a finished file (figure, table, report) as an artifact under ``folder``."""

    def dataset(self, name: str, *, path: Path, digest: str, num_rows: int, context: str) -> None:
        """Record that a data set was read; ``context`` is its use: train, valid, test."""

    def note(self, text: str) -> None:
        """Record a sentence a person should read, in Markdown; shown with the run."""

    def warn(self, text: str) -> None:
        """Record a warning: printed once on the terminal and kept with the run."""

    def progress(self, done: int, total: int | None, *, unit: str, detail: str = "") -> None:
        """Tell how far the stage is; cheap to call often, thinned by the listener."""


@dataclass
class MemoryRecorder:
    """A recorder that keeps all it hears in lists, for tests and notebooks."""

    recorded_params: dict[str, Scalar] = field(default_factory=dict)
    recorded_metrics: list[tuple[str, float, int | None]] = field(default_factory=list)
    files: list[tuple[Path, str]] = field(default_factory=list)
    datasets: list[dict[str, object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    last_progress: tuple[int, int | None, str, str] | None = None

    def params(self, values: Mapping[str, Scalar]) -> None:
        """Keep settings."""
        self.recorded_params.update(values)

    def metrics(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        """Keep numbers."""
        self.recorded_metrics += [(name, value, step) for name, value in values.items()]

    def file(self, path: Path, *, folder: str = "") -> None:
        """Keep the path of a file."""
        self.files.append((path, folder))

    def dataset(self, name: str, *, path: Path, digest: str, num_rows: int, context: str) -> None:
        """Keep what was read."""
        self.datasets.append(
            {"name": name, "path": path, "digest": digest, "rows": num_rows, "context": context}
        )

    def note(self, text: str) -> None:
        """Keep a note."""
        self.notes.append(text)

    def warn(self, text: str) -> None:
        """Keep a warning."""
        self.warnings.append(text)

    def progress(self, done: int, total: int | None, *, unit: str, detail: str = "") -> None:
        """Keep the latest progress."""
        self.last_progress = (done, total, unit, detail)
