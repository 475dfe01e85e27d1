"""The settings that every stage has that makes intervals from resamples."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from headrace.data.truth import UnitChoice
from headrace.evaluation.bootstrap import require_resamples
from headrace.params import Section


class ResampledParams(Section):
    """How intervals are made: a part of the sections stack, decide, interpret and evaluate."""

    num_resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 1000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    unit: UnitChoice = "auto"  # what is resampled: by the split days, its groups, or rows
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _resamples_suffice(self) -> Self:
        require_resamples(self.num_resamples, self.confidence)
        return self
