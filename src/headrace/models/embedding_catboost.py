"""Kind ``embedding_catboost``: trees on raw columns and on what a bag of networks says of a row.

A second-level model, made by a stage of its own after ``train@nn``. The networks are those of a
bag. A train row gets its features from the one network that has not seen the row's fold, any other
row the mean of all: what a network says of rows it was fitted on already holds their labels, and
trees that trust it lose 4 % of RMSE on California housing. In-sample features are not offered.

``predictions`` is one number per target (of a multiclass target one per class). ``embeddings`` is
what the networks' heads read. Each network has axes of its own, so every space is turned into that
of the first one (``Space``).

The model reads rows of the reduced table and encodes them for its networks itself, so it is used
like any other kind of trees. Features are computed from the row, never joined by position.

Legend of axes: N rows, F features, H width of an embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, ValidationError

from headrace.errors import DataError, IntegrityError, SchemaError
from headrace.models import catboost, nn
from headrace.models.bagging import BaggedModel, member_name
from headrace.models.catboost import CatboostParams
from headrace.models.protocol import FittedModel, Values
from headrace.params import Section
from headrace.storage import read_json, write_json

if TYPE_CHECKING:
    from headrace.data.encoder import EncodedBatch, Encoder

Floats = npt.NDArray[np.float64]
Features = Literal["predictions", "embeddings"]

_CONFIG = "embedding.json"
_SPACES = "spaces.safetensors"
_NETWORKS, _TREES, _ENCODER = "networks", "trees", "encoder"  # folders
_PREFIX = "nn/"  # of the names of features


class EmbeddingCatboostParams(CatboostParams):
    """Section ``embedding_catboost`` of params.yaml: the trees, and what they get of the nn."""

    key: ClassVar[str] = "embedding_catboost"

    features: Features = "predictions"
    # How much the gain of a split on such a feature counts beside that of one on a raw column. With
    # 1 the trees say little more than the networks, which is good only where those are better
    # (docs/embedding_catboost.md); below 1 on the CPU only.
    network_weight: Annotated[float, Field(gt=0, le=1)] = 0.02

    @property
    def only_on_cpu(self) -> str:
        """Name of the setting that a GPU cannot follow; empty if there is none."""
        return "network_weight" if self.network_weight < 1 else super().only_on_cpu

    def feature_weights(self, features: Sequence[str]) -> list[float] | None:
        """Return how much the gain of a split counts, by input."""
        return [self.network_weight if name.startswith(_PREFIX) else 1.0 for name in features]


class _Config(Section):
    """The content of embedding.json."""

    format: Literal[1] = 1
    features: Features
    networks: Annotated[tuple[str, ...], Field(strict=False)]
    trees: Annotated[tuple[str, ...], Field(strict=False)]


class EmbeddingModel(Protocol):
    """A fitted model that can embed rows."""

    def embed(self, rows: "EncodedBatch") -> npt.NDArray[np.float32]:
        """Return (N, H)."""


@dataclass(frozen=True)
class Space:
    """How one network's embeddings are moved and turned to lie beside those of the first one.

    Orthogonal Procrustes: of all rotations and reflections the one that brings this network's
    embeddings of the same rows nearest to the first one's, both about their mean. Shapes:
    ``mean_H`` this network's mean, ``rotation_HH``, ``origin_H`` the first one's mean.
    """

    mean_H: Floats
    rotation_HH: Floats
    origin_H: Floats

    def map(self, embedding_NH: npt.NDArray[np.float32]) -> Floats:
        """Return the embeddings in the first network's space."""
        mapped: Floats = (embedding_NH - self.mean_H) @ self.rotation_HH + self.origin_H
        return mapped


@dataclass(frozen=True)
class NetworkFeatures:
    """What a bag of networks says of a row, as columns for trees.

    ``spaces`` has one per network for embeddings, and is empty for predictions.
    """

    networks: BaggedModel
    encoder: "Encoder"
    spaces: Mapping[str, Space]

    def added_to(self, rows: pa.Table) -> pa.Table:
        """Return ``rows`` with the features as further columns, float32.

        Rows with a fold get what the network that has not seen it says, others the mean of all.

        Raises:
            DataError: if ``rows`` has a column of that name already.
        """
        encoded = self.encoder.transform(rows)
        columns: dict[str, Floats] = {}
        for fold in np.unique(encoded.fold):
            places = np.flatnonzero(encoded.fold == fold)
            who = list(self.networks.members) if fold < 0 else [member_name(fold)]
            told = [self._told(name, encoded.where(places)) for name in who]
            for column in told[0]:
                values = columns.setdefault(column, np.empty(len(encoded)))
                parts = [one[column] for one in told]
                weights = [self.networks.weights[name] for name in who]
                values[places] = np.average(parts, axis=0, weights=weights)
        if taken := [column for column in columns if column in rows.column_names]:
            raise DataError(
                f"the table has the columns {taken}, as the features of the networks are called; "
                f"rename them in the recipe"
            )
        for column, values in columns.items():
            rows = rows.append_column(column, pa.array(values.astype(np.float32)))
        return rows

    def _told(self, name: str, rows: "EncodedBatch") -> dict[str, Floats]:
        """Return what one network says, by column."""
        network = self.networks.members[name]
        if self.spaces:
            values_NH = self.spaces[name].map(cast(EmbeddingModel, network).embed(rows))
            return {f"{_PREFIX}{place}": values_NH[:, place] for place in range(values_NH.shape[1])}
        columns = {}
        for target, values in network.predict(rows).items():
            if values.ndim == 1:
                columns[f"{_PREFIX}{target}"] = values
            else:
                columns |= {
                    f"{_PREFIX}{target}/{place}": values[:, place]
                    for place in range(values.shape[1])
                }
        return columns


