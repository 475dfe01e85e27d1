"""Kind ``nn``: one network for all targets, trained from encoded shards.

Only the section and the entries of the protocol are here, so that reading params.yaml loads no
torch; the network itself is in ``mlp``. Batches come from the shards on disk; held in memory are,
per row, only its fold, id, labels and weight. Weights depend on ``threads``, which is why it is a
parameter and no resource.

The defaults reach published tuned networks on tables of numbers (California housing) and of mixed
columns (Adult): ``benchmarks/quality.py``. ``members: 1`` makes a plain MLP of it, several times
faster.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from headrace.models.network_params import NetworkParams
from headrace.models.protocol import TrainViews
from headrace.params import Resources
from headrace.record import Recorder
from headrace.training.params import Activation, Share

if TYPE_CHECKING:
    from headrace.models.mlp import MlpDesign
    from headrace.models.network import NetworkLearner, NetworkModel

_SHAPE = (
    "members", "hidden_sizes", "activation", "dropout", "batch_norm", "numbers", "bins",
    "number_size", "one_hot_labels", "embedding_size",
)  # fmt: skip
Width = Annotated[int, Field(ge=1, le=65_536)]


class NnParams(NetworkParams):
    """Section ``train.nn`` of params.yaml: the network's shape, and how it is trained."""

    # Networks in one, which share most weights; predictions are their mean. 1: a plain MLP.
    members: Annotated[int, Field(ge=1, le=1024)] = 8
    hidden_sizes: Annotated[tuple[Width, ...], Field(strict=False, min_length=1)] = (128, 128)
    activation: Activation = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    batch_norm: bool = False  # of a plain MLP
    # How a number enters: as its place among ``bins`` of equally many rows, by sines and cosines
    # of it, or as it is; in any case made about normal first.
    numbers: Literal["piecewise", "periodic", "plain"] = "piecewise"
    bins: Annotated[int, Field(ge=2, le=4096)] = 128
    number_size: Annotated[int, Field(ge=1, le=4096)] = 16  # length of a number's vector
    # A category of at most so many labels is one-hot; others get vectors of at most this length.
    one_hot_labels: Annotated[int, Field(ge=0, le=4096)] = 8
    embedding_size: Annotated[int, Field(ge=1, le=4096)] = 32
    max_epochs: Annotated[int, Field(ge=1)] = 200
    patience: Annotated[int, Field(ge=1)] = 16
    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-3
    weight_decay: Annotated[float, Field(ge=0)] = 3.0e-4
    weight_average: Share = 0.998

    @model_validator(mode="after")
    def _shape_takes_effect(self) -> Self:
        if self.batch_norm and self.members > 1:
            raise ValueError(
                f"batch_norm is for a plain MLP, but members is {self.members}; set members to 1"
            )
        idle = {"piecewise": (), "periodic": ("bins",), "plain": ("bins", "number_size")}
        for name in idle[self.numbers]:
            if getattr(self, name) != NnParams.model_fields[name].default:
                raise ValueError(f"{name} has no effect where numbers is {self.numbers}")
        return self


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

    return MlpDesign(**{name: getattr(params, name) for name in _SHAPE})
