"""One update of the weights: forward and backward over a batch, clip, step.

A batch may go through the network in parts. Each part's sum of losses is divided by the weights of
the *whole* batch (of all ranks), so the gradients of the parts add up to that of the batch,
whatever the sizes of the parts, weights and missing labels. Only batch norm sees parts: its means
are taken over one part at a time. Dropout draws anew for each part.

Where the device runs out of memory, the parts are halved and the update is tried again from the
random state and norms it began with: as if the parts had been that small from the start. With
several ranks that goes for each rank by itself, which batch norm over all ranks does not allow.
"""

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headrace.errors import ConfigError, DataError, ResourceError
from headrace.training.augment import Augmentation
from headrace.training.device import RandomStream
from headrace.training.distributed import GlobalBatchNorm1d, Ranks
from headrace.training.learner import Learner, Losses
from headrace.training.optimiser import make_optimiser
from headrace.training.params import TrainingParams
from headrace.training.precision import Precision

_LEAST_ROWS = 2  # of a part: batch norm needs two


@dataclass(frozen=True)
class Update:
    """What one update told."""

    losses: Losses  # of the batch of all ranks
    norm: float  # length of its gradient before clipping; infinite if fp16 left the update out


class Updater:
    """Updates the network of a learner, batch by batch, and keeps what the next update needs.

    Raises:
        ConfigError: at construction, if parts are asked for and batch norm spans several ranks.
    """

    def __init__(
        self,
        learner: Learner,
        params: TrainingParams,
        *,
        stream: RandomStream,
        ranks: Ranks,
        warn: Callable[[str], None],
    ) -> None:
        self._learner = learner
        self._stream = stream
        self._ranks = ranks
        self._warn = warn
        self._clip_norm = params.clip_norm
        self._micro_rows = params.micro_rows
        self._optimiser = make_optimiser(learner.network, params)
        device = _device_of(learner.network)
        self._precision = Precision(params.precision, device)
        self._augmentation = Augmentation(params, device=device)
        self._spans_ranks = any(isinstance(m, GlobalBatchNorm1d) for m in learner.network.modules())
        if self._spans_ranks and params.micro_rows is not None:
            raise ConfigError(
                f"`micro_rows` is {params.micro_rows}, but with {ranks.size} ranks batch norm takes"
                f" its means over the whole batch; remove micro_rows or set batch_norm: false"
            )
        self.step = 0  # updates so far

    @property
    def precision(self) -> str:
        """The numbers that the network computes in."""
        return self._precision.name

    @property
    def rate(self) -> float:
        """The learning rate that was used last."""
        return float(self._optimiser.param_groups[0]["lr"])

    def update(self, batch: Any, *, rate: float, place: str) -> Update:
        """Learn from this rank's ``batch``; ``place`` says where training stands, for messages.

        Raises:
            DataError: if loss or gradient is not finite, with the first row ids of the batch.
            ResourceError: if memory runs out however small the parts.
        """
        network = self._learner.network
        if self._augmentation.is_on:
            batch = self._augmentation.changed(batch, rank=self._ranks.rank, step=self.step)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        if self._ranks.size > 1:
            self._stream.restart(self._ranks.rank, self.step)
        weights = self._over_ranks(self._learner.weights(batch))
        own = self._learn_from(batch, weights, place)
        losses = Losses(self._over_ranks(own.sums), weights, own.scales)
        self._ranks.sum_gradients(network)
        self._precision.unscale(self._optimiser)
        clipped = nn.utils.clip_grad_norm_(network.parameters(), self._clip_norm)
        value, norm = torch.stack([losses.total(), clipped]).tolist()  # one wait for the device
        if not math.isfinite(value):
            raise self._not_finite(f"loss is {value}", own, batch, place)
        if not math.isfinite(norm) and not self._precision.is_scaled:
            raise self._not_finite(f"gradient's length is {norm}", own, batch, place)
        self._precision.step(self._optimiser)
        self.step += 1
        return Update(losses, norm)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "optimiser": self._optimiser.state_dict(),
            "precision": self._precision.state(),
            "micro_rows": self._micro_rows,
            "step": self.step,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state()`` returned."""
        self._optimiser.load_state_dict(state["optimiser"])
        self._precision.restore(state["precision"])
        self._micro_rows = state["micro_rows"]
        self.step = state["step"]

    def _learn_from(self, batch: Any, weights: Mapping[str, torch.Tensor], place: str) -> Losses:
        """Add up the gradients over the parts of ``batch``; return its losses."""
        num_rows = len(batch.row_id)
        while True:
            sizes = part_sizes(num_rows, self._micro_rows or num_rows)
            parts = batch.split(sizes) if len(sizes) > 1 else [batch]
            if (losses := self._tried(parts, weights)) is not None:
                return losses
            del parts
            # Here the error is gone, and with it the frames that held tensors.
            self._optimiser.zero_grad(set_to_none=True)
            gc.collect()
            if _device_of(self._learner.network).type == "cuda":
                torch.cuda.empty_cache()
            self._halve(max(sizes), place)

    def _tried(self, parts: list[Any], weights: Mapping[str, torch.Tensor]) -> Losses | None:
        """Run forward and backward; if memory runs out, put all back and return None."""
        random, norms = self._stream.state(), _norm_buffers(self._learner.network)
        before = [buffer.clone() for buffer in norms]
        self._optimiser.zero_grad(set_to_none=True)
        try:
            return self._passed(parts, weights)
        except torch.OutOfMemoryError:
            self._stream.restore(random)
            for buffer, value in zip(norms, before, strict=True):
                buffer.copy_(value)
        return None

    def _passed(self, parts: list[Any], weights: Mapping[str, torch.Tensor]) -> Losses:
        sums: dict[str, torch.Tensor] = {}
        scales: Mapping[str, float] = {}
        for part in parts:
            with self._precision.autocast():
                losses = self._learner.losses(part)
                shares = {
                    name: weights[name].to(value.dtype) for name, value in losses.sums.items()
                }
                total = Losses(losses.sums, shares, losses.scales).total()
            self._precision.backward(total)
            for name, value in losses.sums.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
            scales = losses.scales
        return Losses(sums, weights, scales)

    def _halve(self, rows: int, place: str) -> None:
        if self._spans_ranks or rows < 2 * _LEAST_ROWS:
            raise ResourceError(
                f"the device ran out of memory in {place} with {rows} rows at once, which cannot "
                f"be less; set a smaller batch_rows or a smaller network, or free the device"
            )
        self._micro_rows = rows // 2
        self._warn(
            f"the device ran out of memory in {place} with {rows} rows at once; from now on a "
            f"batch goes through the network in parts of at most {self._micro_rows}, with the same "
            f"updates. Set micro_rows to begin with that"
        )

    def _over_ranks(self, values: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return the sum of each of ``values`` over the ranks."""
        if self._ranks.size == 1:
            return values
        summed = self._ranks.summed(torch.stack(list(values.values())).double())
        return dict(zip(values, summed, strict=True))

    def _not_finite(self, what: str, own: Losses, batch: Any, place: str) -> DataError:
        """Name the rows of the first rank whose part of the loss is not finite, else of rank 0."""
        first_rows = [str(int(i)) for i in batch.row_id[:5]]
        found = self._ranks.gathered((math.isfinite(float(own.total())), first_rows))
        first_rows = next((rows for is_finite, rows in found if not is_finite), found[0][1])
        return DataError(
            f"the training {what} in {place}; first row ids: {first_rows}. Look at these rows for "
            f"extreme values, or set a smaller learning_rate"
        )


def part_sizes(num_rows: int, most: int) -> list[int]:
    """Return the sizes of the parts of a batch: nearly even, of at most ``most`` rows.

    No part has fewer than two rows, for batch norm: that may make one larger.

    >>> part_sizes(10, 4), part_sizes(10, 10), part_sizes(3, 2), part_sizes(0, 2)
    ([4, 3, 3], [10], [3], [0])
    """
    num_parts = max(1, min(-(-num_rows // max(1, most)), num_rows // _LEAST_ROWS))
    rows, extra = divmod(num_rows, num_parts)
    return [rows + 1] * extra + [rows] * (num_parts - extra)


def _norm_buffers(network: nn.Module) -> list[torch.Tensor]:
    """The running means that a forward pass in training mode moves."""
    return [
        buffer
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for buffer in module.buffers()
    ]


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
