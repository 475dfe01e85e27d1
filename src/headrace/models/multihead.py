"""The network of kind ``nn``: one trunk shared by all targets, one head per target.

Legend of axes: B rows of the batch, N numeric inputs, M those of them that have missing values, C
categories, H width of the trunk's output, O outputs of one head (1, or the classes of a multiclass
target).

The encoder standardises numeric inputs; the network squashes what lies far out, so that one
extreme value cannot carry a prediction away, and reads a missing one as 0 with an indicator
beside it. Categories get learned vectors, with rows of their own for unknown and missing. Heads
give logits, or the standardised value; losses are computed on those. Heads start small, so that
the first predictions are near the mean and the first loss is near that of knowing nothing.

A label that is missing has weight 0 in the loss of its target; the row still teaches the others.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

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
from headrace.errors import ConfigError, IntegrityError, SchemaError, nearest
from headrace.models.protocol import TrainViews, Values
from headrace.params import Resources, Section
from headrace.record import Recorder
from headrace.schema import Target
from headrace.storage import read_json, write_file, write_json
from headrace.training.checkpoint import Checkpoints
from headrace.training.device import RandomStream, torch_threads
from headrace.training.distributed import ALONE, Ranks, current_ranks
from headrace.training.learner import Losses, LossMeans, Validation
from headrace.training.loop import Outcome, train_network
from headrace.training.params import TrainingParams, batch_rows_for

_CONFIG = "network.json"
_WEIGHTS = "weights.safetensors"
_FIRST_BATCH = "first_batch.txt"  # what the network was fed first, decoded
_SHOWN_ROWS = 8
_SQUASH = 4.0  # standard deviations; no numeric input leaves ±4, most hardly change
_PREDICT_ROWS = 8192  # bounds the memory of a prediction, whatever batch the caller brings
_EVALUATE_ROWS = 16_384
_EXACT_BYTES = 8 << 30  # packed rows that the page cache of most machines keeps
_PINNED_SHARE = 8  # of the memory budget: the part that may be page-locked for a GPU
_ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
_INIT, _TRAIN = 0, 1  # names of random streams


class Trunk(Section):
    """The hidden layers that all targets share."""

    hidden_sizes: Annotated[tuple[int, ...], Field(strict=False)]
    activation: Literal["relu", "gelu", "silu"]
    dropout: float
    batch_norm: bool


class Inputs(Section):
    """What the network reads, in the order of the encoded arrays."""

    numeric: Annotated[tuple[str, ...], Field(strict=False)]
    has_missing: Annotated[tuple[int, ...], Field(strict=False)]  # positions in ``numeric``
    categories: Annotated[tuple[str, ...], Field(strict=False)]
    cardinalities: Annotated[tuple[int, ...], Field(strict=False)]
    embedding_sizes: Annotated[tuple[int, ...], Field(strict=False)]

    @property
    def width(self) -> int:
        """Numbers that one row brings to the first layer."""
        return len(self.numeric) + len(self.has_missing) + sum(self.embedding_sizes)


class TargetScale(Section):
    """Mean and spread of a regression target over the rows learnt from; 0 and 1 for classes."""

    mean: float
    std: float


class _Config(Section):
    """The content of network.json."""

    format: Literal[1] = 1
    inputs: Inputs
    trunk: Trunk
    targets: Annotated[tuple[Target, ...], Field(strict=False)]
    scales: Annotated[tuple[TargetScale, ...], Field(strict=False)]
    threads: int


class MultiHead(nn.Module):
    """Embeddings, a trunk of hidden layers, and one linear head per target.

    Shape: ``numeric_BN`` float32, standardised, NaN where missing; ``codes_BC`` int32 -> one
    (B, O) tensor per target: logits, or the standardised value.
    """

    has_missing_M: torch.Tensor

    def __init__(self, inputs: Inputs, trunk: Trunk, num_outputs: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("has_missing_M", torch.tensor(inputs.has_missing, dtype=torch.int64))
        sizes = zip(inputs.cardinalities, inputs.embedding_sizes, strict=True)
        self.embeddings = nn.ModuleList(nn.Embedding(count, dim) for count, dim in sizes)
        layers: list[nn.Module] = []
        width = inputs.width
        for hidden in trunk.hidden_sizes:
            layers.append(nn.Linear(width, hidden))
            if trunk.batch_norm:
                layers.append(nn.BatchNorm1d(hidden))
            layers += [_ACTIVATIONS[trunk.activation](), nn.Dropout(trunk.dropout)]
            width = hidden
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(width, outputs) for outputs in num_outputs)
        self._start()

    def forward(self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor) -> list[torch.Tensor]:
        """Return one (B, O) tensor per target."""
        h_BH = self.trunk(self._inputs(numeric_BN, codes_BC))
        return [head(h_BH) for head in self.heads]

    def _inputs(self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor) -> torch.Tensor:
        is_missing_BN = torch.isnan(numeric_BN)
        x_BN = torch.where(is_missing_BN, 0.0, numeric_BN)
        x_BN = x_BN / torch.sqrt(1 + (x_BN / _SQUASH) ** 2)
        parts = [x_BN, is_missing_BN[:, self.has_missing_M].to(x_BN.dtype)]
        parts += [embed(codes_BC[:, c]) for c, embed in enumerate(self.embeddings)]
        return torch.cat(parts, dim=1)

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


class MultiHeadModel:
    """A trained network with what it takes to use it: input names, target scales."""

    kind = "nn"
    inputs: Literal["encoded"] = "encoded"

    def __init__(
        self,
        network: MultiHead,
        config: _Config,
        *,
        device: torch.device,
        summary: Mapping[str, Any],
    ) -> None:
        self._network = network
        self._config = config
        self._device = device
        self._summary = dict(summary)

    @property
    def summary(self) -> Mapping[str, Any]:
        """Best epoch, loss on the inner part, number of parameters."""
        return self._summary

    def predict(self, rows: EncodedBatch | pa.Table) -> Values:
        """Return per target the value, P(labels[1]) or the class probabilities of each row.

        Raises:
            SchemaError: if the rows are not encoded, or by another encoder.
        """
        rows = self._checked(rows)
        self._network.eval()
        parts: list[list[npt.NDArray[np.float64]]] = [[] for _ in self._config.targets]
        with torch_threads(self._config.threads), torch.inference_mode():
            for start in range(0, max(1, len(rows)), _PREDICT_ROWS):
                part = to_tensors(
                    rows.where(np.arange(start, min(len(rows), start + _PREDICT_ROWS)))
                )
                part = part.to(self._device)
                outputs = self._network(part.numeric, part.codes)
                for place, z_BO in enumerate(outputs):
                    parts[place].append(self._to_values(place, z_BO.cpu().double()))
        return {
            target.name: np.concatenate(values)
            for target, values in zip(self._config.targets, parts, strict=True)
        }

    def save(self, folder: Path) -> None:
        """Write network.json and weights.safetensors."""
        state = {name: value.cpu() for name, value in self._network.state_dict().items()}
        save_file({name: value.contiguous() for name, value in state.items()}, folder / _WEIGHTS)
        write_json(folder / _CONFIG, self._config.model_dump(mode="json"))

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

    def _to_values(self, place: int, z_BO: torch.Tensor) -> npt.NDArray[np.float64]:
        task, scale = self._config.targets[place].task, self._config.scales[place]
        if task == "regression":
            y = z_BO[:, 0] * scale.std + scale.mean
        elif task == "binary":
            y = torch.sigmoid(z_BO[:, 0])
        else:
            y = torch.softmax(z_BO, dim=1)
        return cast("npt.NDArray[np.float64]", y.numpy())


def fit_multihead(
    views: TrainViews,
    training: TrainingParams,
    *,
    trunk: Trunk,
    embedding_size: int,
    target_weights: Mapping[str, float],
    stop_on: str,
    checkpoints: Path,
    resources: Resources,
    recorder: Recorder,
) -> MultiHeadModel:
    """Train a network on the learn folds of ``views``; see ``headrace.models.nn.fit``."""
    ranks = current_ranks()
    device = ranks.device(training.device)
    with torch_threads(training.threads):
        learner = open_multihead(
            views,
            training,
            trunk=trunk,
            embedding_size=embedding_size,
            target_weights=target_weights,
            stop_on=stop_on,
            device=device,
            resources=resources,
            log=None if device.type == "cpu" else recorder.note,  # there is nothing to choose
            warn=recorder.warn,
            ranks=ranks,
        )
        config = learner.config
        _record(recorder, learner, device, ranks)
        if ranks.is_first:
            learner.on_first = lambda batch: _record_batch(
                recorder, batch, views.encoded, checkpoints
            )
        signature = _signature(config, training, views, target_weights, stop_on, device)
        ranks.require_same("what is trained", f"{signature} {learner.data_digest}")
        with contextlib.closing(learner):
            outcome = train_network(
                learner,
                training,
                stop_on=stop_on,
                stream=RandomStream(training.seed, _TRAIN, device=device),
                checkpoints=Checkpoints(
                    checkpoints,
                    signature=signature,
                    recorder=recorder,
                ),
                recorder=recorder,
                ranks=ranks,
            )
    network = cast(MultiHead, learner.network)
    return MultiHeadModel(network, config, device=device, summary=_summary(outcome))


def open_multihead(
    views: TrainViews,
    training: TrainingParams,
    *,
    trunk: Trunk,
    embedding_size: int,
    target_weights: Mapping[str, float],
    stop_on: str,
    device: torch.device,
    resources: Resources,
    log: Callable[[str], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
    ranks: Ranks = ALONE,
) -> "MultiHeadLearner":
    """Return what ``fit_multihead`` trains, before its first step: network, batches, losses.

    ``log`` hears how batches reach the device, ``warn`` that reading processes died.
    """
    targets = views.contract.targets
    _refuse_unknown_targets(targets, target_weights, stop_on)
    shards = open_shards(views.encoded, "train", contract_digest=views.contract.digest)
    fold = shards.read("fold")
    learn = np.isin(fold, views.learn_folds)
    inputs = _inputs(open_encoder(views.encoded), embedding_size)
    scales = target_scales(shards, targets, learn)
    config = _Config(
        inputs=inputs, trunk=trunk, targets=targets, scales=scales, threads=training.threads
    )
    with RandomStream(training.seed, _INIT, device=device).lent():
        network = MultiHead(inputs, trunk, [target.num_outputs for target in targets])
    network.to(device)
    return MultiHeadLearner(
        network,
        config,
        shards,
        learn=learn,
        stop=fold == views.stop_fold,
        batch_rows=training.batch_rows or batch_rows_for(int(learn.sum())),
        order=_order(training.order, shards, int(learn.sum())),
        seed=training.seed,
        factors={target.name: target_weights.get(target.name, 1.0) for target in targets},
        device=device,
        transfer=training.transfer,
        resources=resources,
        log=log,
        warn=warn,
        ranks=ranks,
    )


def load_multihead(folder: Path, description: Mapping[str, Any]) -> MultiHeadModel:
    """Read a network that ``MultiHeadModel.save`` wrote; it predicts on the CPU.

    Raises:
        IntegrityError: if a file is missing or does not fit the other.
    """
    try:
        config = _Config.model_validate(read_json(folder / _CONFIG))
        network = MultiHead(config.inputs, config.trunk, [t.num_outputs for t in config.targets])
        network.load_state_dict(load_file(folder / _WEIGHTS))
    except (ValidationError, SafetensorError, RuntimeError, FileNotFoundError) as error:
        raise IntegrityError(
            f"{folder} does not hold a whole network ({error}); train the model again"
        ) from error
    return MultiHeadModel(
        network, config, device=torch.device("cpu"), summary=description.get("summary", {})
    )


def _order(
    wanted: Literal["auto", "exact", "window", "block"], shards: Shards, num_rows: int
) -> Kind:
    """Return the order of training. By the set alone: a machine must not change the result."""
    if wanted != "auto":
        return wanted
    return "exact" if num_rows * shards.schema.rows.row_bytes <= _EXACT_BYTES else "window"


def target_scales(
    shards: Shards, targets: Sequence[Target], learn: npt.NDArray[np.bool_]
) -> tuple[TargetScale, ...]:
    """Return mean and spread of each regression target over the rows that ``learn`` marks."""
    y_BT = shards.read("targets")[learn].astype(np.float64)
    weight_B = shards.read("weight")[learn].astype(np.float64)
    scales = []
    for place, target in enumerate(targets):
        is_known = ~np.isnan(y_BT[:, place])
        y, weight = y_BT[is_known, place], weight_B[is_known]
        if target.task != "regression" or not weight.sum() > 0:
            scales.append(TargetScale(mean=0.0, std=1.0))
            continue
        mean = float(np.average(y, weights=weight))
        std = math.sqrt(float(np.average((y - mean) ** 2, weights=weight)))
        scales.append(TargetScale(mean=mean, std=std or 1.0))
    return tuple(scales)


class MultiHeadLearner:
    """The network with its batches and losses, as the training loop asks for them."""

    def __init__(
        self,
        network: MultiHead,
        config: _Config,
        shards: Shards,
        *,
        learn: npt.NDArray[np.bool_],
        stop: npt.NDArray[np.bool_],
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
        self._stream = BatchStream(
            shards,
            batch_size=ranks.share_of(batch_rows),
            order=order,
            seed=seed,
            rows=learn,
            rank=ranks.rank,
            num_ranks=ranks.size,
            least_tail=2,  # the same batches for any number of ranks: norms and losses span them
        )
        self._held_back = BatchStream(
            shards,
            batch_size=_EVALUATE_ROWS,
            order="sequential",
            rows=stop,
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
        is_known_BT = ~torch.isnan(batch.targets)
        weights_T = torch.where(is_known_BT, batch.weight[:, None], 0.0).sum(dim=0)
        names = [target.name for target in self._targets]
        return dict(zip(names, weights_T.to(self._device).unbind(), strict=True))

    def losses(self, batch: Batch) -> Losses:
        """Run the network on ``batch``."""
        # Standardised in float64, on MPS by the CPU: 1.7e9 + x is all one number in float32.
        y_BT = [
            standardised(batch.targets[:, place], scale).to(self._device)
            for place, scale in enumerate(self._scales)
        ]
        batch = replace(batch, targets=batch.targets.float()).to(self._device)
        outputs = cast("list[torch.Tensor]", self.network(batch.numeric, batch.codes))
        sums, weights = {}, {}
        for place, (target, z_BO) in enumerate(zip(self._targets, outputs, strict=True)):
            y_B = y_BT[place]
            is_known_B = ~torch.isnan(y_B)
            weight_B = torch.where(is_known_B, batch.weight, 0.0)
            y_B = torch.where(is_known_B, y_B, 0.0)
            loss_B = row_losses(z_BO, y_B, target)
            sums[target.name] = (weight_B * loss_B).sum()
            weights[target.name] = weight_B.sum()
        return Losses(sums, weights, self._factors)

    def validate(self) -> Validation:
        """Return the losses over the rows of the stop fold."""
        means = LossMeans(dict(self._factors))
        self._held_back.set_position(0)
        for batch in self._held_back_there:
            means.add(self.losses(batch))
        return Validation(means.over(self._ranks))

    def _with_look(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for place, batch in enumerate(batches):
            if place == 0 and self.on_first is not None:
                self.on_first(batch)
            yield batch


def standardised(y_B: torch.Tensor, scale: TargetScale) -> torch.Tensor:
    """Return float64 values as float32 in standard deviations from the mean; NaN stays."""
    return ((y_B - scale.mean) / scale.std).float()


def row_losses(z_BO: torch.Tensor, y_B: torch.Tensor, target: Target) -> torch.Tensor:
    """Return the loss of each row: squared error in standard deviations, or cross-entropy.

    Shape: ``z_BO`` a head's output, ``y_B`` the standardised value or class code -> (B,).
    """
    if target.task == "regression":
        loss_B = (z_BO[:, 0] - y_B) ** 2
    elif target.task == "binary":
        loss_B = F.binary_cross_entropy_with_logits(z_BO[:, 0], y_B, reduction="none")
    else:
        loss_B = F.cross_entropy(z_BO, y_B.long(), reduction="none")
    if loss_B.shape != y_B.shape:
        raise ValueError(f"losses of shape {tuple(loss_B.shape)} for {tuple(y_B.shape)} labels")
    return loss_B


def embedding_sizes(cardinalities: Sequence[int], most: int) -> tuple[int, ...]:
    """Return the length of the vector of each category: grows slowly with its labels.

    >>> embedding_sizes([4, 100, 100_000], 32)
    (3, 21, 32)
    """
    return tuple(min(most, max(2, round(1.6 * count**0.56))) for count in cardinalities)


def _inputs(encoder: Encoder, embedding_size: int) -> Inputs:
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
        embedding_sizes=embedding_sizes(encoder.cardinalities, embedding_size),
    )


def _refuse_unknown_targets(
    targets: Sequence[Target], target_weights: Mapping[str, float], stop_on: str
) -> None:
    names = [target.name for target in targets]
    for name in target_weights:
        if name not in names:
            raise ConfigError(
                f"`train.nn.target_weights` names {name!r}, which is no target"
                f"{nearest(name, names) or f'; targets: {names}'}"
            )
    if stop_on not in ["loss", *names]:
        raise ConfigError(
            f"`train.nn.stop_on` is {stop_on!r}; it must be loss or one of the targets {names}"
            f"{nearest(stop_on, ['loss', *names])}"
        )


def _signature(
    config: _Config,
    training: TrainingParams,
    views: TrainViews,
    target_weights: Mapping[str, float],
    stop_on: str,
    device: torch.device,
) -> dict[str, Any]:
    """All that a checkpoint depends on and its folder's key may not say (the device, for one)."""
    loop = training.model_dump(mode="json", exclude={"checkpoint_minutes", "transfer"})
    return {
        "network": config.model_dump(mode="json"),
        "training": loop,
        "contract": views.contract.digest,
        "folds": {"learn": list(views.learn_folds), "stop": views.stop_fold},
        "target_weights": dict(target_weights),
        "stop_on": stop_on,
        "device": device.type,
    }


def _record(
    recorder: Recorder, learner: MultiHeadLearner, device: torch.device, ranks: Ranks
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


def _summary(outcome: Outcome) -> dict[str, Any]:
    return {
        "best_epoch": outcome.best_epoch,
        "epochs": outcome.num_epochs,
        "inner_loss": outcome.best_value,
        "parameters": outcome.num_parameters,
    }
