"""Kind ``nn``: one network for all targets, trained from encoded shards.

Only the section and the two entries of the protocol are here, so that reading params.yaml loads no
torch; the network itself is in ``mlp``. Memory does not grow with the inputs: batches come
from the shards on disk. Weights depend on ``threads``, which is why it is a parameter and no
resource.

The defaults are for tables of mixed columns with noisy labels, where a network overfits within a
few epochs: strong dropout, short vectors for categories. On the example (213k rows) they reach an
AUC of .692 on valid and .696 on test rows in 33 CPU seconds, beside CatBoost's .694 and
.690; with dropout .1 and vectors of 32 it is .687 and .691. On Adult: AUC .912.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from headrace.models.network_params import NetworkParams
from headrace.models.protocol import TrainViews
from headrace.params import Resources
from headrace.record import Recorder

if TYPE_CHECKING:
    from headrace.models.mlp import MlpDesign
    from headrace.models.network import NetworkLearner, NetworkModel

Width = Annotated[int, Field(ge=1, le=65_536)]


class NnParams(NetworkParams):
    """Section ``train.nn`` of params.yaml: the network's shape, and how it is trained."""

    hidden_sizes: Annotated[tuple[Width, ...], Field(strict=False, min_length=1)] = (256, 128)
    activation: Literal["relu", "gelu", "silu"] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    batch_norm: bool = False
    embedding_size: Annotated[int, Field(ge=1, le=4096)] = 8  # at most, per category


def fit(
    views: TrainViews,
    params: NnParams,
    *,
    checkpoints: Path,
    resources: Resources,
    recorder: Recorder,
) -> "NetworkModel":
    """Train the network on the rows ``views`` allows; keep the weights of the best epoch.

    Raises:
        ConfigError: if a setting names no target.
        DataError: if a loss is not finite, with row ids.
        DependencyError: if the device asked for is not there.
    """
    from headrace.models.network import fit_network

    return fit_network(
        views,
        params,
        _design(params),
        checkpoints=checkpoints,
        resources=resources,
        recorder=recorder,
    )


def open_learner(views: TrainViews, params: NnParams, *, resources: Resources) -> "NetworkLearner":
    """Return what ``fit`` trains, before its first step, for a measurement of the loop.

    Raises:
        ConfigError: if a setting names no target.
        DependencyError: if the device asked for is not there.
    """
    from headrace.models.network import open_network
    from headrace.training.device import pick_device

    device = pick_device(params.device)
    return open_network(views, params, _design(params), device=device, resources=resources)


def load(folder: Path, description: Mapping[str, Any]) -> "NetworkModel":
    """Read back what ``save`` wrote."""
    from headrace.models.mlp import MlpDesign
    from headrace.models.network import load_network

    return load_network(folder, description, MlpDesign)


def _design(params: NnParams) -> "MlpDesign":
    from headrace.models.mlp import MlpDesign

    return MlpDesign(
        hidden_sizes=params.hidden_sizes,
        activation=params.activation,
        dropout=params.dropout,
        batch_norm=params.batch_norm,
        embedding_size=params.embedding_size,
    )
