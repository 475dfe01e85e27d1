"""Kind ``factorization``: two categories by their labels alone, as users and items of ratings.

Only rows of the table are learnt from: a pair that nobody rated is absent and counts for nothing.
All other inputs are left aside. An unseen label leaves the other's bias and the mean. The network
is in ``factors``.

How much the weights are pulled to 0 decides most, so it is searched: a short fit from a fresh
network per candidate, judged on the rows early stopping looks at, then the whole fit with the best.
Each candidate has checkpoints of its own, so a killed search goes on where it was.

The defaults are for tables of ratings. On MovieLens 100K, split u1, with a tenth of the ratings
for valid, the RMSE is .934 by one fit and .936 by a bag of five; the mean of all ratings has 1.154.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from headrace.errors import ConfigError, nearest
from headrace.models.network_params import NetworkParams, OutputRange
from headrace.models.protocol import TrainViews
from headrace.params import Resources
from headrace.record import MemoryRecorder, Recorder
from headrace.storage import write_file

if TYPE_CHECKING:
    from headrace.models.factors import FactorDesign
    from headrace.models.network import NetworkLearner, NetworkModel

WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_SEARCH_EPOCHS, _SEARCH_PATIENCE = 20, 2


class FactorizationParams(NetworkParams):
    """Section ``train.factorization`` of params.yaml: whose labels, and how they are learnt."""

    # The two categories, as [user, item]; may be left out where the table has two and no more.
    columns: Annotated[tuple[str, str], Field(strict=False)] | None = None
    dim: Annotated[int, Field(ge=1, le=4096)] = 8  # factors per label
    # Times the squares of the vectors and biases that a row looks up, added to its loss. search:
    # the best of 1e-1, 1e-2, …, 1e-6. What reaches the training loop is a number.
    weight_decay: Annotated[float, Field(ge=0)] | Literal["search"] = "search"  # type: ignore[assignment]
    output_range: OutputRange = "seen"
    learning_rate: Annotated[float, Field(gt=0)] = 3.0e-3
    patience: Annotated[int, Field(ge=1)] = 4

    @model_validator(mode="after")
    def _no_numbers_are_read(self) -> Self:
        if self.input_noise:
            raise ValueError("input_noise has no effect: a factorization reads no numbers")
        return self


def fit(
    views: TrainViews,
    params: FactorizationParams,
    *,
    checkpoints: Path,
    resources: Resources,
    recorder: Recorder,
) -> "NetworkModel":
    """Factorize the rows ``views`` allows; keep the weights of the best epoch.

    Records a figure per target: the labels with the highest and lowest biases.

    Raises:
        ConfigError: if a setting names no category or no target.
        DataError: if a loss is not finite, with row ids.
        DependencyError: if the device asked for is not there.
    """
    from headrace.models.bias_figure import bias_figures
    from headrace.models.network import fit_network
    from headrace.training.distributed import current_ranks

    columns = _columns(views, params)
    searched: dict[float, float] = {}
    if params.weight_decay == "search" and "weight_decay" in views.tuned:
        params = _with_decay(params, views.tuned["weight_decay"])
    elif params.weight_decay == "search":
        searched = _search(views, params, columns, checkpoints, resources, recorder)
        params = _with_decay(params, min(searched, key=lambda decay: searched[decay]))
    model = fit_network(
        views,
        params,
        _design(params, columns),
        checkpoints=checkpoints,
        resources=resources,
        recorder=recorder,
    )
    model.tell(
        {
            "weight_decay": params.weight_decay,
            "searched": {f"{decay:.0e}": loss for decay, loss in searched.items()},
        }
    )
    if current_ranks().is_first:
        for figure in bias_figures(model, views.encoded, columns, views.contract.targets):
            path = checkpoints / f"{figure.name}.svg"
            write_file(path, figure.file_text())
            recorder.file(path, folder="figures")
    return model


def open_learner(
    views: TrainViews, params: FactorizationParams, *, resources: Resources
) -> "NetworkLearner":
    """Return what ``fit`` trains, before its first step, for a measurement of the loop.

    Raises:
        ConfigError: if a setting names no category or no target.
        DependencyError: if the device asked for is not there.
    """
    from headrace.models.network import open_network
    from headrace.training.device import pick_device

    if params.weight_decay == "search":
        params = _with_decay(params, WEIGHT_DECAYS[0])
    design = _design(params, _columns(views, params))
    device = pick_device(params.device)
    return open_network(views, params, design, device=device, resources=resources)


def load(folder: Path, description: Mapping[str, Any]) -> "NetworkModel":
    """Read back what ``save`` wrote."""
    from headrace.models.factors import FactorDesign
    from headrace.models.network import load_network

    return load_network(folder, description, FactorDesign)


def _columns(views: TrainViews, params: FactorizationParams) -> tuple[str, str]:
    """Return the two categories, which must have labels of their own codes.

    Raises:
        ConfigError: if they are not named and not the only ones, or are no categories.
    """
    from headrace.data.encoder import open_encoder

    known = [category.name for category in open_encoder(views.encoded).categories]
    if params.columns is None:
        if len(known) != 2:
            raise ConfigError(
                f"`train.factorization.columns` is not set, and the categories are {known}; name "
                f"two of them, as [user, item]"
            )
        return known[0], known[1]
    for name in params.columns:
        if name not in known:
            raise ConfigError(
                f"`train.factorization.columns` names {name!r}, which is not among the categories "
                f"that `encode` keeps{nearest(name, known) or f': {known}'}"
            )
    if len(set(params.columns)) < 2:
        raise ConfigError(
            f"`train.factorization.columns` is {list(params.columns)}; it must name two categories"
        )
    return params.columns


def _with_decay(params: FactorizationParams, weight_decay: float) -> FactorizationParams:
    return params.model_copy(update={"weight_decay": weight_decay})


def _design(params: FactorizationParams, columns: tuple[str, str]) -> "FactorDesign":
    from headrace.models.factors import FactorDesign

    return FactorDesign(columns=columns, dim=params.dim, weight_decay=float(params.weight_decay))


def _search(
    views: TrainViews,
    params: FactorizationParams,
    columns: tuple[str, str],
    checkpoints: Path,
    resources: Resources,
    recorder: Recorder,
) -> dict[float, float]:
    """Return the inner loss of a short fit with each weight decay, and record them."""
    from headrace.models.network import fit_network

    losses = {}
    for decay in WEIGHT_DECAYS:
        short = _with_decay(params, decay).model_copy(
            update={
                "max_epochs": min(params.max_epochs, _SEARCH_EPOCHS),
                "patience": min(params.patience, _SEARCH_PATIENCE),
                "stop_on": "loss",
                "health": "off",
            }
        )
        name = f"weight-decay-{decay:.0e}"
        model = fit_network(
            views,
            short,
            _design(short, columns),
            checkpoints=checkpoints / name,
            resources=resources,
            recorder=_Candidate(recorder, name),
        )
        losses[decay] = float(model.summary["inner_loss"])
        recorder.metrics({f"search_inner_loss/{name}": losses[decay]})
    best = min(losses, key=lambda decay: losses[decay])
    recorder.params({"weight_decay_found": best})
    recorder.note(
        f"Weight decay {best:.0e} is the best of "
        f"{', '.join(f'{decay:.0e} ({loss:.4g})' for decay, loss in losses.items())}: inner loss "
        f"of a short fit in brackets."
    )
    return losses


class _Candidate(MemoryRecorder):
    """Keeps to itself what a short fit tells, but for progress and warnings."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        super().__init__()
        self._recorder = recorder
        self._name = name

    def warn(self, text: str) -> None:
        self._recorder.warn(f"{self._name}: {text}")

    def progress(self, done: int, total: int | None, *, unit: str, detail: str = "") -> None:
        self._recorder.progress(done, total, unit=unit, detail=f"{self._name}, {detail}")
