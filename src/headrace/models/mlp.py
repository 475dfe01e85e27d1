"""The network of kind ``nn``: one trunk shared by all targets, one head per target.

Legend of axes: B rows of the batch, N numeric inputs, M those of them that have missing values, C
categories, H width of the trunk's output, O outputs of one head (1, or the classes of a multiclass
target).

The encoder standardises numeric inputs; the network squashes what lies far out, so that one
extreme value cannot carry a prediction away, and reads a missing one as 0 with an indicator
beside it. Categories get learned vectors, with rows of their own for unknown and missing. Heads
start small, so that the first predictions are near the mean and the first loss is near that of
knowing nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import nn

from headrace.models.network import Inputs, InputSample, Network, Tensors
from headrace.params import Section
from headrace.schema import Target

_SQUASH = 4.0  # standard deviations; no numeric input leaves ±4, most hardly change
_ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class MlpDesign(Section):
    """The hidden layers that all targets share, and the length of the categories' vectors."""

    kind: Literal["nn"] = "nn"
    hidden_sizes: Annotated[tuple[int, ...], Field(strict=False)]
    activation: Literal["relu", "gelu", "silu"]
    dropout: float
    batch_norm: bool
    embedding_size: int

    def statistics(self, sample: InputSample, inputs: Inputs, *, seed: int) -> Tensors:  # noqa: ARG002
        """Nothing: the encoder's standardised numbers are enough."""
        return {}

    def build(
        self,
        inputs: Inputs,
        targets: Sequence[Target],
        statistics: Tensors,  # noqa: ARG002
    ) -> Network:
        """Return a fresh network."""
        return Mlp(inputs, self, [target.num_outputs for target in targets])


class Mlp(Network):
    """Embeddings, a trunk of hidden layers, and one linear head per target.

    Shape: ``numeric_BN`` float32, standardised, NaN where missing; ``codes_BC`` int32 -> one
    (B, 1, O) tensor per target: logits, or the standardised value.
    """

    has_missing_M: torch.Tensor

    def __init__(self, inputs: Inputs, design: MlpDesign, num_outputs: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("has_missing_M", torch.tensor(inputs.has_missing, dtype=torch.int64))
        sizes = embedding_sizes(inputs.cardinalities, design.embedding_size)
        self.embeddings = nn.ModuleList(
            nn.Embedding(count, dim) for count, dim in zip(inputs.cardinalities, sizes, strict=True)
        )
        layers: list[nn.Module] = []
        width = len(inputs.numeric) + len(inputs.has_missing) + sum(sizes)
        for hidden in design.hidden_sizes:
            layers.append(nn.Linear(width, hidden))
            if design.batch_norm:
                layers.append(nn.BatchNorm1d(hidden))
            layers += [_ACTIVATIONS[design.activation](), nn.Dropout(design.dropout)]
            width = hidden
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(width, outputs) for outputs in num_outputs)
        self._start()

    def forward(self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor) -> list[torch.Tensor]:
        """Return one (B, 1, O) tensor per target."""
        h_BH = self.embed(numeric_BN, codes_BC)
        return [head(h_BH)[:, None] for head in self.heads]

    def embed(self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor) -> torch.Tensor:
        """Return the trunk's output (B, H)."""
        is_missing_BN = torch.isnan(numeric_BN)
        x_BN = torch.where(is_missing_BN, 0.0, numeric_BN)
        x_BN = x_BN / torch.sqrt(1 + (x_BN / _SQUASH) ** 2)
        parts = [x_BN, is_missing_BN[:, self.has_missing_M].to(x_BN.dtype)]
        parts += [embed(codes_BC[:, c]) for c, embed in enumerate(self.embeddings)]
        return cast(torch.Tensor, self.trunk(torch.cat(parts, dim=1)))

    def _start(self) -> None:
        """Kaiming for the trunk, small vectors for categories, and heads that say little."""
        for layer in self.trunk:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        for embedding in self.embeddings:
            nn.init.normal_(cast(nn.Embedding, embedding).weight, std=0.1)
        for head in self.heads:
            nn.init.normal_(cast(nn.Linear, head).weight, std=0.01)
            nn.init.zeros_(cast(nn.Linear, head).bias)


def embedding_sizes(cardinalities: Sequence[int], most: int) -> tuple[int, ...]:
    """Return the length of the vector of each category: grows slowly with its labels.

    >>> embedding_sizes([4, 100, 100_000], 32)
    (3, 21, 32)
    """
    return tuple(min(most, max(2, round(1.6 * count**0.56))) for count in cardinalities)
