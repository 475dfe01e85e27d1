"""The network of kind ``tabnet``: each step looks at some columns, and the steps decide together.

The encoder is ``pytorch_tabnet.tab_network.TabNetEncoder``; what goes in and what comes out is
ours. A numeric column passes the curve of kind ``nn`` that makes it about normal, and comes as that
number, as its place in bins of equally many rows (piecewise-linear encoding), and with a flag where
it has missing values; a category comes as a learned vector, with rows of their own for unknown and
missing. All inputs of a column share one entry of the mask, so masks speak of columns. Codes never
reach the library, which fails on one it has not seen.

Legend of axes: B rows of the batch, N numeric inputs, M those of them that have missing values, C
categories, K columns (N + C, in this order), D numbers that the encoder reads, S steps, H width of
the decision, which the heads read.

Source: Arik & Pfister 2021, "TabNet: Attentive Interpretable Tabular Learning". Differs from it:
the inputs above, grouped attention, a head per target, and norms of nearly even parts of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import Field
from pytorch_tabnet.tab_network import GBN, TabNetEncoder
from rtdl_num_embeddings import PiecewiseLinearEncoding
from torch import nn

from headrace.data.encoder import EncodedBatch
from headrace.models.mlp import NormalCurves, embedding_sizes, number_statistics
from headrace.models.network import Inputs, InputSample, Network, NetworkModel, Tensors
from headrace.params import Section
from headrace.schema import Target

Floats: TypeAlias = npt.NDArray[np.float32]

_NUM_LAYERS = 2  # of a step shared with all others, and again of its own
_MOMENTUM = 0.1  # of the norms' running means
_HEAD_STD = 0.05  # a tenth of the library's: the first loss is near that of knowing nothing


class TabnetDesign(Section):
    """Width, steps and masks of the network, and how it reads numbers and categories."""

    kind: Literal["tabnet"] = "tabnet"
    width: Annotated[int, Field(ge=1)]  # of the decision, n_d, and of the attention, n_a
    num_steps: Annotated[int, Field(ge=1)]
    gamma: float
    lambda_sparse: float
    bins: Annotated[int, Field(ge=2)]
    embedding_size: int
    virtual_batch_rows: Annotated[int, Field(ge=1)]

    def statistics(self, sample: InputSample, inputs: Inputs, *, seed: int) -> Tensors:  # noqa: ARG002
        """Return curves and bins of the numeric inputs, from the values of ``sample``."""
        return number_statistics(sample, inputs, bins=self.bins)

    def build(self, inputs: Inputs, targets: Sequence[Target], statistics: Tensors) -> Network:
        """Return a fresh network."""
        num_outputs = [target.num_outputs for target in targets]
        return TabnetNetwork(inputs, self, num_outputs, statistics)


class TabnetNetwork(Network):
    """Columns as numbers, TabNet's encoder, and one linear head per target.

    Shape: ``numeric_BN`` float32, standardised, NaN where missing; ``codes_BC`` int32 -> one
    (B, 1, O) tensor per target: logits, or the standardised value. O is 1, or the classes.
    """

    least_rows = 32  # fewer would move the norms' running means by noise

    has_missing_M: torch.Tensor
    members_KD: torch.Tensor

    def __init__(
        self,
        inputs: Inputs,
        design: TabnetDesign,
        num_outputs: Sequence[int],
        statistics: Tensors,
    ) -> None:
        super().__init__()
        self.has_penalty = design.lambda_sparse > 0
        self._lambda_sparse = design.lambda_sparse
        self._entropy = torch.zeros(())
        self.register_buffer("has_missing_M", torch.tensor(inputs.has_missing, dtype=torch.int64))
        places = range(len(inputs.numeric))
        bins = [statistics[f"bins.{place}"] for place in places]
        self.curves: NormalCurves | None = None
        self.bins: nn.Module | None = None
        if inputs.numeric:
            self.curves = NormalCurves(
                [(statistics[f"knots.{place}"], statistics[f"images.{place}"]) for place in places]
            )
            self.bins = PiecewiseLinearEncoding(bins)
        sizes = embedding_sizes(inputs.cardinalities, design.embedding_size)
        self.embeddings = nn.ModuleList(
            nn.Embedding(count, size)
            for count, size in zip(inputs.cardinalities, sizes, strict=True)
        )
        for embedding in self.embeddings:
            nn.init.normal_(cast(nn.Embedding, embedding).weight, std=0.1)
        members_KD = _members(inputs, [len(edges) - 1 for edges in bins], sizes)
        self.register_buffer("members_KD", members_KD, persistent=False)
        self.encoder: Any = _encoder(members_KD, design)
        self.heads = nn.ModuleList(nn.Linear(design.width, outputs) for outputs in num_outputs)
        for head in self.heads:
            nn.init.normal_(cast(nn.Linear, head).weight, std=_HEAD_STD)
            nn.init.zeros_(cast(nn.Linear, head).bias)

    def forward(self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor) -> list[torch.Tensor]:
        """Return one (B, 1, O) tensor per target."""
        h_BH = self.embed(numeric_BN, codes_BC)
        return [head(h_BH)[:, None] for head in self.heads]

    def embed(self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor) -> torch.Tensor:
        """Return the sum of what the steps decide (B, H)."""
        steps_SBH, negative_entropy = self.encoder(self._read(numeric_BN, codes_BC))
        self._entropy = -negative_entropy
        return torch.stack(steps_SBH).sum(dim=0)

    def penalty(self) -> torch.Tensor:
        """Return ``lambda_sparse`` times the entropy of the masks, a mean over rows and steps."""
        return self._lambda_sparse * self._entropy

    def explain(
        self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masks (S, B, K) and the importances (B, K); call in evaluation mode.

        The importance of a column to a row is the sum of its masks, each step weighted by what it
        adds to the decision; the importances of a row sum to 1, or are 0 where no step adds any.
        """
        explained_BD, masks_BD = self.encoder.forward_masks(self._read(numeric_BN, codes_BC))
        masks_SBK = torch.stack([masks_BD[s] @ self.members_KD.T for s in range(len(masks_BD))])
        explained_BK = explained_BD @ self.members_KD.T
        return masks_SBK, explained_BK / explained_BK.sum(dim=1, keepdim=True).clamp_min(1e-12)

    def _read(self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor) -> torch.Tensor:
        """Return what the encoder reads (B, D), in the order of ``_members``."""
        parts = [embed(codes_BC[:, c]) for c, embed in enumerate(self.embeddings)]
        if self.curves is not None and self.bins is not None:
            is_missing_BN = torch.isnan(numeric_BN)
            x_BN = self.curves(torch.where(is_missing_BN, 0.0, numeric_BN))
            x_BN = torch.where(is_missing_BN, 0.0, x_BN)
            told_BM = is_missing_BN[:, self.has_missing_M].to(x_BN.dtype)
            parts = [x_BN, told_BM, self.bins(x_BN), *parts]
        return torch.cat(parts, dim=1)


