"""The training loop: epochs, learning-rate schedule, early stopping, checkpoints.

It knows nothing of tables or layers: a ``Learner`` hands it batches and losses. Sums of losses and
of row weights travel separately up to the end of an epoch, so every logged loss is the mean over
rows, however short the last batch. After each epoch the learner validates on rows it does not
learn from; the weights of the best epoch are those that stay.

A checkpoint holds all that the next step depends on: weights, optimiser, random stream, epoch and
batches used, the sums of the running epoch, the best weights so far. A resumed run is bit-equal to
an undisturbed one on a CPU with the same number of threads. One is written every
``checkpoint_minutes`` (see ``cadence``), when a signal asks to stop, and at the end. Cost: three to
four times the weights on disk, at most 3 % of the time.

Several processes may run the loop together (``distributed``): the same steps on each, gradients and
losses of the global batch, checkpoints by the first alone. A checkpoint fits any number of them.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headrace.errors import ConfigError, DataError, nearest
from headrace.record import MemoryRecorder, Recorder
from headrace.training.cadence import Cadence
from headrace.training.checkpoint import Checkpoints
from headrace.training.device import RandomStream
from headrace.training.distributed import ALONE, Ranks, weights_digest
from headrace.training.learner import Epoch, Learner, Losses, LossMeans, Observer, Validation
from headrace.training.params import TrainingParams
from headrace.training.signals import HeldSignals, held_signals
from headrace.training.stopping import EarlyStopping


@dataclass(frozen=True)
class Outcome:
    """How a training run ended; the learner's network holds the weights of ``best_epoch``."""

    best_epoch: int  # from 1
    num_epochs: int
    best_value: float  # of what early stopping looked at
    num_parameters: int


