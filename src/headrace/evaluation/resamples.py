"""The file ``resamples.parquet``: every metric of every model on every resample of the test rows.

Resample b holds the same units for every model with the same rows, units, seed and number of
resamples, in any run. So these few numbers are all that a paired comparison across runs needs:
predictions and labels need not be kept, and the size is that of the resamples, not of the rows
(8 kB per model and metric for 1,000 resamples).

One line per target, model and metric: its ``value``, and ``resamples``, NaN where undefined.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.errors import IntegrityError
from headrace.evaluation.bootstrap import Scored
from headrace.evaluation.metrics import MetricName

Floats: TypeAlias = npt.NDArray[np.float64]

RESAMPLES = "resamples.parquet"
_SCHEMA = pa.schema(
    [
        ("target", pa.string()),
        ("model", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("resamples", pa.list_(pa.float64())),
        ("no_interval", pa.string()),
    ]
)


def resamples_bytes(scored: Mapping[str, Mapping[str, Scored]]) -> bytes:
    """Return the file of target → model → metrics."""
    lines = [
        {
            "target": target,
            "model": model,
            "metric": metric,
            "value": one.points[metric],
            "resamples": _rounded(values),
            "no_interval": one.no_interval.get(metric, ""),
        }
        for target, models in scored.items()
        for model, one in models.items()
        for metric, values in one.resamples.items()
    ]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(lines, schema=_SCHEMA), out, compression="zstd")
    return out.getvalue()


def read_resamples(path: Path) -> dict[str, dict[str, Scored]]:
    """Read target → model → metrics back.

    Raises:
        IntegrityError: if the file is of another layout.
    """
    table = pq.read_table(path)
    if table.schema != _SCHEMA:
        raise IntegrityError(
            f"{path} has the columns {table.schema.names}, not those of {RESAMPLES} of this "
            f"headrace; run `headrace repro` to make it again"
        )
    points: dict[tuple[str, str], dict[MetricName, float]] = {}
    values: dict[tuple[str, str], dict[MetricName, Floats]] = {}
    reasons: dict[tuple[str, str], dict[MetricName, str]] = {}
    for line in table.to_pylist():
        key, metric = (line["target"], line["model"]), line["metric"]
        points.setdefault(key, {})[metric] = line["value"]
        values.setdefault(key, {})[metric] = np.array(line["resamples"])
        if line["no_interval"]:
            reasons.setdefault(key, {})[metric] = line["no_interval"]
    found: dict[str, dict[str, Scored]] = {}
    for target, model in points:
        key = (target, model)
        one = Scored(points[key], values[key], no_interval=reasons.get(key, {}))
        found.setdefault(target, {})[model] = one
    return found


def _rounded(values: Floats) -> list[float]:
    # To 12 digits: what another CPU's vector width may not change.
    return [float(f"{value:.12g}") for value in values.tolist()]