class GhostNorm(nn.Module):
    """Batch norm by the means of nearly even parts of a batch, of at most ``rows`` rows.

    The library's may leave a last part of one row, which has no spread to divide by: an error.
    """

    def __init__(self, norm: nn.Module, rows: int) -> None:
        super().__init__()
        self.norm = norm
        self.rows = rows

    def forward(self, x_BH: torch.Tensor) -> torch.Tensor:
        """Normalise; in training by each part's own means."""
        if not self.training:
            return cast(torch.Tensor, self.norm(x_BH))
        parts = x_BH.tensor_split(max(1, -(-len(x_BH) // self.rows)))
        return torch.cat([self.norm(part_BH) for part_BH in parts])


@dataclass(frozen=True)
class Explanation:
    """What a network looked at.

    Shapes: ``masks_SBK`` each step's shares of attention, which sum to 1 over the columns;
    ``importances_BK`` those of all steps together.
    """

    columns: tuple[str, ...]
    masks_SBK: Floats
    importances_BK: Floats

    def shares(self) -> dict[str, float]:
        """Return each column's share of attention over the rows, the largest first."""
        mean_K = self.importances_BK.mean(axis=0, dtype=np.float64)
        shares = {
            name: float(f"{share:.6g}") for name, share in zip(self.columns, mean_K, strict=True)
        }
        return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))


class TabnetModel(NetworkModel):
    """A trained TabNet, which can say what it looks at."""

    def explain(self, rows: EncodedBatch | pa.Table) -> Explanation:
        """Return the masks and importances of each row.

        Raises:
            SchemaError: if the rows are not encoded, or by another encoder.
        """
        network = cast(TabnetNetwork, self.network)
        parts = [network.explain(*part) for part in self._in_parts(rows)]
        inputs = self._config.inputs
        return Explanation(
            columns=(*inputs.numeric, *inputs.categories),
            masks_SBK=torch.cat([masks for masks, _ in parts], dim=1).float().cpu().numpy(),
            importances_BK=torch.cat([found for _, found in parts]).float().cpu().numpy(),
        )


def _members(
    inputs: Inputs, num_bins: Sequence[int], embedding_sizes: Sequence[int]
) -> torch.Tensor:
    """Return which of the encoder's inputs belong to which column: (K, D) of 0 and 1."""
    num_numeric = len(inputs.numeric)
    columns_D = [*range(num_numeric), *inputs.has_missing]
    columns_D += [n for n, count in enumerate(num_bins) for _ in range(count)]
    columns_D += [num_numeric + c for c, size in enumerate(embedding_sizes) for _ in range(size)]
    members_KD = torch.zeros(num_numeric + len(embedding_sizes), len(columns_D))
    members_KD[columns_D, range(len(columns_D))] = 1.0
    return members_KD


def _encoder(members_KD: torch.Tensor, design: TabnetDesign) -> nn.Module:
    """Return the library's encoder, with norms and groups that this frame can use."""
    groups_KD = members_KD / members_KD.sum(dim=1, keepdim=True)  # as its create_group_matrix does
    encoder: nn.Module = TabNetEncoder(
        members_KD.shape[1],
        0,  # it ignores the number of outputs
        n_d=design.width,
        n_a=design.width,
        n_steps=design.num_steps,
        gamma=design.gamma,
        n_independent=_NUM_LAYERS,
        n_shared=_NUM_LAYERS,
        momentum=_MOMENTUM,
        group_attention_matrix=groups_KD,
    )
    del encoder.group_attention_matrix  # a plain tensor there, which stays on the CPU
    encoder.register_buffer("group_attention_matrix", groups_KD, persistent=False)
    # .01 there: the means of a small table would still be on their way when training ends.
    cast(nn.BatchNorm1d, encoder.initial_bn).momentum = _MOMENTUM
    for layer in list(encoder.modules()):
        if isinstance(norm := getattr(layer, "bn", None), GBN):
            layer.bn = GhostNorm(norm.bn, design.virtual_batch_rows)
    return encoder