def network_features(
    networks: BaggedModel, encoder: "Encoder", features: Features, rows: pa.Table
) -> NetworkFeatures:
    """Return the features that ``features`` asks for; ``rows`` show how the spaces lie.

    No label of ``rows`` is looked at. They should be rows that no network was fitted on.
    """
    if features == "predictions":
        return NetworkFeatures(networks, encoder, {})
    encoded = encoder.transform(rows)
    told = {
        name: cast(EmbeddingModel, network).embed(encoded).astype(np.float64)
        for name, network in networks.members.items()
    }
    first_NH = next(iter(told.values()))
    spaces = {name: _turned(own_NH, first_NH) for name, own_NH in told.items()}
    return NetworkFeatures(networks, encoder, spaces)


def _turned(own_NH: Floats, first_NH: Floats) -> Space:
    mean_H, origin_H = own_NH.mean(axis=0), first_NH.mean(axis=0)
    u_HH, _, v_HH = np.linalg.svd((own_NH - mean_H).T @ (first_NH - origin_H))
    return Space(mean_H, u_HH @ v_HH, origin_H)


class EmbeddingCatboostModel:
    """A bag of trees on raw columns and on the features of a bag of networks."""

    kind = "embedding_catboost"
    inputs: Literal["table"] = "table"

    def __init__(self, features: NetworkFeatures, trees: BaggedModel) -> None:
        self.features = features
        self.trees = trees

    @property
    def summary(self) -> Mapping[str, Any]:
        """What each member of the bag of trees says, by its name."""
        return self.trees.summary

    @property
    def tuned(self) -> Mapping[str, float]:
        """What the trees' stop rows settled."""
        return self.trees.tuned

    def predict(self, rows: "EncodedBatch | pa.Table") -> Values:
        """Return per target the value, P(labels[1]) or the class probabilities of each row.

        Raises:
            SchemaError: if the rows lack an input column.
        """
        if not isinstance(rows, pa.Table):
            raise SchemaError("trees read rows of the reduced table, not encoded ones")
        return self.trees.predict(self.features.added_to(rows))

    def save(self, folder: Path) -> None:
        """Write embedding.json, the networks with their encoder and spaces, and the trees."""
        from safetensors.numpy import save_file

        for name, bag in ((_NETWORKS, self.features.networks), (_TREES, self.trees)):
            (folder / name).mkdir()
            bag.save(folder / name)
        (folder / _ENCODER).mkdir()
        self.features.encoder.save(folder / _ENCODER)
        spaces = self.features.spaces
        if spaces:
            tensors = {
                f"{name}/{part}": value
                for name, space in spaces.items()
                for part, value in vars(space).items()
            }
            save_file(tensors, folder / _SPACES)
        config = _Config(
            features="embeddings" if spaces else "predictions",
            networks=tuple(self.features.networks.members),
            trees=tuple(self.trees.members),
        )
        write_json(folder / _CONFIG, config.model_dump(mode="json"))


def load(folder: Path, description: Mapping[str, Any]) -> EmbeddingCatboostModel:
    """Read back what ``save`` wrote.

    Raises:
        IntegrityError: if a file is missing or is not what it must be.
    """
    from safetensors import SafetensorError

    from headrace.data.encoder import Encoder

    try:
        config = _Config.model_validate(read_json(folder / _CONFIG))
        spaces = _load_spaces(folder) if config.features == "embeddings" else {}
    except (ValidationError, SafetensorError, OSError) as error:
        raise IntegrityError(
            f"{folder} does not hold a whole model ({error}); run `headrace repro`"
        ) from error
    networks: dict[str, FittedModel] = {
        name: nn.load(folder / _NETWORKS / name, {}) for name in config.networks
    }
    summaries = description.get("summary", {})
    trees: dict[str, FittedModel] = {
        name: catboost.load(folder / _TREES / name, {"summary": summaries.get(name, {})})
        for name in config.trees
    }
    features = NetworkFeatures(BaggedModel(networks), Encoder.load(folder / _ENCODER), spaces)
    return EmbeddingCatboostModel(features, BaggedModel(trees))


def _load_spaces(folder: Path) -> dict[str, Space]:
    from safetensors.numpy import load_file

    parts: dict[str, dict[str, Floats]] = {}
    for key, value in load_file(folder / _SPACES).items():
        name, part = key.split("/")
        parts.setdefault(name, {})[part] = value
    return {name: Space(**own) for name, own in parts.items()}
