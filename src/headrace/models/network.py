"""What all kinds of networks share: inputs, targets, losses, batches, saved form.

Legend of axes: B rows of the batch, N numeric inputs, C categories, K members of an ensemble in
one network (1 for a plain one), O outputs of one head (1, or the classes of a multiclass target),
H width of the layer before the heads.

A kind brings a ``Design``: a section that says how its network is built from the inputs and from
what a sample of the rows learnt from teaches (bins, say). The network gives per target and member a
logit, or the standardised value; losses are computed on those, member by member, then averaged.
The prediction is the mean of the members' values or probabilities.

A label that is missing has weight 0 in the loss of its target; the row still teaches the others.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from headrace.data.encoder import EncodedBatch, Encoder, open_encoder
from headrace.data.look import look_at
from headrace.data.order import Kind
from headrace.data.shards import Shards, open_shards
from headrace.data.stream import Batch, BatchStream, loader, to_tensors
from headrace.data.transfer import Mode, to_device
from headrace.errors import ConfigError, DataError, IntegrityError, SchemaError, nearest
from headrace.models.network_params import NetworkParams, OutputRange
from headrace.models.protocol import TrainViews, Values
from headrace.params import Resources, Section
from headrace.record import Recorder
from headrace.schema import Target
from headrace.storage import read_json, write_file, write_json
from headrace.training.augment import draws
from headrace.training.checkpoint import Checkpoints
from headrace.training.device import RandomStream, torch_threads
from headrace.training.distributed import ALONE, Ranks, current_ranks
from headrace.training.health import Health
from headrace.training.learner import EPOCH_METRICS, Losses, LossMeans, Validation
from headrace.training.loop import Outcome, train_network
from headrace.training.params import PredictDraws, batch_rows_for
from headrace.training.weights import load_weights, stored_weights

if TYPE_CHECKING:
    from headrace.training.metrics import EpochMetrics

_CONFIG = "network.json"
_WEIGHTS = "weights.safetensors"
_FIRST_BATCH = "first_batch.txt"  # what the network was fed first, decoded
_SHOWN_ROWS = 8
_PREDICT_ROWS = 8192  # bounds the memory of a prediction, whatever batch the caller brings
_EVALUATE_ROWS = 16_384
_EXACT_BYTES = 8 << 30  # packed rows that the page cache of most machines keeps
_PINNED_SHARE = 8  # of the memory budget: the part that may be page-locked for a GPU
_SAMPLE_ROWS = 100_000  # of those learnt from, that a design's statistics are taken from
_RANGE_MARGIN = 0.1  # of an output range: how much wider the sigmoid is, on each side
_STATISTIC = "statistics/"  # prefix of their names beside the weights
_INIT, _TRAIN, _SAMPLE = 0, 1, 2  # names of random streams


class Inputs(Section):
    """What the network reads, in the order of the encoded arrays."""

    numeric: Annotated[tuple[str, ...], Field(strict=False)]
    has_missing: Annotated[tuple[int, ...], Field(strict=False)]  # positions in ``numeric``
    categories: Annotated[tuple[str, ...], Field(strict=False)]
    cardinalities: Annotated[tuple[int, ...], Field(strict=False)]


class TargetScale(Section):
    """Mean and spread of a regression target over the rows learnt from; 0 and 1 for classes.

    ``low`` and ``high`` bound its predictions, in the target's unit; None where nothing does.
    """

    mean: float
    std: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class InputSample:
    """Some of the rows learnt from, for what a design fits before training.

    Shapes: ``numeric_BN`` float32, standardised, NaN where missing; ``codes_BC`` integers.
    """

    numeric_BN: npt.NDArray[np.float32]
    codes_BC: npt.NDArray[Any]


PENALTY = "penalty"  # the name, among the losses, of what a network adds to them

Tensors: TypeAlias = Mapping[str, torch.Tensor]
Floats: TypeAlias = npt.NDArray[np.float64]


class Network(nn.Module):
    """A network with one head per target."""

    has_penalty = False  # whether ``penalty`` is added to the loss that is minimised
    least_rows = 2  # of a batch that it learns from

    def forward(self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor) -> list[torch.Tensor]:
        """Return one (B, K, O) tensor per target: logits, or the standardised value."""
        raise NotImplementedError

    def embed(self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor) -> torch.Tensor:
        """Return what the heads read: (B, H)."""
        raise NotImplementedError

    def penalty(self) -> torch.Tensor:
        """Return what the last forward pass adds to the mean loss of its rows: a scalar."""
        raise NotImplementedError


class Design(Protocol):
    """How a kind builds its network; a ``Section``, for it is saved with the weights."""

    @property
    def kind(self) -> str:
        """The kind of model, as in ``KINDS``."""

    def statistics(self, sample: InputSample, inputs: Inputs, *, seed: int) -> Tensors:
        """Return what the network has to know of the rows, such as bins; it is saved with it."""

    def build(self, inputs: Inputs, targets: Sequence[Target], statistics: Tensors) -> Network:
        """Return a fresh network; random numbers come from torch's generator."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return the fields as JSON values."""


