"""The synthetic table and the flights as the stages' folders: foreign, reduced and encoded.

``foreign`` is how data comes from elsewhere: Parquet as pyarrow writes it by default, with zstd.
``ours`` is what the stage ``reduce`` makes of it, ``encode`` what the stage ``encode`` does. All
rows are train rows. Set HEADRACE_BENCHMARK_DATA to a folder to keep them for the next run.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks._table import NUMERIC, TARGET, TEXTS, make_rows
from headrace.data.encoder import Encoder
from headrace.data.table import Table, open_table
from headrace.params import Resources, parse_section, read_yaml
from headrace.record import MemoryRecorder
from headrace.schema import Column, Contract, Target
from headrace.stages.encode import EncodeParams, encode
from headrace.stages.extract import ExtractParams, extract
from headrace.stages.raw import RawParams, raw
from headrace.stages.reduce import ReduceParams, reduce
from headrace.storage import new_folder, write_file

_REPOSITORY = Path(__file__).parents[1]
_MAX_FILES = 16
_ROWS_PER_FILE = 65_536  # at least, but for a smaller table
_ROLES = dict.fromkeys(NUMERIC, "numeric") | dict.fromkeys(TEXTS, "category") | {TARGET: "target"}


@dataclass(frozen=True)
class Folders:
    """One table in each form that the stages know; made on first use, then kept."""

    root: Path
    num_rows: int

    @property
    def foreign(self) -> Table:
        """Parquet files of pyarrow's defaults with zstd, texts as texts."""
        folder = self.root / "foreign"
        if not folder.exists():
            write_foreign(folder, self.num_rows)
        return open_table(folder)

    @property
    def ours(self) -> Table:
        """What the stage ``reduce`` makes of ``foreign``."""
        folder = self.root / "ours"
        if not folder.exists():
            reduce(self.foreign.folder, folder, ReduceParams(), **told())
        return open_table(folder)

    @property
    def encoded(self) -> Path:
        """The shards that the stage ``encode`` makes of ``ours``."""
        folder = self.root / "encode"
        if not folder.exists():
            encode(self.ours.folder, folder, EncodeParams(), **told())
        return folder

    @property
    def encoder(self) -> Encoder:
        """The encoder fitted there."""
        return Encoder.load(self.encoded)


@contextlib.contextmanager
def synthetic(num_rows: int) -> Iterator[Folders]:
    """Yield the synthetic table of ``num_rows`` rows."""
    with _root() as root:
        yield Folders(root / f"synthetic-{num_rows}", num_rows)


@contextlib.contextmanager
def flights() -> Iterator[Folders]:
    """Yield the example, run from its raw files with the repository's params.yaml."""
    with _root() as root:
        yield make_flights(root / "flights")


def make_flights(root: Path) -> Folders:
    """Run raw, extract and reduce of the example below ``root``, where they are not done."""
    params = read_yaml(_REPOSITORY / "params.yaml")
    if not (root / "ours").exists():
        (root / "data").mkdir(parents=True, exist_ok=True)
        raw(root / "data" / "raw", RawParams(), **told())
        shutil.copy(_REPOSITORY / params["extract"]["recipe"], root / params["extract"]["recipe"])
        section = parse_section(ExtractParams, params["extract"], key="extract", path=root)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            extract(root, root / "foreign", section, scratch=Path(scratch), **told())
        reduce(root / "foreign", root / "ours", ReduceParams(), **told())
    return Folders(root, open_table(root / "ours").num_rows("train"))


def write_foreign(folder: Path, num_rows: int, *, seed: int = 0) -> None:
    """Write the synthetic table as a stage's folder, in files of pyarrow's defaults with zstd."""
    num_files = min(_MAX_FILES, max(1, num_rows // _ROWS_PER_FILE))
    bounds = [num_rows * i // num_files for i in range(num_files + 1)]
    with new_folder(folder) as private:
        (private / "train").mkdir()
        for i in range(num_files):
            rows = make_rows(np.random.default_rng([seed, i]), bounds[i + 1] - bounds[i])
            rows = with_identity(rows, first_id=bounds[i])
            path = private / "train" / f"part-{i:05}.parquet"
            pq.write_table(rows, path, compression="zstd", row_group_size=1 << 16)
        write_file(private / "contract.json", contract_of(rows).to_json())


def with_identity(rows: pa.Table, *, first_id: int) -> pa.Table:
    """Return rows with ``row_id`` and ``fold`` in front."""
    row_id = np.arange(first_id, first_id + rows.num_rows)
    rows = rows.add_column(0, "row_id", pa.array(row_id))
    return rows.add_column(1, "fold", pa.array((row_id % 5).astype(np.int8)))


def contract_of(rows: pa.Table) -> Contract:
    """Return the contract of columns of the synthetic table, all or some of them."""
    columns = tuple(
        Column(name=name, role=_ROLES[name], dtype=str(rows.schema.field(name).type))
        for name in rows.column_names[2:]
    )
    return Contract(
        columns=columns, targets=(Target(name=TARGET, task="binary", labels=("0", "1")),)
    )


def told(threads: int = 1) -> dict:
    """Return the arguments that every stage takes."""
    return {"resources": Resources(threads=threads), "recorder": MemoryRecorder()}


@contextlib.contextmanager
def _root() -> Iterator[Path]:
    if kept := os.environ.get("HEADRACE_BENCHMARK_DATA"):
        yield Path(kept)
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
