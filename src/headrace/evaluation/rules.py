"""What ``decide`` settled for each target: a rule that turns predictions into decisions.

decisions.json holds the rules and how they were found; ``evaluate`` measures them on test rows and
the published package applies them, both through ``Rule``, so all three say the same. A rule is a
value that JSON holds whole, and applying it needs numpy alone; how one is found is not known here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from headrace.errors import IntegrityError
from headrace.evaluation.blend import Numbers, linked
from headrace.params import Section
from headrace.storage import read_json, verify_file

Floats: TypeAlias = npt.NDArray[np.float64]
Codes: TypeAlias = npt.NDArray[np.int64]
Costs: TypeAlias = tuple[tuple[float, ...], ...]  # costs[true class][predicted class]
DECISIONS = "decisions.json"
DEFAULT = 0.5  # the probability from which class 1 is predicted, unless a rule says otherwise


class Temperature(Section):
    """Logits, or log-probabilities of several classes, divided by ``temperature``."""

    kind: Literal["temperature"] = "temperature"
    temperature: Annotated[float, Field(gt=0)]

    def of(self, probability: Floats) -> Floats:
        """Return calibrated probabilities, (N,) or (N, C)."""
        if probability.ndim == 1:
            z_N = linked(probability, "logit")[:, 0] / self.temperature
            calibrated: Floats = np.exp(-np.logaddexp(0.0, -z_N))
            return calibrated
        z_NC = linked(probability, "log") / self.temperature
        share_NC = np.exp(z_NC - z_NC.max(axis=1, keepdims=True))
        shares: Floats = share_NC / share_NC.sum(axis=1, keepdims=True)
        return shares

    def __str__(self) -> str:
        """Return its name and number."""
        return f"temperature {self.temperature:g}"


class Isotonic(Section):
    """A rising function of the probability: straight lines through ``raw`` and ``calibrated``."""

    kind: Literal["isotonic"] = "isotonic"
    raw: Numbers
    calibrated: Numbers

    def of(self, probability: Floats) -> Floats:
        """Return calibrated probabilities, (N,)."""
        calibrated: Floats = np.interp(probability, self.raw, self.calibrated)
        return calibrated

    def __str__(self) -> str:
        """Return its name and size."""
        return f"isotonic, {len(self.raw)} points"


AnyCalibration: TypeAlias = Temperature | Isotonic
Calibration: TypeAlias = Annotated[AnyCalibration, Field(discriminator="kind")]


class Conformal(Section):
    """How far from a prediction the truth may lie: ``limit`` on the scores of ``num_rows`` rows."""

    coverage: Annotated[float, Field(gt=0, lt=1)]
    limit: Annotated[float, Field(ge=0)]
    num_rows: int

    def interval(self, value: Floats) -> tuple[Floats, Floats]:
        """Return the lower and the upper bound of each value."""
        return value - self.limit, value + self.limit

    def classes(self, probability: Floats) -> npt.NDArray[np.bool_]:
        """Return which classes each row's set holds, (N, C)."""
        p_NC = of_classes(probability)
        is_in = 1 - p_NC <= self.limit
        is_in[np.arange(len(p_NC)), p_NC.argmax(axis=1)] = True
        return is_in


def of_classes(probability: Floats) -> Floats:
    """Return the probability of every class, (N, C), also where that of class 1 is told, (N,)."""
    if probability.ndim == 2:
        return probability
    return np.column_stack([1 - probability, probability])


class Rule(Section):
    """How the predictions of one target's chosen model are used.

    ``threshold`` is the calibrated probability from which ``labels[1]`` is predicted (binary).
    ``costs`` [true][predicted], if there are any, make it the class of least expected cost (several
    classes); without them the likeliest is predicted.
    """

    model: str
    calibration: Calibration | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] = DEFAULT
    costs: Annotated[tuple[Numbers, ...], Field(strict=False)] | None = None
    conformal: Conformal | None = None

    def calibrated(self, values: Floats) -> Floats:
        """Return calibrated probabilities; ``values`` themselves where there is no map."""
        return values if self.calibration is None else self.calibration.of(values)

    def classes(self, calibrated: Floats) -> Codes:
        """Return the code of the class predicted from calibrated probabilities, (N,)."""
        if calibrated.ndim == 1:
            return (calibrated >= self.threshold).astype(np.int64)
        return likeliest(calibrated) if self.costs is None else least_cost(calibrated, self.costs)


def likeliest(probability: Floats) -> Codes:
    """Return the code of the class predicted without a rule: from 0.5 on, or the likeliest."""
    if probability.ndim == 1:
        return (probability >= DEFAULT).astype(np.int64)
    code: Codes = probability.argmax(axis=1)
    return code


def least_cost(probability: Floats, costs: Costs) -> Codes:
    """Return the class of least expected cost of each row, (N, C) to (N,)."""
    p_NC = probability
    # Not a product of matrices: BLAS rounds by the number of rows it is given.
    expected = [
        sum(p_NC[:, true] * costs[true][predicted] for true in range(len(costs)))
        for predicted in range(len(costs))
    ]
    code: Codes = np.argmin(np.stack(expected), axis=0)
    return code


@dataclass(frozen=True)
class Decisions:
    """The rule per target, and the whole content of decisions.json."""

    rules: Mapping[str, Rule]
    content: Mapping[str, Any]

    def entry(self, target: str) -> Mapping[str, Any]:
        """Return a target's entry: how its rule was found."""
        found: Mapping[str, Any] = self.content["targets"][target]
        return found


def read_decisions(folder: Path, chosen: Mapping[str, str]) -> Decisions:
    """Read decisions.json of a folder with a manifest; ``chosen`` is the model of each target.

    Raises:
        IntegrityError: if it is missing, damaged, of another format, or for other targets or
            models.
    """
    return decisions_of(verify_file(folder, DECISIONS), chosen)


def decisions_of(path: Path, chosen: Mapping[str, str]) -> Decisions:
    """Read a decisions.json whose bytes are known to be right; as ``read_decisions``."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != 1:
        raise IntegrityError(f"{path} has no decisions of format 1; run `headrace repro`")
    found = {name: entry["model"] for name, entry in content["targets"].items()}
    if found != chosen:
        raise IntegrityError(
            f"{path} is for the targets and models {found}, expected {dict(chosen)}; run "
            f"`headrace repro`"
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
