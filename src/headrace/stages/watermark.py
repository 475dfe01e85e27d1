"""Stage ``watermark``: one small value per database source, which changes when its rows do.

A file is a dependency that DVC can hash; it cannot see inside a database. Where databases are
declared, this stage always runs, and ``extract`` depends on what it writes: so ``extract`` runs
again when the rows changed and not otherwise. ``dvc status`` alone cannot know.
"""

from dataclasses import dataclass
from pathlib import Path

from headrace.data.scan import DATABASES, find_files
from headrace.params import Resources
from headrace.record import Recorder
from headrace.sources import postgresql, sqlite
from headrace.stages.extract import ExtractParams
from headrace.storage import new_folder, write_json

WATERMARK = "watermark.json"


@dataclass(frozen=True)
class Watermarked:
    """The watermark of each database source."""

    values: dict[str, list[list[str | None]]]

    def __str__(self) -> str:
        """One line for the terminal."""
        return ", ".join(f"{name}: {value}" for name, value in self.values.items())


def watermark(
    root: Path,
    out: Path,
    params: ExtractParams,
    *,
    resources: Resources,  # noqa: ARG001 every stage gets its resources
    recorder: Recorder,
) -> Watermarked:
    """Write the watermark of every database source of ``params``.

    Raises:
        DependencyError: a database that does not answer.
        DataError: a table, query or watermark that it refuses.
    """
    values = read_watermarks(root, params)
    with new_folder(out) as folder:
        write_json(folder / WATERMARK, values)
    recorder.params({f"watermark/{name}": str(value) for name, value in values.items()})
    return Watermarked(values)


def read_watermarks(root: Path, params: ExtractParams) -> dict[str, list[list[str | None]]]:
    """Return for each database source a value that is equal as long as its rows are."""
    databases = {name: one for name, one in params.sources.items() if one.kind in DATABASES}
    values = {}
    for found in find_files(root, databases):
        source = found.source
        if source.kind == "sqlite":
            path = found.files[0].path
            values[found.name] = sqlite.read_watermark(path, watermark=source.watermark)
        else:
            values[found.name] = postgresql.read_watermark(
                str(source.url),
                table=source.table,
                query=source.query,
                watermark=source.watermark,
            )
    return values
