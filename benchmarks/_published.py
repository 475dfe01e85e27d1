"""California housing and Adult with the splits of the published tables, as the stages' folders.

California comes from HEADRACE_SHARED_DATA (default ``../shared/data`` beside the repository), Adult
from ``examples/adult``. Each set has variants with another choice of targets: a column that is a
target in one of them is an input in none, so that networks with one and two heads see the same
inputs.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks._folders import told
from headrace.data.table import Table, open_table
from headrace.params import parse_section, read_yaml
from headrace.stages.encode import EncodeParams, encode
from headrace.stages.extract import ExtractParams, extract
from headrace.stages.reduce import ReduceParams, reduce

_REPOSITORY = Path(__file__).parents[1]
_CALIFORNIA = (
    "medium_income", "house_age", "average_rooms", "average_bedrooms", "population",
    "average_occupation", "latitude", "longitude",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One data set with its targets; made on first use, then kept below ``root``."""

    root: Path
    name: str  # california or adult
    targets: tuple[str, ...]
    without: tuple[str, ...] = ()  # columns left out of the inputs

    @property
    def folder(self) -> Path:
        """Where the stages' folders are."""
        return self.root / "-".join([self.name, *self.targets])

    @property
    def table(self) -> Path:
        """What ``reduce`` wrote."""
        return self.folder / "reduce"

    @property
    def encoded(self) -> Path:
        """What ``encode`` wrote."""
        return self.folder / "encode"

    def made(self) -> Table:
        """Run the stages that are not done, and return the table."""
        if not self.encoded.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            section = {"california": _california, "adult": _adult}[self.name](self)
            shutil.rmtree(self.folder / "extract", ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                extract(
                    self.folder, self.folder / "extract", section, scratch=Path(scratch), **told()
                )
            shutil.rmtree(self.table, ignore_errors=True)
            reduce(self.folder / "extract", self.table, ReduceParams(), **told())
            encode(self.table, self.encoded, EncodeParams(min_count=2), **told())
        return open_table(self.table)


def _california(case: Case) -> ExtractParams:
    """Write the published arrays as one file; the split is a column of it."""
    default = _REPOSITORY.parent / "shared" / "data"
    source = Path(os.environ.get("HEADRACE_SHARED_DATA", default)) / "california_housing"
    parts = []
    for split, name in (("train", "train"), ("valid", "val"), ("test", "test")):
        numbers = np.load(source / f"N_{name}.npy")
        columns = {c: pa.array(numbers[:, j]) for j, c in enumerate(_CALIFORNIA)}
        columns["house_value"] = pa.array(np.load(source / f"y_{name}.npy").astype(np.float64))
        columns["split"] = pa.array([split] * len(numbers))
        parts.append(pa.table(columns))
    rows = pa.concat_tables(parts)
    pq.write_table(rows, case.folder / "california.parquet")
    _write_recipe(case, rows.column_names, "california")
    return _section(
        {
            "sources": {"california": "california.parquet"},
            "recipe": "recipe.sql",
            "targets": {name: {"task": "regression"} for name in case.targets},
            "split": {"kind": "given", "column": "split"},
            "columns": {
                name: {"role": "numeric"}
                for name in rows.column_names
                if name not in (*case.targets, *case.without, "split")
            },
        }
    )


def _adult(case: Case) -> ExtractParams:
    example = _REPOSITORY / "examples" / "adult"
    raw = read_yaml(example / "params.yaml")["extract"]
    for name in (*(s["path"] for s in raw["sources"].values()), raw["recipe"]):
        shutil.copy(example / name, case.folder)
    text = (case.folder / raw["recipe"]).read_text()
    for name in case.without:
        text = text.replace(f"  {name},\n", "")
        raw["columns"].pop(name, None)
    if "income" in case.without:
        text = text.replace(",\n  rtrim(income, '.') AS income", "")
    (case.folder / raw["recipe"]).write_text(text)
    tasks = {"income": raw["targets"]["income"], "hours_per_week": {"task": "regression"}}
    raw["targets"] = {name: tasks[name] for name in case.targets}
    for name in case.targets:
        raw["columns"].pop(name, None)
    return _section(raw)


def _write_recipe(case: Case, names: list[str], source: str) -> None:
    kept = [name for name in names if name not in case.without]
    (case.folder / "recipe.sql").write_text(f"SELECT row_id, {', '.join(kept)} FROM {source}\n")


def _section(raw: dict) -> ExtractParams:
    return parse_section(ExtractParams, raw, key="extract", path=Path("benchmark"))