class _Config(Section):
    """The content of network.json."""

    format: Literal[2] = 2
    inputs: Inputs
    design: dict[str, Any]
    targets: Annotated[tuple[Target, ...], Field(strict=False)]
    scales: Annotated[tuple[TargetScale, ...], Field(strict=False)]
    threads: int
    predict_draws: PredictDraws | None = None


class NetworkModel:
    """A trained network with what it takes to use it: input names, target scales."""

    inputs: Literal["encoded"] = "encoded"

    def __init__(
        self,
        network: Network,
        config: _Config,
        statistics: Tensors,
        *,
        kind: str,
        device: torch.device,
        summary: Mapping[str, Any],
    ) -> None:
        self.kind = kind
        self.network = network
        self._config = config
        self._statistics = statistics
        self._device = device
        self._summary = dict(summary)
        self._draws = (
            draws(
                config.predict_draws,
                num_numeric=len(config.inputs.numeric),
                num_categories=len(config.inputs.categories),
            )
            if config.predict_draws
            else []
        )

    @property
    def summary(self) -> Mapping[str, Any]:
        """Best epoch, loss on the inner part, number of parameters."""
        return self._summary

    @property
    def tuned(self) -> Mapping[str, float]:
        """The best epoch and, where it was searched, the weight decay."""
        names = ("best_epoch", "weight_decay")
        return {name: float(self._summary[name]) for name in names if name in self._summary}

    def tell(self, facts: Mapping[str, Any]) -> None:
        """Add to the summary what a kind knows beside it, as JSON values."""
        self._summary |= facts

    def predict(self, rows: EncodedBatch | pa.Table) -> Values:
        """Return per target the value, P(labels[1]) or the class probabilities of each row.

        Raises:
            SchemaError: if the rows are not encoded, or by another encoder.
        """
        parts: list[list[Floats]] = [[] for _ in self._config.targets]
        for inputs in self._in_parts(rows):
            drawn = [draw.changed(*inputs) for draw in self._draws] or [inputs]
            outputs = [self.network(*one) for one in drawn]
            for place, (target, scale) in enumerate(
                zip(self._config.targets, self._config.scales, strict=True)
            ):
                values = [
                    member_values(z[place].cpu().double(), target, scale).mean(dim=1)
                    for z in outputs
                ]
                parts[place].append(torch.stack(values).mean(dim=0).numpy())
        return {
            target.name: np.concatenate(values)
            for target, values in zip(self._config.targets, parts, strict=True)
        }

    def embed(self, rows: EncodedBatch | pa.Table) -> npt.NDArray[np.float32]:
        """Return what the heads read of each row: (B, H) float32.

        Raises:
            SchemaError: if the rows are not encoded, or by another encoder.
        """
        return np.concatenate(
            [self.network.embed(*part).float().cpu().numpy() for part in self._in_parts(rows)]
        )

    def save(self, folder: Path) -> None:
        """Write network.json and weights.safetensors."""
        state = stored_weights(self.network)
        state |= {f"{_STATISTIC}{name}": value for name, value in self._statistics.items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(tensors, folder / _WEIGHTS)
        write_json(folder / _CONFIG, self._config.model_dump(mode="json"))

    def _in_parts(
        self, rows: EncodedBatch | pa.Table
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield numbers and codes in parts that bound memory, with the network ready for them."""
        rows = self._checked(rows)
        self.network.eval()
        with torch_threads(self._config.threads), torch.inference_mode():
            for start in range(0, max(1, len(rows)), _PREDICT_ROWS):
                stop = min(len(rows), start + _PREDICT_ROWS)
                part = to_tensors(rows.where(np.arange(start, stop))).to(self._device)
                yield part.numeric, part.codes

    def _checked(self, rows: EncodedBatch | pa.Table) -> EncodedBatch:
        inputs = self._config.inputs
        if not isinstance(rows, EncodedBatch):
            raise SchemaError("a network reads encoded rows; pass them through its encoder first")
        found = (rows.numeric.shape[1], rows.codes.shape[1])
        expected = (len(inputs.numeric), len(inputs.categories))
        beyond = rows.codes.max(axis=0, initial=0) >= np.array(inputs.cardinalities)
        if found != expected or beyond.any():
            raise SchemaError(
                f"the rows have {found[0]} numeric and {found[1]} category inputs, or codes that "
                f"the network has not; it was trained on {expected[0]} and {expected[1]}: encode "
                f"them with the encoder of this model"
            )
        return rows


def fit_network(
    views: TrainViews,
    params: NetworkParams,
    design: Design,
    *,
    checkpoints: Path,
    resources: Resources,
    recorder: Recorder,
    model: type[NetworkModel] = NetworkModel,
) -> NetworkModel:
    """Train the network of ``design`` on the rows that ``views`` allows; keep the best weights.

    Returns a ``model``.

    Raises:
        ConfigError: if a setting names no target, or a batch is larger than the set.
        DataError: if a loss is not finite, with row ids; if there are too few rows.
        DependencyError: if the device asked for is not there.
    """
    ranks = current_ranks()
    device = ranks.device(params.device)
    with torch_threads(params.threads):
        learner = open_network(
            views,
            params,
            design,
            device=device,
            resources=resources,
            log=None if device.type == "cpu" else recorder.note,  # there is nothing to choose
            warn=recorder.warn,
            ranks=ranks,
        )
        _record(recorder, learner, device, ranks)
        if ranks.is_first:
            learner.on_first = lambda batch: _record_batch(
                recorder, batch, views.encoded, checkpoints
            )
        signature = _signature(learner.config, params, views, device)
        ranks.require_same("what is trained", f"{signature} {learner.data_digest}")
        health = (
            None
            if params.health == "off"
            else Health(learner, params, folder=checkpoints, recorder=recorder, ranks=ranks)
        )
        with contextlib.closing(learner):
            outcome = train_network(
                learner,
                params,
                stop_on=params.stop_on,
                length=round(views.tuned["best_epoch"]) if views.stop.kind == "none" else None,
                stream=RandomStream(params.seed, _TRAIN, device=device),
                checkpoints=Checkpoints(checkpoints, signature=signature, recorder=recorder),
                recorder=recorder,
                observer=health,
                ranks=ranks,
            )
        curves: dict[str, Any] = {}
        if health is not None:
            health.finish(outcome)
            curves = {"curves": health.curves(outcome)}
    return model(
        cast(Network, learner.network),
        learner.config,
        learner.statistics,
        kind=design.kind,
        device=device,
        summary=_summary(outcome, params.stop_on, learner.config.targets) | curves,
    )


def open_network(
    views: TrainViews,
    params: NetworkParams,
    design: Design,
    *,
    device: torch.device,
    resources: Resources,
    log: Callable[[str], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
    ranks: Ranks = ALONE,
) -> "NetworkLearner":
    """Return what ``fit_network`` trains, before its first step: network, batches, losses.

    ``log`` hears how batches reach the device, ``warn`` that reading processes died.

    Raises:
        ConfigError: if a setting names no target, or a batch is larger than the set.
        DataError: if there are too few rows for the network.
    """
    targets = views.contract.targets
    _refuse_unknown_targets(targets, params, design.kind)
    shards = open_shards(views.encoded, "train", contract_digest=views.contract.digest)
    parts = _Parts.of(shards, views)
    inputs = _inputs(open_encoder(views.encoded))
    scales = target_scales(shards, targets, parts.learn, views, params.output_range)
    sample = _sample(shards, parts.learn, seed=params.seed)
    statistics = design.statistics(sample, inputs, seed=params.seed)
    with RandomStream(params.seed, _INIT, device=device).lent():
        network = design.build(inputs, targets, statistics)
    network.to(device)
    num_learnt = int(parts.learn.sum())
    _refuse_few_rows(num_learnt, network.least_rows, params, design.kind)
    return NetworkLearner(
        network,
        _Config(
            inputs=inputs,
            design=design.model_dump(mode="json"),
            targets=targets,
            scales=scales,
            threads=params.threads,
            predict_draws=params.draws_for_predictions,
        ),
        statistics,
        parts,
        views,
        batch_rows=params.batch_rows or batch_rows_for(num_learnt),
        order=_order(params.order, shards, num_learnt),
        seed=params.seed,
        factors={target.name: params.target_weights.get(target.name, 1.0) for target in targets},
        device=device,
        transfer=params.transfer,
        resources=resources,
        log=log,
        warn=warn,
        ranks=ranks,
    )


DesignKind = TypeVar("DesignKind", bound=Section)


def load_network(
    folder: Path,
    description: Mapping[str, Any],
    design_kind: type[DesignKind],
    *,
    model: type[NetworkModel] = NetworkModel,
) -> NetworkModel:
    """Read a network that ``NetworkModel.save`` wrote, as a ``model``; it predicts on the CPU.

    Raises:
        IntegrityError: if a file is missing or does not fit the other.
    """
    try:
        config = _Config.model_validate(read_json(folder / _CONFIG))
        design = cast(Design, design_kind.model_validate(config.design))
        tensors = load_file(folder / _WEIGHTS)
        statistics = {
            name.removeprefix(_STATISTIC): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(_STATISTIC)
        }
        network = design.build(config.inputs, config.targets, statistics)
        load_weights(network, tensors)
    except (ValidationError, SafetensorError, RuntimeError, KeyError, FileNotFoundError) as error:
        raise IntegrityError(
            f"{folder} does not hold a whole network ({error}); train the model again"
        ) from error
    return model(
        network,
        config,
        statistics,
        kind=design.kind,
        device=torch.device("cpu"),
        summary=description.get("summary", {}),
    )


def _order(
    wanted: Literal["auto", "exact", "window", "block"], shards: Shards, num_rows: int
) -> Kind:
    """Return the order of training. By the set alone: a machine must not change the result."""
    if wanted != "auto":
        return wanted
    return "exact" if num_rows * shards.schema.rows.row_bytes <= _EXACT_BYTES else "window"


@dataclass(frozen=True)
class _Parts:
    """The rows learnt from and those held back, as masks of two (or once the same) splits."""

    shards: Shards
    learn: npt.NDArray[np.bool_]
    held_back: Shards
    stop: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, shards: Shards, views: TrainViews) -> "_Parts":
        fold = shards.read("fold")
        is_by_id = views.stop.kind == "share" or views.draw is not None
        row_id = shards.read("row_id") if is_by_id else np.zeros(len(fold), np.int64)
        learn = views.is_learnt(fold, row_id)
        if views.stop.kind != "valid":
            return cls(shards, learn, shards, views.is_stop(fold, row_id))
        valid = open_shards(views.encoded, "valid", contract_digest=views.contract.digest)
        return cls(shards, learn, valid, np.ones(valid.num_rows, bool))


def target_scales(
    shards: Shards,
    targets: Sequence[Target],
    learn: npt.NDArray[np.bool_],
    views: TrainViews,
    ranges: OutputRange,
) -> tuple[TargetScale, ...]:
    """Return mean and spread of each regression target over the rows that ``learn`` marks."""
    y_BT, weight_B = _labels(shards, learn, views)
    scales = []
    for place, target in enumerate(targets):
        is_known = ~np.isnan(y_BT[:, place])
        y, weight = y_BT[is_known, place], weight_B[is_known]
        if target.task != "regression" or not weight.sum() > 0:
            scales.append(TargetScale(mean=0.0, std=1.0))
            continue
        mean = float(np.average(y, weights=weight))
        std = math.sqrt(float(np.average((y - mean) ** 2, weights=weight)))
        low = high = None
        if ranges != "seen":
            low, high = ranges.get(target.name, (None, None))
        elif std > 0:
            low, high = float(y[weight > 0].min()), float(y[weight > 0].max())
        scales.append(TargetScale(mean=mean, std=std or 1.0, low=low, high=high))
    return tuple(scales)


def constant_loss(y_B: Floats, weight_B: Floats, target: Target, scale: TargetScale) -> float:
    """Return the loss of the best constant prediction: variance, or entropy of the classes.

    Shapes: ``y_B`` (B,) the value or class code, NaN where missing. NaN without a labelled row.
    """
    is_known = ~np.isnan(y_B)
    y, weight = y_B[is_known], weight_B[is_known]
    if not weight.sum() > 0:
        return math.nan
    if target.task == "regression":
        return float(np.average(((y - scale.mean) / scale.std) ** 2, weights=weight))
    share = np.bincount(y.astype(np.int64), weights=weight) / weight.sum()
    return float(-(share * np.log(share, where=share > 0, out=np.zeros_like(share))).sum())


def _labels(
    shards: Shards, learn: npt.NDArray[np.bool_], views: TrainViews
) -> tuple[Floats, Floats]:
    """Return labels (B, T) and weights (B,) of the rows learnt from."""
    y_BT = shards.read("targets")[learn].astype(np.float64)
    weight_B = shards.read("weight")[learn].astype(np.float64)
    if views.draw is not None:
        weight_B = weight_B * views.counts(shards.read("row_id")[learn])
    return y_BT, weight_B


def _some_of(shards: Shards, rows: npt.NDArray[np.bool_], most: int, *, seed: int) -> EncodedBatch:
    """Return the rows that ``rows`` marks, or as many of them as ``most``, drawn by ``seed``."""
    places = np.flatnonzero(rows)
    if len(places) > most:
        rng = np.random.default_rng([seed, _SAMPLE])
        places = np.sort(rng.choice(places, most, replace=False))
    return shards.take(places)


def _sample(shards: Shards, learn: npt.NDArray[np.bool_], *, seed: int) -> InputSample:
    """Return the inputs of rows learnt from, at most ``_SAMPLE_ROWS``."""
    rows = _some_of(shards, learn, _SAMPLE_ROWS, seed=seed)
    return InputSample(rows.numeric.astype(np.float32), rows.codes)


class NetworkLearner:
    """The network with its batches and losses, as the training loop asks for them."""

    def __init__(
        self,
        network: Network,
        config: _Config,
        statistics: Tensors,
        parts: _Parts,
        views: TrainViews,
        *,
        batch_rows: int,
        order: Kind,
        seed: int,
        factors: Mapping[str, float],
        device: torch.device,
        transfer: Mode,
        resources: Resources,
        log: Callable[[str], None] | None,
        warn: Callable[[str], None],
        ranks: Ranks,
    ) -> None:
        self.network: nn.Module = network
        self.config = config
        self.statistics = statistics
        self._views = views
        self._parts = parts
        self._seed = seed
        self._stream = BatchStream(
            parts.shards,
            batch_size=ranks.share_of(batch_rows),
            order=order,
            seed=seed,
            rows=parts.learn,
            rank=ranks.rank,
            num_ranks=ranks.size,
            # The same batches for any number of ranks: norms and losses span them.
            least_tail=network.least_rows,
        )
        self._held_back = BatchStream(
            parts.held_back,
            batch_size=_EVALUATE_ROWS,
            order="sequential",
            rows=parts.stop,
            rank=ranks.rank,
            num_ranks=ranks.size,
        )
        self._loader = loader(self._stream, num_workers=resources.workers, warn=warn)
        self.there = to_device(
            self._loader,
            device,
            mode=transfer,
            pinned_cap_bytes=resources.memory_budget // _PINNED_SHARE,
            log=log,
        )
        # Copied as it is used: the set that is learnt from has the device's free memory.
        self._held_back_there = to_device(self._held_back, device, mode="plain")
        self._targets = config.targets
        self._scales = config.scales
        self._factors = factors
        self._device = device
        self.on_first: Callable[[Batch], None] | None = None  # hears the first batch of a run
        self.batch_rows = batch_rows
        self._ranks = ranks
        self.order = order
        self.data_digest = self._stream.source.digest
        self.num_rows = self._stream.num_rows
        self.num_held_back = self._held_back.num_rows
        self.num_batches = len(self._stream)

    def batches(self, epoch: int, *, used: int) -> Iterable[Batch]:
        """Yield the batches of ``epoch`` after the first ``used``."""
        if used >= self.num_batches:
            return ()
        self._stream.set_position(epoch, used)
        is_start = (epoch, used) == (0, 0)  # a resumed run begins elsewhere
        return self._with_look(self.there) if is_start else self.there

    def close(self) -> None:
        """End the processes that read, if there are any."""
        self._loader.close()

    def weights(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return per target the weights of the rows that have a label, on the device."""
        batch = self._drawn(batch)
        is_known_BT = ~torch.isnan(batch.targets)
        weights_T = torch.where(is_known_BT, batch.weight[:, None], 0.0).sum(dim=0)
        names = [target.name for target in self._targets]
        weights = dict(zip(names, weights_T.to(self._device).unbind(), strict=True))
        if cast(Network, self.network).has_penalty:
            weights[PENALTY] = torch.tensor(float(len(batch)), device=self._device)
        return weights

    def losses(self, batch: Batch) -> Losses:
        """Run the network on ``batch``: the loss of every member, averaged."""
        batch = self._drawn(batch)
        y_BT = self._standardised(batch)
        batch = replace(batch, targets=batch.targets.float()).to(self._device)
        network = cast(Network, self.network)
        outputs = network(batch.numeric, batch.codes)
        sums, weights = {}, {}
        for place, (target, z_BKO) in enumerate(zip(self._targets, outputs, strict=True)):
            y_B, weight_B = _known(y_BT[place], batch.weight)
            loss_BK = member_losses(z_BKO, y_B, target, self._scales[place])
            sums[target.name] = (weight_B * loss_BK.mean(dim=1)).sum()
            weights[target.name] = weight_B.sum()
        factors = dict(self._factors)
        if network.has_penalty:
            weights[PENALTY] = torch.tensor(float(len(batch)), device=self._device)
            sums[PENALTY] = network.penalty() * weights[PENALTY]
            factors[PENALTY] = 1.0
        return Losses(sums, weights, factors)

    def validate(self) -> Validation:
        """Return losses and metrics of the mean prediction over the held-back rows."""
        means = LossMeans(dict(self._factors))
        self._metrics.reset()
        self._held_back.set_position(0)
        for batch in self._held_back_there:
            outputs = self._outputs(batch)
            means.add(self._losses_of(outputs, batch))
            for place, (target, z_BKO) in enumerate(zip(self._targets, outputs, strict=True)):
                values = member_values(z_BKO.cpu().double(), target, self._scales[place])
                self._metrics.add(
                    target.name,
                    truth=batch.targets[:, place],
                    prediction=values.mean(dim=1),
                    weight=batch.weight,
                )
        return Validation(means.over(self._ranks), self._metrics.values())

    def prediction_losses(self, batch: Batch) -> Losses:
        """Return the losses of the mean prediction, as ``validate`` counts them."""
        return self._losses_of(self._outputs(batch), batch)

    def learnt_rows(self, num_rows: int) -> Batch:
        """Return a batch of at most so many of the rows learnt from, always the same."""
        parts = self._parts
        return to_tensors(_some_of(parts.shards, parts.learn, num_rows, seed=self._seed))

    def held_back_rows(self, num_rows: int) -> Batch:
        """Return a batch of at most so many of the held-back rows, always the same."""
        parts = self._parts
        return to_tensors(_some_of(parts.held_back, parts.stop, num_rows, seed=self._seed))

    def constant_losses(self) -> dict[str, float]:
        """Return per target the loss of the best constant prediction of the rows learnt from."""
        y_BT, weight_B = _labels(self._parts.shards, self._parts.learn, self._views)
        return {
            target.name: constant_loss(y_BT[:, place], weight_B, target, self._scales[place])
            for place, target in enumerate(self._targets)
        }

    @cached_property
    def _metrics(self) -> "EpochMetrics":
        # Here, not at the top: a prediction needs none of torchmetrics, which takes a second.
        from headrace.training.metrics import EpochMetrics

        return EpochMetrics(self._targets, self._ranks)

    def _outputs(self, batch: Batch) -> list[torch.Tensor]:
        batch = replace(batch, targets=batch.targets.float()).to(self._device)
        return cast("list[torch.Tensor]", self.network(batch.numeric, batch.codes))

    def _losses_of(self, outputs: Sequence[torch.Tensor], batch: Batch) -> Losses:
        y_BT, weight_B = self._standardised(batch), batch.weight.to(self._device)
        sums, weights = {}, {}
        for place, (target, z_BKO) in enumerate(zip(self._targets, outputs, strict=True)):
            y_B, known_B = _known(y_BT[place], weight_B)
            loss_B = mean_losses(z_BKO, y_B, target, self._scales[place])
            sums[target.name] = (known_B * loss_B).sum()
            weights[target.name] = known_B.sum()
        return Losses(sums, weights, self._factors)

    def _standardised(self, batch: Batch) -> list[torch.Tensor]:
        # Standardised in float64, on MPS by the CPU: 1.7e9 + x is all one number in float32.
        return [
            standardised(batch.targets[:, place], scale).to(self._device)
            for place, scale in enumerate(self._scales)
        ]

    def _drawn(self, batch: Batch) -> Batch:
        """Let each row count as often as the bootstrap sample holds it, if there is one."""
        if self._views.draw is None:
            return batch
        counts = self._views.counts(batch.row_id.cpu().numpy())
        factor = torch.from_numpy(counts).to(batch.weight)
        return replace(batch, weight=batch.weight * factor)

    def _with_look(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for place, batch in enumerate(batches):
            if place == 0 and self.on_first is not None:
                self.on_first(batch)
            yield batch


def standardised(y_B: torch.Tensor, scale: TargetScale) -> torch.Tensor:
    """Return float64 values as float32 in standard deviations from the mean; NaN stays."""
    return ((y_B - scale.mean) / scale.std).float()


def member_losses(
    z_BKO: torch.Tensor, y_B: torch.Tensor, target: Target, scale: TargetScale
) -> torch.Tensor:
    """Return each member's loss of each row: squared error in standard deviations, or log-loss.

    Shape: ``z_BKO`` a head's output, ``y_B`` the standardised value or class code -> (B, K).
    """
    _require_outputs(z_BKO, y_B, target)
    y_BK = y_B[:, None].expand(z_BKO.shape[:2])
    if target.task == "regression":
        return (in_range(z_BKO[:, :, 0], scale) - y_BK) ** 2
    if target.task == "binary":
        return F.binary_cross_entropy_with_logits(z_BKO[:, :, 0], y_BK, reduction="none")
    return F.cross_entropy(z_BKO.transpose(1, 2), y_BK.long(), reduction="none")


def mean_losses(
    z_BKO: torch.Tensor, y_B: torch.Tensor, target: Target, scale: TargetScale
) -> torch.Tensor:
    """Return the loss of the members' mean prediction of each row; see ``member_losses`` -> (B,).

    Probabilities are averaged as logarithms, so none is rounded to 0.
    """
    if z_BKO.shape[1] == 1:
        return member_losses(z_BKO, y_B, target, scale)[:, 0]
    if target.task == "regression":
        _require_outputs(z_BKO, y_B, target)
        return (in_range(z_BKO[:, :, 0], scale).mean(dim=1) - y_B) ** 2
    # exp(−loss) of a member is the probability that it gives the true class.
    log_p_BK = -member_losses(z_BKO, y_B, target, scale)
    return math.log(z_BKO.shape[1]) - torch.logsumexp(log_p_BK, dim=1)


def member_values(z_BKO: torch.Tensor, target: Target, scale: TargetScale) -> torch.Tensor:
    """Return each member's prediction: (B, K) values or P(labels[1]); (B, K, O) probabilities."""
    if target.task == "regression":
        return in_range(z_BKO[:, :, 0], scale) * scale.std + scale.mean
    if target.task == "binary":
        return torch.sigmoid(z_BKO[:, :, 0])
    return torch.softmax(z_BKO, dim=2)


def in_range(z: torch.Tensor, scale: TargetScale) -> torch.Tensor:
    """Return standardised values that stay within the target's output range, if it has one.

    The range of the sigmoid is a tenth wider on each side, so that its ends can be reached; an
    output of 0 is the mean of the target.
    """
    if scale.low is None or scale.high is None:
        return z
    margin = _RANGE_MARGIN * (scale.high - scale.low)
    low, high = (
        (bound - scale.mean) / scale.std for bound in (scale.low - margin, scale.high + margin)
    )
    share = min(max(-low / (high - low), 0.01), 0.99)  # where the mean lies
    return low + (high - low) * torch.sigmoid(z + math.log(share / (1 - share)))


def _known(y_B: torch.Tensor, weight_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels without NaN, and weights that are 0 where there was one."""
    is_known_B = ~torch.isnan(y_B)
    return torch.where(is_known_B, y_B, 0.0), torch.where(is_known_B, weight_B, 0.0)


def _require_outputs(z_BKO: torch.Tensor, y_B: torch.Tensor, target: Target) -> None:
    """Refuse shapes that would broadcast in silence."""
    if z_BKO.ndim != 3 or len(z_BKO) != len(y_B) or z_BKO.shape[2] != target.num_outputs:
        raise ValueError(
            f"outputs of shape {tuple(z_BKO.shape)} for {tuple(y_B.shape)} labels of "
            f"{target.name!r}; expected (rows, members, {target.num_outputs})"
        )


def _inputs(encoder: Encoder) -> Inputs:
    has_missing = [
        place
        for place, scale in enumerate(encoder.scales)
        if scale.num_missing + scale.num_infinite > 0
    ]
    return Inputs(
        numeric=encoder.numeric,
        has_missing=tuple(has_missing),
        categories=tuple(category.name for category in encoder.categories),
        cardinalities=encoder.cardinalities,
    )


def _refuse_unknown_targets(targets: Sequence[Target], params: NetworkParams, kind: str) -> None:
    names = [target.name for target in targets]
    ranges = {} if params.output_range == "seen" else params.output_range
    for key, named in (("target_weights", params.target_weights), ("output_range", ranges)):
        for name in named:
            if name not in names:
                raise ConfigError(
                    f"`train.{kind}.{key}` names {name!r}, which is no target"
                    f"{nearest(name, names) or f'; targets: {names}'}"
                )
    for target in targets:
        bounds = ranges.get(target.name)
        if bounds and (target.task != "regression" or not bounds[0] < bounds[1]):
            raise ConfigError(
                f"`train.{kind}.output_range.{target.name}` is {list(bounds)} for a {target.task} "
                f"target; it must be [low, high] with low < high, of a regression target"
            )
    metrics = [f"{name}_{one.name}" for one in targets for name in EPOCH_METRICS[one.task]]
    known = ["loss", *names, *metrics]
    if params.stop_on not in known:
        raise ConfigError(
            f"`train.{kind}.stop_on` is {params.stop_on!r}; it must be loss, one of the targets "
            f"{names}, or one of the metrics {metrics}{nearest(params.stop_on, known)}"
        )


def _refuse_few_rows(num_rows: int, least_rows: int, params: NetworkParams, kind: str) -> None:
    """Refuse a set that makes no whole batch, and a batch too small for the network's norms."""
    if num_rows < least_rows:
        raise DataError(
            f"{kind} learns from batches of at least {least_rows} rows, but there are only "
            f"{num_rows} to learn from; take more rows, or remove {kind} from `models`"
        )
    if params.batch_rows is not None and not least_rows <= params.batch_rows <= num_rows:
        raise ConfigError(
            f"`train.{kind}.batch_rows` is {params.batch_rows}, but a batch of {kind} has at least "
            f"{least_rows} rows, and there are {num_rows} to learn from; set it between these, or "
            f"leave it out"
        )


def _signature(
    config: _Config, params: NetworkParams, views: TrainViews, device: torch.device
) -> dict[str, Any]:
    """All that a checkpoint depends on and its folder's key may not say (the device, for one)."""
    return {
        "network": config.model_dump(mode="json"),
        "training": params.model_dump(mode="json", exclude={"checkpoint_minutes", "transfer"}),
        "contract": views.contract.digest,
        "rows": views.described,
        "device": device.type,
    }


def _record(
    recorder: Recorder, learner: NetworkLearner, device: torch.device, ranks: Ranks
) -> None:
    recorder.params(
        {
            "device": device.type,
            "rows_learnt_from": learner.num_rows,
            "rows_held_back": learner.num_held_back,
            "batch_rows": learner.batch_rows,
            "order": learner.order,
            "transfer": learner.there.choice.mode,
            "pinned_bytes": learner.there.pinned_bytes,
            "ranks": ranks.size,
            "parameters": sum(p.numel() for p in learner.network.parameters()),
        }
    )


def _record_batch(recorder: Recorder, batch: Batch, encoded: Path, folder: Path) -> None:
    """Record once per run what the network is fed, in the words and units of the table."""
    look = look_at(batch.to("cpu"), open_encoder(encoded), num_rows=_SHOWN_ROWS)
    write_file(folder / _FIRST_BATCH, look.text())
    recorder.file(folder / _FIRST_BATCH, folder="data")


def _summary(outcome: Outcome, stop_on: str, targets: Sequence[Target]) -> dict[str, Any]:
    found = {
        "best_epoch": outcome.best_epoch,
        "epochs": outcome.num_epochs,
        "parameters": outcome.num_parameters,
    }
    if outcome.best_value is None:
        return found
    is_loss = stop_on in ["loss", *(target.name for target in targets)]
    return {**found, "inner_loss" if is_loss else f"inner_{stop_on}": outcome.best_value}