def train_network(
    learner: Learner,
    params: TrainingParams,
    *,
    stop_on: str,
    stream: RandomStream,
    checkpoints: Checkpoints,
    recorder: Recorder,
    observer: Observer | None = None,
    ranks: Ranks = ALONE,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Train ``learner.network`` until it stops improving; leave the best weights in it.

    ``stop_on`` is ``loss`` (the total), the name of one of the losses, or of a metric of the
    learner's ``Validation``. Random numbers (dropout) come from ``stream``; with several ``ranks``
    each draws its own, anew for every step. ``observer`` hears what happens and changes nothing.
    ``clock`` gives the seconds by which checkpoints are due. SIGINT and SIGTERM take effect between
    two steps, after a checkpoint.

    Raises:
        ConfigError: if ``stop_on`` names nothing that the learner validates.
        DataError: if a loss is not finite, with the first row ids of the batch.
    """
    with held_signals() as signals, stream.lent():
        run = _Run(
            learner, params, stop_on, stream, checkpoints, recorder, observer, ranks, clock, signals
        )
        run.resume()
        while not run.is_over:
            run.one_epoch()
    return run.finish()


def training_update(learner: Learner, params: TrainingParams) -> Callable[[Any], None]:
    """Return the loop's update of ``learner`` by one batch, for a measurement of what it takes.

    The network learns from it. Nothing is saved or recorded.
    """
    recorder = MemoryRecorder()
    unused = Checkpoints(Path(), signature="", recorder=recorder)
    stream = RandomStream(params.seed, device=_device_of(learner.network))
    clock, signals = time.monotonic, HeldSignals()
    run = _Run(learner, params, "loss", stream, unused, recorder, None, ALONE, clock, signals)
    return run._update


def learning_rate(step: int, total_steps: int, params: TrainingParams) -> float:
    """Return the learning rate of update ``step`` (from 0) of at most ``total_steps``."""
    rate = params.learning_rate
    if step < params.warmup_steps:
        return rate * (step + 1) / params.warmup_steps
    if params.schedule == "constant":
        return rate
    share = (step - params.warmup_steps) / max(1, total_steps - params.warmup_steps)
    return rate * max(0.01, 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


class _Run:
    """One training run: the state that a checkpoint keeps, and the steps that change it."""

    def __init__(
        self,
        learner: Learner,
        params: TrainingParams,
        stop_on: str,
        stream: RandomStream,
        checkpoints: Checkpoints,
        recorder: Recorder,
        observer: Observer | None,
        ranks: Ranks,
        clock: Callable[[], float],
        signals: HeldSignals,
    ) -> None:
        ranks.share_norms(learner.network)
        self._ranks = ranks
        self._learner = learner
        self._params = params
        self._stop_on = stop_on
        self._stream = stream
        self._checkpoints = checkpoints
        self._recorder = recorder
        self._observer = observer
        self._optimiser = _optimiser(learner.network, params)
        self._best: dict[str, torch.Tensor] = {}
        self._sums: LossMeans | None = None
        self._clock = clock
        self._signals = signals
        self._cadence = Cadence(60 * params.checkpoint_minutes, clock())
        self.stopping = EarlyStopping(params.patience)
        self.epoch = 0  # finished ones
        self.used = 0  # batches of the running epoch
        self.step = 0  # updates over all epochs

    @property
    def is_over(self) -> bool:
        """Whether no further epoch is wanted."""
        return self.stopping.is_over or self.epoch >= self._params.max_epochs

    def one_epoch(self) -> None:
        """Finish the running epoch, validate, and keep the weights if they are the best."""
        network, learner = self._learner.network, self._learner
        network.train()
        began, num_rows = time.monotonic(), 0
        for batch in learner.batches(self.epoch, used=self.used):
            self._update(batch)
            self.used += 1
            num_rows += len(batch.row_id) * self._ranks.size
            rate = num_rows / max(1e-9, time.monotonic() - began)
            self._recorder.progress(
                self.epoch,
                self._params.max_epochs,
                unit="epochs",
                detail=f"batch {self.used}/{learner.num_batches}, {rate:,.0f} rows/s",
            )
            self._end_step()
        self._require_same_weights()
        found = self._validate()
        self._log(found)
        figure = found.figure(self._stop_on)
        is_best = self.stopping.see(
            self.epoch, figure.value, higher_is_better=figure.higher_is_better
        )
        if is_best:
            self._best = _copy(network.state_dict())
        self._tell(found, is_best=is_best)
        self.epoch, self.used, self._sums = self.epoch + 1, 0, None
        self._end_step()
        self._recorder.progress(
            self.epoch, self._params.max_epochs, unit="epochs", detail=_in_words(found)
        )

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        state = self._ranks.from_first(self._checkpoints.load)
        if state is not None:
            self._take_over(state)
        elif self._observer is not None:
            before = self._stream.state()
            self._observer.before(self._learner)
            self._stream.restore(before)
        self._require_same_weights()

    def _take_over(self, state: Mapping[str, Any]) -> None:
        self._learner.network.load_state_dict(state["network"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._stream.restore(state["stream"])
        self.stopping.restore(state["stopping"])
        self._best = {
            name: value.to(_device_of(self._learner.network))
            for name, value in state["best"].items()
        }
        self.epoch, self.used, self.step = state["epoch"], state["used"], state["step"]
        if state["sums"] is not None:
            self._sums = LossMeans(**state["sums"])
        if self._observer is not None:
            self._observer.restore(state["observer"])
        self._recorder.note(f"Resumed in epoch {self.epoch + 1} after {self.used} batches.")
        if (before := state.get("ranks", 1)) != self._ranks.size:
            self._recorder.note(
                f"The checkpoint was written by {before} ranks and goes on with "
                f"{self._ranks.size}: the same rows in the same batches, sums rounded in another "
                f"order, other dropout masks."
            )

    def finish(self) -> Outcome:
        """Put the best weights back and say how it went."""
        network = self._learner.network
        if not self._best:
            raise DataError(
                f"training diverged in its first epoch: on the held-back rows, {self._stop_on!r} "
                f"is not finite; set a smaller learning_rate, or look for extreme values in the "
                f"numeric columns"
            )
        network.load_state_dict(self._best)
        network.eval()
        return Outcome(
            best_epoch=self.stopping.best_epoch + 1,
            num_epochs=self.epoch,
            best_value=self.stopping.best,
            num_parameters=sum(p.numel() for p in network.parameters()),
        )

    def _update(self, batch: Any) -> None:
        rate = learning_rate(
            self.step, self._learner.num_batches * self._params.max_epochs, self._params
        )
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.zero_grad(set_to_none=True)
        if self._ranks.size > 1:
            self._stream.restart(self._ranks.rank, self.step)
        losses = self._learner.losses(batch)
        whole, total = self._over_ranks(losses)
        value = float((total if whole is losses else whole.total()).detach())
        if not math.isfinite(value):
            raise self._not_finite(value, total, batch)
        torch.autograd.backward(total)
        self._ranks.sum_gradients(self._learner.network)
        norm = nn.utils.clip_grad_norm_(self._learner.network.parameters(), self._params.clip_norm)
        if self._observer is not None:
            self._observer.gradients(float(norm))
        self._optimiser.step()
        self.step += 1
        if self._sums is None:
            self._sums = LossMeans(dict(losses.scales))
        self._sums.add(whole)

    def _over_ranks(self, losses: Losses) -> tuple[Losses, torch.Tensor]:
        """Return the losses of the global batch, and this rank's part of their total.

        The parts divide by the weights of the global batch, so they and their gradients add up.
        """
        if self._ranks.size == 1:
            return losses, losses.total()
        names = list(losses.sums)
        own = [losses.sums[name].detach() for name in names]
        own += [losses.weights[name] for name in names]
        summed = self._ranks.summed(torch.stack(own).double())
        sums, weights = summed[: len(names)], summed[len(names) :]
        whole = Losses(
            dict(zip(names, sums, strict=True)),
            dict(zip(names, weights, strict=True)),
            losses.scales,
        )
        shares = {name: whole.weights[name].to(losses.sums[name].dtype) for name in names}
        return whole, Losses(losses.sums, shares, losses.scales).total()

    def _not_finite(self, value: float, own: torch.Tensor, batch: Any) -> DataError:
        """Name the rows of the first rank whose part of the loss is not finite."""
        first_rows = [str(int(i)) for i in batch.row_id[:5]]
        found = self._ranks.gathered((math.isfinite(float(own.detach())), first_rows))
        first_rows = next((rows for is_finite, rows in found if not is_finite), first_rows)
        return DataError(
            f"the training loss is {value} in epoch {self.epoch + 1}, batch {self.used + 1}; first "
            f"row ids: {first_rows}. Look at these rows for extreme values, or set a smaller "
            f"learning_rate"
        )

    def _require_same_weights(self) -> None:
        if self._ranks.size > 1:
            self._ranks.require_same("the network", weights_digest(self._learner.network))

    def _validate(self) -> Validation:
        self._learner.network.eval()
        with torch.no_grad():
            found = self._learner.validate()
        if self._stop_on not in (names := found.names()):
            raise ConfigError(
                f"`stop_on` is {self._stop_on!r}, which is not validated"
                f"{nearest(self._stop_on, names) or f'; there are: {names}'}"
            )
        return found

    @property
    def _rate(self) -> float:
        """The learning rate that was used last."""
        return float(self._optimiser.param_groups[0]["lr"])

    def _log(self, found: Validation) -> None:
        values = {"inner_loss": found.losses.total(), "learning_rate": self._rate}
        values |= {f"inner_loss_{name}": value for name, value in found.losses.means().items()}
        values |= {f"inner_{name}": metric.value for name, metric in found.metrics.items()}
        if self._sums is not None:
            values["train_loss"] = self._sums.total()
            values |= {f"train_loss_{name}": value for name, value in self._sums.means().items()}
        self._recorder.metrics(
            {name: value for name, value in values.items() if math.isfinite(value)},
            step=self.epoch + 1,
        )

    def _tell(self, found: Validation, *, is_best: bool) -> None:
        if self._observer is not None:
            self._observer.epoch(
                Epoch(
                    number=self.epoch + 1,
                    train_losses={} if self._sums is None else self._sums.means(),
                    inner_losses=found.losses.means(),
                    metrics=found.metrics,
                    learning_rate=self._rate,
                    is_best=is_best,
                )
            )

    def _end_step(self) -> None:
        """Save if it is time, training is over or a signal came; obey the signal."""
        began = self._clock()
        if self._cadence.is_due(began) or self.is_over or self._signals.is_stop_asked:
            self._save()
            self._cadence.saved(began, self._clock())
        self._signals.release()

    def _save(self) -> None:
        if not self._ranks.is_first:
            return
        sums = self._sums
        self._checkpoints.save(
            {
                "network": self._learner.network.state_dict(),
                "optimiser": self._optimiser.state_dict(),
                "stream": self._stream.state(),
                "stopping": self.stopping.state(),
                "best": self._best,
                "epoch": self.epoch,
                "used": self.used,
                "step": self.step,
                "ranks": self._ranks.size,
                "observer": {} if self._observer is None else self._observer.state(),
                "sums": None
                if sums is None
                else {
                    "scales": dict(sums.scales),
                    "sums": dict(sums.sums),
                    "weights": dict(sums.weights),
                },
            }
        )


def _optimiser(network: nn.Module, params: TrainingParams) -> torch.optim.Optimizer:
    """AdamW; biases, norms and embeddings are not pulled to zero."""
    embedded = {
        id(weight)
        for module in network.modules()
        if isinstance(module, nn.Embedding)
        for weight in module.parameters()
    }
    decayed = [p for p in network.parameters() if p.ndim >= 2 and id(p) not in embedded]
    others = [p for p in network.parameters() if p.ndim < 2 or id(p) in embedded]
    groups = [
        {"params": decayed, "weight_decay": params.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=params.learning_rate)


def _in_words(found: Validation) -> str:
    """The validation for a progress line: ``loss 0.431, auc_late 0.692``."""
    figures = {"loss": found.losses.total()}
    figures |= {name: metric.value for name, metric in found.metrics.items()}
    return ", ".join(f"{name} {value:.5g}" for name, value in figures.items())


def _copy(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
