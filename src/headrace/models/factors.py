"""The network of kind ``factorization``: a vector and a bias per label of two categories.

Legend of axes: B rows of the batch, O outputs of all heads together (1 per target, or the classes
of a multiclass one), D factors of one label for one output.

An output is mean + bias of the one label + bias of the other + their vectors' product. Each output
has vectors of its own: several targets are several factorizations, trained side by side. Source:
Koren, Bell and Volinsky 2009, "Matrix Factorization Techniques for Recommender Systems".

Every row adds the squares of what it looks up, times the weight decay, to its loss. So a label is
pulled to 0 in proportion to its rows, and one that is not in the batch not at all. Source: Zhou et
al. 2008, "Large-Scale Parallel Collaborative Filtering for the Netflix Prize". An optimiser's own
decay would shrink every label at each step: rare ones to nothing.

A label that no row taught counts as 0, vector and bias: unknown and missing ones, and those that
only held-back rows have. Biases start at exactly 0, so one that still is 0 tells such a label.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from headrace.data.encoder import FIRST_LABEL
from headrace.models.network import Inputs, InputSample, Network, Tensors
from headrace.params import Section
from headrace.schema import Target

_STD = 0.05  # of new vectors: their products begin near 0, and decay leads from there


class FactorDesign(Section):
    """The two categories, the length of their vectors, and how these are pulled to 0."""

    kind: Literal["factorization"] = "factorization"
    columns: Annotated[tuple[str, str], Field(strict=False)]
    dim: int
    weight_decay: float

    def statistics(self, sample: InputSample, inputs: Inputs, *, seed: int) -> Tensors:  # noqa: ARG002
        """Nothing: the labels are all there is."""
        return {}

    def build(
        self,
        inputs: Inputs,
        targets: Sequence[Target],
        statistics: Tensors,  # noqa: ARG002
    ) -> Network:
        """Return a fresh network."""
        places = [inputs.categories.index(name) for name in self.columns]
        return Factors(
            places,
            [inputs.cardinalities[place] for place in places],
            [target.num_outputs for target in targets],
            dim=self.dim,
            weight_decay=self.weight_decay,
        )


class Factors(Network):
    """Two tables of vectors and two of biases, looked up by the codes of two categories.

    Shape: ``codes_BC`` integers; numeric inputs are not read -> one (B, 1, O) tensor per target:
    logits, or the standardised value.
    """

    has_penalty = True

    def __init__(
        self,
        places: Sequence[int],
        cardinalities: Sequence[int],
        num_outputs: Sequence[int],
        *,
        dim: int,
        weight_decay: float,
    ) -> None:
        super().__init__()
        self._places = tuple(places)
        self._num_outputs = list(num_outputs)
        self._weight_decay = weight_decay
        total = sum(num_outputs)
        self.mean_O = nn.Parameter(torch.zeros(total))
        self.first, self.second = (nn.Embedding(count, total * dim) for count in cardinalities)
        self.first_bias, self.second_bias = (nn.Embedding(count, total) for count in cardinalities)
        for table in (self.first, self.second):
            nn.init.normal_(table.weight, std=_STD)
        for table in (self.first_bias, self.second_bias):
            nn.init.zeros_(table.weight)
        self._penalty = torch.zeros(())

    def forward(self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor) -> list[torch.Tensor]:  # noqa: ARG002
        """Return one (B, 1, O) tensor per target."""
        (first_BOD, first_BO), (second_BOD, second_BO) = self._looked_up(codes_BC)
        z_BO = self.mean_O + first_BO + second_BO + (first_BOD * second_BOD).sum(dim=2)
        squares_B = (first_BOD**2 + second_BOD**2).sum(dim=(1, 2))
        squares_B = squares_B + (first_BO**2 + second_BO**2).sum(dim=1)
        self._penalty = self._weight_decay * squares_B.mean()
        return [z_BO[:, None] for z_BO in torch.split(z_BO, self._num_outputs, dim=1)]

    def embed(self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return the vectors of both labels beside each other: (B, 2·O·D)."""
        (first_BOD, _), (second_BOD, _) = self._looked_up(codes_BC)
        return torch.cat([first_BOD.flatten(1), second_BOD.flatten(1)], dim=1)

    def penalty(self) -> torch.Tensor:
        """Return the weight decay of what the last rows looked up, as a mean over them."""
        return self._penalty

    def _looked_up(self, codes_BC: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return for each of the two categories vectors (B, O, D) and biases (B, O)."""
        found = []
        tables = ((self.first, self.first_bias), (self.second, self.second_bias))
        for place, (factors, biases) in zip(self._places, tables, strict=True):
            codes_B = codes_BC[:, place]
            bias_BO = biases(codes_B) * (codes_B >= FIRST_LABEL)[:, None]
            factors_BOD = factors(codes_B).unflatten(1, (bias_BO.shape[1], -1))
            found.append((factors_BOD * (bias_BO != 0)[:, :, None], bias_BO))
        return found
