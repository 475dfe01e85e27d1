"""What ``decide`` settled for each target: a rule that turns predictions into decisions.

decisions.json holds the rules and how they were found; ``evaluate`` measures them on test rows and
the published package applies them, both through ``Rule``, so all three say the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from headrace.errors import IntegrityError
from headrace.evaluation.calibration import Calibration
from headrace.evaluation.conformal import Conformal
from headrace.evaluation.thresholds import DEFAULT, least_cost
from headrace.params import Section
from headrace.schema import Target
from headrace.storage import read_json, verify_file

Floats: TypeAlias = npt.NDArray[np.float64]
DECISIONS = "decisions.json"
Row = Annotated[tuple[float, ...], Field(strict=False)]  # JSON has only lists


class Rule(Section):
    """How the predictions of one target's chosen model are used.

    ``threshold`` is the calibrated probability from which ``labels[1]`` is predicted (binary).
    ``costs`` [true][predicted], if there are any, make it the class of least expected cost (several
    classes); without them the likeliest is predicted.
    """

    model: str
    calibration: Calibration | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] = DEFAULT
    costs: Annotated[tuple[Row, ...], Field(strict=False)] | None = None
    conformal: Conformal | None = None

    def calibrated(self, values: Floats) -> Floats:
        """Return calibrated probabilities; ``values`` themselves where there is no map."""
        return values if self.calibration is None else self.calibration.of(values)

    def classes(self, calibrated: Floats) -> npt.NDArray[np.int64]:
        """Return the code of the class predicted from calibrated probabilities, (N,)."""
        if calibrated.ndim == 1:
            return (calibrated >= self.threshold).astype(np.int64)
        return likeliest(calibrated) if self.costs is None else least_cost(calibrated, self.costs)


def likeliest(probability: Floats) -> npt.NDArray[np.int64]:
    """Return the code of the class predicted without a rule: from 0.5 on, or the likeliest."""
    if probability.ndim == 1:
        return (probability >= DEFAULT).astype(np.int64)
    code: npt.NDArray[np.int64] = probability.argmax(axis=1)
    return code


@dataclass(frozen=True)
class Decisions:
    """The rule per target, and the whole content of decisions.json."""

    rules: Mapping[str, Rule]
    content: Mapping[str, Any]


def read_decisions(folder: Path, targets: Sequence[Target]) -> Decisions:
    """Read decisions.json of a folder with a manifest.

    Raises:
        IntegrityError: if it is missing, damaged, of another format or for other targets.
    """
    path = verify_file(folder, DECISIONS)
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != 1:
        raise IntegrityError(f"{path} has no decisions of format 1; run `headrace repro`")
    wanted = sorted(target.name for target in targets)
    found = sorted(content["targets"])
    if found != wanted:
        raise IntegrityError(
            f"{path} is for the targets {found}, expected {wanted}; run `headrace repro`"
        )
    try:
        rules = {
            name: Rule.model_validate(entry["rule"]) for name, entry in content["targets"].items()
        }
    except (KeyError, ValidationError) as error:
        raise IntegrityError(
            f"{path} has no rule that can be read ({error}); run `headrace repro`"
        ) from error
    return Decisions(rules, content)
