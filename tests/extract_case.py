"""A small project folder for tests of extract: write files, run the stage, read what it wrote."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from headrace.params import Resources, parse_section
from headrace.record import MemoryRecorder
from headrace.stages.extract import Extracted, ExtractParams, extract

BUDGET = 512 << 20


class Case:
    """One project folder; ``run`` extracts with the given settings."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.out = root / "data" / "extract"
        self.recorder = MemoryRecorder()

    def write(self, name: str, content: str | bytes) -> str:
        """Write a file and return its name."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def table(self, name: str = "rows.csv", *, num_rows: int = 200, **more: Any) -> str:
        """Write a CSV of ``id, x, kind, y``; ``more`` are further columns, by function of i."""
        columns: dict[str, Any] = {
            "id": lambda i: i,
            "x": lambda i: (i * 37) % 101 / 4,
            "kind": lambda i: "abc"[i % 3],
            "y": lambda i: i % 2,
        }
        columns |= more
        lines = [",".join(columns)]
        lines += [",".join(str(of(i)) for of in columns.values()) for i in range(num_rows)]
        return self.write(name, "\n".join(lines) + "\n")

    def params(self, **settings: Any) -> ExtractParams:
        """Return the section, as params.yaml would give it."""
        given = {"sources": {"rows": "rows.csv"}, "targets": ["y"], "key": ["id"]} | settings
        return parse_section(ExtractParams, given, key="extract", path=Path("params.yaml"))

    def run(
        self,
        *,
        threads: int = 2,
        budget: int = BUDGET,
        out: Path | None = None,
        **settings: Any,
    ) -> Extracted:
        """Extract and return the result."""
        return extract(
            self.root,
            out or self.out,
            self.params(**settings),
            scratch=self.root / "scratch",
            resources=Resources(threads=threads, memory_budget=budget),
            recorder=self.recorder,
        )

    def rows(self, *splits: str) -> dict[str, list[Any]]:
        """Return all columns of the splits (all that exist, if none is named)."""
        names = splits or tuple(p.name for p in sorted(self.out.iterdir()) if p.is_dir())
        found: dict[str, list[Any]] = {}
        for split in names:
            part = pq.read_table(self.out / split).to_pydict()
            part["split"] = [split] * len(part["row_id"])
            for name, values in part.items():
                found.setdefault(name, []).extend(values)
        return found

    def report(self, name: str = "extract.json") -> Any:
        """Return a JSON file of the out."""
        return json.loads((self.out / name).read_text())

    def rejects(self) -> list[dict[str, str]]:
        """Return the rejected rows."""
        with (self.out / "rejects.csv").open(newline="") as file:
            return list(csv.DictReader(file))
