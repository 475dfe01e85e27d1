"""How the predictions of several models become one: a weighted mean, or a linear model of them.

A blend is a value that JSON holds whole, so selection.json and a published package say the same
and predict the same, to the last bit: coefficients have the 12 digits that are written, and no
row's value depends on the rows beside it. How a blend is found is not known here.

Legend of axes: N rows, C classes; F what one model gives per row: 1, or C for a multiclass target.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter

from headrace.params import Section

Floats: TypeAlias = npt.NDArray[np.float64]
Numbers = Annotated[tuple[float, ...], Field(strict=False)]  # JSON has only lists
Link = Literal["identity", "logit", "log"]

# A probability this near to 0 or 1 counts no further; a sure model would outvote all others.
_LEAST_PROBABILITY = 1e-6


class MeanBlend(Section):
    """The weighted mean of values or probabilities; weights sum to 1."""

    kind: Literal["mean"] = "mean"
    weights: dict[str, Annotated[float, Field(ge=0)]]

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the models that count, sorted: sums do not depend on the order in a file."""
        return tuple(sorted(name for name, weight in self.weights.items() if weight > 0))

    def __str__(self) -> str:
        """Return each weight that is not 0."""
        return ", ".join(f"{name} {self.weights[name]:.2f}" for name in self.members)

    def of(self, predictions: Mapping[str, Floats]) -> Floats:
        """Return the mean of predictions of the same rows, (N,) or (N, C)."""
        first, *others = self.members
        total = self.weights[first] * predictions[first]
        if not others:
            return predictions[first].copy()  # exactly the model's own values, no rounding
        for name in others:
            total += self.weights[name] * predictions[name]
        # Rounding may carry a mean of equal probabilities an ulp past them: stay within them.
        stacked = [predictions[name] for name in self.members]
        inside: Floats = np.clip(
            total, np.minimum.reduce(stacked), np.maximum.reduce(stacked), out=total
        )
        return inside


class LinearBlend(Section):
    """A linear model of values, of logits, or of log-probabilities, and back.

    Shapes: ``intercept`` (F,); ``coefficients`` per model (F, F): a row per output.
    """

    kind: Literal["linear"] = "linear"
    link: Link
    intercept: Numbers
    coefficients: dict[str, Annotated[tuple[Numbers, ...], Field(strict=False)]]

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the models that count, sorted, as above."""
        return tuple(sorted(self.coefficients))

    def __str__(self) -> str:
        """Return each coefficient; of several classes the mean of a class's own ones."""
        own = {
            name: sum(row[place] for place, row in enumerate(rows)) / len(rows)
            for name, rows in self.coefficients.items()
        }
        scale = {"identity": "values", "logit": "logits", "log": "log-probabilities, own class"}
        told = ", ".join(f"{name} {own[name]:.2f}" for name in self.members)
        return f"{told}, of {scale[self.link]}"

    def of(self, predictions: Mapping[str, Floats]) -> Floats:
        """Return values or probabilities of the same rows, (N,) or (N, C)."""
        num_rows = len(next(iter(predictions.values())))
        z_NF = np.tile(np.array(self.intercept), (num_rows, 1))
        for name in self.members:
            x_NF = linked(predictions[name], self.link)
            # Not a product of matrices: BLAS rounds by the number of rows it is given.
            for output, row in enumerate(self.coefficients[name]):
                for place, coefficient in enumerate(row):
                    z_NF[:, output] += coefficient * x_NF[:, place]
        if self.link == "identity":
            return z_NF[:, 0]
        if self.link == "logit":
            value: Floats = np.exp(-np.logaddexp(0.0, -z_NF[:, 0]))
            return value
        share_NF: Floats = np.exp(z_NF - z_NF.max(axis=1, keepdims=True))
        shares_NF: Floats = share_NF / share_NF.sum(axis=1, keepdims=True)
        return shares_NF


Blend: TypeAlias = Annotated[MeanBlend | LinearBlend, Field(discriminator="kind")]


def blend_of(content: Any) -> MeanBlend | LinearBlend:
    """Return the blend that JSON values describe.

    Raises:
        pydantic.ValidationError: if they describe none.
    """
    adapter: TypeAdapter[MeanBlend | LinearBlend] = TypeAdapter(Blend)
    return adapter.validate_python(content)


def linked(prediction: Floats, link: Link) -> Floats:
    """Return predictions on the scale on which they are added up, (N, F)."""
    if link == "identity":
        return prediction[:, None]
    if link == "logit":
        p_N = np.clip(prediction, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
        return (np.log(p_N) - np.log1p(-p_N))[:, None]
    logs: Floats = np.log(np.clip(prediction, _LEAST_PROBABILITY, 1.0))
    return logs


@overload
def rounded(value: float) -> float: ...


@overload
def rounded(value: float | None) -> float | None: ...


def rounded(value: float | None) -> float | None:
    """Return ``value`` to 12 significant digits: what another CPU's vector width may not change."""
    return None if value is None else float(f"{value:.12g}")
