"""The rows a model is most wrong about, for a person to look at.

They are read off the test rows for the report, and nothing is chosen by them: a data set with
wrong labels, a unit that changed or a kind of row that train does not have shows here first. The
loss is that of one row, whatever its weight: the absolute error, or minus the natural logarithm of
the true class's probability.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.evaluation.blend import rounded
from headrace.evaluation.losses import log_losses
from headrace.evaluation.metrics import Sample
from headrace.schema import Target

Floats: TypeAlias = npt.NDArray[np.float64]

SHOWN = 20
SHOWN_COLUMNS = 5  # beside each row, and its key


@dataclass(frozen=True)
class WorstRows:
    """The rows with the largest losses, worst first, of equal ones the smaller row id.

    Shapes: (rows,); ``prediction`` is the value, the probability of labels[1], or (rows, classes).
    """

    row_id: npt.NDArray[np.int64]
    truth: Floats
    prediction: Floats
    loss: Floats


def worst_rows(sample: Sample, row_id: npt.NDArray[np.int64], *, count: int = SHOWN) -> WorstRows:
    """Return the ``count`` rows of ``sample`` that lose most; ``row_id`` are theirs."""
    if sample.task == "regression":
        loss = np.abs(sample.prediction - sample.truth)
    else:
        loss = log_losses(sample.truth, sample.prediction)
    order = np.lexsort((row_id, -loss))[:count]
    return WorstRows(row_id[order], sample.truth[order], sample.prediction[order], loss[order])


def worst_of(parts: Iterable[tuple[Sample, npt.NDArray[np.int64]]]) -> WorstRows:
    """Return ``worst_rows`` of rows that come in parts; memory stays at one."""
    worst: WorstRows | None = None
    for sample, row_id in parts:
        found = worst_rows(sample, row_id)
        if worst is not None:
            both = Sample(
                sample.task,
                np.concatenate([worst.truth, found.truth]),
                np.concatenate([worst.prediction, found.prediction]),
            )
            found = worst_rows(both, np.concatenate([worst.row_id, found.row_id]))
        worst = found
    if worst is None:
        raise ValueError("no parts; expected rows")
    return worst


def worst_json(
    worst: WorstRows, target: Target, model: str, values: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """Return the rows as JSON values, ``values`` of some columns beside them; ids are text."""
    return {
        "model": model,
        "loss": "absolute error" if target.task == "regression" else "log-loss",
        "columns": list(values),
        "rows": [
            {
                "row_id": str(worst.row_id[i]),
                "truth": _truth(worst.truth[i], target),
                "prediction": _prediction(worst.prediction[i], target),
                "loss": rounded(float(worst.loss[i])),
                "values": {name: column[i] for name, column in values.items()},
            }
            for i in range(len(worst.row_id))
        ],
    }


def _truth(value: float, target: Target) -> float | str:
    return rounded(float(value)) if target.task == "regression" else target.labels[int(value)]


def _prediction(value: Any, target: Target) -> float | dict[str, float]:
    """Return the value, or the probability of each label."""
    if target.task == "regression":
        return rounded(float(value))
    of_class = value if target.task == "multiclass" else (1 - value, value)
    return {label: rounded(float(one)) for label, one in zip(target.labels, of_class, strict=True)}
